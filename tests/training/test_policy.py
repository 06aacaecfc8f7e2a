"""The objective against definitions written out in numpy, one reply and token at a time."""

import math
import statistics

import numpy as np
import pytest
import torch

from nanolab.cli import UserError
from nanolab.stages.config import RLConfig
from nanolab.stages.rl_plan import objective_of
from nanolab.training.policy import ADVANTAGES, ALGORITHMS, NORMALISERS, Objective, clipped, k3, policy_loss

MAX = 7  # --max-new-tokens
SHAPE = (4, 6)  # replies, tokens


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def situation(seed: int = 0, moved: float = 0.5) -> tuple:
    """logprobs (with gradient), old, reference, mask, advantages. Masks of different lengths, with a hole where a tool
    spoke.
    """
    g = rng(seed)
    lp = -3 * torch.rand(SHAPE, generator=g, dtype=torch.float64)
    old, reference = (lp + moved * torch.randn(SHAPE, generator=g, dtype=torch.float64) for _ in range(2))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 1, 1, 0, 0, 1], [0, 0, 0, 0, 1, 0], [1, 1, 0, 0, 0, 0]]).bool()
    advantages = torch.tensor([1.5, -0.5, 0.25, -1.0], dtype=torch.float64)
    return lp.requires_grad_(), old, reference, mask, advantages


def by_hand(o: Objective, lp, old, reference, mask, advantages) -> float:
    """The loss of a whole batch: formulas of the papers, in loops."""
    lp, old, reference, mask, advantages = (x.detach().numpy() for x in (lp, old, reference, mask, advantages))
    replies = []
    for i in range(len(lp)):
        values = []
        for t in np.flatnonzero(mask[i]):
            ratio = math.exp(lp[i, t]) / math.exp(old[i, t])
            inside = min(
                max(ratio, 1 - o.clip_low if o.clip_low else -math.inf), 1 + o.clip_high if o.clip_high else math.inf
            )
            apart = math.exp(reference[i, t]) / math.exp(lp[i, t])
            values.append(-min(ratio * advantages[i], inside * advantages[i]) + o.kl * (apart - math.log(apart) - 1))
        replies.append(values)
    if o.normaliser == "token":
        return statistics.fmean(v for values in replies for v in values)
    if o.normaliser == "sequence":
        return statistics.fmean(statistics.fmean(values) for values in replies)
    return statistics.fmean(sum(values) / MAX for values in replies)


def mean_loss(o: Objective, lp, old, reference, mask, advantages) -> torch.Tensor:
    return policy_loss(o, lp, old, reference if o.kl else None, mask, advantages, MAX) / NORMALISERS[
        o.normaliser
    ].total(mask)


OBJECTIVES = {
    **ALGORITHMS,
    **{n: Objective(normaliser=n, clip_low=0.1, clip_high=0.3, kl=0.2) for n in NORMALISERS},
    "low": Objective(clip_low=0.2),
    "high": Objective(clip_high=0.2),
}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("seed", range(3))
def test_the_loss_is_its_definition_and_its_gradient_that_of_finite_differences(name, seed):
    o, (lp, *rest) = OBJECTIVES[name], situation(seed)
    loss = mean_loss(o, lp, *rest)
    assert loss.item() == pytest.approx(by_hand(o, lp, *rest), rel=1e-9)
    (gradient,) = torch.autograd.grad(loss, lp)
    for i, t in np.ndindex(SHAPE):
        h = torch.zeros_like(lp)
        h[i, t] = 1e-6
        slope = (by_hand(o, lp + h, *rest) - by_hand(o, lp - h, *rest)) / 2e-6
        assert gradient[i, t].item() == pytest.approx(slope, abs=2e-7)


def test_parts_of_a_batch_make_the_whole():
    """Micro-batches' sums over the batch's total: how the loop counts them."""
    for o in OBJECTIVES.values():
        lp, old, reference, mask, advantages = situation()
        reference = reference if o.kl else None
        cut = [
            policy_loss(o, lp[s], old[s], None if reference is None else reference[s], mask[s], advantages[s], MAX)
            for s in (slice(1), slice(1, 4))
        ]
        total = sum(NORMALISERS[o.normaliser].total(mask[s]) for s in (slice(1), slice(1, 4)))
        assert (sum(cut) / total).item() == pytest.approx(
            by_hand(o, lp, old, situation()[2], mask, advantages), rel=1e-9
        )


@pytest.mark.parametrize("name", ALGORITHMS)
def test_on_policy_every_algorithm_is_reinforce(name):
    """Where the policy is the one that drew: d loss / d log pi = -A w, whatever the clip."""
    o = ALGORITHMS[name]
    lp, _, _, mask, advantages = situation()
    old = lp.detach().clone()
    (gradient,) = torch.autograd.grad(mean_loss(o, lp, old, old, mask, advantages), lp)
    lengths = mask.sum(1).tolist()
    share = {"token": [1 / sum(lengths)] * 4, "sequence": [1 / n / 4 for n in lengths], "constant": [1 / MAX / 4] * 4}[
        o.normaliser
    ]
    for i, t in np.ndindex(SHAPE):
        assert gradient[i, t].item() == pytest.approx(
            -advantages[i].item() * share[i] if mask[i, t] else 0.0, abs=1e-12
        )


def test_reinforce_reaches_the_weights_of_a_softmax():
    """A one-token policy softmax(theta): the gradient of the mean of -A log pi is the mean of -A (onehot - pi)."""
    theta = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
    drawn, A = torch.tensor([0, 2, 2, 1]), torch.tensor([1.0, -0.5, 0.25, 2.0], dtype=torch.float64)
    lp = theta.log_softmax(0)[drawn][:, None]
    (gradient,) = torch.autograd.grad(
        mean_loss(ALGORITHMS["reinforce"], lp, lp.detach(), None, torch.ones(4, 1).bool(), A), theta
    )
    pi = np.exp([0.3, -0.2, 0.5]) / np.exp([0.3, -0.2, 0.5]).sum()
    wanted = np.mean([-a * (np.eye(3)[d] - pi) for d, a in zip(drawn.tolist(), A.tolist())], axis=0)
    np.testing.assert_allclose(gradient, wanted, atol=1e-12)


def test_untrained_tokens_have_no_gradient_however_far_they_are():
    for o in OBJECTIVES.values():
        lp, old, reference, mask, advantages = situation()
        far = torch.where(mask, old, old - 50.0)  # a prompt's or a tool's tokens may be anything
        (gradient,) = torch.autograd.grad(mean_loss(o, lp, far, reference, mask, advantages), lp)
        assert (gradient[~mask] == 0).all() and (gradient[mask] != 0).any()


@pytest.mark.parametrize(
    "ratio,advantage,stopped",
    [
        (1.5, 1.0, True),
        (1.5, -1.0, False),
        (0.5, -1.0, True),
        (0.5, 1.0, False),
        (1.25, 1.0, False),
        (0.85, -1.0, False),
        (0.75, -1.0, True),
        (1.35, 1.0, True),
    ],
)
def test_the_clip_stops_a_token_exactly_where_it_has_gone_far_enough(ratio, advantage, stopped):
    lp = torch.tensor([[math.log(ratio)]], requires_grad=True)
    A, old, one = torch.tensor([advantage]), torch.zeros(1, 1), torch.ones(1, 1).bool()
    o = Objective(clip_low=0.2, clip_high=0.3)
    (gradient,) = torch.autograd.grad(policy_loss(o, lp, old, None, one, A, MAX), lp)
    assert gradient.item() == (0.0 if stopped else pytest.approx(-advantage * ratio))
    assert clipped(lp, old, A, 0.2, 0.3).item() is stopped
    assert clipped(lp, old, A, 0.0, 0.0).item() is False, "off"


def test_one_side_of_the_clip_alone():
    for ratio, advantage, side, stopped in [
        (3.0, 1.0, "low", False),
        (0.1, -1.0, "low", True),
        (3.0, 1.0, "high", True),
        (0.1, -1.0, "high", False),
    ]:
        lp = torch.tensor([[math.log(ratio)]], requires_grad=True)
        (gradient,) = torch.autograd.grad(
            policy_loss(
                OBJECTIVES[side], lp, torch.zeros(1, 1), None, torch.ones(1, 1).bool(), torch.tensor([advantage]), MAX
            ),
            lp,
        )
        assert (gradient.item() == 0.0) is stopped


def test_the_divergence_is_right_in_the_mean():
    """E_pi[k3] = KL(pi || ref), and E_pi[grad k3] = grad KL(ref || pi), by the sum over a small vocabulary."""
    theta = torch.tensor([0.3, -0.2, 0.5, 1.0], dtype=torch.float64, requires_grad=True)
    lp, ref = theta.log_softmax(0), torch.tensor([1.0, 0.0, -1.0, 0.2], dtype=torch.float64).log_softmax(0)
    pi = lp.exp().detach()
    assert (pi @ k3(lp, ref)).item() == pytest.approx((pi * (lp - ref)).sum().item(), abs=1e-12)
    (gradient,) = torch.autograd.grad(pi @ k3(lp, ref), theta, retain_graph=True)
    (wanted,) = torch.autograd.grad((ref.exp() * (ref - lp)).sum(), theta)
    torch.testing.assert_close(gradient, wanted)
    assert (k3(lp, lp) == 0).all()


# advantages


@pytest.mark.parametrize("rewards", [[1.0, 0.0, 0.0, 0.0], [0.3, 0.9, -2.0, 0.1], [1.0, 0.0]])
def test_advantages_are_their_definitions(rewards):
    for name, table in ADVANTAGES.items():
        for i, (r, a) in enumerate(
            zip(rewards, table(torch.tensor([rewards, rewards], dtype=torch.float64))[1].tolist())
        ):
            others = rewards[:i] + rewards[i + 1 :]
            centred = r - statistics.fmean(rewards)
            wanted = {
                "mean": centred,
                "standardised": centred / (statistics.pstdev(rewards) + 1e-4),
                "leave_one_out": r - statistics.fmean(others),
            }
            assert a == pytest.approx(wanted[name], abs=1e-12)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_equal_rewards_give_exact_zeros_and_no_gradient(name):
    """Exact, because an optimizer that is indifferent to a gradient's scale makes a step of any rest."""
    rewards = torch.tensor([[0.1] * 3, [0.7] * 3], dtype=torch.float64)
    assert (rewards - rewards.mean(1, keepdim=True)).any(), "the plain formula leaves a rest"
    A = ADVANTAGES[name](rewards).flatten()
    assert (A == 0).all()
    for o in OBJECTIVES.values():
        lp, old, _, mask, _ = situation()
        lp = lp.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(policy_loss(o, lp, old, None, mask, A[:4], MAX), lp)
        assert (gradient == 0).all()


# choices


def test_an_algorithm_is_a_row_and_a_choice_replaces_one_cell():
    for name, row in ALGORITHMS.items():
        assert objective_of(RLConfig(algorithm=name)) == row
    mixed = objective_of(RLConfig(algorithm="grpo", advantage="leave_one_out", clip_high=0.28, kl=0.0))
    assert mixed == Objective("leave_one_out", "sequence", 0.2, 0.28, 0.0)


@pytest.mark.parametrize(
    "changes,said",
    [
        (
            dict(algorithm="gpro"),
            "'gpro' is unknown; expected one of reinforce, grpo, dr_grpo; did you mean --algorithm grpo",
        ),
        (dict(advantage="means"), "did you mean --advantage mean"),
        (dict(normaliser="tokens"), "did you mean --normaliser token"),
        (dict(clip_low=1.0), "--clip-low is 1; expected .* below 1"),
        (dict(clip_low=-0.1), "--clip-low is -0.1"),
        (dict(clip_high=-0.5), "--clip-high is -0.5"),
        (dict(kl=-2.0), "--kl is -2; .*try --kl 0.04"),
        (dict(kl=math.nan), "--kl is nan"),
    ],
)
def test_bad_choices(changes, said):
    with pytest.raises(UserError, match=said):
        objective_of(RLConfig(**changes))
