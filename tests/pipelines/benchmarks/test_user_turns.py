"""What people say, out of files of every form, and nothing of what was replied or labelled."""

import json

import pytest

from pipelines.benchmarks.user_turns import user_turns
from pipelines.config.data import AskedFile
from pipelines.errors import StageError

CHAT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " Any news? "},
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": "And now\ud83d?"},
    ]
}
CLINC150 = {name: [] for name in ("oos_train", "val", "oos_val")} | {"train": [["set an alarm", "alarm"]]}
CLINC150 |= {"oos_train": [["what is love", "oos"]], "val": [["never asked", "alarm"]]}
TWEETS = [
    {"Question": question, "Answer": ["x"], "Tweet": "Rain again, #fun", "qid": question}
    for question in ("Who?", "Why?")
]
FILES = {
    "chat": ("chats.jsonl", json.dumps(CHAT) + "\n" + json.dumps({"prompt": "Hello", "response": "Hi"})),
    "lines": ("asked.txt", "Write a poem about rain.\n\n  Why is it wet? \n"),
    "banking77": ("train.csv", 'text,category\n"Where is it, my card?",card_arrival\n'),
    "clinc150": ("data_full.json", json.dumps(CLINC150)),
    "trec": ("train.label", "NUM:dist How far is it to Aspen ?\nHUM:desc Who was Galileo ?\n"),
    "tweetqa": ("train.json", json.dumps(TWEETS)),
}
SAID = {
    "chat": ["Any news?", "And now\ufffd?", "Hello"],
    "lines": ["Write a poem about rain.", "Why is it wet?"],
    "banking77": ["Where is it, my card?"],
    "clinc150": ["set an alarm", "what is love"],
    "trec": ["How far is it to Aspen ?", "Who was Galileo ?"],
    "tweetqa": ["Rain again, #fun"],
}


@pytest.mark.parametrize("form", FILES)
def test_what_is_said_comes_in_the_order_of_the_file(form, tmp_path):
    name, content = FILES[form]
    (tmp_path / name).write_text(content)
    bad = []
    assert list(user_turns(AskedFile(file=str(tmp_path / name), form=form), bad)) == SAID[form] and not bad


def test_a_record_that_is_no_chat_is_noted_and_a_file_of_another_form_refused(tmp_path):
    file = tmp_path / "chats.jsonl"
    file.write_text('{"text": "Hello"}\n' + FILES["chat"][1])
    bad = []
    assert list(user_turns(AskedFile(file=str(file)), bad)) == SAID["chat"]
    assert [(lost.paper_id, lost.lost) for lost in bad] == [("chats.jsonl:1", "chat")]
    with pytest.raises(StageError, match="not banking77's CSV"):
        list(user_turns(AskedFile(file=str(file), form="banking77"), bad))
