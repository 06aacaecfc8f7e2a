"""The optimizer on 1, 2, 3 and 4 gloo ranks: same result, same state, and state that moves between rank counts.

Every function that takes a `runtime` first runs in the ranks' processes.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nanolab.model.config import GPTConfig
from nanolab.model.gpt import GPT
from nanolab.runtime import Runtime
from nanolab.stages.config import BaseTrainConfig
from nanolab.training.optim import MuonAdamW
from nanolab.training.recipes import param_groups

ONE = Runtime(torch.device("cpu"), torch.float32)
PARTS = 12  # of every gradient; rank r of W adds up parts r, r + W, ...
# ragged: 1517 elements divide by no rank count. exact: 2048 fill the ranges of 2 and 4 ranks. tiny, scalar: replicated.
ADAMW = {"ragged": (37, 41), "exact": (64, 32), "short": (1025,), "tiny": (5, 3), "scalar": ()}
# 3, 2 and 1 matrices: some ranks own one more than others, some none.
MUON = [("square", 3, (8, 8)), ("wide", 2, (4, 12)), ("tall", 1, (12, 4))]


def build(runtime):
    """(optimizer, {name: parameter}), equal on every rank."""
    g = torch.Generator().manual_seed(0)
    named = {n: nn.Parameter(torch.randn(s, generator=g)) for n, s in ADAMW.items()}
    adamw = dict(kind="adamw", betas=(0.8, 0.96), eps=1e-10)
    groups = [
        dict(
            name="tables",
            params=[(n, named[n]) for n in ("ragged", "tiny", "exact")],
            lr=0.01,
            weight_decay=0.1,
            **adamw,
        ),
        dict(name="rest", params=[(n, named[n]) for n in ("scalar", "short")], lr=0.02, weight_decay=0.0, **adamw),
    ]
    for name, k, shape in MUON:
        params = [(f"{name}{i}", nn.Parameter(torch.randn(shape, generator=g))) for i in range(k)]
        named |= dict(params)
        groups.append(
            dict(name=name, kind="muon", params=params, lr=0.02, momentum=0.9, beta2=0.9, weight_decay=0.1, ns_steps=5)
        )
    return MuonAdamW(groups, runtime), named


def set_gradients(named, step, runtime):
    """Multiples of 2^-12: their sum is exact in any order, so that rank counts differ by the rounding of kernels
    only.
    """
    g = torch.Generator().manual_seed(100 + step)
    for p in named.values():
        parts = torch.randint(-64, 65, (PARTS, *p.shape), generator=g).float() / 4096
        p.grad = parts[runtime.rank :: runtime.world_size].sum(dim=0)


def train(runtime, steps=4):
    """(weights, own state, norms) after `steps` steps. Norms are asked for at every second step only."""
    optimizer, named = build(runtime)
    norms = []
    for step in range(steps):
        set_gradients(named, step, runtime)
        if step % 2:
            norms.append(optimizer.grad_norm().item())
        optimizer.step()
        optimizer.zero_grad()
    return {n: p.detach().clone() for n, p in named.items()}, dict(optimizer.state_dict()), norms


CLIP = 0.5


def clipped(runtime):
    """Weights and state after two steps whose gradients were clipped at CLIP, and the norms before."""
    optimizer, named = build(runtime)
    norms = []
    for step in range(2):
        set_gradients(named, step, runtime)
        norms.append(optimizer.grad_norm(CLIP).item())
        optimizer.step()
        optimizer.zero_grad()
    return {n: p.detach().clone() for n, p in named.items()}, dict(optimizer.state_dict()), norms


def reload(runtime, pieces):
    """Own state after loading `pieces`."""
    optimizer, _ = build(runtime)
    optimizer.load_state_dict(pieces)
    return dict(optimizer.state_dict())


def several(runtime, pieces):
    """What one launch of a rank count answers: two trainings, the state of another rank count loaded, a clipped
    training.
    """
    return train(runtime), train(runtime), reload(runtime, pieces), clipped(runtime)


def merged(states):
    """All ranks' pieces in one dict; no key may come twice."""
    together = {k: t for state in states for k, t in state.items()}
    assert len(together) == sum(len(s) for s in states)
    return together


def whole(pieces):
    """Slot -> all its elements, whatever the cuts."""
    slots = {}
    for key in pieces:
        slot, _, span = key.partition("@")
        slots.setdefault(slot, []).append((int(span.split(":")[0]) if span else 0, pieces[key].reshape(-1)))
    return {slot: torch.cat([t for _, t in sorted(parts, key=lambda part: part[0])]) for slot, parts in slots.items()}


def bit_equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def assert_close(a, b, **tolerances):
    assert a.keys() == b.keys()
    for k in a:
        torch.testing.assert_close(a[k], b[k], msg=lambda text, k=k: f"{k}: {text}", **tolerances)


@pytest.fixture(scope="module")
def one():
    return train(ONE)


@pytest.fixture(scope="module")
def two(run_ranks, one):
    return run_ranks(several, 2, one[1])


@pytest.fixture(scope="module")
def four(run_ranks, two):
    return run_ranks(several, 4, merged([rank[0][1] for rank in two]))


@pytest.fixture(scope="module")
def three(run_ranks, four):
    return run_ranks(several, 3, merged([rank[0][1] for rank in four]))


RANKS = pytest.mark.parametrize("ranks", ["two", pytest.param("three", marks=pytest.mark.slow), "four"])


@RANKS
def test_ranks_agree_with_each_other_and_with_themselves_bit_for_bit(ranks, request):
    results = request.getfixturevalue(ranks)
    for first, second, *_ in results:
        assert bit_equal(first[0], results[0][0][0])
        assert bit_equal(first[0], second[0]) and bit_equal(first[1], second[1]) and first[2] == second[2]


@RANKS
def test_many_ranks_equal_one(ranks, one, request):
    """Summed gradients are exact here, and ranges are aligned, so that AdamW agrees to the bit. Muon multiplies stacks
    of other sizes, which a processor's library may do in another order: fp32 rounding, grown by the iteration."""
    results = request.getfixturevalue(ranks)
    weights, state, norms = one
    found, found_state = results[0][0][0], whole(merged([r[0][1] for r in results]))
    assert all(torch.equal(found[n], weights[n]) for n in ADAMW)
    assert_close(found, weights, rtol=0, atol=2e-6)
    assert_close(found_state, whole(state), rtol=1e-4, atol=1e-9)
    assert results[0][0][2] == pytest.approx(norms, rel=1e-6)


def test_grad_norm_is_that_of_the_sum_over_ranks(two):
    _, named = build(ONE)
    expected = []
    for step in (1, 3):
        set_gradients(named, step, ONE)
        expected.append(math.sqrt(sum(p.grad.double().square().sum().item() for p in named.values())))
    assert two[0][0][2] == two[1][0][2] == pytest.approx(expected, rel=1e-6)


@RANKS
def test_clipping_on_ranks_is_torchs_on_the_whole_gradient(ranks, request):
    """Oracle: torch clips the whole gradient on one rank, the optimizer is told nothing."""
    optimizer, named = build(ONE)
    norms = []
    for step in range(2):
        set_gradients(named, step, ONE)
        norms.append(torch.nn.utils.clip_grad_norm_(named.values(), CLIP).item())
        optimizer.step()
    assert min(norms) > 2 * CLIP
    results = [r[3] for r in request.getfixturevalue(ranks)]
    for weights, _, found in results:
        assert found == results[0][2] == pytest.approx(norms, rel=1e-6)
        assert bit_equal(weights, results[0][0])
        assert_close(weights, named, rtol=0, atol=2e-6)
    state = whole(optimizer.state_dict())  # moments know the gradient's scale, to which an update is nearly blind
    assert_close(whole(merged([r[1] for r in results])), state, rtol=1e-4, atol=1e-9)


@RANKS
def test_state_is_divided_not_repeated(ranks, one, request):
    """Per rank at most its share, rounded up, of everything that is worth dividing."""
    results = request.getfixturevalue(ranks)
    total = sum(t.numel() for t in one[1].values())
    held = [sum(t.numel() for t in r[0][1].values()) for r in results]
    assert sum(held) == total and max(held) < 1.35 * total / len(results)


def test_state_moves_between_rank_counts_bit_for_bit(one, two, four, three):
    moves = [
        (one[1], merged([r[2] for r in two])),
        (merged([r[0][1] for r in two]), reload(ONE, merged([r[0][1] for r in two]))),
        (merged([r[0][1] for r in two]), merged([r[2] for r in four])),
        (merged([r[0][1] for r in four]), merged([r[2] for r in three])),
    ]
    for saved, loaded in moves:
        assert bit_equal(whole(saved), whole(loaded)) and saved["step"] == loaded["step"] == 4


def half_batches(runtime):
    """Losses and weights of a model that sees its rank's rows of the same global batches.

    Every weight is moved off its initial value first. At initialisation the blocks add nothing, the last norm removes
    the scale of what is left, and so the gradients of backout and residual weights are rounding alone, which AdamW,
    blind to size, would turn into full steps of either sign. With two layers backout would stay such a weight."""
    config = GPTConfig(sequence_len=32, vocab_size=96, n_layer=3, n_head=2, n_embd=32)
    model = GPT(config)
    model.init_weights(0)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=noise))
    rates = BaseTrainConfig(embedding_lr=0.02, unembedding_lr=0.004, matrix_lr=0.02, scalar_lr=0.1)
    optimizer = MuonAdamW(
        param_groups(model, rates, SimpleNamespace(recipe="dial", batch_scale=1.0, weight_decay=0.1, model=config)),
        runtime,
    )
    g = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(8):
        rows = torch.randint(0, 96, (8, 33), generator=g)
        mine = rows[runtime.rank :: runtime.world_size]
        loss = model(mine[:, :-1], mine[:, 1:], reduction="sum") / (8 * 32)
        loss.backward()
        losses.append(runtime.all_reduce_(loss.detach().clone()).item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, {n: p.detach().clone() for n, p in model.named_parameters()}


def test_training_on_two_ranks_equals_training_on_one(run_ranks):
    losses, weights = half_batches(ONE)
    results = run_ranks(half_batches, 2)
    for other_losses, other_weights in results:
        # Gradients differ by the order of their sums (1e-7), grown by AdamW's and Muon's divisions.
        assert other_losses == pytest.approx(losses, rel=2e-6)
        for name, w in weights.items():
            error = (w - other_weights[name]).norm() / w.norm().clamp_min(1e-3)
            assert error < 1e-4, name
    assert bit_equal(results[0][1], results[1][1])


def fail_on_rank_one(runtime):
    if runtime.rank == 1:
        raise ValueError("the one that fails")
    runtime.barrier()


def test_a_failing_rank_ends_all_and_is_heard(run_ranks):
    with pytest.raises(AssertionError, match="the one that fails"):
        run_ranks(fail_on_rank_one, 2)
