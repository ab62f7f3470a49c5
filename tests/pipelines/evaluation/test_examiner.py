"""The engine against one question asked by itself, written out with the library's own calls."""

import pytest
import torch
from rich.console import Console

from deltamem import DeltaMemConfig, DeltaMemory, get_delta_mem_model
from deltamem.chat.format import encode_messages
from pipelines.backbones.random_weights import byte_tokenizer
from pipelines.benchmarks.base import Context, Question, prompt_messages
from pipelines.errors import StageError
from pipelines.evaluation.examiner import Examiner
from pipelines.evaluation.passes import Reader, Rows
from pipelines.evaluation.prompts import PromptEncoder
from pipelines.evaluation.records import RecordLog
from pipelines.evaluation.sampling import RELEASE
from pipelines.evaluation.swap import swap_partners, unrelated, unrelated_corpus
from tests.full_disk import full_disk

CONDITIONS = ["none", "state", "swapped", "full"]
# Room for the keys and values of all questions' histories; for two questions, so that a history is shared by its own.
COPIED, SHARED = 2**20, 2**16
WORDS = "amber basin cedar delta ember fjord grove haven inlet jetty knoll lagoon".split()


def user(text):
    return {"role": "user", "content": text}


def context(number, facts, questions, system=False):
    history = []
    for fact in range(facts):
        history.append(user(f"The {WORDS[(number + fact) % 12]} number {number} is {fact * 7}."))
        if fact % 2:
            history.append({"role": "assistant", "content": "Noted."})
    asked = []
    for place in range(questions):
        messages = [user(f"What is {' '.join(WORDS[place : place + 1 + place % 4])}?")]
        if system:
            messages.insert(0, {"role": "system", "content": "Answer briefly."})
        answer = WORDS[(number * 3 + place) % 12][: 2 + place]
        asked.append(Question(f"q{number}.{place}", f"d{number}", messages, [answer]))
    return Context(f"c{number}", history, asked)


CONTEXTS = [context(0, 5, 4), context(1, 2, 1, system=True), context(2, 6, 3), context(3, 2, 2)]


class Letters:
    """A benchmark whose metric is the share of letters in the answer."""

    name, version, max_new_tokens, stop, metrics = "letters", "1", 6, (), ("letters",)

    def __init__(self, contexts=CONTEXTS, drop_first="oldest", writes_questions=False):
        self.held, self.drop_first, self.writes_questions = contexts, drop_first, writes_questions

    def contexts(self):
        return iter(self.held)

    def score(self, question, prediction):
        return {"letters": sum(map(str.isalpha, prediction)) / 6}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def make_model(tiny_model, tokenizer):
    """An adapter that changes the answers: large steering columns, gates wide open."""

    def make(strategy="tsw", **options):
        base = tiny_model("qwen3", tokenizer=tokenizer)
        torch.manual_seed(1)
        config = DeltaMemConfig(strategy=strategy, output_init="random", online_gain=2.0, **options)
        return get_delta_mem_model(base, config).requires_grad_(False).eval()

    return make


@pytest.fixture
def evaluate(tokenizer, tmp_path):
    """Runs the engine; the records by condition and question."""

    def run(
        model,
        contexts=CONTEXTS,
        conditions=CONDITIONS,
        batch_size=3,
        window=4096,
        drop_first="oldest",
        writes_questions=False,
        **options,
    ):
        benchmark = Letters(contexts, drop_first, writes_questions)
        segment = model.config.segment_rule if hasattr(model, "memory_layers") else "message"
        encoder = PromptEncoder(tokenizer, segment, window)
        reader = options.pop("reader", None) or Reader(model, [tokenizer.eos_token_id], tokenizer.pad_token_id)
        log = RecordLog(options.pop("path", tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"), {"key": 1})
        limit, room = options.pop("max_new_tokens", None), options.pop("cache_bytes", COPIED)
        quiet, drawn = Console(quiet=True), options.pop("sampling", None)
        examiner = Examiner(benchmark, contexts, reader, encoder, log, batch_size, limit, room, quiet, drawn)
        examiner.run(conditions)
        log.close()
        return {(r["condition"], r["question_id"]): r for r in log.records}

    return run


class Alone:
    """One question, one row, no padding, nothing shared."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer

    def encode(self, messages, prompt=True):
        found = encode_messages(
            self.tokenizer, messages, add_generation_prompt=prompt, segment=self.model.config.segment
        )
        return torch.tensor([found.input_ids]), torch.tensor([found.segment_ids])

    def written(self, history):
        ids, segments = self.encode(history, prompt=False)
        return self.model.write(ids, segment_ids=segments)

    def answer_ids(self, question):
        return torch.tensor([[*self.tokenizer(question.references[0]).input_ids, self.tokenizer.eos_token_id]])

    def ask(self, ids, segments, question, memory, write):
        """One joint pass over prompt and answer, and a plain generate."""
        answer = self.answer_ids(question)
        joint, size = torch.cat([ids, answer], 1), answer.shape[1]
        with torch.no_grad():
            out = self.model(joint, memory=memory, write=write, segment_ids=torch.zeros_like(joint))
            nll = torch.nn.functional.cross_entropy(out.logits[0, -size - 1 : -1], answer[0]).item()
            made = self.model.generate(
                ids,
                memory=memory,
                write=write,
                segment_ids=segments,
                max_new_tokens=6,
                do_sample=False,
                eos_token_id=self.tokenizer.eos_token_id,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        return nll, self.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip()


def by_id(contexts=CONTEXTS):
    return {c.context_id: c for c in contexts}


def assert_same(record, expected):
    nll, prediction = expected
    assert record["nll"] == pytest.approx(nll, abs=1e-4)
    assert record["prediction"] == prediction


@pytest.mark.parametrize("strategy", ["tsw", "ssw", "msw"])
def test_question_alone_with_every_memory(strategy, make_model, tokenizer, evaluate):
    model = make_model(strategy)
    conditions = ["none", "state", "swapped", "permuted"]
    records, alone = evaluate(model, conditions=conditions), Alone(model, tokenizer)
    partners = swap_partners(CONTEXTS)
    for c in CONTEXTS:
        right = alone.written(c.history)
        first, second, third = right.states.values()
        memories = {
            "none": None,
            "state": right,
            "permuted": DeltaMemory(dict(zip(right.states, (third, first, second), strict=True))),
            "swapped": alone.written(by_id()[partners[c.context_id]].history),
        }
        for question in c.questions:
            ids, segments = alone.encode(question.messages)
            for condition, memory in memories.items():
                expected = alone.ask(ids, segments, question, memory, write=False)
                assert_same(records[condition, question.question_id], expected)
    nlls = {condition: [r["nll"] for (c, _), r in records.items() if c == condition] for condition in memories}
    assert nlls["none"] != nlls["state"] != nlls["swapped"] != nlls["permuted"] != nlls["state"], (
        "the memory must matter for this test to tell anything"
    )


def test_one_layer_finds_another_history_s_state(make_model, tokenizer, evaluate):
    model = make_model()
    records, alone = evaluate(model, conditions=["swapped_layer_1"]), Alone(model, tokenizer)
    partners = swap_partners(CONTEXTS)
    for c in CONTEXTS:
        right, wrong = alone.written(c.history), alone.written(by_id()[partners[c.context_id]].history)
        memory = DeltaMemory({**right.states, 1: wrong.states[1]})
        for question in c.questions:
            expected = alone.ask(*alone.encode(question.messages), question, memory, write=False)
            assert_same(records["swapped_layer_1", question.question_id], expected)
            assert expected[0] != pytest.approx(
                alone.ask(*alone.encode(question.messages), question, right, write=False)[0], abs=1e-5
            )


@pytest.mark.parametrize("strategy", ["tsw", "msw"])
def test_a_chat_s_question_is_written_as_it_is_read(strategy, make_model, tokenizer, evaluate):
    model = make_model(strategy)
    conditions = ["none", "state", "strength_0"]
    records, alone = evaluate(model, conditions=conditions, writes_questions=True), Alone(model, tokenizer)
    for c in CONTEXTS:
        for question in c.questions:
            encoded = alone.encode(question.messages)
            for condition, memory in (("none", None), ("state", alone.written(c.history))):
                expected = alone.ask(*encoded, question, memory, write=True)
                assert_same(records[condition, question.question_id], expected)
            none, off = (records[name, question.question_id]["nll"] for name in ("none", "strength_0"))
            assert off == pytest.approx(alone.ask(*encoded, question, None, write=False)[0], abs=1e-4)
            assert none != pytest.approx(off, abs=1e-4)


def test_an_unrelated_memory_is_written_from_as_much_text_that_has_nothing_to_do_with_the_questions(
    make_model, tokenizer, evaluate
):
    model = make_model()
    records, alone = evaluate(model, conditions=["none", "unrelated", "state"]), Alone(model, tokenizer)
    histories = [unrelated(c).history for c in CONTEXTS]
    for c, history in zip(CONTEXTS, histories, strict=True):
        assert [(m["role"], len(m["content"])) for m in history] == [(m["role"], len(m["content"])) for m in c.history]
        assert unrelated(c).history == history
        for question in c.questions:
            expected = alone.ask(*alone.encode(question.messages), question, alone.written(history), write=False)
            assert_same(records["unrelated", question.question_id], expected)
            assert records["unrelated", question.question_id]["nll"] != records["state", question.question_id]["nll"]
    texts = ["".join(m["content"] for m in history) for history in histories]
    assert len(set(texts)) == len(texts) and all(len(text.split()) > 3 for text in texts)


def test_a_system_message_stays_and_a_long_history_goes_round_the_corpus():
    corpus = unrelated_corpus()
    written = [{"role": "system", "content": "Remember."}, user("x" * (len(corpus) + 100)), user("y" * 50)]
    system, long, short = unrelated(Context("c", [], [], written)).history
    assert system == written[0] and len(long["content"]) == len(corpus) + 100
    assert long["content"][:150] == (long["content"] + short["content"])[len(corpus) : len(corpus) + 150]


def test_drawn_answers_are_the_same_however_they_are_batched(make_model, evaluate):
    model = make_model()
    alone, together = (evaluate(model, conditions=["state"], batch_size=size, sampling=RELEASE) for size in (1, 8))
    greedy = evaluate(model, conditions=["state"])
    assert {key: r["prediction"] for key, r in alone.items()} == {key: r["prediction"] for key, r in together.items()}
    assert [r["prediction"] for r in alone.values()] != [r["prediction"] for r in greedy.values()]
    assert [r["nll"] for r in alone.values()] == pytest.approx([r["nll"] for r in greedy.values()], abs=1e-4)


def test_strengths_turn_the_memory_off_and_up(make_model, tokenizer, evaluate):
    model = make_model()
    records, alone = evaluate(model, conditions=["none", "state", "strength_0", "strength_2"]), Alone(model, tokenizer)
    assert model.strength == 1
    for c in CONTEXTS:
        memory = alone.written(c.history)
        for question in c.questions:
            none, off = (records[name, question.question_id] for name in ("none", "strength_0"))
            assert {**off, "condition": "none"} == none
            model.strength = 2.0
            twice = alone.ask(*alone.encode(question.messages), question, memory, write=False)
            model.strength = 1.0
            assert_same(records["strength_2", question.question_id], twice)
            assert records["state", question.question_id]["nll"] != pytest.approx(twice[0], abs=1e-4)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_model_whose_answers_are_no_numbers_is_not_scored(condition, make_model, evaluate):
    model = make_model()
    for parameter in model.parameters():
        parameter.data = parameter.data.fill_(float("nan"))
    with pytest.raises(StageError, match=f"under '{condition}'.*is nan.*diverged"):
        evaluate(model, conditions=[condition])


@pytest.fixture
def begun(monkeypatch):
    """The rows whose beginnings were shared."""
    rows, beginning = [], Rows.beginning
    monkeypatch.setattr(Rows, "beginning", lambda self, row: rows.append(row) or beginning(self, row))
    return rows


@pytest.mark.parametrize("room", [COPIED, SHARED], ids=["copied", "shared"])
@pytest.mark.parametrize("strategy", ["tsw", "msw"])
def test_full_with_a_shared_history_is_the_whole_prompt_read_at_once(
    strategy, room, make_model, tokenizer, evaluate, begun
):
    model = make_model(strategy)
    records, alone = evaluate(model, conditions=["full"], cache_bytes=room), Alone(model, tokenizer)
    assert bool(begun) == (room == SHARED)
    for c in CONTEXTS:
        for question in c.questions:
            ids, segments = alone.encode(prompt_messages(question, c.history))
            assert_same(records["full", question.question_id], alone.ask(ids, segments, question, None, write=True))


@pytest.mark.parametrize("room", [COPIED, SHARED], ids=["copied", "shared"])
def test_full_under_ssw_reads_history_then_question_then_answer(room, make_model, tokenizer, evaluate):
    model = make_model("ssw")
    records, alone = evaluate(model, conditions=["full"], cache_bytes=room), Alone(model, tokenizer)
    for c in CONTEXTS:
        for question in c.questions:
            ids, segments = alone.encode(prompt_messages(question, c.history))
            start = segments[0].tolist().index(segments.max())  # where the question's text begins
            cuts = [(0, start), (start, ids.shape[1] - 1), (ids.shape[1] - 1, None)]
            answer = alone.answer_ids(question)
            ids = torch.cat([ids, answer[:, :-1]], 1)
            segments = torch.cat([segments, torch.zeros_like(answer[:, :-1])], 1)
            memory = cache = None
            with torch.no_grad():
                for a, b in cuts:
                    out = model(
                        ids[:, a:b],
                        memory=memory,
                        segment_ids=segments[:, a:b],
                        past_key_values=cache,
                        use_cache=True,
                    )
                    memory, cache = out.memory, out.past_key_values
            nll = torch.nn.functional.cross_entropy(out.logits[0], answer[0]).item()
            assert records["full", question.question_id]["nll"] == pytest.approx(nll, abs=1e-4)


@pytest.mark.parametrize("strategy", ["tsw", "ssw"])
@pytest.mark.parametrize("other", [1, 100])
def test_batches_change_nothing(strategy, other, make_model, evaluate):
    model = make_model(strategy)
    records, others = evaluate(model, batch_size=3), evaluate(model, batch_size=other)
    assert records.keys() == others.keys()
    assert len(records) == 4 * 10
    for key, record in records.items():
        assert_same(record, (others[key]["nll"], others[key]["prediction"]))


def test_the_frozen_backbone_is_the_adapter_with_an_empty_memory(make_model, tokenizer, evaluate):
    model = make_model()
    frozen = evaluate(model.base_model, conditions=["none", "full"])
    records = evaluate(model, conditions=["none", "full"])
    same = {
        condition: [
            frozen[key]["nll"] == pytest.approx(records[key]["nll"], abs=1e-4) for key in frozen if key[0] == condition
        ]
        for condition in ("none", "full")
    }
    assert all(same["none"])
    assert not any(same["full"])
    ids = torch.tensor(
        [encode_messages(tokenizer, prompt_messages(CONTEXTS[1].questions[0], CONTEXTS[1].history), True)[0]]
    )
    made = model.base_model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    prediction = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert frozen["full", "q1.0"]["prediction"] == prediction


@pytest.mark.parametrize("drop_first", ["oldest", "newest"])
@pytest.mark.parametrize("strategy", ["tsw", "ssw"])
def test_what_the_window_has_no_room_for_is_still_written(drop_first, strategy, make_model, tokenizer, evaluate):
    model, window = make_model(strategy), 200
    records, alone = (
        evaluate(model, conditions=["full"], window=window, drop_first=drop_first),
        Alone(model, tokenizer),
    )
    c = CONTEXTS[2]
    count = records["full", "q2.0"]["left_out"]
    assert 0 < count < len(c.history)
    oldest = drop_first == "oldest"
    left_out, kept = (c.history[:count], c.history[count:]) if oldest else (c.history[-count:], c.history[:-count])
    for question in c.questions:
        ids, segments = alone.encode(prompt_messages(question, kept))
        start = segments[0].tolist().index(segments.max())
        assert ids.shape[1] + max(6, alone.answer_ids(question).shape[1]) <= window
        memory = alone.written(left_out) if oldest else None
        with torch.no_grad():
            out = model(ids[:, :start], memory=memory, segment_ids=segments[:, :start], use_cache=True)
            memory = out.memory
            if not oldest:
                left_ids, left_segments = alone.encode(left_out, prompt=False)
                memory = model.write(left_ids, memory=memory, segment_ids=left_segments)
            rest = slice(start, ids.shape[1] - 1)
            out = model(
                ids[:, rest],
                memory=memory,
                segment_ids=segments[:, rest],
                past_key_values=out.past_key_values,
            )
            answer = alone.answer_ids(question)
            last = torch.cat([ids[:, -1:], answer[:, :-1]], 1)
            out = model(
                last,
                memory=out.memory,
                segment_ids=torch.zeros_like(last),
                past_key_values=out.past_key_values,
            )
        nll = torch.nn.functional.cross_entropy(out.logits[0], answer[0]).item()
        assert records["full", question.question_id]["nll"] == pytest.approx(nll, abs=1e-4)


def test_a_history_longer_than_the_window_is_written_in_pieces(make_model, tokenizer, evaluate):
    model, window = make_model(), 120
    records, alone = evaluate(model, conditions=["state"], window=window), Alone(model, tokenizer)
    ids, segments = alone.encode(CONTEXTS[2].history, prompt=False)
    assert ids.shape[1] > 2 * window
    starts = [i for i in range(1, ids.shape[1]) if -1 != segments[0, i] != segments[0, i - 1]]
    memory, begin = None, 0
    while begin < ids.shape[1]:
        end = max((i for i in starts if begin < i <= begin + window), default=None)
        if begin + window >= ids.shape[1]:
            end = ids.shape[1]
        memory, begin = model.write(ids[:, begin:end], memory=memory), end
    for question in CONTEXTS[2].questions:
        expected = alone.ask(*alone.encode(question.messages), question, memory, write=False)
        assert_same(records["state", question.question_id], expected)


def test_an_interrupted_run_asks_nothing_twice(make_model, tokenizer, evaluate, tmp_path):
    model, path = make_model(), tmp_path / "kept.jsonl"
    whole = evaluate(model)

    class Interrupted(Reader):
        left = 9

        def generate(self, *arguments):
            Interrupted.left -= 1
            if not Interrupted.left:
                raise KeyboardInterrupt
            self.asked = getattr(self, "asked", 0) + len(arguments[1])
            return super().generate(*arguments)

    reader = Interrupted(model, [tokenizer.eos_token_id], tokenizer.pad_token_id)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, path=path, reader=reader)
    assert 0 < reader.asked < 40
    with path.open("ab") as file:
        file.write(b'{"records": [{"question_id": "q0.0", "cond')  # the machine stopped in the middle of a line
    first = reader.asked
    records = evaluate(model, path=path, reader=reader)
    assert reader.asked == 40
    assert first < 40
    assert {key: (r["prediction"], pytest.approx(r["nll"], abs=1e-4)) for key, r in whole.items()} == {
        key: (r["prediction"], r["nll"]) for key, r in records.items()
    }
    assert evaluate(model, path=path, reader=reader) == records
    assert reader.asked == 40


def test_another_key_starts_over_and_sets_the_file_aside(tmp_path):
    path = tmp_path / "log.jsonl"
    log = RecordLog(path, {"adapter": "a"})
    log.add([{"condition": "none", "question_id": "q"}], {"part": "none"})
    log.close()
    assert RecordLog(path, {"adapter": "a"}).has("none", "q")
    other = RecordLog(path, {"adapter": "b"})
    assert not other.has("none", "q") and not RecordLog(path, {"adapter": "b"}).set_aside
    assert RecordLog(other.set_aside, {"adapter": "a"}).has("none", "q"), "what was answered before must not be lost"


def test_a_full_disk_loses_the_batch_that_found_it_full_and_nothing_before(tmp_path):
    path = tmp_path / "log.jsonl"
    log = RecordLog(path, {"adapter": "a"})
    log.add([{"condition": "none", "question_id": "first"}], {})
    with full_disk(path.stat().st_size + 20), pytest.raises(OSError, match="too large"):
        log.add([{"condition": "none", "question_id": "second"}], {})
    assert not path.read_bytes().endswith(b"\n")
    again = RecordLog(path, {"adapter": "a"})
    assert again.has("none", "first") and not again.has("none", "second") and not again.set_aside
    again.add([{"condition": "none", "question_id": "second"}], {})
    assert RecordLog(path, {"adapter": "a"}).has("none", "second")


def test_limits_of_answers(make_model, evaluate):
    model = make_model()
    long, short = (
        evaluate(model, conditions=["state"]),
        evaluate(model, conditions=["state"], max_new_tokens=2),
    )
    assert all(
        long[key]["prediction"].startswith(record["prediction"].rstrip("\ufffd")) for key, record in short.items()
    )
    assert all(len(record["prediction"]) <= 2 for record in short.values())


def test_contexts_without_a_history_have_no_memory_to_test(make_model, evaluate):
    contexts = [*CONTEXTS[:2], Context("empty", [], [Question("lone", "lone", [user("Who?")], ["me"])])]
    records = evaluate(make_model(), contexts=contexts)
    assert {condition for condition, question in records if question == "lone"} == {"none", "full"}


def test_a_single_document_cant_be_swapped(make_model, evaluate):
    with pytest.raises(StageError, match="at least two documents"):
        evaluate(make_model(), contexts=CONTEXTS[:1])


def test_one_layer_has_no_other_to_trade_states_with(make_model, evaluate):
    with pytest.raises(StageError, match="'permuted'.*this adapter has one layer"):
        evaluate(make_model(layers=(1,)), conditions=["permuted"])
