"""The optimizer on one rank: AdamW against torch's and float64, groups, state, errors. Ranks: test_optim_dist.py."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from nanolab.cli import UserError
from nanolab.model.config import GPTConfig
from nanolab.runtime import Runtime
from nanolab.stages.config import BaseTrainConfig
from nanolab.training.optim import MuonAdamW
from nanolab.training.recipes import param_groups

ONE = Runtime(torch.device("cpu"), torch.float32)


def adamw_group(params, **changes):
    return (
        dict(name="a", kind="adamw", params=params, lr=0.01, betas=(0.8, 0.96), eps=1e-10, weight_decay=0.1) | changes
    )


def muon_group(params, **changes):
    return (
        dict(name="m", kind="muon", params=params, lr=0.02, momentum=0.9, beta2=0.9, weight_decay=0.1, ns_steps=5)
        | changes
    )


def parameters(*shapes, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [(f"p{i}", nn.Parameter(torch.randn(s, generator=g))) for i, s in enumerate(shapes)]


def set_gradients(params, seed):
    g = torch.Generator().manual_seed(seed)
    for _, p in params:
        p.grad = torch.randn(p.shape, generator=g) * 0.01


def small_optimizer():
    """Two AdamW parameters and five matrices, of which 4 share a group. Returns (optimizer, all named parameters)."""
    tables, scalars, squares, wide = (
        parameters((40, 30)),
        parameters((3,), seed=1),
        parameters(*[(8, 8)] * 4, seed=2),
        parameters((8, 20), seed=3),
    )
    groups = [
        adamw_group([("table", tables[0][1])]),
        adamw_group([("scalar", scalars[0][1])], weight_decay=0.0),
        muon_group([(f"square{i}", p) for i, (_, p) in enumerate(squares)]),
        muon_group([("wide", wide[0][1])]),
    ]
    return MuonAdamW(groups, ONE), [pair for group in groups for pair in group["params"]]


def test_adamw_equals_torch_adamw():
    params = parameters((70, 33), (5,), ())
    oracle_params = [nn.Parameter(p.detach().clone()) for _, p in params]
    optimizer = MuonAdamW([adamw_group(params)], ONE)
    oracle = torch.optim.AdamW(
        oracle_params, lr=0.01, betas=(0.8, 0.96), eps=1e-10, weight_decay=0.1, foreach=False, fused=False
    )
    for step in range(5):
        set_gradients(params, step)
        for (_, p), q in zip(params, oracle_params):
            q.grad = p.grad.clone()
        optimizer.groups[0]["lr"] = oracle.param_groups[0]["lr"] = 0.01 / (step + 1)
        optimizer.step()
        oracle.step()
        for (_, p), q in zip(params, oracle_params):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)  # same formula, another order of operations


def test_adamw_equals_the_formula_in_float64():
    ((_, p),) = params = parameters((6, 7))
    x, m, v = p.detach().double().numpy().copy(), 0.0, 0.0
    optimizer = MuonAdamW([adamw_group(params, eps=0.05)], ONE)  # an eps that would show on the wrong side of the root
    for t in range(1, 5):
        set_gradients(params, t)
        g = p.grad.double().numpy()
        m, v = 0.8 * m + 0.2 * g, 0.96 * v + 0.04 * g**2
        x = x - 0.01 * 0.1 * x - 0.01 * (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.96**t)) + 0.05)
        optimizer.step()
        np.testing.assert_allclose(p.detach().numpy(), x, rtol=1e-6, atol=1e-7)


def test_a_row_that_was_never_seen_only_decays():
    """Tables of rare tokens: no gradient, ever, must not divide zero by a tiny eps into something else."""
    ((_, p),) = params = parameters((4, 300))
    before = p.detach().clone()
    p.grad = torch.randn(4, 300)
    p.grad[2] = 0
    MuonAdamW([adamw_group(params)], ONE).step()
    torch.testing.assert_close(p[2], before[2] * (1 - 0.01 * 0.1), rtol=1e-6, atol=0)
    assert (p[1] - before[1]).abs().min() > 1e-3


def test_stacks_of_matrices_do_not_touch_each_other(monkeypatch):
    """A matrix gets the same update alone as among others, whatever the number of matrices updated at once."""
    from nanolab.training import groups

    alone = []
    for i in range(5):
        params = [parameters(*[(12, 8)] * 5)[i]]
        params[0][1].grad = torch.randn(12, 8, generator=torch.Generator().manual_seed(i))
        MuonAdamW([muon_group(params)], ONE).step()
        alone.append(params[0][1])
    for chunk in (1, 2 * 96, 1 << 20):
        monkeypatch.setitem(groups.CHUNK, "cpu", chunk)
        params = parameters(*[(12, 8)] * 5)
        for i, (_, p) in enumerate(params):
            p.grad = torch.randn(12, 8, generator=torch.Generator().manual_seed(i))
        grads = [p.grad.clone() for _, p in params]
        MuonAdamW([muon_group(params)], ONE).step()
        for (_, p), q, g in zip(params, alone, grads):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
            assert torch.equal(p.grad, g)


def test_bf16_iteration_stays_close_to_fp32():
    """The compute dtype decides about the iteration only; bf16 has 8 bits, so that an update may differ by a few
    percent.
    """
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        params = parameters(*[(32, 32)] * 2)
        before = [p.detach().clone() for _, p in params]
        set_gradients(params, 1)
        MuonAdamW([muon_group(params, weight_decay=0.0)], Runtime(torch.device("cpu"), dtype)).step()
        results[dtype] = torch.stack([p.detach() - b for (_, p), b in zip(params, before)])
        assert params[0][1].dtype == torch.float32
    error = (results[torch.bfloat16] - results[torch.float32]).norm() / results[torch.float32].norm()
    assert 1e-4 < error < 0.05


def test_the_loop_sets_rates_and_initial_lr_stays():
    optimizer, params = small_optimizer()
    assert [g["initial_lr"] for g in optimizer.groups] == [0.01, 0.01, 0.02, 0.02]
    before = [p.detach().clone() for _, p in params]
    for group in optimizer.groups:
        group["lr"] = 0.0
    set_gradients(params, 0)
    optimizer.step()
    assert all(torch.equal(p, b) for (_, p), b in zip(params, before))
    assert [g["initial_lr"] for g in optimizer.groups] == [0.01, 0.01, 0.02, 0.02]


def test_grad_norm_is_the_norm_of_all_gradients_and_changes_nothing():
    runs = []
    for ask in (False, True):
        optimizer, params = small_optimizer()
        set_gradients(params, 7)
        if ask:
            expected = np.sqrt(sum((p.grad.double().numpy() ** 2).sum() for _, p in params))
            assert optimizer.grad_norm().item() == pytest.approx(expected, rel=1e-6)
        optimizer.step()
        runs.append([p.detach().clone() for _, p in params])
    assert all(torch.equal(a, b) for a, b in zip(*runs))
    params[0][1].grad[0, 0] = float("nan")
    assert optimizer.grad_norm().isnan()


@pytest.mark.parametrize("share", [0.3, 1.0, 5.0])
def test_clipping_is_torchs(share):
    """Below, at and above the norm: the gradients that `step` uses are those that torch.nn.utils.clip_grad_norm_
    leaves.
    """
    optimizer, params = small_optimizer()
    clipped, clipped_params = small_optimizer()
    for ps in (params, clipped_params):
        set_gradients(ps, 7)
    limit = share * torch.nn.utils.get_total_norm([p.grad for _, p in params]).item()
    before = torch.nn.utils.clip_grad_norm_([p for _, p in params], limit)
    assert clipped.grad_norm(limit).item() == pytest.approx(before.item(), rel=1e-6)
    assert clipped.grad_norm().item() == pytest.approx(min(share, 1.0) * before.item(), rel=1e-5)
    for o in (optimizer, clipped):
        o.step()
    for (_, p), (_, q) in zip(params, clipped_params):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    for key, state in optimizer.state_dict().items():  # one step is blind to the gradient's scale; its moments are not
        torch.testing.assert_close(clipped.state_dict()[key], state, rtol=1e-5, atol=0)


def test_grad_norm_of_a_step_not_taken_is_forgotten():
    optimizer, params = small_optimizer()
    set_gradients(params, 1)
    optimizer.grad_norm()
    optimizer.zero_grad()
    assert all(p.grad is None for _, p in params)
    set_gradients(params, 2)
    optimizer.step()
    other, other_params = small_optimizer()
    set_gradients(other_params, 2)
    other.step()
    assert all(torch.equal(p, q) for (_, p), (_, q) in zip(params, other_params))


def test_state_returns_bit_for_bit_and_the_next_step_too():
    optimizer, params = small_optimizer()
    for step in range(3):
        set_gradients(params, step)
        optimizer.step()
    state = {k: t.clone() for k, t in optimizer.state_dict().items()}
    assert sorted(k for k in state if k.startswith(("table", "wide"))) == [
        "table/exp_avg@0:1200",
        "table/exp_avg_sq@0:1200",
        "wide/momentum@0:160",
        "wide/second_moment@0:20",
    ]
    assert state["step"] == 3
    other, other_params = small_optimizer()
    other.load_state_dict(state)
    assert all(torch.equal(t, state[k]) for k, t in other.state_dict().items())
    with torch.no_grad():
        for (_, q), (_, p) in zip(other_params, params):
            q.copy_(p)
    for o, ps in ((optimizer, params), (other, other_params)):
        set_gradients(ps, 9)
        o.step()
    assert all(torch.equal(p, q) for (_, p), (_, q) in zip(params, other_params))


@pytest.mark.parametrize(
    "change,words",
    [
        (lambda s: s.pop("square2/momentum@0:64"), "square2/momentum (has nothing of 0:64)"),
        (lambda s: s.pop("step"), "missing or incomplete: step"),
        (lambda s: s.update({"gone/exp_avg@0:5": torch.zeros(5)}), "unknown: gone/exp_avg@0:5"),
        (
            lambda s: s.update({"table/exp_avg@0:600": s.pop("table/exp_avg@0:1200")[:600]}),
            "table/exp_avg (has 0:600 of 0:1200)",
        ),
        (
            lambda s: s.update({"table/exp_avg@600:1200": torch.zeros(600)}),
            "table/exp_avg (has 0:1200, 600:1200 of 0:1200)",
        ),
    ],
)
def test_state_of_another_model_is_refused_by_name_and_nothing_changes(change, words):
    optimizer, params = small_optimizer()
    set_gradients(params, 0)
    optimizer.step()
    state = {k: t + 1 for k, t in optimizer.state_dict().items()}
    change(state)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(UserError) as error:
        optimizer.load_state_dict(state)
    assert words in str(error.value)
    assert all(torch.equal(t, before[k]) for k, t in optimizer.state_dict().items())


def test_mistakes_in_groups_are_named():
    with pytest.raises(ValueError, match=r"\[\(3, 4\), \(4, 3\)\]; expected matrices of one shape"):
        MuonAdamW([muon_group(parameters((3, 4), (4, 3)))], ONE)
    with pytest.raises(ValueError, match="expected matrices"):
        MuonAdamW([muon_group(parameters((3,)))], ONE)
    with pytest.raises(ValueError, match="ns_steps"):
        MuonAdamW([muon_group(parameters((3, 4)), ns_steps=6)], ONE)
    with pytest.raises(ValueError, match="p0 is torch.bfloat16"):
        MuonAdamW([adamw_group([("p0", nn.Parameter(torch.zeros(4, dtype=torch.bfloat16)))])], ONE)
    params = parameters((3, 4), (3, 4))
    params[0][1].grad = torch.zeros(3, 4)
    with pytest.raises(RuntimeError, match="parameter p1 has no gradient"):
        MuonAdamW([muon_group(params)], ONE).step()


def test_the_model_learns_a_batch_and_two_runs_are_bit_identical(make_gpt):
    config = GPTConfig(sequence_len=16, vocab_size=64, n_layer=2, n_head=2, n_embd=32)
    tokens = torch.randint(0, 64, (4, 17), generator=torch.Generator().manual_seed(0))
    runs = []
    for _ in range(2):
        model = make_gpt(config)
        rates = BaseTrainConfig(embedding_lr=0.02, unembedding_lr=0.004, matrix_lr=0.02, scalar_lr=0.1)
        optimizer = MuonAdamW(
            param_groups(model, rates, SimpleNamespace(recipe="dial", batch_scale=1.0, weight_decay=0.1, model=config)),
            ONE,
        )
        assert {id(p) for p in optimizer.params} == {id(p) for p in model.parameters()} and len(
            optimizer.params
        ) == len(list(model.parameters()))
        losses = []
        for _ in range(40):
            loss = model(tokens[:, :-1], tokens[:, 1:])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        runs.append((losses, [p.detach().clone() for p in model.parameters()]))
    (losses, weights), (again, weights_again) = runs
    assert losses == again and all(torch.equal(a, b) for a, b in zip(weights, weights_again))
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.gpu
def test_gpu_equals_cpu():
    devices = []
    for device in ("cpu", "cuda"):
        params = [
            (n, nn.Parameter(p.detach().to(device))) for n, p in parameters((70, 33), (5,), (16, 16), (16, 16), (8, 32))
        ]
        groups = [adamw_group(params[:2]), muon_group(params[2:4]), muon_group(params[4:])]
        optimizer = MuonAdamW(groups, Runtime(torch.device(device), torch.float32))
        for step in range(3):
            for i, (_, p) in enumerate(params):
                p.grad = (torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + i)) * 0.01).to(
                    device
                )
            optimizer.step()
        devices.append([p.detach().cpu() for _, p in params])
    for a, b in zip(*devices):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
