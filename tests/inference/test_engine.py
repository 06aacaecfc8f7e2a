"""Generation against a naive loop that recomputes everything for every token."""

import pytest
import torch

from nanolab.cli import UserError
from nanolab.inference.engine import Engine, Request
from nanolab.model.config import GPTConfig
from nanolab.model.gpt import GPT
from nanolab.runtime import Runtime

# S is 128
CONFIG = GPTConfig(
    sequence_len=160, vocab_size=61, n_layer=2, n_head=2, attention="mqa", n_embd=32, window_pattern="SL"
)
RUNTIME = Runtime(torch.device("cpu"), torch.float32)
GREEDY = dict(temperature=0.0, stop_ids=())


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(1)
    model = GPT(CONFIG)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.5)
    return model


@pytest.fixture
def engine(model) -> Engine:
    return Engine(model, None, RUNTIME)


def prompt(n: int, seed: int = 0) -> list[int]:
    return torch.randint(CONFIG.vocab_size, (n,), generator=torch.Generator().manual_seed(100 * n + seed)).tolist()


@torch.no_grad()
def naive_greedy(model: GPT, ids: list[int], n: int) -> list[int]:
    ids = list(ids)
    for _ in range(n):
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
    return ids[-n:]


class Counting(torch.nn.Module):
    """The model, with a record of the shapes that it was called with."""

    def __init__(self, model: GPT):
        super().__init__()
        self.model, self.config, self.compute_dtype, self.shapes = model, model.config, model.compute_dtype, []

    def forward(self, ids, **kwargs):
        self.shapes.append(tuple(ids.shape))
        return self.model(ids, **kwargs)


@pytest.mark.parametrize("length", [1, 2, 30, 135])
def test_greedy_equals_the_naive_loop(model, engine, length):
    ids = prompt(length)
    assert engine.complete([ids], Request(max_tokens=20, **GREEDY)) == [naive_greedy(model, ids, 20)]


def test_ragged_prompts_together_equal_each_alone(model, engine):
    prompts = [prompt(7), prompt(1), prompt(130), prompt(7, seed=1), prompt(40), prompt(7)]
    assert engine.complete(prompts, Request(max_tokens=15, **GREEDY)) == [naive_greedy(model, p, 15) for p in prompts]


@pytest.mark.parametrize("prefill_tokens", [1, 3, 8, 39, 40])
def test_prefill_in_chunks_equals_whole_prefill(model, prefill_tokens):
    prompts = [prompt(40), prompt(40, seed=1), prompt(13)]
    expected = Engine(model, None, RUNTIME).complete(prompts, Request(max_tokens=10, **GREEDY))
    counted = Counting(model)
    assert (
        Engine(counted, None, RUNTIME, prefill_tokens=prefill_tokens).complete(
            prompts, Request(max_tokens=10, **GREEDY)
        )
        == expected
    )
    assert all(B * T <= prefill_tokens for B, T in counted.shapes if T > 1)


def test_no_forward_is_wasted(model):
    counted = Counting(model)
    out = Engine(counted, None, RUNTIME).complete([prompt(5), prompt(5)], Request(max_tokens=4, **GREEDY))
    assert counted.shapes == [(1, 5)] + [(2, 1)] * 3  # equal prompts are read once; the last token is not read at all
    assert out[0] == out[1] and len(out[0]) == 4


def test_finished_rows_leave_the_batch_and_the_others_do_not_notice(model):
    prompts = [prompt(n) for n in (3, 9, 20, 31)]
    alone = [naive_greedy(model, p, 25) for p in prompts]
    stop = alone[1][4]
    expected = [reply[: reply.index(stop)] if stop in reply else reply for reply in alone]
    assert len({len(reply) for reply in expected}) > 1
    counted = Counting(model)
    engine = Engine(counted, None, RUNTIME)
    assert engine.complete(prompts, Request(max_tokens=25, temperature=0.0, stop_ids={stop})) == expected
    decoded = [B for B, T in counted.shapes if T == 1]
    # the n-th decode step holds the rows whose n-th token neither stopped them nor was their last
    assert decoded == [sum(len(r) >= n for r in expected) for n in range(1, len(decoded) + 1)]


def test_the_stream_says_how_each_row_ended_and_complete_leaves_the_stop_out(model, engine):
    ids = prompt(6)
    reply = naive_greedy(model, ids, 8)
    stop = reply[5]
    n = reply.index(stop)
    steps = list(engine.generate([ids], Request(max_tokens=8, temperature=0.0, stop_ids=[stop])))
    assert [(s.row, s.token, s.finish) for step in steps for s in step] == [(0, t, None) for t in reply[:n]] + [
        (0, stop, "stop")
    ]
    assert engine.complete([ids], Request(max_tokens=8, temperature=0.0, stop_ids=[stop])) == [reply[:n]]
    last = list(engine.generate([ids], Request(max_tokens=2, **GREEDY)))[-1][0]
    assert last.finish == "length"


def test_a_stop_id_on_the_last_allowed_token_is_a_stop(model, engine):
    ids = prompt(6)
    token = naive_greedy(model, ids, 1)[0]
    assert [s[0].finish for s in engine.generate([ids], Request(max_tokens=1, temperature=0.0, stop_ids=[token]))] == [
        "stop"
    ]


def test_generation_ends_at_the_models_sequence_length(model, engine):
    short, long = prompt(4), prompt(155)
    events = [s for step in engine.generate([short, long], Request(max_tokens=1000, **GREEDY)) for s in step]
    tokens = {row: [s.token for s in events if s.row == row] for row in (0, 1)}
    assert [len(tokens[0]), len(tokens[1])] == [156, 5]
    assert [s.row for s in events if s.finish == "length"] == [1, 0]
    assert tokens[1] == naive_greedy(model, long, 5)


def test_logprobs_are_the_models_own(model, engine):
    ids = prompt(10)
    steps = [
        step[0] for step in engine.generate([ids], Request(max_tokens=6, temperature=0.7, top_k=5, stop_ids=(), seed=3))
    ]
    with torch.no_grad():
        logits = model(torch.tensor([ids + [s.token for s in steps]]))[0].double()
    for i, s in enumerate(steps):
        assert s.logprob == pytest.approx(logits[9 + i].log_softmax(-1)[s.token].item(), abs=1e-4)


def test_a_sampled_row_is_the_same_alone_and_among_others(engine):
    prompts = [prompt(7), prompt(7), prompt(20), prompt(3)]
    settings = dict(max_tokens=25, temperature=1.0, top_p=0.95)
    together = engine.complete(prompts, Request(stop_ids={4, 9}, **settings), seeds=[5, 6, 7, 8])
    for i, p in enumerate(prompts):
        assert engine.complete([p], Request(stop_ids={4, 9}, **settings, seed=5 + i)) == [together[i]]
    assert together[0] != together[1]


def test_one_seed_repeats_and_another_differs(engine):
    settings = dict(max_tokens=12, temperature=1.0, stop_ids=())
    first = engine.complete([prompt(3)] * 3, Request(**settings, seed=1))
    assert first == engine.complete([prompt(3)] * 3, Request(**settings, seed=1))
    assert first[:2] == engine.complete([prompt(3)] * 2, Request(**settings, seed=1))
    assert first != engine.complete([prompt(3)] * 3, Request(**settings, seed=2))
    assert len({tuple(r) for r in first}) == 3


def test_bf16_runs_in_bf16(model):
    """Products are bf16's; on CPUs the cache is wider, for speed, and holds the same values."""
    bf16 = GPT(CONFIG, compute_dtype=torch.bfloat16)
    bf16.load_state_dict(model.state_dict())
    engine = Engine(bf16, None, RUNTIME)
    engine.add(Request(tuple(prompt(9)), 5, stop_ids=()))
    engine.step()
    assert (
        all(torch.equal(t, t.bfloat16().float()) for t in engine.cache.k + engine.cache.v) and engine.cache.k[0].any()
    )
    assert [len(r) for r in engine.complete([prompt(9), prompt(4), prompt(1)], Request(max_tokens=5, **GREEDY))] == [
        5,
        5,
        5,
    ]


@pytest.mark.parametrize(
    "prompts, settings, message",
    [
        ([[]], {}, "prompt 0 has 0 tokens"),
        ([[1], [1] * 160], {}, "prompt 1 has 160 tokens; this model reads 1 to 159"),
        ([[1]], {"max_tokens": 0}, "--max-tokens"),
        ([[1]], {"temperature": -1.0}, "--temperature"),
        ([[1], [2]], {"seed": [1]}, "1 seeds for 2 rows"),
    ],
)
def test_bad_requests_are_refused_at_the_call(engine, prompts, settings, message):
    with pytest.raises(UserError, match=message):
        engine.generate(prompts, Request(stop_ids=(), **settings))


def test_no_prompts_give_no_rows(engine):
    assert engine.complete([], Request(stop_ids=())) == []
