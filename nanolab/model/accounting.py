"""What a model costs, from its config alone: parameters, FLOPs, bytes. Imports no torch.

`tests/model/test_accounting.py` holds every formula against a model that is built and measured.
"""

from nanolab.config import GPTConfig

SMEAR_CHANNELS = 24  # leading embedding channels that steer the smear gate
VE_GATE_CHANNELS = 12  # leading channels of the normed input that steer a value embedding's gate
PAD_VOCAB_TO = 64  # table rows are padded to a multiple of this


def padded_vocab(c: GPTConfig) -> int:
    return -(-c.vocab_size // PAD_VOCAB_TO) * PAD_VOCAB_TO


def windows(c: GPTConfig) -> list[int]:
    """Keys before itself that a query sees, per layer: S is a quarter of the row rounded up to 128, the last layer is L."""
    size = {"L": c.sequence_len, "S": -(-c.sequence_len // 4 // 128) * 128}
    letters = [c.window_pattern[i % len(c.window_pattern)] for i in range(c.n_layer)]
    return [size[letter] for letter in letters[:-1]] + [size["L"]]


def has_value_embedding(c: GPTConfig, layer: int) -> bool:
    """Every second layer, counted from the last."""
    return layer % 2 == (c.n_layer - 1) % 2


def n_params(c: GPTConfig) -> dict[str, int]:
    """Parameters by group, and `total`, and `scaling`: matrices + lm_head, the N of the scaling laws."""
    V, C, kv = padded_vocab(c), c.n_embd, c.n_kv_head * (c.n_embd // c.n_head)
    n_ve = sum(has_value_embedding(c, i) for i in range(c.n_layer))
    p = {
        "wte": V * C,
        "value_embeds": n_ve * V * kv,
        "lm_head": V * C,
        "matrices": c.n_layer * (2 * C * C + 2 * C * kv + 8 * C * C) + n_ve * VE_GATE_CHANNELS * c.n_kv_head,
        "scalars": 2 * c.n_layer + SMEAR_CHANNELS + 2,
    }
    return p | {"total": sum(p.values()), "scaling": p["matrices"] + p["lm_head"]}


def matmul_params(c: GPTConfig) -> int:
    """Parameters that multiply every token (tables are looked up, not multiplied)."""
    return n_params(c)["scaling"] + SMEAR_CHANNELS


def train_flops_per_token(c: GPTConfig) -> int:
    """Forward and backward, nominal: 6 per matmul parameter plus 12 H D min(window, T) per layer. PaLM, arXiv 2204.02311, app. B."""
    return 6 * matmul_params(c) + sum(12 * c.n_embd * min(w, c.sequence_len) for w in windows(c))


def decode_flops_per_token(c: GPTConfig, context: int) -> int:
    """One decoded token after `context` tokens: 2 per matmul parameter plus 4 H D min(window, context) per layer."""
    return 2 * matmul_params(c) + sum(4 * c.n_embd * min(w, context) for w in windows(c))


def kv_bytes_per_token(c: GPTConfig, bytes_per_value: int) -> int:
    """Stored by the cache for one token of one row, all layers."""
    return c.n_layer * 2 * c.n_kv_head * (c.n_embd // c.n_head) * bytes_per_value


def train_memory_bytes(c: GPTConfig, rows: int, bytes_per_value: int, ranks: int = 1, device_type: str = "cpu") -> int:
    """Predicted peak of training on one rank, above what the process needs to start; good to about a third.

    Weights and gradients in fp32 (8 bytes a parameter on every rank), optimizer moments sharded over the ranks (8 bytes
    for AdamW's, 4 for Muon's), activations kept for the backward pass, and logits. On CPUs 40 values per token, width and
    layer are kept, as measured (tests/model/test_memory.py), and the head works on 1,024 rows at a time. On GPUs 20 is
    assumed: compiled code keeps fewer; not measured yet.
    """
    p, tokens = n_params(c), rows * c.sequence_len
    state = 8 * p["total"] + (8 * (p["total"] - p["matrices"]) + 4 * p["matrices"]) // ranks
    values, head_rows = (40, min(tokens, 1024)) if device_type == "cpu" else (20, tokens)
    activations = c.n_layer * tokens * c.n_embd * bytes_per_value * values
    return state + activations + head_rows * padded_vocab(c) * (bytes_per_value + 8)
