"""What a model is, what its fields stand for, and the flags of commands that build one. Imports no torch."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any

from nanolab.cli import (
    Bounds,
    Condition,
    Count,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    ShareBelow1,
    UserError,
    at_least,
    check_bounds,
    nearest,
)


@dataclass(frozen=True)
class Architecture:
    """Every architectural choice. A choice by name is an entry of a table; dev/VARIANTS.md lists formula, paper and
    place of each.
    """

    # embedding
    embedding: str = "token"  # token | bigram: what the embedding knows of a token
    bigram_rows: NonNegativeInt = 0  # rows of --embedding bigram's table; 0: as many as the vocabulary
    # positions
    positions: str = "rope"  # rope | nope | rnope | learned | sinusoidal | alibi: how the model knows positions
    rope_base: PositiveFloat = 100_000.0  # base of RoPE: the slowest pair of channels turns by almost 1 / base a token
    rope_layout: str = "half"  # half | interleaved: which two channels RoPE rotates together
    rope_fraction: Annotated[float, Bounds(0, 1, low_too=False)] = 1.0  # share of a head's channels that RoPE rotates
    # none | linear:S | yarn:S, for rows S times as long as those the weights were trained on
    rope_scaling: str = "none"
    position_pattern: str = "R,N"  # layers of rnope, tiled: R has RoPE, N has none
    # attention
    attention: str = "mha"  # mha | gqa:G (G key/value heads) | mqa | mla
    mla_kv_rank: NonNegativeInt = 0  # width of MLA's cached latent; 0: 4 x head size
    mla_q_rank: NonNegativeInt = 0  # width of MLA's query latent; 0: 3 x the cached one, at most the model's width
    mla_rope_dim: Annotated[int, at_least(0, -1)] = -1  # width of MLA's shared rotary key; -1: half the head size
    # tiled over layers: S sees a window, L the whole row, the last layer is L; or rope: S in layers with RoPE
    window_pattern: str = "SSSL"
    # keys before itself that a query of an S layer sees; 0: a quarter of the row, rounded up to 128
    window_size: NonNegativeInt = 0
    softmax: str = "softmax"  # softmax | softmax1 | softmax_n | sink: the term added to the denominator
    softmax_n: NonNegativeFloat = 1.0  # the n of --softmax softmax_n
    gate: str = "none"  # none | head | elementwise: sigmoid gate on attention's output
    qk_norm: str = "rms"  # none | rms | layernorm | l2: norm of queries and keys
    qk_gain: NonNegativeFloat = 1.2  # multiplies queries and keys after QK norm
    score_softcap: NonNegativeFloat = 0.0  # scores become c * tanh(score / c); 0: off
    document_mask: bool = False  # attention stays inside a document
    # residual stream
    value_embeds: bool = True  # a table of values for every second layer
    residual_scalars: bool = True  # learned weights of the residual stream and of the embedding, per layer
    smear: bool = True  # mix into each embedding a share of the one before
    backout: bool = True  # subtract a share of the middle layer's residual stream at the end
    embed_norm: bool = True  # norm after the embedding
    # blocks and head
    mlp: str = "relu2"  # relu | relu2 | gelu | gelu_tanh | swiglu: activation of the MLP
    norm: str = "rms"  # rms | layernorm: norm of the residual stream
    norm_gain: bool = False  # norms have learned gains
    bias: str = ""  # parts with biases, any of qkv,out,mlp,norm,head
    softcap: NonNegativeFloat = 15.0  # logits become softcap * tanh(logits / softcap); 0: off
    tied_head: bool = False  # the head's matrix is the embedding table
    pad_vocab_to: Count = 64  # table rows are padded to a multiple of this
    # dropout
    embed_dropout: ShareBelow1 = 0.0  # share of embeddings dropped in training
    attn_dropout: ShareBelow1 = 0.0  # share of attention weights dropped in training
    resid_dropout: ShareBelow1 = 0.0  # share of attention's output dropped in training
    mlp_dropout: ShareBelow1 = 0.0  # share of the MLP's output dropped in training
    init: str = "dial"  # dial | gpt2 | normal02: initial weights


@dataclass(frozen=True)
class GPTConfig(Architecture):
    """A model: everything that is needed to rebuild the module that a checkpoint's weights fit."""

    sequence_len: Count = 2048  # longest training row; windows are fractions of it
    vocab_size: Count = 32768  # tokenizer size, special tokens included
    n_layer: Count = 12  # layers
    n_head: Count = 6  # H, query heads
    n_embd: Count = 768  # C, width of the residual stream
    bos: Annotated[int, at_least(0, -1)] = -1  # the token that begins a document; document_mask needs it

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def n_kv_head(self) -> int:
        """Key/value heads: of gqa:G, G; of mqa, one; otherwise as many as query heads."""
        kind, _, groups = self.attention.partition(":")
        return int(groups) if kind == "gqa" else 1 if kind == "mqa" else self.n_head

    def has_bias(self, part: str) -> bool:
        return part in self.bias.split(",")

    def __post_init__(self) -> None:
        _check_gpt(self)


BIAS_PARTS = ("qkv", "out", "mlp", "norm", "head")


def _check_gpt(c: GPTConfig) -> None:
    """What can be told from the numbers alone. Names of table entries, and pairs of them, are checked by
    model/variants.py.
    """
    check_bounds(type(c), vars(c))
    if c.n_embd % c.n_head or c.head_dim % 2:
        raise UserError(
            f"width {c.n_embd} over {c.n_head} heads gives head size {c.n_embd / c.n_head:g}; expected an even whole"
            " number; choose --head-dim so that it divides the width"
        )
    kind, _, groups = c.attention.partition(":")
    if (kind == "gqa") != bool(groups) or (
        groups and not (groups.isdigit() and int(groups) and c.n_head % int(groups) == 0)
    ):
        raise UserError(
            f"--attention {c.attention} with {c.n_head} heads; expected mha, mqa, mla or gqa:G with G dividing the"
            " heads; try --attention gqa:1"
        )
    if c.window_pattern != "rope" and (not c.window_pattern or set(c.window_pattern) - set("SL")):
        raise UserError(
            f"window pattern {c.window_pattern!r} has letters other than S and L; try --window-pattern SSSL"
        )
    if set(c.position_pattern.split(",")) - {"R", "N"}:
        raise UserError(
            f"position pattern {c.position_pattern!r} has parts other than R and N; try --position-pattern R,R,R,N"
        )
    for part in filter(None, c.bias.split(",")):
        if part not in BIAS_PARTS:
            raise UserError(
                f"--bias names {part!r}; expected parts out of {','.join(BIAS_PARTS)}{nearest(part, list(BIAS_PARTS))}"
            )
    if c.n_embd < 32 and (c.smear or c.value_embeds):
        raise UserError(
            f"width {c.n_embd} is below 32, which the smear and value gates read; raise --depth or --aspect-ratio, or"
            " use --no-smear --no-value-embeds"
        )


# --- what the fields stand for: entries of tables, parts, windows -----------------------------------------------------
# The tables are imported when they are asked: their entries are made of what gpt.py defines, which asks.


def entry(c: GPTConfig, flag: str) -> Any:
    """The entry of a table that a flag of `c` names."""
    from nanolab.model.variants.tables import AXES

    return AXES[flag][getattr(c, flag).partition(":")[0]]


def parts_of(c: GPTConfig, seam: str = "") -> list[Any]:
    """The parts of the residual stream that are switched on (at a seam), in the order of PARTS."""
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


# --- flags ------------------------------------------------------------------------------------------------------------

TURNING = "--positions rope, or rnope with an R in --position-pattern"


def turns(c: Any) -> bool:
    """Whether positions turn in some layer."""
    pattern = c.position_pattern.split(",")
    return (
        c.positions == "rope" or c.positions == "rnope" and "R" in [pattern[i % len(pattern)] for i in range(c.depth)]
    )


def has_window(c: Any) -> bool:
    """Whether some layer is one that sees a window only. The last one is not, unless the pattern is rope."""
    letters = c.window_pattern or "L"
    return turns(c) if letters == "rope" else "S" in [letters[i % len(letters)] for i in range(c.depth - 1)]


@dataclass(frozen=True)
class ModelFlags(Architecture):
    """The flags of every command that builds a new model: a preset, the dial, and the architecture."""

    preset: str = "nanolab"  # a row of defaults for the other flags (nanolab/presets.py); flags given beside it win
    depth: Count = 20  # layers; width, batch, rates and training length follow from it
    aspect_ratio: Count = 64  # width = depth * aspect_ratio, rounded up to a multiple of head_dim
    head_dim: Count = 128  # D, width of an attention head
    max_seq_len: Count = 2048  # T, context length in tokens

    CONDITIONS = [
        Condition("rope_base rope_layout rope_scaling rope_fraction", "positions", turns, TURNING),
        Condition(
            "rope_fraction", "attention", lambda c: c.attention != "mla", "--attention mha; mla has --mla-rope-dim"
        ),
        Condition("bigram_rows", "embedding", lambda c: c.embedding == "bigram", "--embedding bigram"),
        Condition("position_pattern", "positions", lambda c: c.positions == "rnope", "--positions rnope"),
        Condition(
            "mla_kv_rank mla_q_rank mla_rope_dim", "attention", lambda c: c.attention == "mla", "--attention mla"
        ),
        Condition("mla_rope_dim", "positions", turns, TURNING),
        Condition("window_size", "window_pattern", has_window, "--window-pattern with an S before the last layer"),
        Condition("softmax_n", "softmax", lambda c: c.softmax == "softmax_n", "--softmax softmax_n"),
    ]


@dataclass(frozen=True)
class InspectConfig(ModelFlags):
    """Show a model as a table: shapes, parameters per part, FLOPs, cache bytes, and the attention kernel of each
    layer.
    """

    depth: Count = 12
    vocab_size: Count = 32768  # tokenizer size, special tokens included
    context: NonNegativeInt = 0  # tokens before a decoded one, for its FLOPs; 0: a full row
    attn_kernel: str = ""  # eager | sdpa | banded | flex | fa3; default: as in base_train
    device_type: str = ""  # cuda | mps | cpu; default: the best there is
    json: bool = False  # last line of output is one JSON document

    GROUPS = {
        "": "preset depth aspect_ratio head_dim max_seq_len vocab_size context attn_kernel device_type json",
        "model": "Architecture",
    }


def chosen(c: Architecture) -> list[str]:
    """The architecture flags that are not at their defaults, as "name value"."""
    return [
        f"{f.name} {getattr(c, f.name)}" for f in dataclasses.fields(Architecture) if getattr(c, f.name) != f.default
    ]
