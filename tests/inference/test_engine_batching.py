"""Requests that come and go: whatever runs beside a row, its greedy text is what the model without any cache says.

The oracle reads prompt and reply in one forward without a cache: every token must be the best there, or within a
near-tie of it."""

import gc
import random
import weakref
from collections import Counter

import pytest
import torch

from nanolab.cli import UserError
from nanolab.data.tokenizer import Tokenizer
from nanolab.inference import prefill
from nanolab.inference.cache import KVCache
from nanolab.inference.engine import Engine, Request
from nanolab.inference.prepare import prepare_for_inference
from nanolab.inference.recorded import Recorder
from nanolab.model.config import GPTConfig
from nanolab.model.gpt import GPT
from nanolab.runtime import Runtime

RUNTIME = Runtime(torch.device("cpu"), torch.float32)
TIE = 1e-4
SMALL = dict(sequence_len=96, vocab_size=61, n_layer=3, n_head=4, n_embd=32, bos=60)
VARIANTS = {
    "default": GPTConfig(**SMALL, window_size=7, window_pattern="SSL"),
    "documents": GPTConfig(**SMALL, window_size=7, window_pattern="SL", document_mask=True),
    "gqa-alibi-sink": GPTConfig(**SMALL, window_size=5, attention="gqa:2", positions="alibi", softmax="sink"),
    "mla": GPTConfig(**SMALL, window_size=9, attention="mla", value_embeds=False),
    "gpt2": GPTConfig(
        **SMALL,
        positions="learned",
        window_pattern="L",
        qk_norm="none",
        qk_gain=1.0,
        value_embeds=False,
        residual_scalars=False,
        smear=False,
        backout=False,
        embed_norm=False,
        mlp="gelu_tanh",
        norm="layernorm",
        norm_gain=True,
        bias="qkv,out,mlp,norm",
        softcap=0.0,
        tied_head=True,
    ),
}


def build(config: GPTConfig, dtype: torch.dtype = torch.float32) -> GPT:
    """Random in every parameter, so that every part shows in the logits."""
    torch.manual_seed(2)
    model = GPT(config, compute_dtype=dtype).eval().requires_grad_(False)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3)
    return model


@pytest.fixture(scope="module", params=list(VARIANTS))
def model(request) -> GPT:
    return build(VARIANTS[request.param])


@pytest.fixture(scope="module")
def default() -> GPT:
    return build(VARIANTS["default"])


@pytest.fixture(scope="module")
def kept(model) -> dict:
    """(bucket, limit, dtype) -> the recorded step of this model."""
    return {}


@pytest.fixture
def recordings(kept, monkeypatch):
    """Engines of one model share what they record: it depends on its weights and on shapes."""
    record = Recorder._record

    def once(recorder: Recorder, bucket: tuple[int, int], cache: KVCache) -> None:
        key = bucket, cache.limit, cache.dtype
        if key not in kept:
            record(recorder, bucket, cache)
            kept[key] = recorder.steps[bucket]
        recorder.steps[bucket] = kept[key]

    monkeypatch.setattr(Recorder, "_record", once)


@torch.no_grad()
def check_greedy(model: GPT, prompt: tuple[int, ...], reply: list[int], tie: float = TIE) -> None:
    logits = model(torch.tensor([[*prompt, *reply]], device=model.wte.weight.device))[0, len(prompt) - 1 : -1].cpu()
    behind = logits.amax(-1) - logits.gather(-1, torch.tensor(reply)[:, None])[:, 0]
    assert (behind <= tie).all(), f"{behind} behind the best"


def greedy(prompt, max_tokens: int = 12, **more) -> Request:
    return Request(tuple(prompt), max_tokens=max_tokens, temperature=0.0, **{"stop_ids": (), **more})


def ids(rng: random.Random, n: int) -> list[int]:
    return [rng.randrange(61) for _ in range(n)]


def drain(engine: Engine, replies: dict[int, list[int]]) -> dict[int, str]:
    """Step until idle; how each row ended."""
    ends = {}
    while not engine.idle:
        for new in engine.step():
            assert new.row not in ends
            replies.setdefault(new.row, []).append(new.token)
            if new.finish:
                ends[new.row] = new.finish
    return ends


@pytest.mark.slow
@pytest.mark.parametrize(
    "seed, graphs",
    [(0, False), (1, True), *(pytest.param(n, n % 2 == 0, marks=pytest.mark.slow) for n in range(2, 10))],
)
def test_any_schedule_gives_the_text_of_the_model_without_a_cache(model, recordings, seed, graphs):
    rng = random.Random(seed)
    engine = Engine(
        model,
        None,
        RUNTIME,
        max_rows=6 if graphs else rng.randint(1, 5),
        prefill_tokens=rng.randint(1, 40),
        prefix_bytes=rng.choice([0, 300_000]),
        graphs=graphs,
    )
    if graphs:
        engine.recorder.after = 2
    prompts, replies, cancelled, live, cached = {}, {}, set(), [], 0
    for _ in range(60):
        if rng.random() < 0.3:
            prompt, kind = ids(rng, rng.randint(1, 50)), rng.random()
            if kind < 0.5 and prompts:  # the next turn of a conversation, or once more the same
                before = rng.choice(list(prompts))
                prompt = (
                    [*prompts[before], *replies.get(before, []), *ids(rng, rng.randint(0, 5))][-95:]
                    if kind < 0.35
                    else prompts[before]
                )
            number = engine.add(greedy(prompt, rng.randint(1, 30)))
            prompts[number], live = tuple(prompt), [*live, number]
        if rng.random() < 0.1 and live:
            cancelled.add(number := live.pop(rng.randrange(len(live))))
            engine.cancel(number)
        engine.prepare()
        for new in engine.step():
            assert new.row not in cancelled
            replies.setdefault(new.row, []).append(new.token)
            cached += new.cached
            if new.finish:
                live.remove(new.row)
        assert engine.running <= engine.max_rows
    ends = drain(engine, replies)
    assert set(ends) | set(replies) | cancelled == set(prompts) and len(replies) > 5
    assert engine.prefixes is None or cached > 0
    assert engine.recorder is None or engine.recorder.steps
    for number, reply in replies.items():
        check_greedy(model, prompts[number], reply)


@pytest.mark.parametrize("name", ["default", "mla"])
def test_in_bf16_a_row_differs_from_itself_alone_by_a_near_tie_at_most(name):
    """Rounding may differ with the batch: where the texts part, the two best logits are within bf16's steps of each
    other.
    """
    model = prepare_for_inference(build(VARIANTS[name], torch.bfloat16))
    rng = random.Random(3)
    prompts = [ids(rng, n) for n in (1, 30, 12, 44, 7)]
    alone, together = [], {}
    for prompt in prompts:
        engine, out = Engine(model, None, RUNTIME), {}
        engine.add(greedy(prompt, 20))
        drain(engine, out)
        alone.append(out[0])
    engine = Engine(model, None, RUNTIME, prefill_tokens=11, prefix_bytes=1 << 20)
    for prompt in prompts:
        engine.add(greedy(prompt, 20))
        for new in engine.step():
            together.setdefault(new.row, []).append(new.token)
    drain(engine, together)
    for i, prompt in enumerate(prompts):
        check_greedy(model, tuple(prompt), alone[i], tie=0.25)  # bf16's steps at the logits' size, 15, are 1/16
        parted = next((n for n in range(20) if alone[i][n] != together[i][n]), None)
        if parted is not None:
            check_greedy(model, tuple(prompt), together[i][: parted + 1], tie=0.25)


def test_a_request_joins_at_the_next_step_and_a_cancelled_one_is_gone_from_it(default):
    engine = Engine(default, None, RUNTIME)
    first = engine.add(greedy(range(5), 20))
    assert [s.row for s in engine.step()] == [first] and (engine.running, engine.waiting) == (1, 0)
    second, third = engine.add(greedy(range(9), 20)), engine.add(greedy(range(3), 2))
    assert engine.waiting == 2
    assert [s.row for s in engine.step()] == [first, second, third]
    engine.cancel(first)
    assert engine.running == 2
    assert [(s.row, s.finish) for s in engine.step()] == [(third, "length"), (second, None)]
    assert [s.row for s in engine.step()] == [second] and engine.running == 1
    engine.cancel(second)
    engine.cancel(second), engine.cancel(first)  # nothing to do
    assert engine.idle and engine.step() == []


def test_rows_wait_for_a_place_and_cancelling_them_there_is_enough(default):
    engine = Engine(default, None, RUNTIME, max_rows=1)
    rows = [engine.add(greedy([i, 1], 3)) for i in range(3)]
    assert [s.row for s in engine.step()] == rows[:1] and engine.waiting == 2
    engine.cancel(rows[1])
    assert [[s.row for s in engine.step()] for _ in range(4)] == [rows[:1], rows[:1], rows[2:], rows[2:]]


def test_a_long_prompt_is_read_in_chunks_while_others_run_and_can_be_given_up_on_the_way(default):
    engine = Engine(default, None, RUNTIME, prefill_tokens=10)
    short = engine.add(greedy([1, 2, 3], 30))
    engine.step()
    long = engine.add(greedy(range(45), 5))
    assert [[s.row for s in engine.step()] for _ in range(5)] == [[short]] * 4 + [[short, long]]
    given_up = engine.add(greedy(range(1, 45), 5))
    engine.step()
    assert engine.waiting == 1
    engine.cancel(given_up)
    assert engine.waiting == 0 and not engine.prefill.parts


def test_a_step_reads_no_more_prompt_tokens_than_allowed(default):
    read = []

    class Counting(torch.nn.Module):
        config, compute_dtype = default.config, default.compute_dtype

        def forward(self, ids, cache, last_only):
            read.append(ids.numel() if cache is not engine.cache else 0)
            return default(ids, cache=cache, last_only=last_only)

    engine = Engine(Counting(), None, RUNTIME, prefill_tokens=16)
    rng, per_step = random.Random(0), []
    for n in (3, 5, 5, 40, 2, 16, 17, 5, 1):
        engine.add(greedy(ids(rng, n), 3))
    while not engine.idle:
        read.clear()
        engine.step()
        per_step.append(sum(read))
    assert max(per_step) == 16 and sum(per_step) == 94 and per_step[:5].count(16) >= 4  # not more, and not idle either


def test_a_short_prompt_does_not_wait_for_a_long_one_nor_a_long_one_for_many_short_ones(default):
    engine = Engine(default, None, RUNTIME, prefill_tokens=10)
    long = engine.add(greedy(range(50), 1))
    engine.step()  # 10 of its 50 are read
    finished = []
    for i in range(12):
        engine.add(greedy([i] * 5, 1))
        finished.append([new.row for new in engine.step()])
    assert finished[:4] == [[1], [2], [3], [4]] and long in sum(finished[:9], [])


def test_a_cancelled_row_does_not_disturb_the_one_that_waits_for_the_same_prompt(default):
    engine = Engine(default, None, RUNTIME, prefill_tokens=4)
    rows = [engine.add(greedy(range(10), 4)) for _ in range(3)]
    engine.step()
    engine.cancel(rows[0])
    replies: dict[int, list[int]] = {}
    drain(engine, replies)
    assert replies[rows[1]] == replies[rows[2]] and rows[0] not in replies
    check_greedy(default, tuple(range(10)), replies[rows[1]])


def test_sampled_rows_depend_on_their_own_seed_alone(default):
    def run(requests: list[Request], gap: int) -> list[list[int]]:
        engine, replies = Engine(default, None, RUNTIME, prefill_tokens=7), {}
        for request in requests:
            engine.add(request)
            for _ in range(gap):
                for new in engine.step():
                    replies.setdefault(new.row, []).append(new.token)
        drain(engine, replies)
        return [replies[i] for i in range(len(requests))]

    requests = [
        Request((1, 2, 3), 20, 1.0, seed=5, stop_ids=()),
        Request((1, 2, 3), 20, 1.0, seed=6, stop_ids=()),
        Request((7,) * 20, 20, 0.8, top_p=0.9, seed=5, stop_ids=()),
        Request((4,), 20, 0.8, top_k=9, repetition_penalty=1.3, seed=5, stop_ids=()),
    ]
    alone = [run([request], 0)[0] for request in requests]
    assert run(requests, 0) == run(requests, 3) == alone and alone[0] != alone[1]


@pytest.mark.slow
@pytest.mark.fault("S5")
def test_scores_of_a_prompt_are_those_of_the_model_without_a_cache(model, monkeypatch):
    """Whatever is read beside it and in what chunks; equal prompts that are not scored, or with fewer alternatives,
    keep what is theirs.
    """
    monkeypatch.setattr(prefill, "LOGITS", 7 * SMALL["vocab_size"])
    rng, asked, found, replies = random.Random(0), {}, {}, {}
    engine = Engine(model, None, RUNTIME, max_rows=5, prefill_tokens=17, prefix_bytes=1 << 20)
    prompts = [ids(rng, n) for n in (1, 2, 30, 30, 95)]
    for _ in range(24):
        prompt, top = rng.choice(prompts), rng.choice([-1, 0, 3])
        asked[engine.add(greedy(prompt, rng.randint(1, 3), prompt_logprobs=top))] = tuple(prompt), top
        for new in engine.step() if rng.random() < 0.5 else ():
            found.setdefault(new.row, new.scores)
            replies.setdefault(new.row, []).append(new.token)
    while not engine.idle:
        for new in engine.step():
            found.setdefault(new.row, new.scores)
            replies.setdefault(new.row, []).append(new.token)
    assert set(found) == set(asked)
    with torch.no_grad():
        expected = {tuple(prompt): model(torch.tensor([prompt]))[0].log_softmax(-1) for prompt in prompts}
    for row, (prompt, top) in asked.items():
        check_greedy(model, prompt, replies[row])
        assert [score.token for score in found[row]] == (list(prompt) if top >= 0 else [])
        for score, following, logprobs in zip(found[row][1:], prompt[1:], expected[prompt]):
            assert score.logprob == pytest.approx(logprobs[following].item(), abs=TIE)
            assert [value for _, value in score.top] == pytest.approx(logprobs.topk(top).values.tolist(), abs=TIE)
            assert [value for _, value in score.top] == pytest.approx(
                [logprobs[token].item() for token, _ in score.top], abs=TIE
            )


@pytest.mark.fault("S5")
def test_scoring_a_prompt_takes_turns_with_the_others_and_never_holds_all_its_logits(default, monkeypatch):
    """A row decodes one token in each step while 90 tokens are scored eight at a time; the head sees four places at
    once.
    """
    monkeypatch.setattr(prefill, "LOGITS", 4 * SMALL["vocab_size"])
    engine, rng, sizes, logits = Engine(default, None, RUNTIME, prefill_tokens=8), random.Random(0), [], default.logits
    monkeypatch.setattr(default, "logits", lambda x: sizes.append(x.numel() // x.size(-1)) or logits(x))
    beside = engine.add(greedy(ids(rng, 3), 90))
    engine.step()
    long = engine.add(greedy(ids(rng, 90), 1, prompt_logprobs=0))
    steps = [engine.step() for _ in range(12)]
    assert [sum(new.row == beside for new in step) for step in steps] == [1] * 12
    assert [sum(new.row == long for new in step) for step in steps] == [0] * 11 + [1] and len(
        steps[-1][-1].scores
    ) == 90
    assert max(sizes) == 4


def test_a_prompt_that_begins_with_a_snapshot_starts_there(default):
    engine, replies = Engine(default, None, RUNTIME, prefix_bytes=1 << 20), {}
    rng = random.Random(1)
    prompt = ids(rng, 20)
    first = engine.add(greedy(prompt, 10))
    drain(engine, replies)
    following = [*prompt, *replies[first], *ids(rng, 4)]
    for text, expected in (
        (following, 29),
        (prompt, 20),
        (prompt[:19] + [prompt[19] ^ 1], 0),
        ([*prompt, *ids(rng, 3)], 20),
    ):
        number = engine.add(greedy(text, 10))
        new = next(new for new in iter(engine.step, None) for new in new)
        assert new.cached == expected
        replies[number] = [new.token]
        drain(engine, replies)
        check_greedy(default, tuple(text), replies[number])
    assert replies[2] == replies[first]


def test_snapshots_are_bounded_in_bytes_and_the_oldest_goes_first(default):
    engine = Engine(default, None, RUNTIME, prefix_bytes=60_000)
    kept = []
    for i in range(12):
        engine.add(greedy([i] * 10, 4))
        drain(engine, {})
        kept.append(len(engine.prefixes.kept))
        actual = sum(c.nbytes + (0 if logits is None else logits.nbytes) for c, logits in engine.prefixes.kept.values())
        assert engine.prefixes.used == actual <= 60_000
    assert kept[0] == 2 and kept[-1] == kept[-2] > 2
    talks = {key[0] for key in engine.prefixes.kept}
    assert talks == set(range(12 - len(talks), 12))
    # of a prompt and its reply, which begins with it, both stay only while there is room
    assert len(talks) == len(engine.prefixes.kept) - 1
    assert Engine(default, None, RUNTIME).prefixes is None


def alive() -> Counter:
    """The tensors, by shape, and the objects of this package that the process holds."""
    gc.collect()
    found = (
        one
        for one in gc.get_objects()
        if issubclass(type(one), torch.Tensor) or str(type(one).__module__).startswith("nanolab.")
    )
    # as text: tests of compiling leave symbolic ones
    return Counter((type(one).__name__, str(getattr(one, "shape", ""))) for one in found)


def test_memory_is_flat_over_many_requests(default):
    gc.collect()
    gc.freeze()  # what other tests left behind, and may free meanwhile, is not counted
    counts = counts_after_rounds(Engine(default, None, RUNTIME, max_rows=4))
    assert counts[0] == counts[1] == counts[2] and counts[0]["Engine", ""] == 1


def counts_after_rounds(engine: Engine) -> list[Counter]:
    """alive() after every round of thirty requests."""
    counts = []
    for i in range(90):
        j = i % 30
        number = engine.add(greedy([j, 1 + j % 5], 3 + j % 5))
        if j % 9 == 4:
            engine.cancel(number)
        engine.step()
        if j == 29:
            drain(engine, {})
            counts.append(alive())
    return counts


@pytest.mark.fault("outer D20")
def test_special_tokens_are_not_penalised_for_repetition():
    """Greedy at a penalty, against a loop without a cache that divides the logits of the text's tokens only."""
    tokenizer = Tokenizer.train(["plain"], 265)
    model, specials = (
        build(GPTConfig(**{**SMALL, "vocab_size": 265, "bos": tokenizer.bos})),
        set(tokenizer.specials.values()),
    )
    with torch.no_grad():  # special tokens are likely, so that replies hold some
        model.lm_head.weight[sorted(specials)] *= 1.5
    prompt = [tokenizer.bos, 5, 6, 7, *specials, 8, 9]
    expected = list(prompt)
    for _ in range(20):
        logits = model(torch.tensor([expected]))[0, -1]
        for i in set(expected) - specials:
            logits[i] = logits[i] / 3 if logits[i] > 0 else logits[i] * 3
        expected.append(int(logits.argmax()))
    engine, replies = Engine(model, tokenizer, RUNTIME), {}
    engine.add(greedy(prompt, 20, repetition_penalty=3.0))
    drain(engine, replies)
    assert replies[0] == expected[len(prompt) :] and specials & set(replies[0])


def test_generate_runs_beside_what_was_added(default):
    engine = Engine(default, None, RUNTIME)
    number, replies = engine.add(greedy([3, 4], 6)), {}
    assert len(engine.complete([[1, 2]], Request(max_tokens=5, temperature=0.0, stop_ids=()))[0]) == 5
    assert drain(engine, replies) == {number: "length"} and len(replies[number]) == 6


def test_a_stop_string_ends_its_row_in_the_step_that_completes_it(default):
    tokenizer = Tokenizer.train(["plain"], 265)
    config = GPTConfig(**{**SMALL, "vocab_size": 265, "bos": tokenizer.bos})
    engine = Engine(build(config), tokenizer, RUNTIME)
    request = Request((1, 2), 40, 1.0, seed=3, stop_ids=())
    free: dict[int, list[int]] = {}
    engine.add(request)
    drain(engine, free)
    text = [tokenizer.decode([t]) for t in free[0]]
    at = next(i for i in range(5, 30) if all(len(c) == 1 and c.isascii() for c in text[i : i + 3]))
    stop = "".join(text[at : at + 3])
    assert tokenizer.decode(free[0][: at + 2]).find(stop) < 0  # it comes nowhere before
    replies: dict[int, list[int]] = {}
    number = engine.add(Request((1, 2), 40, 1.0, seed=3, stop_ids=(), stop=("never in it", stop)))
    assert drain(engine, replies) == {number: "stop"} and replies[number] == free[0][: at + 3]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prompt": ()}, "has 0 tokens"),
        ({"prompt": (1,) * 96}, "96 tokens; this model reads 1 to 95"),
        ({"max_tokens": 0}, "max-tokens"),
        ({"temperature": -1.0}, "--temperature"),
        ({"repetition_penalty": -1.0}, "penalty"),
    ],
)
def test_bad_requests_are_refused_at_once(default, change, message):
    engine = Engine(default, None, RUNTIME)
    with pytest.raises(UserError, match=message):
        engine.add(Request(**{"prompt": (1,), "stop_ids": (), **change}))
    assert engine.idle


def replayed(model: GPT, device: str) -> None:
    """Rows that come and go through recorded steps, against the same without a record and against the oracle."""
    runtime, rng, replies = Runtime(torch.device(device), model.compute_dtype), random.Random(5), []
    prompts = [ids(rng, n) for n in (3, 20, 9, 1)]
    for graphs in (False, True):
        engine, out = Engine(model, None, runtime, max_rows=2, graphs=graphs), {}
        if graphs:
            engine.recorder.after = 1
        for prompt in prompts:
            engine.add(greedy(prompt, 30))
            for _ in range(4):
                for new in engine.step():
                    out.setdefault(new.row, []).append(new.token)
                engine.prepare()
        drain(engine, out)
        replies.append(out)
    assert replies[0] == replies[1] and len(engine.recorder.steps) >= 2
    for i, prompt in enumerate(prompts):
        check_greedy(model, tuple(prompt), replies[1][i])


@pytest.mark.slow
@pytest.mark.parametrize("name", list(VARIANTS))
def test_recorded_steps_give_the_same_text(name):
    replayed(build(VARIANTS[name]), "cpu")


@pytest.mark.parametrize("name", list(VARIANTS))
def test_steps_of_fixed_shape_are_the_models_own_without_being_recorded(name):
    """What a GPU captures: rows padded to a bucket, positions in tensors alone."""
    model = build(VARIANTS[name])
    replies = []
    for graphs in (False, True):
        engine, out = Engine(model, None, RUNTIME, graphs=graphs), {}
        if graphs:
            engine.recorder.after, engine.recorder.cuda = 10**9, True
        for n in (3, 20, 9):
            engine.add(greedy(range(n), 12 + n))
        drain(engine, out)
        replies.append(out)
    assert replies[0] == replies[1] and len(engine.recorder.uses) >= 3


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(VARIANTS))
def test_cuda_graphs_give_the_same_text(name):
    replayed(build(VARIANTS[name]).to("cuda"), "cuda")


def test_what_was_generated_leaves_no_memory_behind(default):
    """By reference counts alone: a training loop, which generates at every step of RL, collects garbage rarely."""
    engine, made = Engine(default, None, RUNTIME), []
    others = [x for x in gc.get_objects() if type(x) is KVCache]  # of other tests
    gc.disable()
    try:
        for _ in engine.generate([[1, 2, 3], [4, 5]], Request(max_tokens=4, stop_ids=())):
            made = made or [
                weakref.ref(x)
                for x in gc.get_objects()
                if type(x) is KVCache and not any(x is other for other in others)
            ]
        assert made and not any(ref() for ref in made)
    finally:
        gc.enable()
