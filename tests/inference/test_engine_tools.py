"""Tool use inside a generation, against a loop that recomputes everything for every token and knows the protocol by
heart.
"""

import math
import threading
import time

import pytest
import torch

from nanolab.data.tokenizer import Tokenizer
from nanolab.inference.calculator import calculator
from nanolab.inference.engine import Engine, Request
from nanolab.inference.sampling import SamplingState, choose, row_generators
from nanolab.model.config import GPTConfig
from nanolab.model.gpt import GPT
from nanolab.runtime import Runtime

RUNTIME = Runtime(torch.device("cpu"), torch.float32)
TOKENIZER = Tokenizer.train(["plain"], 265)  # bytes and special tokens
CONFIG = GPTConfig(sequence_len=96, vocab_size=265, n_layer=2, n_head=2, n_embd=32, window_pattern="SL")
START, END, OUT, OUT_END, STOP = (
    TOKENIZER.special(f"<|{name}|>")
    for name in ("python_start", "python_end", "output_start", "output_end", "assistant_end")
)


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text)


class Chain(torch.nn.Module):
    """A model that knows which token follows which; it is sure of itself."""

    def __init__(self, *texts: list[int]):
        super().__init__()
        self.config, self.compute_dtype, self.read = CONFIG, torch.float32, []
        self.after = {a: b for text in texts for a, b in zip(text, text[1:])}

    def forward(self, ids, cache, last_only):
        cache.advance(ids.size(1))
        self.read.append(ids[:, -1].tolist())
        logits = torch.zeros(len(ids), 1, CONFIG.vocab_size)
        for row, token in enumerate(ids[:, -1].tolist()):
            logits[row, 0, self.after[token]] = 50.0
        return logits


def run(model, prompts, tools=calculator, **settings):
    """By row: tokens, forced flags, log probabilities; and how the row ended."""
    rows = [([], [], []) for _ in prompts]
    ends = [None] * len(prompts)
    for step in Engine(model, TOKENIZER, RUNTIME).generate(prompts, Request(tools=tools, **settings)):
        for new in step:
            assert ends[new.row] is None
            for part, value in zip(rows[new.row], (new.token, new.forced, new.logprob)):
                part.append(value)
            ends[new.row] = new.finish
    return rows, ends


CALL = [*ids("a"), START, *ids("6*7"), END]
REPLY = [*CALL[1:], OUT, *ids("42"), OUT_END, *ids("b"), STOP]


def test_the_result_is_forced_after_the_call_and_the_model_reads_it():
    # it would end where it is forced
    model = Chain(CALL, [OUT_END, *ids("b"), STOP], [END, STOP], [OUT, STOP], [*ids("4"), STOP], [*ids("2"), STOP])
    ((tokens, forced, logprobs),), ends = run(model, [ids("a")])
    assert tokens == REPLY and ends == ["stop"]
    assert forced == [False] * 5 + [True] * 4 + [False] * 2
    assert [p == 0.0 for p in logprobs[5:9]] == [True] * 4 and all(p == pytest.approx(0, abs=1e-4) for p in logprobs)
    assert [t for (t,) in model.read] == [*ids("a"), *REPLY[:-1]]  # every token once, forced ones too, the stop not
    assert Engine(model, TOKENIZER, RUNTIME).complete([ids("a")], Request(tools=calculator)) == [REPLY[:-1]]


def test_without_tools_a_call_is_text_like_any_other():
    model = Chain(CALL, [END, *ids("z"), STOP])
    ((tokens, forced, _),), _ = run(model, [ids("a")], tools=None)
    assert tokens == [*CALL[1:], *ids("z"), STOP] and not any(forced)


@pytest.mark.parametrize("room, calls", [(3, 0), (5, 0), (6, 1), (7, 1), (9, 1), (10, 1)])
def test_a_row_ends_at_its_budget_inside_a_call_or_its_result(room, calls):
    """Forced tokens count; a call that ends where the row ends is not made."""
    made = []
    model = Chain(CALL, [OUT_END, *ids("b"), STOP], [END, STOP], [OUT, STOP], [*ids("4"), STOP], [*ids("2"), STOP])
    rows, ends = run(model, [ids("a")], tools=lambda code: made.append(code) or calculator(code), max_tokens=room)
    assert rows[0][0] == REPLY[:room] and ends == ["length"] and len(made) == calls


def test_a_result_longer_than_the_context_is_cut_there():
    model = Chain(CALL, *([i, STOP] for i in (END, OUT, *ids("x"))))
    rows, ends = run(model, [ids("a")], tools=lambda code: "x" * 500, max_tokens=1000)
    assert len(rows[0][0]) == CONFIG.sequence_len - 1 and ends == ["length"] and all(rows[0][1][5:])


def test_forced_tokens_do_not_stop_a_row():
    model = Chain(CALL, [OUT_END, *ids("b"), *ids("4"), STOP], *([i, STOP] for i in (END, OUT, *ids("2"))))
    rows, ends = run(model, [ids("a")], stop_ids={OUT, OUT_END, *ids("4")})
    assert rows[0][0] == [*REPLY[:-1], *ids("4")] and ends == ["stop"]


def test_the_tool_runs_after_its_call_was_handed_out():
    """So that a page shows the call while the tool works; and a talk that is given up does not run it."""
    made = []
    model = Chain(CALL, [END, STOP])
    steps = Engine(model, TOKENIZER, RUNTIME).generate([ids("a")], Request(tools=lambda code: made.append(code) or ""))
    while next(steps)[0].token != END:
        pass
    assert made == []
    next(steps)
    assert made == ["6*7"]


def test_an_error_is_a_result_too():
    model = Chain(
        [*ids("a"), START, *ids("1/0"), END],
        [OUT_END, STOP],
        *([i, STOP] for i in (END, OUT, *ids("error: division by zero"))),
    )
    model.after |= {ids("1")[0]: ids("/")[0], ids("/")[0]: ids("0")[0], ids("0")[0]: END}
    ((tokens, _, _),), _ = run(model, [ids("a")])
    assert "<|output_start|>error: division by zero<|output_end|>" in TOKENIZER.decode(tokens)


# ------------------------------------------------------------------------- a real model that calls its tool all the
# time


class Eager(torch.nn.Module):
    """A model with random weights and a liking for calls."""

    def __init__(self, model: GPT):
        super().__init__()
        self.model, self.config, self.compute_dtype = model, model.config, model.compute_dtype

    def forward(self, ids, **kwargs):
        logits = self.model(ids, **kwargs)
        likes = torch.zeros(CONFIG.vocab_size)
        likes[START], likes[END], likes[STOP] = 5.5, 6.0, 3.0
        return logits + likes


@pytest.fixture(scope="module")
def eager() -> Eager:
    torch.manual_seed(3)
    model = GPT(CONFIG)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.2)
    return Eager(model.requires_grad_(False))


def tool(code: str) -> str:
    """As many characters as the call had, and a few more."""
    return f"{len(code)}:" + "r" * (len(code) % 5)


PROMPTS = [[TOKENIZER.bos], ids("some words"), ids("x"), ids("a longer prompt than the others"), ids("x"), ids("some")]
SETTINGS = dict(max_tokens=50, temperature=0.9, top_p=0.98)


@torch.no_grad()
def naive(model, prompt: list[int], seed: int, stop_ids: set[int]) -> tuple[list[int], list[bool]]:
    """One row: sample, and behind each finished call put the result; recomputes all for every sampled token."""
    draws = SamplingState(SETTINGS["temperature"], 0, SETTINGS["top_p"], row_generators([seed], 1)[0])
    new: list[int] = []
    forced: list[bool] = []
    while len(new) < SETTINGS["max_tokens"]:
        token = choose(model(torch.tensor([prompt + new]))[:, -1], [draws])[0].token
        new.append(token)
        forced.append(False)
        if token in stop_ids:
            break
        own = [t for t, f in zip(new, forced) if not f]
        if token == END and START in own and END not in own[len(own) - own[::-1].index(START) : -1]:
            code = own[len(own) - own[::-1].index(START) : -1]
            result = [OUT, *ids(tool(TOKENIZER.decode(code))), OUT_END]
            new += result
            forced += [True] * len(result)
    n = SETTINGS["max_tokens"]
    return new[:n], forced[:n]


def test_rows_with_calls_are_what_each_would_be_alone(eager):
    seeds = list(range(20, 26))
    rows, ends = run(eager, PROMPTS, tools=tool, seed=seeds, stop_ids={STOP}, **SETTINGS)
    for prompt, seed, (tokens, forced, logprobs) in zip(PROMPTS, seeds, rows):
        assert (tokens, forced) == naive(eager, prompt, seed, {STOP})
        assert [p == 0 for p in logprobs] == forced and all(math.isfinite(p) for p in logprobs)
    flags = [forced for _, forced, _ in rows]
    assert sum(map(any, flags)) >= 4 and len(set(ends)) == 2  # most rows made calls; some stopped, some were cut
    # forced and sampled tokens in one batch
    assert any(len({row[n] for row in flags if n < len(row)}) == 2 for n in range(50))


@pytest.mark.slow
@pytest.mark.parametrize("graphs", [False, True])
def test_rows_whose_tool_takes_long_step_aside(eager, graphs):
    """Each row's text is what it is with an instant tool; while one waits the others go on, and a row that is given up
    meanwhile is gone.
    """
    engine = Engine(eager, TOKENIZER, RUNTIME, max_rows=5, tool_threads=1, graphs=graphs)
    if graphs:
        engine.recorder.after = 2
    may_answer, ran = threading.Event(), []

    def slow(code: str) -> str:
        ran.append(code)
        may_answer.wait(20)
        return tool(code)

    def ask(i: int, use) -> int:
        settings = dict(top_k=0, stop_ids=(STOP,), tools=use, seed=20 + i, **SETTINGS)
        return engine.add(Request(tuple(PROMPTS[i]), **settings))

    numbers = {ask(i, slow): i for i in (0, 1, 2, 3)}
    got, finished = {number: [] for number in numbers}, set()

    def step() -> None:
        engine.prepare()
        for new in engine.step():
            got[new.row].append(new.token)
            finished.update([new.row] if new.finish else [])

    while len(engine.aside) < 2 or engine.rows:
        step()
    waiting = {row.number for row, *_ in engine.aside}
    assert not waiting & finished and waiting | finished == set(got) and not engine.idle
    last = engine.aside[-1]  # its tool has not begun: there is one thread
    engine.cancel(gone := last[0].number)
    assert last[2].cancelled() and len(ran) == 1
    quick = ask(4, tool)
    numbers[quick], got[quick] = 4, []
    while quick not in finished and not any(row.number == quick for row, *_ in engine.aside):
        step()  # it goes on while they wait
    assert len(got[quick]) > 1
    may_answer.set()
    while not engine.idle:
        step()
    assert finished == set(got) - {gone}
    for number in finished:
        assert got[number] == naive(eager, PROMPTS[numbers[number]], 20 + numbers[number], {STOP})[0]


def test_a_tool_that_the_machine_fails_is_a_result_too(eager):
    def broken(code: str) -> str:
        raise BlockingIOError(11, "no more processes")

    (row,), _ = run(eager, [ids("x")], tools=broken, seed=[22], stop_ids=(), **SETTINGS)
    assert "error: BlockingIOError" in TOKENIZER.decode(row[0])


def test_a_row_that_finds_no_place_waits_without_spinning(eager):
    engine = Engine(eager, TOKENIZER, RUNTIME, max_rows=1, tool_threads=1)
    for i in (2, 2):
        engine.add(
            Request(
                tuple(PROMPTS[i]), top_k=0, stop_ids=(), tools=lambda code: time.sleep(0.2) or "ok", seed=22, **SETTINGS
            )
        )
    steps = 0
    while not engine.idle:
        engine.step()
        steps += 1
    assert steps < 300
    engine.close()


def test_a_sampled_tokens_logprob_is_the_models_own_behind_a_result(eager):
    (row,), _ = run(eager, [ids("x")], tools=tool, seed=[22], stop_ids=(), **SETTINGS)
    tokens, forced, logprobs = row
    assert any(forced) and not all(forced[-5:])
    with torch.no_grad():
        scores = eager(torch.tensor([ids("x") + tokens]))[0].double().log_softmax(-1)
    for n, (token, is_forced, logprob) in enumerate(zip(tokens, forced, logprobs)):
        if not is_forced:
            assert logprob == pytest.approx(scores[n, token].item(), abs=1e-4)
