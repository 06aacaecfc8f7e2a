"""Scores of texts' tails, against a full forward of every text alone in fp64."""

import importlib.util
import math
import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nanolab.cli import UserError
from nanolab.evals.icl import Text
from nanolab.evals.likelihood import GPTReader, score
from nanolab.inference import prefill
from nanolab.inference.prepare import prepare_for_inference
from nanolab.model.gpt import GPT
from nanolab.runtime import Runtime

spec = importlib.util.spec_from_file_location("nanolab_tests_axes", Path(__file__).parents[1] / "contracts" / "axes.py")
axes = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
sys.path.append(str(Path(spec.origin).parent))  # axes imports its neighbours
spec.loader.exec_module(axes)

CPU = Runtime(torch.device("cpu"), torch.float32)
V, LIMIT = 61, 64
CONFIG = replace(axes.BASE, sequence_len=LIMIT)
# Of each axis, the values that a cache, a window, padding or the head can meet; norms, gains and inits cannot tell.
ALIKE = ("dropout", "norm=", "norm_gain", "init", "mlp=", "qk_")
KINDS = {
    name: replace(c, sequence_len=LIMIT)
    for name, c in axes.singles().items()
    if not any(word in name for word in ALIKE)
}
KINDS |= {f"{n} layers": replace(CONFIG, n_layer=n, backout=True) for n in (1, 2)}  # the middle one is the last


def build(config=CONFIG, dtype=torch.float64, seed: int = 0) -> GPT:
    """Weights far from their initial ones: every token matters to those behind it."""
    model = GPT(config, dtype)
    model.init_weights(seed)
    g = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=g))
    return (model.double() if dtype == torch.float64 else model).eval()


def ids(n: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(V) for _ in range(n)]


def choices(context: int, *tails: int, seed: int = 0) -> list[Text]:
    """One context with tails of these lengths, each scored from the first of its own tokens."""
    return [Text(ids(context, seed) + ids(n, 100 * seed + i), context) for i, n in enumerate(tails, 1)]


def schema(*contexts: int, tail: int = 3, seed: int = 0) -> list[Text]:
    """Contexts that differ with one tail, which is scored."""
    return [
        Text(ids(5, seed) + ids(n, 100 * seed + i) + ids(tail, seed + 50), 5 + n) for i, n in enumerate(contexts, 1)
    ]


GROUPS = [
    choices(30, 1, 4, 2, 7, seed=1),
    choices(29, 3, 3, 5, seed=2),
    choices(50, 2, 9, seed=3),  # the second is as long as can be without a cut
    schema(30, 24, seed=4),
    schema(3, 9, 6, seed=5),
    [Text(ids(40, 6), 33)],
    [Text(ids(2, 7), 1)],
    choices(70, 1, 1, seed=8),  # cut alike
    choices(60, 2, 6, 11, 11, seed=9),  # not cut, and cut at two places
    [Text(ids(20, 10), start) for start in (19, 4, 11)],  # identical but for what is scored
    [Text(ids(n, 11), 30) for n in (40, 33, 45)],  # each begins with the other
    choices(31, 5, seed=12) * 3,  # identical
    [],
]


@torch.no_grad()
def alone(model: GPT, text: Text, limit: int = LIMIT) -> tuple[float, bool]:
    """By the definition: the text's last `limit` tokens by themselves, the logits of all of them."""
    start = text.start - max(0, len(text.ids) - limit)
    kept = list(text.ids)[-limit:]
    logits = model(torch.tensor([kept]))[0].double()
    nats, greedy = 0.0, True
    for i in range(start, len(kept)):
        row = logits[i - 1]
        nats += math.log(torch.exp(row - row[kept[i]]).sum())
        greedy &= not (row > row[kept[i]]).any() and not (row[: kept[i]] == row[kept[i]]).any()
    return nats, greedy


def check(
    model: GPT, groups: list[list[Text]], reference: GPT | None = None, atol: float = 1e-9, **how
) -> list[list[float]]:
    found = score(GPTReader(model, CPU), groups, **how)
    assert [len(scores) for scores in found] == [len(group) for group in groups]
    for group, scores in zip(groups, found):
        for text, got in zip(group, scores):
            nats, greedy = alone(reference or model, text)
            assert got.nats == pytest.approx(nats, abs=atol)
            if atol < 1e-6:
                assert got.greedy == greedy
            cut = max(0, len(text.ids) - LIMIT)
            assert (got.n_tokens, got.cut) == (len(text.ids) - text.start, cut)
    return [[got.nats for got in scores] for scores in found]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_that_each_text_gets_alone(kind):
    check(build(KINDS[kind]), GROUPS, tokens=300)


@pytest.mark.parametrize("tokens", [1, 64, 200, 5000])
def test_any_packing_finds_the_same(tokens):
    model = build()
    whole = check(model, GROUPS, tokens=tokens)
    assert whole[3:6] == [
        [pytest.approx(nats, abs=1e-9) for nats in group] for group in check(model, GROUPS[3:6], tokens=tokens)
    ]


def test_the_head_reads_places_a_block_at_a_time(monkeypatch):
    monkeypatch.setattr(prefill, "LOGITS", 5 * V)
    check(build(), GROUPS)


def test_results_are_in_the_order_of_the_groups():
    model, order = build(), list(range(len(GROUPS)))
    straight = score(GPTReader(model, CPU), GROUPS)
    random.Random(3).shuffle(order)
    for i, scores in zip(order, score(GPTReader(model, CPU), [GROUPS[i] for i in order])):
        assert [s[1:] for s in scores] == [s[1:] for s in straight[i]]
        assert [s.nats for s in scores] == pytest.approx([s.nats for s in straight[i]], abs=1e-9)


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 2e-4), (torch.bfloat16, 1.5)])
def test_fp32_and_bf16_are_close_and_so_is_a_served_model(dtype, atol):
    check(build(dtype=dtype), GROUPS, build(), atol)
    check(prepare_for_inference(build(dtype=dtype)), GROUPS, build(), atol)


class Counted:
    """GPTReader that notes what it is given."""

    def __init__(self, model: GPT):
        self.reader, self.seen = GPTReader(model, CPU), []
        self.limit, self.tokens, self.shares = self.reader.limit, self.reader.tokens, True

    def logits(self, reads):
        self.seen.append(reads)
        return self.reader.logits(reads)


def test_some_of_these_groups_share_a_prefix_and_some_do_not():
    """Else the tests above would be of less than they seem."""
    reader = Counted(build())
    score(reader, GROUPS, tokens=300)
    shared = [reads.prefixes.shape for reads in reader.seen if reads.prefixes is not None]
    assert sum(N for N, _ in shared) == 4 and max(N for N, _ in shared) > 1 and len(reader.seen) > len(shared) + 1


def test_a_prefix_is_read_once_and_the_head_sees_only_what_counts():
    reader = Counted(build())
    score(reader, [choices(50, 2, 3, 4)])
    (reads,) = reader.seen
    # the last token of the context, and all but the last of the tail
    assert reads.prefixes.shape == (1, 49) and reads.ids.shape == (3, 4)
    assert len(reads.rows) == 2 + 3 + 4


def test_what_is_the_same_is_read_once():
    reader = Counted(build())
    score(reader, [choices(50, 1, 1, 1, 1), choices(31, 5) * 3])
    assert sorted(len(reads.ids) for reads in reader.seen) == [2] and reader.seen[0].prefixes is None


def test_passes_keep_to_the_tokens_that_they_may_have():
    reader = Counted(build())
    score(
        reader,
        [choices(30 + i % 7, 3, 4, 2, seed=i) for i in range(20)] + [[Text(ids(5 + i, i), 4)] for i in range(20)],
        tokens=150,
    )
    sizes = [reads.ids.size + (0 if reads.prefixes is None else reads.prefixes.size) for reads in reader.seen]
    assert max(sizes) <= 150 and len(sizes) < 16


def test_of_equally_likely_tokens_the_lowest_is_the_greedy_one():
    model = build(replace(CONFIG, softcap=0.0))
    with torch.no_grad():
        model.lm_head.weight.zero_()
    found = score(GPTReader(model, CPU), [[Text([3, 1, 0, 0], 2), Text([3, 1, 0, 1], 2), Text([3, 1, 2], 2)]])[0]
    assert [s.greedy for s in found] == [True, False, False]
    assert [s.nats for s in found] == pytest.approx([n * math.log(V) for n in (2, 2, 1)])


def test_texts_are_of_any_sequence():
    lists = [[Text(t.ids, t.start) for t in choices(30, 2, 3)]]
    arrays = [
        [Text(np.array(t.ids, dtype=np.int32), t.start) for t in lists[0]],
        [Text(tuple(t.ids), t.start) for t in lists[0]],
    ]
    reader = GPTReader(build(), CPU)
    for scores in score(reader, arrays):
        assert [s.nats for s in scores] == pytest.approx([s.nats for s in score(reader, lists)[0]], abs=1e-9)


@pytest.mark.parametrize(
    "text, said",
    [
        (Text([1, 2, 3], 0), "3 tokens, scored from token 0 on"),
        (Text([1, 2, 3], 3), "expected at least one scored token"),
        (Text(list(range(60)) + [1] * 20, 16), "80 tokens, scored from token 16 on, for a model that reads 64"),
    ],
)
def test_a_text_without_context_or_tail_is_named(text, said):
    with pytest.raises(UserError, match=said):
        score(GPTReader(build(), CPU), [choices(5, 2), [text]])


def test_a_loss_that_is_no_number_is_named():
    model = build()
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(UserError, match="the loss of 1 of 1 texts is nan; expected a finite number"):
        score(GPTReader(model, CPU), [[Text([1, 2, 3], 1)]])


def test_one_token_of_context_is_enough():
    check(build(), [[Text(list(range(60)) + [1] * 20, 17)]])
