"""What a model costs: parameters, FLOPs, bytes. Parameters are counted in a model without memory (the meta device), the
FLOPs of attention by formula.

`tests/model/test_accounting.py` and the contracts hold every formula against a model that is built and measured.
"""

from functools import lru_cache

import torch

from nanolab.model.config import GPTConfig, check_flags, entry, padded_vocab, parts_of, windows
from nanolab.model.gpt import GPT, Embedding, Linear
from nanolab.model.variants.tables import AXES


def n_params(c: GPTConfig) -> dict[str, int]:
    """Parameters by part: wte, wpe, other `tables`, head, `matrices` of the blocks, `vectors` (gains, biases, sinks),
    `scalars` (mixing weights).

    Also `total`, and `scaling`: matrices + the head's, tied or not, the N of the scaling laws. Raises UserError for
    flags that cannot work."""
    return {part: n for part, n in _sizes(c).items() if part not in ("multiplied", "mlp")}


def _sizes(c: GPTConfig) -> dict[str, int]:
    """`n_params`, and `multiplied`: parameters that multiply every token (tables are looked up); `mlp`: matrices of one
    MLP.
    """
    check_flags(c)
    return _counted(c, tuple(entry(c, flag) for flag in AXES), tuple(parts_of(c)))


@lru_cache(maxsize=256)
def _counted(c: GPTConfig, entries: tuple, parts: tuple) -> dict[str, int]:
    """entries, parts: what the names in c stand for, since tables may change."""
    with torch.device("meta"):
        model = GPT(c)

    def size(*modules: torch.nn.Module, matrices: bool = False) -> int:
        return sum(p.numel() for m in modules for p in m.parameters() if not matrices or p.dim() == 2)

    mixing = [model.embedding, *(getattr(model, part.name) for part in parts)]
    tables = [m for part in mixing for m in part.modules() if isinstance(m, Embedding)]
    p = {
        "wte": size(model.wte),
        "wpe": size(model.positions),
        "tables": size(*tables),
        "lm_head": 0 if c.tied_head else model.lm_head.weight.numel(),
        "matrices": size(model.h, matrices=True),
    }
    p["scalars"] = size(*mixing) - p["tables"]
    p["vectors"] = size(model) - sum(p.values())
    p["total"], p["scaling"] = size(model), p["matrices"] + model.wte.weight.numel()
    linears = [m for part in mixing for m in part.modules() if isinstance(m, Linear)]
    return p | {"multiplied": p["scaling"] + size(*linears), "mlp": size(model.h[0].mlp, matrices=True)}


def train_flops_per_token(c: GPTConfig, row: int = 0) -> int:
    """Forward and backward, nominal: 6 per matmul parameter, and 6 H (width of q.k + width of p v) min(window, T) per
    layer; forward alone is a third. row: T, default the longest. PaLM, arXiv 2204.02311, app. B."""
    widths = [sum(entry(c, "attention").score_widths(c, i)) for i in range(c.n_layer)]
    return 6 * _sizes(c)["multiplied"] + sum(
        6 * c.n_head * d * min(w, row or c.sequence_len) for w, d in zip(windows(c), widths)
    )


def prompt_flops(c: GPTConfig, length: int) -> int:
    """Reading a prompt into a cache: forward, of which the last layer's MLP and the head are for the last token
    alone.
    """
    last_only = padded_vocab(c) * c.n_embd + _sizes(c)["mlp"]
    return length * train_flops_per_token(c, length) // 3 - 2 * (length - 1) * last_only


def decode_flops_per_token(c: GPTConfig, context: int) -> int:
    """One decoded token after `context` tokens: 2 per matmul parameter, and 2 H (both widths) min(window, context) per
    layer.
    """
    widths = [sum(entry(c, "attention").decode_widths(c, i)) for i in range(c.n_layer)]
    return 2 * _sizes(c)["multiplied"] + sum(2 * c.n_head * d * min(w, context) for w, d in zip(windows(c), widths))


def cached_shapes(c: GPTConfig) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Per layer, (heads, channels) of the two tensors that the cache keeps of a token."""
    return [entry(c, "attention").cached_shapes(c, i) for i in range(c.n_layer)]


def kv_bytes_per_token(c: GPTConfig, bytes_per_value: int) -> int:
    """Stored by the cache for one token of one row, all layers."""
    return sum(heads * channels for pair in cached_shapes(c) for heads, channels in pair) * bytes_per_value


def train_memory(
    c: GPTConfig,
    rows: int,
    bytes_per_value: int,
    device_type: str = "cpu",
    *,
    activation_checkpointing: bool = False,
    optimizer: tuple[int, int] | None = None,
) -> dict[str, int]:
    """Predicted bytes of training on one rank, above what the process needs to start, by part; good to about a third
    for the default model.

    weights, gradients: in fp32, on every rank. optimizer: its state (on one rank 8 bytes for a value of AdamW's and 4
    for one of Muon's), and "step", what a step holds beside these; both from `MuonAdamW.memory`. activations: kept for
    the backward pass, and the head's logits. On CPUs 40 values per token, width and layer are kept, as measured
    (tests/model/test_memory.py), and the head works on 1,024 rows at a time. On GPUs 20 is assumed: compiled code keeps
    fewer; not measured yet. With activation checkpointing one value of each layer is kept beside the work on one: 100
    values on CPUs, as measured (most of it freed memory that the process keeps), and 20 assumed on GPUs."""
    p, tokens = n_params(c), rows * c.sequence_len
    state, step = optimizer or (8 * (p["total"] - p["matrices"]) + 4 * p["matrices"], 0)
    values, again, head_rows = (40, 100, min(tokens, 1024)) if device_type == "cpu" else (20, 20, tokens)
    kept = c.n_layer + again if activation_checkpointing else c.n_layer * values
    activations = kept * tokens * c.n_embd * bytes_per_value + head_rows * padded_vocab(c) * (bytes_per_value + 8)
    return {
        "weights": 4 * p["total"],
        "gradients": 4 * p["total"],
        "optimizer": state,
        "activations": activations,
        "step": step,
    }


def peak_bytes(memory: dict[str, int]) -> int:
    """Of the parts that `train_memory` gives: the optimizer's step comes when the activations have gone."""
    return sum(memory.values()) - min(memory["activations"], memory["step"])
