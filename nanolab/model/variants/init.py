"""Initial weights: one function per way. Gains, biases and the learned scalars start at constants that their modules
know.

A residual projection is a matrix that writes into the residual stream: every `c_proj`. C is the width, L the layers.
"""

import math

import torch
from torch import Generator, nn


def dial(model: nn.Module, g: Generator) -> None:
    """U(-s, s), s = sqrt(3 / inputs), in matrices, 0 in residual projections, 0.4 s in c_fc, N(0, 0.8) in wte.
    karpathy/nanochat.

    Gates start near 0 from U(0, 0.02), the head at N(0, 0.001); a tied one makes wte N(0, 0.02). wpe is N(0, 0.2).
    """
    s = math.sqrt(3 / model.config.n_embd)
    for name, p in matrices(model):
        if name.endswith("c_proj.weight"):
            p.zero_()
        elif name == "wte.weight":
            p.normal_(0, 0.02 if model.config.tied_head else 0.8, generator=g)
        elif name == "lm_head.weight":
            p.normal_(0, 0.001, generator=g)
        elif name == "positions.wpe.weight":
            p.normal_(0, 0.2, generator=g)
        elif name.endswith("gate.weight") and "mlp" not in name:
            p.uniform_(0, 0.02, generator=g)
        elif name.startswith("value_embeds"):
            p.uniform_(-s, s, generator=g)
        else:
            bound = math.sqrt(3 / p.size(1)) * (0.4 if name.endswith("c_fc.weight") else 1.0)
            p.uniform_(-bound, bound, generator=g)


def gpt2(model: nn.Module, g: Generator) -> None:
    """N(0, 0.02), residual projections N(0, 0.02 / sqrt(2L)). GPT-2 (Radford et al. 2019), section 2.3."""
    for name, p in matrices(model):
        p.normal_(
            0, 0.02 / math.sqrt(2 * model.config.n_layer) if name.endswith("c_proj.weight") else 0.02, generator=g
        )


def normal02(model: nn.Module, g: Generator) -> None:
    """N(0, 0.02) everywhere. GPT, Radford et al. 2018, section 4.1."""
    for _, p in matrices(model):
        p.normal_(0, 0.02, generator=g)


INITS = {"dial": dial, "gpt2": gpt2, "normal02": normal02}


def matrices(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Every parameter with two dimensions, tables first, then by layer."""
    return [(name, p) for name, p in model.named_parameters() if p.dim() == 2]
