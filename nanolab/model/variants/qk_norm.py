"""Norms of queries and keys before their product: one class per way."""

import math

import torch
from torch import Tensor, nn

from nanolab.model.config import GPTConfig
from nanolab.model.gpt import rms_norm
from nanolab.model.variants.norms import LayerNorm


class NoQKNorm(nn.Module):
    """q.k / sqrt(D) of the raw queries and keys. Vaswani et al., arXiv 1706.03762."""

    def __init__(self, c: GPTConfig, q_width: int, k_width: int):
        super().__init__()

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return q, k


class RMSQKNorm(NoQKNorm):
    """q / rms(q), k / rms(k) per head, without gains. Henry et al., arXiv 2010.04245; Dehghani et al., arXiv
    2302.05442.
    """

    normalize = staticmethod(rms_norm)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.normalize(q), self.normalize(k)


class LayerNormQKNorm(NoQKNorm):
    """LayerNorm of q and of k per head, with learned gains. Dehghani et al., arXiv 2302.05442."""

    def __init__(self, c: GPTConfig, q_width: int, k_width: int):
        super().__init__(c, q_width, k_width)
        self.q, self.k = LayerNorm(q_width, True, False), LayerNorm(k_width, True, False)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.q(q), self.k(k)


class L2QKNorm(NoQKNorm):
    """g q/|q| . k/|k| with g learned per head from log2(T^2 - T) on. Henry et al., arXiv 2010.04245."""

    normalize = staticmethod(rms_norm)

    def __init__(self, c: GPTConfig, q_width: int, k_width: int):
        super().__init__(c, q_width, k_width)
        self.start = math.log2(max(2, c.sequence_len**2 - c.sequence_len))
        self.g = nn.Parameter(torch.empty(c.n_head))

    def init_constants(self) -> None:
        self.g.fill_(self.start)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """RMS norm gives sqrt(D) x/|x|, and the kernel divides by sqrt(D): together a factor of sqrt(D) is left."""
        g = (self.g / math.sqrt(q.size(-1))).to(q.dtype)
        return self.normalize(q) * g[:, None], self.normalize(k)


QK_NORMS = {"none": NoQKNorm, "rms": RMSQKNorm, "layernorm": LayerNormQKNorm, "l2": L2QKNorm}
