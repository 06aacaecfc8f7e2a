"""Loss scaling: the rule of torch.amp.GradScaler, gradients that come out exact, and one decision for all ranks."""

import pytest
import torch
from torch import nn

from nanolab.cli import UserError
from nanolab.runtime import Runtime
from nanolab.training.scaler import LossScaler

ONE = Runtime(torch.device("cpu"), torch.float16)


class Holder:
    """As much of an optimizer as the scaler looks at."""

    def __init__(self, *params):
        self.groups = [dict(params=[(f"p{i}", p)]) for i, p in enumerate(params)]


def overflow_pattern():
    g = torch.Generator().manual_seed(0)
    return (torch.rand(60, generator=g) < 0.2).tolist() + [False] * 12


def test_the_scale_follows_torch_grad_scaler():
    """Same sequence of good and overflowing steps, same scales: growth after 4 good ones in a row, halved at each
    overflow.
    """
    theirs = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_factor=2.0, backoff_factor=0.5, growth_interval=4)
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    sgd = torch.optim.SGD([q], lr=0.125)
    ours = LossScaler(ONE, initial_scale=1024.0, growth_interval=4)
    holder, scales = Holder(p), []
    for overflow in overflow_pattern():
        weight = torch.full((3,), float("inf") if overflow else 0.25)
        ours.scale((p * weight).sum()).backward()
        found_inf = ours.unscale_(holder)
        assert found_inf == overflow
        if not found_inf:
            with torch.no_grad():
                p -= 0.125 * p.grad
        ours.update(found_inf)
        theirs.scale((q * weight).sum()).backward()
        theirs.step(sgd)
        theirs.update()
        p.grad = q.grad = None
        assert ours.factor == theirs.get_scale()
        scales.append(ours.factor)
    assert torch.equal(p, q)
    assert len(set(scales)) > 4 and scales[-1] > min(scales)  # it went both ways


def test_unscaled_gradients_are_bit_equal_to_plain_ones():
    g = torch.Generator().manual_seed(1)
    p, x = nn.Parameter(torch.randn(50, 7, generator=g)), torch.randn(7, generator=g)
    (p @ x).square().mean().backward()
    plain, p.grad = p.grad, None
    scaler = LossScaler(ONE)
    scaler.scale((p @ x).square().mean()).backward()
    assert not torch.equal(p.grad, plain)
    assert scaler.unscale_(Holder(p)) is False
    assert torch.equal(p.grad, plain)


def test_scaling_keeps_gradients_that_fp16_would_lose():
    x = torch.ones(4, dtype=torch.float16)
    w = nn.Parameter(torch.ones(4))

    def gradient(scaler):
        w.grad = None
        loss = (w.half() * x).sum().float() * 1e-8  # below 6e-8, the smallest fp16 number
        (scaler.scale(loss) if scaler else loss).backward()
        if scaler:
            scaler.unscale_(Holder(w))
        return w.grad

    assert torch.equal(gradient(None), torch.zeros(4))
    torch.testing.assert_close(gradient(LossScaler(ONE)), torch.full((4,), 1e-8), rtol=1e-3, atol=0)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_one_bad_element_of_many_is_found(bad):
    p, q = nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(100, 100))
    p.grad, q.grad = torch.full((5,), 3e38), torch.ones(100, 100)  # large but finite: its square is not
    assert LossScaler(ONE).unscale_(Holder(p, q)) is False
    q.grad[57, 99] = bad
    assert LossScaler(ONE).unscale_(Holder(p, q)) is True


def test_no_backward_pass_is_an_error():
    with pytest.raises(RuntimeError, match="no parameter has a gradient"):
        LossScaler(ONE).unscale_(Holder(nn.Parameter(torch.zeros(2))))


def test_state_goes_through_json_and_the_sequence_goes_on():
    import json

    pattern = overflow_pattern()
    straight, first = LossScaler(ONE, growth_interval=3), LossScaler(ONE, growth_interval=3)
    for overflow in pattern[:20]:
        straight.update(overflow)
        first.update(overflow)
    second = LossScaler(ONE, growth_interval=3)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for overflow in pattern[20:]:
        straight.update(overflow)
        second.update(overflow)
        assert (second.factor, second.good_steps) == (straight.factor, straight.good_steps)
    with pytest.raises(UserError, match="loss scaler state has"):
        second.load_state_dict({"scale": 1.0})


def overflow_on_rank_one(runtime):
    p = nn.Parameter(torch.zeros(3))
    scaler, found = LossScaler(runtime, initial_scale=8.0), []
    for bad in (False, True):
        p.grad = torch.tensor([1.0, float("inf") if bad and runtime.rank == 1 else 1.0, 1.0])
        found.append(scaler.unscale_(Holder(p)))
        scaler.update(found[-1])
    return found, scaler.factor


def test_an_overflow_on_one_rank_skips_the_step_on_all(run_ranks):
    assert run_ranks(overflow_on_rank_one, 2) == [([False, True], 4.0)] * 2
