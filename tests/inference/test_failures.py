"""What goes wrong beside the text: recording, a tool, memory, logits. The rows that are not concerned get the text that
they get alone.
"""

import copy
import random
import sys
from types import SimpleNamespace

import pytest
import torch

from nanolab.cli import UserError
from nanolab.data.tokenizer import Tokenizer
from nanolab.inference import engine as engine_module
from nanolab.inference import recorded
from nanolab.inference.cache import KVCache
from nanolab.inference.dialogue import Dialogue
from nanolab.inference.engine import Engine, Request
from nanolab.inference.tools import ToolUse
from nanolab.model.config import GPTConfig
from nanolab.model.gpt import GPT
from nanolab.runtime import Runtime

RUNTIME = Runtime(torch.device("cpu"), torch.float32)
TOKENIZER = Tokenizer.train(["plain"], 265)  # bytes and special tokens
CONFIG = GPTConfig(
    sequence_len=96,
    vocab_size=265,
    n_layer=2,
    n_head=2,
    n_embd=32,
    window_size=7,
    window_pattern="SL",
    bos=TOKENIZER.bos,
)
PROMPTS = [tuple(random.Random(i).randrange(250) for _ in range(n)) for i, n in enumerate((9, 30, 3, 17, 9, 22))]
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError(),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"
        " allocate 4096 bytes"
    ),
]


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(2)
    model = GPT(CONFIG).eval().requires_grad_(False)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3)
    return model


def request(i: int, max_tokens: int = 14, **more) -> Request:
    """Every second one greedy, the others drawn by a seed of their own."""
    return Request(PROMPTS[i], max_tokens, **{"temperature": float(i % 2), "seed": i, "stop_ids": ()} | more)


def drain(engine: Engine) -> tuple[dict[int, list[int]], dict[int, str]]:
    """Step until idle: the rows' tokens, and the codes of those that failed."""
    got, failed = {}, {}
    for _ in range(2000):
        if engine.idle:
            assert not engine.live and not engine.rows
            return got, failed
        for new in engine.step():
            got.setdefault(new.row, []).append(new.token)
        failed |= {row: code for row, code, _ in engine.failed}
        engine.failed.clear()
        engine.prepare()
    raise AssertionError("it never ends")


@pytest.fixture(scope="module")
def alone(model) -> list[list[int]]:
    """The reply of each request when nothing else runs and nothing goes wrong."""
    texts = []
    for i in range(len(PROMPTS)):
        engine = Engine(model, TOKENIZER, RUNTIME)
        engine.add(request(i))
        (reply,) = [[new.token for step in iter(engine.step, []) for new in step]]
        texts.append(reply)
    return texts


def once(function, error: BaseException, at: int):
    """The function, whose call number `at` raises instead."""
    calls = iter(range(10**9))

    def wrapped(*args, **kwargs):
        if next(calls) == at:
            raise error
        return function(*args, **kwargs)

    return wrapped


@pytest.mark.fault("outer D2")
@pytest.mark.parametrize(
    "error", [RuntimeError("not supported"), TypeError("x"), *ERRORS], ids=lambda e: type(e).__name__
)
@pytest.mark.parametrize("replay", [False, True])
def test_a_recorder_that_fails_is_said_once_and_done_without(model, alone, monkeypatch, caplog, error, replay):
    made = []

    def record(step, inputs):
        made.append(step)
        if not replay:
            raise error
        return once(step, error, 3)  # the first three calls warm it up

    monkeypatch.setattr(recorded, "record_cpu", record)
    engine = Engine(model, TOKENIZER, RUNTIME, graphs=True)
    engine.recorder.after = 2
    for i in (0, 1):
        engine.add(request(i))
        got, failed = drain(engine)
        assert (got, failed) == ({i: alone[i]}, {})
    assert len(made) == 1 and not engine.recorder.steps
    assert [r.levelname for r in caplog.records] == ["WARNING"] and type(error).__name__ in caplog.text


@pytest.mark.fault("outer D2")
def test_the_terminal_goes_on_too(model, monkeypatch):
    def fails(step, inputs):
        raise RuntimeError("not supported")

    monkeypatch.setattr(recorded, "record_cpu", fails)
    engine = Engine(model, TOKENIZER, RUNTIME, max_rows=1, prefix_bytes=1 << 20, graphs=True)
    engine.recorder.after = 2
    dialogue = Dialogue(engine, answers=False)
    for _ in range(2):
        assert len([new for step in dialogue.reply("plain", Request((), 20, 0.0, stop_ids=())) for new in step]) == 20
    assert len(dialogue.turns) == 2


@pytest.mark.fault("outer D2")
def test_what_torch_says_of_the_version_of_python_is_heard(monkeypatch, caplog):
    recorded.warn.cache_clear()
    monkeypatch.setattr(torch.jit._trace, "sys", SimpleNamespace(**vars(sys) | {"version_info": (3, 14)}))
    for _ in range(2):
        recorded.record_cpu(lambda x: (x * int(x.size(0)),), [torch.ones(2)])
    assert len(caplog.records) == 1 and "3.14" in caplog.text
    monkeypatch.undo()
    recorded.record_cpu(lambda x: (x * int(x.size(0)),), [torch.ones(2)])
    assert len(caplog.records) == 1


@pytest.mark.fault("outer D5")
def test_a_snapshot_larger_than_the_room_is_not_made_and_nothing_goes_for_it(model, monkeypatch):
    engine = Engine(model, TOKENIZER, RUNTIME, prefix_bytes=20_000)
    for i in range(3):
        engine.add(Request((i, i + 1), 2, 0.0, stop_ids=()))
        drain(engine)
    kept, used = list(engine.prefixes.kept), engine.prefixes.used
    assert len(kept) == 6 and used <= 20_000
    copies = []
    monkeypatch.setattr(
        KVCache, "snapshot", lambda cache, row, plain=KVCache.snapshot: copies.append(row) or plain(cache, row)
    )
    number = engine.add(Request(tuple(range(10, 90)), 4, 0.0, stop_ids=()))
    got, _ = drain(engine)
    assert len(got[number]) == 4
    assert (list(engine.prefixes.kept), engine.prefixes.used, copies) == (kept, used, [])


@pytest.mark.fault("outer D5")
def test_a_prompt_whose_reply_is_kept_goes_before_another_conversation(model):
    engine = Engine(model, TOKENIZER, RUNTIME, prefix_bytes=60_000)
    for i in range(9):
        engine.add(Request((i,) * 10, 4, 0.0, stop_ids=()))
        drain(engine)
    lengths = [len(ids) for ids in engine.prefixes.kept]
    assert lengths.count(13) > lengths.count(10) == 1  # half and half before


def test_the_longest_snapshot_is_found(model):
    """Of random sequences over two tokens, against the definition."""
    rng, prefixes = random.Random(0), engine_module.PrefixCache(1 << 30)
    cache = KVCache(CONFIG, 1, capacity=1)
    kept = {tuple(rng.choices((1, 2), k=rng.randint(1, 9))): rng.random() < 0.5 for _ in range(60)}
    for ids, has_logits in kept.items():
        prefixes.keep(ids, cache.nbytes, lambda has_logits=has_logits: (cache, torch.zeros(1) if has_logits else None))
    for _ in range(300):
        prompt = tuple(rng.choices((1, 2), k=rng.randint(1, 12)))
        fitting = [ids for ids in kept if ids == prompt[: len(ids)] and (ids != prompt or kept[ids])]
        found = prefixes.find(prompt)
        assert found is (prefixes.kept[max(fitting, key=len)] if fitting else None)
    for ids in kept:
        contained = id(prefixes.kept[ids]) in prefixes.contained
        assert contained == any(other[: len(ids)] == ids and other != ids for other in kept)


@pytest.mark.fault("outer D10")
@pytest.mark.parametrize(
    "error", [RuntimeError("can't start new thread"), KeyError("x"), SystemExit(3), None], ids=repr
)
def test_a_tool_that_raises_anything_or_gives_no_text_is_a_result_and_logged(caplog, error):
    def tool(code: str):
        if error:
            raise error

    text = TOKENIZER.decode(ToolUse(TOKENIZER, tool).answer("1"))
    assert "error: " + (type(error).__name__ if error else "") in text
    assert [r.levelname for r in caplog.records] == ["WARNING"] and caplog.records[0].exc_info


@pytest.mark.fault("outer D10")
@pytest.mark.parametrize("threads", [0, 1])
def test_rows_go_on_where_no_thread_starts_for_a_tool(model, alone, monkeypatch, threads):
    """The first row calls after its second token."""
    engine = Engine(model, TOKENIZER, RUNTIME, tool_threads=threads)
    start, end = TOKENIZER.special("<|python_start|>"), TOKENIZER.special("<|python_end|>")

    def fails(*args):
        raise RuntimeError("can't start new thread")

    if threads:
        monkeypatch.setattr(engine.tools, "submit", fails)
    calling = engine.add(request(0, 40, tools=fails if not threads else str))
    beside = engine.add(request(1))
    got, forced = {calling: [], beside: []}, []
    engine.live[calling].waiting.extend([start, *TOKENIZER.encode("1")])
    heard = engine.live[calling]
    while not engine.idle:
        for new in engine.step():
            got[new.row].append(new.token)
            if new.row == calling and new.forced:
                forced.append(new.token)
                if len(forced) == 2:
                    heard.tokens[-1], heard.call = end, "1"  # as if the model had ended its call
    assert "error: RuntimeError" in TOKENIZER.decode(forced)
    assert got[beside] == alone[1] and len(got[calling]) == 40


POINTS = {
    "forward": lambda engine: (GPT, "forward"),
    "growth": lambda engine: (KVCache, "_resize"),
    "snapshot": lambda engine: (KVCache, "snapshot"),
    "sampling": lambda engine: (engine_module, "choose"),
    "join": lambda engine: (KVCache, "put"),
    "new cache": lambda engine: (KVCache, "__init__"),
    "penalty": lambda engine: (sys.modules["nanolab.inference.sampling"], "likeliest"),
}


@pytest.mark.slow
@pytest.mark.fault("outer D11")
@pytest.mark.parametrize("point", list(POINTS))
@pytest.mark.parametrize(
    "error, prefix_bytes", [(ERRORS[0], 0), (ERRORS[1], 1 << 20), (ERRORS[2], 1 << 20)], ids=["cuda", "python", "cpu"]
)
def test_out_of_memory_costs_snapshots_and_then_the_youngest_rows(
    model, alone, monkeypatch, caplog, point, error, prefix_bytes
):
    """Memory runs out once, at the first, the second, ... of the places where that could be; rows come in over several
    steps.
    """
    ran_out = 0
    for at in (0, 2, 9, 20):
        with monkeypatch.context() as patch:
            engine = Engine(model, TOKENIZER, RUNTIME, prefill_tokens=16, prefix_bytes=prefix_bytes)
            patch.setattr(*POINTS[point](engine), once(getattr(*POINTS[point](engine)), error, at))
            got, failed = {}, {}
            caplog.clear()
            for i in range(len(PROMPTS)):
                engine.add(request(i, logprobs=2))
                for new in engine.step():
                    got.setdefault(new.row, []).append(new.token)
                failed |= {row: code for row, code, _ in engine.failed}
                engine.failed.clear()
            for part, more in zip((got, failed), drain(engine)):
                for row, value in more.items():
                    part[row] = part.get(row, []) + value if part is got else value
        happened = [r.message for r in caplog.records]
        assert len(happened) <= 1
        ran_out += len(happened)
        assert set(failed.values()) <= {"out_of_memory"} and len(failed) <= len(happened)
        if not prefix_bytes:
            assert len(failed) == len(happened)
        for i, reply in enumerate(alone):
            if i in failed:
                assert got.get(i, []) == reply[: len(got.get(i, []))]
            else:
                assert got[i] == reply
    assert ran_out >= (0 if point in ("snapshot",) and not prefix_bytes else 2)


@pytest.mark.fault("outer D11")
def test_with_room_for_two_rows_the_two_oldest_of_six_arrive(model, alone, monkeypatch):
    """A cache of at most 2 rows' keys, whenever it grows: the youngest are given up until the others fit; then there is
    room for new ones.
    """
    plain = KVCache._resize

    def limited(cache, rows):
        if rows > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        plain(cache, rows)

    monkeypatch.setattr(KVCache, "_resize", limited)
    engine = Engine(model, TOKENIZER, RUNTIME, prefix_bytes=1 << 20)
    for i in range(6):
        engine.add(request(i))
    got, failed = drain(engine)
    assert failed == dict.fromkeys((2, 3, 4, 5), "out_of_memory")
    assert [got[0], got[1]] == alone[:2]
    number = engine.add(request(4))
    got, failed = drain(engine)
    assert (got[number], failed) == (alone[4], {})


@pytest.mark.fault("outer D11")
def test_rows_that_wait_for_a_tool_survive_too(model, monkeypatch):
    """The call is made once, and the text is that of a run in which nothing goes wrong."""

    def run(at: int) -> tuple[list[int], list[str]]:
        made = []
        engine = Engine(model, TOKENIZER, RUNTIME, tool_threads=1, prefix_bytes=1 << 20)
        engine.add(request(0, 40, tools=lambda code: made.append(code) or "seen"))
        row, out = engine.live[0], []
        with monkeypatch.context() as patch:
            patch.setattr(KVCache, "snapshot", once(KVCache.snapshot, MemoryError(), at))
            while not engine.idle:
                for new in engine.step():
                    out.append(new.token)
                    if len(out) == 4:
                        row.tokens[-1], row.call = TOKENIZER.special("<|python_end|>"), "7"
        engine.close()
        assert not engine.failed
        return out, made

    assert run(0) == run(10**6) and run(0)[1] == ["7"]


@pytest.mark.fault("outer D11")
def test_a_batch_that_memory_does_not_suffice_for_is_an_error_with_a_code(model, monkeypatch):
    engine = Engine(model, TOKENIZER, RUNTIME)
    monkeypatch.setattr(GPT, "forward", once(GPT.forward, MemoryError(), 2))
    with pytest.raises(UserError) as error:
        engine.complete([PROMPTS[0]], Request(max_tokens=20, temperature=0.0, stop_ids=()))
    assert error.value.code == "out-of-memory"


@pytest.mark.slow
@pytest.mark.fault("outer D11")
@pytest.mark.parametrize("rows", [1, 5, 8])
def test_the_memory_of_full_rows_is_what_is_said_before(model, rows):
    engine = Engine(model, TOKENIZER, RUNTIME, max_rows=rows)
    sizes = []
    for i in range(rows):
        engine.add(Request((i, 1), 1000, 0.0, stop_ids=()))
    while not engine.idle:
        engine.step()
        sizes.append(sum(x.nbytes for x in (*engine.cache.k, *engine.cache.v)))
    assert max(sizes) == engine.most_bytes


def poisoned(model: GPT, token: int) -> GPT:
    """Whoever reads this token has NaN in every key, value and logit from there on."""
    model = copy.deepcopy(model)
    model.wte.weight[token] = float("nan")
    return model


@pytest.mark.fault("outer NaN")
@pytest.mark.parametrize("graphs", [False, True])
def test_logits_that_are_no_numbers_fail_their_row_alone(model, alone, graphs):
    """Others in the batch, and those that come later into its place and to its prompt, get their text."""
    sick = next(t for t in range(250) if not any(t in (*p, *reply) for p, reply in zip(PROMPTS, alone)))
    engine = Engine(poisoned(model, sick), TOKENIZER, RUNTIME, prefix_bytes=1 << 20, graphs=graphs)
    if graphs:
        engine.recorder.after = 1
    for _ in range(2):
        bad = Request((sick, *PROMPTS[3]), 9, 0.7, top_k=5, stop_ids=())
        numbers = [engine.add(r) for r in (request(0), request(0, 30), bad, request(1))]
        bad = numbers[2]
        for _ in range(3):
            list(engine.step())
        assert [(row, code) for row, code, _ in engine.failed] == [(bad, "non_finite_logits")]
        engine.failed.clear()
        engine.add(request(2))
        got, failed = drain(engine)
        assert failed == {} and not any(sick in ids for ids in engine.prefixes.kept)
        assert got[numbers[-1]] == alone[1][3:] and got[numbers[-1] + 1] == alone[2]
    with pytest.raises(UserError) as error:
        Dialogue(engine, answers=False).reply(TOKENIZER.decode([sick]), Request((), 5, 0.0)).__next__()
    assert error.value.code == "non-finite-logits"
