"""How a token knows where it is: one class per way. Dims: B batch, T tokens, H heads, D head size, C width.

A class may add something to the embeddings (`add`), rotate queries and keys of some layers (`angles`, `uses_rope`), or
lower the scores of distant keys (`slopes`).
"""

import math

import torch
from torch import Tensor, nn

from nanolab.cli import UserError
from nanolab.model.config import GPTConfig
from nanolab.model.context import Angles
from nanolab.model.gpt import Embedding, apply_rope


class Positions(nn.Module):
    """Adds nothing, rotates nothing, prefers no distance; the entries of `POSITIONS` change one of these."""

    group = "positions"  # of the optimizer (training/recipes.py)

    def __init__(self, c: GPTConfig):
        super().__init__()
        self.config = c
        # on the device before a step: a copy from the host cannot be recorded
        self.register_buffer("slopes_H", self.slopes(c), persistent=False)

    def add(self, e_BTC: Tensor, pos_BT: Tensor) -> Tensor:
        return e_BTC

    def angles(self, pos_BT: Tensor, dtype: torch.dtype) -> Angles | None:
        """cos and sin for the layers with rotary positions."""
        return None

    @staticmethod
    def slopes(c: GPTConfig, device: torch.device | None = None) -> Tensor | None:
        """(H,) fp32 what a score loses per token of distance; the model reads `slopes_H`."""
        return None

    @staticmethod
    def uses_rope(c: GPTConfig, layer: int) -> bool:
        return False


class Nope(Positions):
    """No positions but the causal mask. Haviv et al., arXiv 2203.16634; Kazemnejad et al., arXiv 2305.19466."""


class Rope(Positions):
    """Pair i of q and k turns by t base^(-2i/D), so that q.k depends on the distance. RoFormer, arXiv 2104.09864."""

    def angles(self, pos_BT: Tensor, dtype: torch.dtype) -> Angles:
        return rope_angles(self.config, pos_BT, dtype)

    @staticmethod
    def uses_rope(c: GPTConfig, layer: int) -> bool:
        return True


class RNope(Positions):
    """Rope on the layers marked R in --position-pattern, nothing on those marked N. Yang et al., arXiv 2501.18795."""

    def angles(self, pos_BT: Tensor, dtype: torch.dtype) -> Angles:
        return rope_angles(self.config, pos_BT, dtype)

    @staticmethod
    def uses_rope(c: GPTConfig, layer: int) -> bool:
        pattern = c.position_pattern.split(",")
        return pattern[layer % len(pattern)] == "R"


class Learned(Positions):
    """e_t + P[t], a learned row for each position up to the row's length. GPT-2; Gehring et al., arXiv 1705.03122."""

    def __init__(self, c: GPTConfig):
        super().__init__(c)
        self.wpe = Embedding(c.sequence_len, c.n_embd, kind="positions")

    def add(self, e_BTC: Tensor, pos_BT: Tensor) -> Tensor:
        if e_BTC.size(1) > self.wpe.num_embeddings:
            raise UserError(
                f"a row of {e_BTC.size(1)} tokens is past the {self.wpe.num_embeddings} positions that --positions"
                " learned has; cut it, or use other positions"
            )
        return e_BTC + self.wpe.look_up(pos_BT, e_BTC.dtype)


class Sinusoidal(Positions):
    """e_t + PE(t), PE(t, 2i) = sin(t / 10000^(2i/C)), PE(t, 2i+1) = cos(same). Vaswani et al., arXiv 1706.03762."""

    def add(self, e_BTC: Tensor, pos_BT: Tensor) -> Tensor:
        C = e_BTC.size(-1)
        rate = 10_000.0 ** (-torch.arange(0, C, 2, device=pos_BT.device, dtype=torch.float32) / C)
        angle = pos_BT[..., None] * rate
        return e_BTC + torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2).to(e_BTC.dtype)


class Alibi(Positions):
    """s_ij - m_h (i - j), m_h = 2^(-8h/H) for h = 1..H. Press et al., arXiv 2108.12409."""

    @staticmethod
    def slopes(c: GPTConfig, device: torch.device | None = None) -> Tensor:
        return torch.tensor(alibi_slopes(c.n_head), dtype=torch.float32, device=device)

    def _apply(self, fn, recurse: bool = True) -> "Alibi":
        """Whatever a module is moved or cast by leaves the slopes as they are: fp32 in a model of any dtype, and filled
        where memory was only allocated.
        """
        super()._apply(fn, recurse)
        self.slopes_H = self.slopes(self.config, self.slopes_H.device)
        return self


POSITIONS = {"rope": Rope, "nope": Nope, "rnope": RNope, "learned": Learned, "sinusoidal": Sinusoidal, "alibi": Alibi}


def alibi_slopes(n_head: int) -> list[float]:
    """m_h of each head. Where H is no power of two: those of the power below, then every second one of the power
    above.
    """
    below = 2 ** int(math.log2(n_head))
    slopes = [2 ** (-8 * h / below) for h in range(1, below + 1)]
    slopes += [2 ** (-8 * h / (2 * below)) for h in range(1, 2 * below + 1, 2)]
    return slopes[:n_head]


def rope_dim(c: GPTConfig) -> int:
    """Channels of a head that are rotated: even. In MLA all of its rotary part's."""
    if c.attention == "mla":
        return c.mla_rope_dim if c.mla_rope_dim >= 0 else c.head_dim // 4 * 2
    return max(2, int(c.head_dim * c.rope_fraction) // 2 * 2)


def rope_scaling(c: GPTConfig) -> tuple[str, float]:
    """(way, factor) of --rope-scaling. Raises UserError for what is neither none, linear:S nor yarn:S with S above
    1.
    """
    way, _, factor = c.rope_scaling.partition(":")
    if c.rope_scaling == "none":
        return way, 1.0
    try:
        scale = float(factor)
    except ValueError:
        scale = 0.0
    if way not in ("linear", "yarn") or not scale > 1 or math.isinf(scale):
        raise UserError(
            f"--rope-scaling is {c.rope_scaling!r}; expected none, linear:S or yarn:S with a factor S above 1; try"
            " --rope-scaling yarn:4"
        )
    return way, scale


def rope_rates(c: GPTConfig, device: torch.device) -> tuple[Tensor, float]:
    """(radians per position of each pair, fp32; factor of cos and sin).

    Linear: every rate divided by S, arXiv 2306.15595. YaRN, arXiv 2309.00071: a pair that turns r times in the length
    that the weights were trained on is divided by S where r < 1, kept where r > 32, between them in proportion; scores
    grow by m^2 with m = 0.1 ln S + 1. Training length = row / S.
    """
    d = rope_dim(c)
    rates = c.rope_base ** (-torch.arange(0, d, 2, dtype=torch.float32, device=device) / d)
    way, s = rope_scaling(c)
    if way == "none":
        return rates, 1.0
    if way == "linear":
        return rates / s, 1.0
    turns = c.sequence_len / s * rates / (2 * math.pi)
    kept = ((turns - 1) / (32 - 1)).clamp(0, 1)
    return rates * ((1 - kept) / s + kept), 0.1 * math.log(s) + 1


def rope_angles(c: GPTConfig, pos_BT: Tensor, dtype: torch.dtype) -> Angles:
    """cos and sin, each (B, T, 1, rotated channels / 2) in `dtype`.

    Computed for the positions at hand instead of read from a table: it costs a few microseconds a step, and there is no
    table end to run past.
    """
    rates, m = rope_rates(c, pos_BT.device)
    angle = pos_BT.float()[..., None] * rates
    return (angle.cos() * m).to(dtype)[..., None, :], (angle.sin() * m).to(dtype)[..., None, :]


def interleaved(x_BTHD: Tensor, angles: Angles) -> Tensor:
    """Pairs (x[2i], x[2i + 1]) of the first d channels turn by minus the angle. RoFormer, arXiv 2104.09864."""
    cos, sin = angles
    d = 2 * cos.size(-1)
    a, b = x_BTHD[..., 0:d:2], x_BTHD[..., 1:d:2]
    rotated = torch.stack((a * cos + b * sin, b * cos - a * sin), dim=-1).flatten(-2)
    return torch.cat((rotated, x_BTHD[..., d:]), dim=-1)


ROTATIONS = {"half": apply_rope, "interleaved": interleaved}
