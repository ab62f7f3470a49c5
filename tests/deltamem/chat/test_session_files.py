"""Saved sessions: bit-exact, atomic, incremental, refused where they don't belong."""

import contextlib
import json
import os
from dataclasses import replace

import pytest
import torch

from deltamem import ChatSession, DeltaMemory
from deltamem.chat import identity, session_files
from deltamem.chat.turn import Turn, TurnOptions
from deltamem.decoding.key_values import KeyValues
from deltamem.errors import ChatExistsError, SnapshotError
from tests.full_disk import full_disk
from tests.tiny_models import make_chat_model

SHORT = {"max_new_tokens": 8}


def next_logits(session):
    turn = Turn(session.runtime, session.state, [{"role": "user", "content": "and now?"}], TurnOptions())
    with torch.no_grad():
        return turn.prefill()


@pytest.fixture
def models():
    return make_chat_model()


@pytest.mark.parametrize("strategy", ["tsw", "ssw", "msw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_restored_logits_are_the_same_to_the_bit(strategy, dtype, tmp_path):
    model, tokenizer = make_chat_model(strategy)
    model.base_model.to(dtype)
    chat = ChatSession(model, tokenizer, system="S", window=400, write=True)
    for text in ("one", "two ünïcode 🙂", "three"):
        chat.send(text, **SHORT)
    chat.write = False
    chat.save(tmp_path / "chat")
    restored = ChatSession.load(model, tokenizer, tmp_path / "chat")
    assert torch.equal(next_logits(chat), next_logits(restored))
    assert restored.messages == chat.messages and restored.state.tokens == chat.state.tokens
    assert (restored.write, restored.system, restored.runtime.window) == (False, "S", 400)
    assert restored.send("more", **SHORT) == chat.send("more", **SHORT)


def test_a_folder_holds_safetensors_and_json_and_no_pickle(models, tmp_path):
    chat = ChatSession(*models)
    chat.send("one", **SHORT)
    chat.save(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    memory = DeltaMemory.load(session_files.memory_file(tmp_path))
    assert all(torch.equal(memory.states[i], chat.memory.states[i]) for i in memory.states)


def test_an_empty_session_can_be_saved(models, tmp_path):
    ChatSession(*models).save(tmp_path)
    restored = ChatSession.load(*models, tmp_path)
    assert restored.messages == [] and restored.state.keys.length == 0
    restored.send("one", **SHORT)


def test_a_session_saved_without_its_cache_goes_on_from_its_tokens_read_anew_and_not_written_again(models, tmp_path):
    """As an engine leaves it that keeps caches itself."""
    model, tokenizer = models
    chat = ChatSession(model, tokenizer)
    chat.send("one", **SHORT)
    chat.state = replace(chat.state, keys=KeyValues(), parts=())
    session_files.save(chat.runtime, chat.state, tmp_path, {"session_id": "somebody's"})
    assert not key_files(tmp_path)
    restored = ChatSession.load(model, tokenizer, tmp_path)
    before, reply = restored.state, restored.send("two", **SHORT)
    assert reply.cached_tokens == 0 and restored.state.keys.length == len(restored.state.tokens)
    assert restored.state.tokens[: len(before.tokens)] == before.tokens
    with torch.no_grad():
        read = model(torch.tensor([before.tokens]), memory=before.memory, write=False, use_cache=True)
        new = torch.tensor([restored.state.tokens[len(before.tokens) :]])
        after = model(new, memory=before.memory, past_key_values=read.past_key_values)
    torch.testing.assert_close(dict(restored.memory.states), dict(after.memory.states), rtol=1e-4, atol=1e-5)


def key_files(folder):
    return {path.name: path.stat().st_size for path in folder.glob("keys-*")}


def test_saving_again_writes_only_what_is_new(models, tmp_path):
    chat = ChatSession(*models)
    chat.send("a long message " * 20, **SHORT)
    chat.save(tmp_path)
    first = key_files(tmp_path)
    chat.send("short", **SHORT)
    chat.save(tmp_path)
    second = key_files(tmp_path)
    assert first.items() < second.items() and len(second) == 2
    assert len(list(tmp_path.glob("memory-*"))) == 1
    assert torch.equal(next_logits(ChatSession.load(*models, tmp_path)), next_logits(chat))


def test_undone_turns_and_a_moved_window_are_saved_right(models, tmp_path):
    chat = ChatSession(*models, window=300)
    for number in range(12):
        chat.send(f"message {number}", **SHORT)
        chat.save(tmp_path)
        if number % 4 == 3:
            chat.undo()
            chat.save(tmp_path)
        restored = ChatSession.load(*models, tmp_path)
        assert restored.messages == chat.messages and restored.forgotten == chat.forgotten
        assert torch.equal(next_logits(restored), next_logits(chat))
    assert chat.forgotten > 0


def test_many_saves_do_not_leave_many_files(models, tmp_path, monkeypatch):
    monkeypatch.setattr(session_files, "_MOST_PARTS", 3)
    chat = ChatSession(*models)
    for number in range(7):
        chat.send(str(number), max_new_tokens=2)
        chat.save(tmp_path)
        assert len(key_files(tmp_path)) <= 3
    assert torch.equal(next_logits(ChatSession.load(*models, tmp_path)), next_logits(chat))


def test_forks_may_share_a_folder_or_part_ways(models, tmp_path):
    chat = ChatSession(*models)
    chat.send("one", **SHORT)
    chat.save(tmp_path / "a")
    twin = chat.fork()
    twin.send("two", **SHORT)
    twin.save(tmp_path / "b")
    chat.reset()
    chat.save(tmp_path / "a")  # removes the files that the twin's state knows
    twin.save(tmp_path / "a")
    for name in "ab":
        restored = ChatSession.load(*models, tmp_path / name)
        assert torch.equal(next_logits(restored), next_logits(twin))


@pytest.mark.parametrize("what", ["adapter", "backbone"])
def test_another_adapter_or_backbone_is_refused_with_the_reason(what, models, tmp_path):
    chat = ChatSession(*models)
    chat.send("one", **SHORT)
    chat.save(tmp_path)
    other, tokenizer = make_chat_model()
    ChatSession.load(other, tokenizer, tmp_path)  # equal weights are the same model
    with torch.no_grad():
        next(iter(other.memory_layers.values())).beta_bias[0] += 1e-3 if what == "adapter" else 0
        other.base_model.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3 if what == "backbone" else 0
    with pytest.raises(SnapshotError, match=f"saved with another {what}"):
        ChatSession.load(other, tokenizer, tmp_path)


def test_a_position_encoding_changed_in_place_is_another_backbone(models, tmp_path):
    chat = ChatSession(*models)
    chat.save(tmp_path)
    models[0].base_model.config.rope_parameters["rope_theta"] *= 2
    with pytest.raises(SnapshotError, match="saved with another backbone"):
        ChatSession.load(*models, tmp_path)


def test_the_backbone_is_digested_once_however_many_chats_are_restored(models, tmp_path, monkeypatch):
    chat = ChatSession(*models)
    chat.send("one", **SHORT)
    chat.save(tmp_path)
    digested, hash_tensors = [], identity._hash
    monkeypatch.setattr(identity, "_hash", lambda tensors: digested.append(tensors) or hash_tensors(tensors))
    for _ in range(3):
        ChatSession.load(*models, tmp_path)
    assert all(len(tensors) < len(list(models[0].base_model.parameters())) for tensors in digested)
    with torch.no_grad():
        models[0].base_model.model.layers[0].mlp.up_proj.weight.mul_(1)
    ChatSession.load(*models, tmp_path)  # written to, if to the same end: looked at again
    assert len(digested[-1]) == len(list(models[0].base_model.parameters()))


def damage_manifest(folder, **changes):
    manifest = json.loads((folder / "session.json").read_text())
    (folder / "session.json").write_text(json.dumps({**manifest, **changes}))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: (f / "session.json").unlink(), "holds no saved session"),
        (lambda f: (f / "session.json").write_text("{"), "can't be read"),
        (lambda f: (f / "session.json").write_bytes(b"\xff\xfe"), "can't be read"),
        (lambda f: (f / "session.json").write_text("[]"), "not a saved session"),
        (lambda f: damage_manifest(f, format_version=9), "format_version 9"),
        (
            lambda f: damage_manifest(f, memory={"file": "../x", "sha256": ""}),
            "names a file that no save writes",
        ),
        (lambda f: damage_manifest(f, tokens=[1]), "1 named"),
        (lambda f: next(f.glob("keys-*")).unlink(), "missing or damaged"),
        (lambda f: os.truncate(next(f.glob("memory-*")), 100), "missing or damaged"),
        (lambda f: flip_a_bit(next(f.glob("keys-*"))), "missing or damaged"),
    ],
)
def test_damage_is_found_and_named(damage, message, models, tmp_path):
    chat = ChatSession(*models)
    chat.send("one", **SHORT)
    chat.save(tmp_path)
    damage(tmp_path)
    with pytest.raises(SnapshotError, match=message):
        ChatSession.load(*models, tmp_path)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


class Crash(BaseException):
    pass


def test_a_save_that_breaks_off_leaves_the_old_session_or_the_new_one(models, tmp_path, monkeypatch):
    chat = ChatSession(*models)
    chat.send("one", **SHORT)
    chat.save(tmp_path)
    sync = session_files._sync
    # at the cache file's sync, at the memory's, at the folder's (after session.json was replaced), at none
    for steps, messages in ((0, 2), (1, 2), (2, 4), (9, 6)):
        left = iter(range(steps))

        def sync_or_die(path, left=left):
            if next(left, None) is None:
                raise Crash
            sync(path)

        monkeypatch.setattr(session_files, "_sync", sync_or_die)
        chat = ChatSession.load(*models, tmp_path)
        chat.send("two", **SHORT)
        with contextlib.suppress(Crash):
            chat.save(tmp_path)
        restored = ChatSession.load(*models, tmp_path)
        assert len(restored.messages) == messages
        same = chat if messages != 2 else restored
        assert torch.equal(next_logits(restored), next_logits(same))
    assert len(list(tmp_path.glob("memory-*"))) == 1, "leftovers are removed by the next save"


def test_a_full_disk_is_an_error_of_the_file_and_leaves_what_was_saved(models, tmp_path):
    chat = ChatSession(*models)
    chat.send("one", **SHORT)
    chat.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    chat.send("two", **SHORT)
    with full_disk(), pytest.raises(OSError, match="too large") as caught:
        chat.save(tmp_path)
    assert caught.value.filename.startswith(str(tmp_path))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    chat.save(tmp_path)
    assert ChatSession.load(*models, tmp_path).messages == chat.messages


@pytest.mark.parametrize("largest, clear, file", [(500, False, "keys"), (500, True, "memory"), (3000, True, "session")])
def test_wherever_the_disk_gets_full_nothing_is_left_behind(models, tmp_path, largest, clear, file):
    chat = ChatSession(*models)
    chat.send("a long message, " * 200, **SHORT)
    if clear:  # there are no keys to be written then
        chat.clear_prompt()
    with full_disk(largest), pytest.raises(OSError, match=f"{tmp_path}/{file}"):
        chat.save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_memory_that_can_not_be_written_is_an_error_of_its_file(models, tmp_path):
    with pytest.raises(FileNotFoundError, match="none"):
        models[0].new_memory(1).save(tmp_path / "none" / "memory.safetensors")


def test_another_chat_is_spared_where_it_is_not_to_be_overwritten(models, tmp_path):
    chat = ChatSession(*models)
    chat.send("one", **SHORT)
    chat.save(tmp_path)
    chat.send("two", **SHORT)
    chat.save(tmp_path)
    chat.undo()
    chat.save(tmp_path, overwrite=False)  # an earlier moment of the same chat
    chat.reset()
    with pytest.raises(ChatExistsError, match="holds another chat"):
        chat.save(tmp_path, overwrite=False)
    chat.send("else", **SHORT)
    with pytest.raises(ChatExistsError, match="name another folder"):
        chat.save(tmp_path, overwrite=False)
    assert ChatSession.load(*models, tmp_path).messages[0]["content"] == "one"
    chat.save(tmp_path)
    assert ChatSession.load(*models, tmp_path).messages[0]["content"] == "else"


def test_a_file_of_somebody_else_is_not_overwritten(models, tmp_path):
    (tmp_path / "session.json").write_text("{}")
    with pytest.raises(ChatExistsError):
        ChatSession(*models).save(tmp_path, overwrite=False)
    assert (tmp_path / "session.json").read_text() == "{}"
