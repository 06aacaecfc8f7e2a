"""The softmax of attention: one class per variant, which says what is added to the denominator."""

import math

import torch
from torch import Tensor, nn

from nanolab.model.config import GPTConfig


class Softmax(nn.Module):
    """p_i = exp(s_i) / sum_j exp(s_j). Vaswani et al., arXiv 1706.03762."""

    def __init__(self, c: GPTConfig):
        super().__init__()

    def forward(self) -> Tensor | float | None:
        """ln n of the term n in the denominator: None for n = 0, a number, or (H,)."""
        return None


class Softmax1(Softmax):
    """p_i = exp(s_i) / (1 + sum_j exp(s_j)): a head may attend to nothing. Miller 2023; arXiv 2309.17453."""

    def forward(self) -> float:
        return 0.0


class SoftmaxN(Softmax):
    """p_i = exp(s_i) / (n + sum_j exp(s_j)) for any real n >= 0, --softmax-n. Miller 2023; arXiv 2410.10781."""

    def __init__(self, c: GPTConfig):
        super().__init__(c)
        self.log_n = math.log(c.softmax_n) if c.softmax_n else None

    def forward(self) -> float | None:
        return self.log_n


class Sink(Softmax):
    """p_i = exp(s_i) / (exp(b_h) + sum_j exp(s_j)), b_h learned per head. gpt-oss, arXiv 2508.10925."""

    def __init__(self, c: GPTConfig):
        super().__init__(c)
        self.logit = nn.Parameter(torch.empty(c.n_head))

    def init_constants(self) -> None:
        self.logit.zero_()

    def forward(self) -> Tensor:
        return self.logit


SOFTMAXES = {"softmax": Softmax, "softmax1": Softmax1, "softmax_n": SoftmaxN, "sink": Sink}
