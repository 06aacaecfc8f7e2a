"""Initial weights: one function per way. Gains, biases and the learned scalars start at constants that their modules
know.

What a matrix is for, its module says as `kind`: "tokens", "positions" and "values" are tables, "constant" one that its
module fills; "head"; "residual" writes into the residual stream (every `c_proj`); "hidden" is the MLP's first; "gate";
all others are "matrix". C is the width, L the layers.
"""

import math
from collections.abc import Iterator

import torch
from torch import Generator, nn

from nanolab.model.gpt import Embedding, Linear


def dial(model: nn.Module, g: Generator) -> None:
    """U(-s, s), s = sqrt(3 / inputs), in matrices, 0 in residual projections, 0.4 s in c_fc, N(0, 0.8) in wte.
    karpathy/nanochat.

    Gates start near 0 from U(0, 0.02), the head at N(0, 0.001); a tied one makes wte N(0, 0.02). wpe is N(0, 0.2).
    """
    std = {"tokens": 0.02 if model.config.tied_head else 0.8, "positions": 0.2, "head": 0.001}
    for kind, p in matrices(model):
        if kind == "residual":
            p.zero_()
        elif kind in std:
            p.normal_(0, std[kind], generator=g)
        elif kind == "gate":
            p.uniform_(0, 0.02, generator=g)
        else:
            inputs = model.config.n_embd if kind == "values" else p.size(1)
            s = math.sqrt(3 / inputs) * (0.4 if kind == "hidden" else 1.0)
            p.uniform_(-s, s, generator=g)


def gpt2(model: nn.Module, g: Generator) -> None:
    """N(0, 0.02), residual projections N(0, 0.02 / sqrt(2L)). GPT-2 (Radford et al. 2019), section 2.3."""
    for kind, p in matrices(model):
        p.normal_(0, 0.02 / math.sqrt(2 * model.config.n_layer) if kind == "residual" else 0.02, generator=g)


def normal02(model: nn.Module, g: Generator) -> None:
    """N(0, 0.02) everywhere. GPT, Radford et al. 2018, section 4.1."""
    for _, p in matrices(model):
        p.normal_(0, 0.02, generator=g)


INITS = {"dial": dial, "gpt2": gpt2, "normal02": normal02}


def matrices(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(kind, weight) of every matrix and table, in the order of the model's modules."""
    return ((m.kind, m.weight) for m in model.modules() if isinstance(m, (Linear, Embedding)) and m.kind != "constant")
