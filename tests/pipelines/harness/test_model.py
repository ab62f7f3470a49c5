"""δ-mem behind lm-evaluation-harness: the same numbers as the harness's own model class and as the model."""

import csv
import json
import random
import sys
from itertools import chain

import nltk
import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from tokenizers.processors import TemplateProcessing

from deltamem import DeltaMemConfig, encode_messages, get_delta_mem_model
from deltamem.errors import DeltaMemError
from pipelines.backbones.random_weights import byte_tokenizer
from pipelines.config.benchmarks import LmEvalSettings
from pipelines.errors import StageError
from pipelines.evaluation.records import RecordLog
from pipelines.harness import tasks as lm_eval_tasks
from pipelines.harness.loading import arguments
from pipelines.harness.model import DeltaMemLM, main
from pipelines.harness.tasks import ensure_sentence_model, run_lm_eval
from tests.paths import DATA

IFEVAL = DATA / "ifeval" / "input_data.jsonl"
PROMPTS = [
    {
        "key": 1,
        "prompt": "Say hello without a comma.",
        "instruction_id_list": ["punctuation:no_comma"],
        "kwargs": [{}],
    },
    {
        "key": 2,
        "prompt": "Write 400 sentences.",
        "instruction_id_list": ["length_constraints:number_sentences", "detectable_format:title"],
        "kwargs": [{"relation": "at least", "num_sentences": 400}, {}],
    },
]
GPQA = {
    "Record ID": "r1",
    "Question": "What is it?",
    "Correct Answer": "a quark",
    "Incorrect Answer 1": "a lepton",
    "Incorrect Answer 2": "a boson",
    "Incorrect Answer 3": "a hadron",
    "High-level domain": "Physics",
    "Subdomain": "Particles",
}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def base(tiny_model, tokenizer):
    return tiny_model("qwen3", tokenizer=tokenizer, max_position_embeddings=512)


@pytest.fixture
def delta(base):
    """A function from a strategy to a δ-mem model whose memory matters."""

    def make(strategy):
        torch.manual_seed(1)
        model = get_delta_mem_model(base, DeltaMemConfig(strategy=strategy, online_gain=3.0)).eval()
        return model

    return make


def requests(kind, *arguments):
    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


PAIRS = [
    ("The cat sat", " down"),
    ("", "No context"),
    ("A", "b"),
    ("Trailing space ", "x"),
    ("The cat sat", " up"),
]
UNTIL = {"until": ["b"], "max_gen_toks": 12, "do_sample": False}
QUESTIONS = [("Who was it, and when?", UNTIL), ("Hi", UNTIL), ("Where?", {"max_gen_toks": 5})]


def test_without_an_adapter_it_is_the_harnesss_own_model(base, tokenizer):
    ours = DeltaMemLM(base, tokenizer, batch_size=3)
    theirs = HFLM(pretrained=base, tokenizer=tokenizer, batch_size=1)
    pairs = requests("loglikelihood", *PAIRS)
    for (mine, greedy), (other, other_greedy) in zip(
        ours.loglikelihood(pairs), theirs.loglikelihood(pairs), strict=True
    ):
        assert mine == pytest.approx(other, abs=1e-3)
        assert greedy == other_greedy
    texts = requests("loglikelihood_rolling", ("short",), ("long " * 150,))  # the second needs two windows
    assert ours.loglikelihood_rolling(texts) == pytest.approx(theirs.loglikelihood_rolling(texts), abs=1e-2)
    asked = requests("generate_until", *[(text, dict(options)) for text, options in QUESTIONS])
    again = requests("generate_until", *[(text, dict(options)) for text, options in QUESTIONS])
    assert ours.generate_until(asked) == theirs.generate_until(again)


@pytest.mark.parametrize("strategy", ["tsw", "msw"])
def test_a_likelihood_is_that_of_one_pass_that_reads_and_writes(delta, tokenizer, strategy):
    model = delta(strategy)
    context, continuation = "The cat sat on the", " mat today"
    ((value, _),) = DeltaMemLM(model, tokenizer).loglikelihood(requests("loglikelihood", (context, continuation)))
    ids = torch.tensor([tokenizer.encode(context + continuation)])
    with torch.inference_mode():
        logits = model(ids).logits[0].log_softmax(-1)
        frozen = model.base_model(ids).logits[0].log_softmax(-1)
    start = len(tokenizer.encode(context))
    targets = ids[0, start:]
    expected = logits[start - 1 : -1].gather(1, targets[:, None]).sum().item()
    without = frozen[start - 1 : -1].gather(1, targets[:, None]).sum().item()
    assert value == pytest.approx(expected, abs=1e-3)
    assert abs(expected - without) > 0.01  # the memory takes part


@pytest.mark.parametrize("strategy", ["tsw", "ssw", "msw"])
def test_answers_do_not_depend_on_the_batch(delta, tokenizer, strategy):
    model = delta(strategy)
    alone, together = (DeltaMemLM(model, tokenizer, batch_size=size) for size in (1, 5))
    pairs = requests("loglikelihood", *PAIRS)
    for one, other in zip(alone.loglikelihood(pairs), together.loglikelihood(pairs), strict=True):
        assert one[0] == pytest.approx(other[0], abs=1e-3)
    asked = [requests("generate_until", *[(t, dict(o)) for t, o in QUESTIONS]) for _ in range(2)]
    assert alone.generate_until(asked[0]) == together.generate_until(asked[1])


@pytest.mark.parametrize("strategy", ["tsw", "ssw"])
def test_a_chat_is_generated_as_the_library_does(delta, tokenizer, strategy):
    model = delta(strategy)
    lm = DeltaMemLM(model, tokenizer)
    chat = [{"role": "user", "content": "Name a colour."}]
    text = lm.apply_chat_template(chat)
    (answer,) = lm.generate_until(requests("generate_until", (text, {"max_gen_toks": 8})))
    ids, segments = (torch.tensor([row]) for row in encode_messages(tokenizer, chat, True))
    out = model.generate(ids, segment_ids=segments, max_new_tokens=8, do_sample=False)
    assert answer == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


THINKING = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
CHAT = [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Red."}] * 2 + [
    {"role": "user", "content": "And another?"}
]


@pytest.mark.parametrize("template", [None, THINKING])
def test_a_chat_is_read_as_the_library_encodes_it(delta, template):
    """Thinking is off, and the memory is written message by message, whatever kind of request it is."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    model = delta("ssw")
    lm = DeltaMemLM(model, tokenizer)
    text = lm.apply_chat_template(CHAT)
    encoded = encode_messages(tokenizer, CHAT, True)
    assert lm.tok_encode(text) == encoded.input_ids

    def log_probabilities(body, segments, rest):
        """Of the tokens ``rest``, after a prompt that is written message by message."""
        with torch.inference_mode():
            read = model(torch.tensor([body[:-1]]), segment_ids=torch.tensor([segments[:-1]]), use_cache=True)
            ids = torch.tensor([[body[-1], *rest[:-1]]])
            after = {"memory": read.memory, "past_key_values": read.past_key_values}
            logits = model(ids, segment_ids=torch.zeros_like(ids), **after).logits[0]
        return logits.log_softmax(-1)

    (answer,) = lm.generate_until(requests("generate_until", (text, {"max_gen_toks": 1})))
    likeliest = log_probabilities(*encoded, [0]).argmax(-1)
    assert answer == tokenizer.decode(likeliest, skip_special_tokens=True)

    # the harness moves the white space at the prompt's end to the continuation
    ((value, _),) = lm.loglikelihood(requests("loglikelihood", (text, "Blue.")))
    space = len(text) - len(text.rstrip())
    rest = tokenizer.encode(text[-space:] + "Blue.")
    kept = (row[:-space] for row in encoded)
    expected = log_probabilities(*kept, rest).gather(1, torch.tensor(rest)[:, None]).sum().item()
    assert value == pytest.approx(expected, abs=1e-3)


def test_a_chat_has_no_beginning_of_text_but_its_templates(base, tokenizer):
    adding = byte_tokenizer()
    adding.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", adding.pad_token_id)]
    )
    lm, plain = DeltaMemLM(base, adding), DeltaMemLM(base, tokenizer)
    for one in (lm, plain):
        text = one.apply_chat_template(CHAT)
    assert lm._encode_pair(text, "Blue.") == plain._encode_pair(text, "Blue.")
    assert lm._encode_pair("Name:", " Blue.") != plain._encode_pair("Name:", " Blue.")


def test_a_template_that_changes_messages_is_no_trouble_where_they_need_not_be_told_apart(delta):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("['content']", "['content'] | upper")
    asked = {"max_gen_toks": 2}
    for strategy in ("tsw", "ssw"):
        lm = DeltaMemLM(delta(strategy), tokenizer)
        text = lm.apply_chat_template(CHAT)
        if strategy == "tsw":
            assert len(lm.generate_until(requests("generate_until", (text, asked)))) == 1
        else:
            with pytest.raises(DeltaMemError, match="the chat template changed the text of message 0"):
                lm.generate_until(requests("generate_until", (text, asked)))


def test_an_answer_that_is_begun_goes_on_within_its_message(delta, tokenizer):
    lm = DeltaMemLM(delta("ssw"), tokenizer)
    begun = [*CHAT, {"role": "assistant", "content": "It is"}]
    text = lm.apply_chat_template(begun, add_generation_prompt=False)
    prompt = lm._prompt(text, lm.tok_encode(text), 1)
    assert tokenizer.decode(prompt.input_ids) == text and text.endswith("It is")
    assert (prompt.segment_ids[-1], max(prompt.segment_ids)) == (5, 5)


def test_only_the_beginning_of_a_prompt_is_left_out_of_the_window(delta, tokenizer):
    lm = DeltaMemLM(delta("tsw"), tokenizer)
    long, options = "x" * 600 + "Where is the cat?", {"max_gen_toks": 20}
    whole, cut = lm.generate_until(requests("generate_until", (long, options), (long[-492:], options)))
    assert whole == cut
    assert lm.shortened == {long}
    with pytest.raises(DeltaMemError, match="no room"):
        lm.generate_until(requests("generate_until", ("x", {"max_gen_toks": 512})))


def test_sampling_is_refused_with_what_to_do(base, tokenizer):
    asked = requests("generate_until", ("x", {"do_sample": True, "temperature": 0.7}))
    with pytest.raises(DeltaMemError, match="do_sample=False"):
        DeltaMemLM(base, tokenizer).generate_until(asked)


def test_the_likelihood_of_a_text_falls_with_its_length(delta, tokenizer):
    lm = DeltaMemLM(delta("tsw"), tokenizer, batch_size=4)
    texts = [("a",), ("ab",), ("ab é",), ("ab é.",)]
    values = lm.loglikelihood_rolling(requests("loglikelihood_rolling", *texts))
    assert values == sorted(values, reverse=True)
    assert values[0] < 0


def test_what_was_answered_is_not_asked_again(delta, tokenizer, tmp_path, monkeypatch):
    model, key = delta("tsw"), {"model": "tiny"}
    asked = [(text, dict(options)) for text, options in QUESTIONS]
    log = RecordLog(tmp_path / "log.jsonl", key)
    lm = DeltaMemLM(model, tokenizer, log=log)
    first = lm.generate_until(requests("generate_until", *asked[:2]))
    scored = lm.loglikelihood(requests("loglikelihood", PAIRS[0]))
    assert sum(cost["tokens"] for cost in log.costs) == lm.reader.tokens > 0
    log.close()

    resumed = DeltaMemLM(model, tokenizer, log=RecordLog(tmp_path / "log.jsonl", key))
    generated = []
    monkeypatch.setattr(resumed.reader, "generate", lambda rows, last, *_, **__: generated.append(len(last)) or [[]])
    answers = resumed.generate_until(requests("generate_until", *asked))
    assert answers[:2] == first
    assert generated == [1]
    assert resumed.loglikelihood(requests("loglikelihood", PAIRS[0])) == scored


# --- tasks ----------------------------------------------------------------------------------------------


def entry(**changes):
    return LmEvalSettings(**{"kind": "lm_eval", "version": 1, "task": "ifeval", **changes})


STRICT = ["prompt_level_strict_acc", "prompt_level_loose_acc"]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "input_data.jsonl"
    path.write_text("\n".join(json.dumps(prompt) for prompt in PROMPTS))
    return str(path)


def test_ifeval_from_its_authors_file(delta, tokenizer, prompts):
    task = entry(data_file=prompts, metrics=STRICT, max_new_tokens=6)
    model = delta("tsw")
    records, harness = run_lm_eval(model, tokenizer, task, batch_size=2)
    assert [record["question_id"] for record in records] == ["ifeval/0", "ifeval/1"]
    assert {record["condition"] for record in records} == {"full"}
    assert records[0]["prompt_level_strict_acc"] == float("," not in records[0]["prediction"])
    assert records[1]["prompt_level_strict_acc"] == 0  # six tokens aren't 400 sentences
    for metric in STRICT:
        mean = sum(record[metric] for record in records) / 2
        assert harness["results"][f"{metric},none"] == pytest.approx(mean)
    assert harness["results"].keys() >= {"inst_level_strict_acc,none"}
    limited, _ = run_lm_eval(model, tokenizer, task.model_copy(update={"max_questions": 1}), batch_size=2)
    assert limited == records[:1]


@pytest.mark.skipif(not IFEVAL.exists(), reason="IFEval's own file is not at hand")
def test_ifevals_real_file_is_read(base, tokenizer):
    task, _ = lm_eval_tasks._load_task(entry(data_file=str(IFEVAL), metrics=STRICT))
    assert len(task.eval_docs) == 541


def gpqa(folder, **changes):
    path = folder / "gpqa_diamond.csv"
    rows = [GPQA | {"Record ID": f"r{n}", "Question": f"What is it, {n}?"} for n in range(3)]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, GPQA)
        writer.writeheader()
        writer.writerows(rows)
    return entry(data_file=str(path), **{"task": "gpqa_diamond_cot_zeroshot", **changes})


def test_gpqa_by_reasoning_and_by_likelihood(delta, tokenizer, tmp_path):
    model = delta("msw")
    metrics = ["exact_match,flexible-extract", "exact_match,strict-match"]
    records, harness = run_lm_eval(model, tokenizer, gpqa(tmp_path, metrics=metrics, max_new_tokens=5), batch_size=3)
    assert len(records) == 3
    assert all(set(metrics) < set(record) and record["references"][0] in "(A)(B)(C)(D)" for record in records)
    random.seed(5)  # whatever the random state is, the options are shuffled the same way
    again, _ = run_lm_eval(model, tokenizer, gpqa(tmp_path, metrics=metrics, max_new_tokens=5), batch_size=1)
    assert again == records
    choices, harness = run_lm_eval(
        model, tokenizer, gpqa(tmp_path, task="gpqa_diamond_zeroshot", metrics=["acc"]), batch_size=4
    )
    right = [f"({'ABCD'[int(record['prediction'])]})" == record["references"][0] for record in choices]
    assert [record["acc"] for record in choices] == [float(value) for value in right]
    assert harness["results"]["acc,none"] == pytest.approx(sum(right) / 3)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data_file": "none.jsonl"}, "there is no such file"),
        ({"data_file": "data.txt"}, "must end with one of .json, .jsonl, .csv"),
        ({"metrics": ["accuracy"]}, "no question has the score 'accuracy'.*prompt_level_strict_acc,none"),
    ],
)
def test_an_entry_that_can_not_be_run_says_why(base, tokenizer, prompts, changes, message):
    task = entry(**{"data_file": prompts, "metrics": STRICT, "max_new_tokens": 1, **changes})
    with pytest.raises(StageError, match=message):
        run_lm_eval(base, tokenizer, task, batch_size=2)


def test_without_the_hub_it_says_what_to_do(base, tokenizer, monkeypatch):
    import datasets

    def fail(*arguments, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(StageError, match="no route.*'data_file'"):
        run_lm_eval(base, tokenizer, entry(metrics=STRICT), batch_size=2)


def test_sentences_are_counted_without_a_download(tmp_path, monkeypatch):
    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setattr(lm_eval_tasks.tempfile, "gettempdir", lambda: str(tmp_path))
    ensure_sentence_model()
    text = "Dr. Smith paid $3.50 to J. Doe. He left! Did he?"
    assert nltk.sent_tokenize(text) == ["Dr. Smith paid $3.50 to J. Doe.", "He left!", "Did he?"]
    ensure_sentence_model()
    assert len(nltk.data.path) == 1


# --- the command line -----------------------------------------------------------------------------------


def test_the_harness_knows_the_model_by_name():
    assert get_model("deltamem") is DeltaMemLM


@pytest.mark.parametrize(
    ("model_args", "size", "message"),
    [
        ("adapter=somewhere", 1, "name the backbone, base="),
        ("base=x,peft=y", 1, "unknown key 'peft'; known: base, adapter"),
        ("pretrained=no-such-folder", 1, "the backbone no-such-folder can't be loaded on cpu"),
        ("base=x", "auto", "--batch_size auto: give the number of requests"),
        ("base=x", "0", "--batch_size 0: give the number of requests"),
    ],
)
def test_a_command_that_can_not_be_run_says_why(model_args, size, message):
    with pytest.raises(DeltaMemError, match=message):
        DeltaMemLM.create_from_arg_string(model_args, {"batch_size": size, "device": "cpu", "max_batch_size": None})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_cpu_is_used_unless_another_was_asked_for(capsys):
    assert arguments({"base": "x"}, "cuda:0") == {"base": "x", "device": None}
    assert "evaluating on the CPU" in capsys.readouterr().err
    assert arguments({"base": "x"}, "cuda:1")["device"] == "cuda:1"
    assert arguments({"pretrained": "x", "device": "meta"}, "cpu") == {"base": "x", "device": "meta"}


@pytest.mark.slow
def test_the_command_line(delta, base, tokenizer, tmp_path, monkeypatch):
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    delta("tsw").save_pretrained(tmp_path / "adapter")
    (tmp_path / "docs.jsonl").write_text('{"question": "Sky?", "choices": ["blue", "red"], "gold": 0}\n' * 2)
    task = {
        "task": "sky",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "docs.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "sky.yaml").write_text(yaml.safe_dump(task))
    options = {
        "--model": "deltamem",
        "--model_args": f"base={tmp_path}/base,adapter={tmp_path}/adapter",
        "--tasks": str(tmp_path / "sky.yaml"),
        "--batch_size": "2",
        "--output_path": str(tmp_path / "out"),
    }
    command = ["deltamem-lm-eval", *chain.from_iterable(options.items())]
    monkeypatch.setattr(sys, "argv", [*command, "--batch_size", "auto"])
    with pytest.raises(SystemExit, match="error: --batch_size auto"):
        main()
    monkeypatch.setattr(sys, "argv", command)
    main()
    (written,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(written.read_text())["results"]["sky"]["acc,none"] in (0.0, 1.0)
