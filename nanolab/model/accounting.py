"""What a model costs, from its config alone: parameters, FLOPs, bytes. Nothing is built; the table entries state their
shapes.

`tests/model/test_accounting.py` and the contracts hold every formula against a model that is built and measured.
"""

from typing import Any

from nanolab.model.attention import windows
from nanolab.model.blocks import NORMS
from nanolab.model.config import GPTConfig
from nanolab.model.variants.gates import GATES
from nanolab.model.variants.latent import ATTENTIONS
from nanolab.model.variants.mlp import MLPS
from nanolab.model.variants.parts import SMEAR_CHANNELS, has_value_embedding
from nanolab.model.variants.positions import POSITIONS
from nanolab.model.variants.qk_norm import QK_NORMS
from nanolab.model.variants.softmax import NORMALISERS
from nanolab.model.variants.tables import check


def padded_vocab(c: GPTConfig) -> int:
    return -(-c.vocab_size // c.pad_vocab_to) * c.pad_vocab_to


def attention_class(c: GPTConfig):
    return ATTENTIONS[c.attention.partition(":")[0]]


def stated(entry: Any, *args: Any) -> tuple[int, int]:
    """(values in matrices, values outside them) that an entry of a table states of itself; what it does not state, it
    does not have.
    """
    matrices = entry.matrices(*args) if hasattr(entry, "matrices") else []
    return sum(out * inputs for out, inputs in matrices), entry.n_params(*args) if hasattr(entry, "n_params") else 0


def n_params_by_entry(c: GPTConfig) -> dict[str, tuple[int, int]]:
    """flag -> (values in matrices, values outside them) of the entry that it chooses, over the whole model, with the
    biases that --bias adds to it.
    """
    attention, mlp, norm = (
        attention_class(c),
        MLPS[c.mlp],
        stated(NORMS[c.norm], c.n_embd, c.norm_gain, c.has_bias("norm")),
    )
    parts = [("norm", norm)] * (1 + c.embed_norm)
    for i in range(c.n_layer):
        parts += [
            ("attention", stated(attention, c, i)),
            ("attention", (0, attention.qkv_biases(c, i) * c.has_bias("qkv") + c.n_embd * c.has_bias("out"))),
            ("gate", stated(GATES[c.gate], c)),
            ("qk_norm", stated(QK_NORMS[c.qk_norm], c, *attention.normed_widths(c))),
            ("normaliser", stated(NORMALISERS[c.normaliser], c)),
            ("mlp", stated(mlp, c)),
            ("mlp", (0, sum(out for out, _ in mlp.matrices(c)) * c.has_bias("mlp"))),
            ("norm", norm),
            ("norm", norm),
        ]
    return {
        flag: (sum(m for part, (m, _) in parts if part == flag), sum(v for part, (_, v) in parts if part == flag))
        for flag, _ in parts
    }


def n_params(c: GPTConfig) -> dict[str, int]:
    """Parameters by part: tables, head, `matrices` of the blocks, `vectors` (gains, biases, sinks), `scalars` (mixing
    weights).

    Also `total`, and `scaling`: matrices + the head's, tied or not, the N of the scaling laws. Raises UserError for
    flags that cannot work."""
    check(c)
    V, C, entries = padded_vocab(c), c.n_embd, n_params_by_entry(c).values()
    p = {
        "wte": V * C,
        "wpe": POSITIONS[c.positions].n_params(c),
        "value_embeds": sum(has_value_embedding(c, i) for i in range(c.n_layer)) * V * c.n_kv_head * c.head_dim,
        "lm_head": V * C * (not c.tied_head),
        "matrices": sum(matrices for matrices, _ in entries),
        "vectors": sum(others for _, others in entries) + V * c.has_bias("head"),
        "scalars": 2 * c.n_layer * c.residual_scalars + (SMEAR_CHANNELS + 1) * c.smear + c.backout,
    }
    return p | {"total": sum(p.values()), "scaling": p["matrices"] + V * C}


def matmul_params(c: GPTConfig) -> int:
    """Parameters that multiply every token (tables are looked up, not multiplied)."""
    return n_params(c)["scaling"] + SMEAR_CHANNELS * c.smear


def train_flops_per_token(c: GPTConfig, row: int = 0) -> int:
    """Forward and backward, nominal: 6 per matmul parameter, and 6 H (width of q.k + width of p v) min(window, T) per
    layer; forward alone is a third. row: T, default the longest. PaLM, arXiv 2204.02311, app. B."""
    widths = [sum(attention_class(c).score_widths(c, i)) for i in range(c.n_layer)]
    return 6 * matmul_params(c) + sum(
        6 * c.n_head * d * min(w, row or c.sequence_len) for w, d in zip(windows(c), widths)
    )


def prompt_flops(c: GPTConfig, length: int) -> int:
    """Reading a prompt into a cache: forward, of which the last layer's MLP and the head are for the last token
    alone.
    """
    last_only = padded_vocab(c) * c.n_embd + stated(MLPS[c.mlp], c)[0]
    return length * train_flops_per_token(c, length) // 3 - 2 * (length - 1) * last_only


def decode_flops_per_token(c: GPTConfig, context: int) -> int:
    """One decoded token after `context` tokens: 2 per matmul parameter, and 2 H (both widths) min(window, context) per
    layer.
    """
    widths = [sum(attention_class(c).decode_widths(c, i)) for i in range(c.n_layer)]
    return 2 * matmul_params(c) + sum(2 * c.n_head * d * min(w, context) for w, d in zip(windows(c), widths))


def cached_shapes(c: GPTConfig) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Per layer, (heads, channels) of the two tensors that the cache keeps of a token."""
    return [attention_class(c).cached_shapes(c, i) for i in range(c.n_layer)]


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
