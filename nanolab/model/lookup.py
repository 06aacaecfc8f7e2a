"""What the flags of a model choose: entries of tables, parts, windows. The tables are imported when they are asked,
since their entries are made of what gpt.py defines, which asks.
"""

from typing import Any

from nanolab.model.config import GPTConfig


def entry(c: GPTConfig, flag: str) -> Any:
    """The entry of a table that a flag of `c` names."""
    from nanolab.model.variants.tables import AXES

    return AXES[flag][getattr(c, flag).partition(":")[0]]


def parts_of(c: GPTConfig, seam: str = "") -> list[Any]:
    """The parts of the embedding and the residual stream that are switched on (at a seam), in the order of PARTS."""
    from nanolab.model.variants.parts import PARTS

    return [part for flag, part in PARTS.items() if getattr(c, flag) and seam in ("", part.seam)]


def check_flags(c: GPTConfig) -> None:
    """Raise UserError for flags that name no entry or cannot work together."""
    from nanolab.model.variants.tables import check

    check(c)


def padded_vocab(c: GPTConfig) -> int:
    """Rows of the tables."""
    return -(-c.vocab_size // c.pad_vocab_to) * c.pad_vocab_to


def windows(c: GPTConfig) -> list[int]:
    """Keys before itself that a query sees, per layer. A window of w lets it see itself and the w keys before it."""
    short = c.window_size or -(-c.sequence_len // 4 // 128) * 128
    if c.window_pattern == "rope":
        return [short if entry(c, "positions").uses_rope(c, i) else c.sequence_len for i in range(c.n_layer)]
    letters = [c.window_pattern[i % len(c.window_pattern)] for i in range(c.n_layer)]
    return [short if letter == "S" else c.sequence_len for letter in letters[:-1]] + [c.sequence_len]


def no_rope(x: Any, angles: Any) -> Any:
    return x


def rope_of(c: GPTConfig, layer: int) -> Any:
    """The function (x_BTHD, angles) -> x_BTHD that gives queries and keys of this layer their positions."""
    return entry(c, "rope_layout") if entry(c, "positions").uses_rope(c, layer) else no_rope


def make_norm(c: GPTConfig) -> Any:
    """The norm of the residual stream, as --norm, --norm-gain and --bias norm say."""
    return entry(c, "norm")(c.n_embd, c.norm_gain, c.has_bias("norm"))
