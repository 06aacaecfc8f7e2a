"""Norms of the residual stream: one class per way."""

import torch.nn.functional as F
from torch import Tensor

from nanolab.model.gpt import Norm, RMSNorm


class LayerNorm(Norm):
    """(x - mean(x)) / sqrt(var(x) + eps). Ba et al., arXiv 1607.06450."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (None if p is None else p.to(x.dtype) for p in (self.weight, self.bias))
        return F.layer_norm(x, (x.size(-1),), weight, bias, eps=1e-5)


NORMS = {"rms": RMSNorm, "layernorm": LayerNorm}
