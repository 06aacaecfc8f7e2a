"""Gates on the output of attention: one class per way. Dims: B batch, T tokens, H heads, D head size, C width."""

import torch
from torch import Tensor, nn

from nanolab.model.config import GPTConfig
from nanolab.model.gpt import Identity, Linear


class NoGate(Identity):
    """Attention's output as it is. Vaswani et al., arXiv 1706.03762."""


class HeadGate(nn.Module):
    """o_h sigmoid(w_h . x): one gate per head. Qiu et al., arXiv 2505.06708; Bondarenko et al., arXiv 2306.12929."""

    def __init__(self, c: GPTConfig):
        super().__init__()
        self.gate = Linear(c.n_embd, c.n_head, kind="gate")

    def forward(self, y_BTHD: Tensor, x_BTC: Tensor) -> Tensor:
        return y_BTHD * torch.sigmoid(self.gate(x_BTC))[..., None]


class ElementwiseGate(nn.Module):
    """o sigmoid(W x): one gate per channel. Qiu et al., arXiv 2505.06708."""

    def __init__(self, c: GPTConfig):
        super().__init__()
        self.gate = Linear(c.n_embd, c.n_embd, kind="gate")

    def forward(self, y_BTHD: Tensor, x_BTC: Tensor) -> Tensor:
        return y_BTHD * torch.sigmoid(self.gate(x_BTC)).view(y_BTHD.shape)


GATES = {"none": NoGate, "head": HeadGate, "elementwise": ElementwiseGate}
