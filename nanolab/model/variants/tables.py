"""The axes: every flag whose value is an entry of a table, and the pairs of flags that cannot work together."""

from collections.abc import Callable
from typing import Any

from nanolab.cli import UserError, nearest
from nanolab.model.config import GPTConfig
from nanolab.model.variants.embedding import EMBEDDINGS
from nanolab.model.variants.gates import GATES
from nanolab.model.variants.init import INITS
from nanolab.model.variants.latent import ATTENTIONS
from nanolab.model.variants.mlp import MLPS
from nanolab.model.variants.norms import NORMS
from nanolab.model.variants.positions import POSITIONS, ROTATIONS, rope_scaling
from nanolab.model.variants.qk_norm import QK_NORMS
from nanolab.model.variants.softmax import SOFTMAXES

# flag (a field of config.Architecture) -> its table
AXES: dict[str, dict[str, Any]] = {
    "embedding": EMBEDDINGS,
    "positions": POSITIONS,
    "rope_layout": ROTATIONS,
    "attention": ATTENTIONS,
    "qk_norm": QK_NORMS,
    "softmax": SOFTMAXES,
    "gate": GATES,
    "mlp": MLPS,
    "norm": NORMS,
    "init": INITS,
}


def uses_rope_somewhere(c: GPTConfig) -> bool:
    return any(POSITIONS[c.positions].uses_rope(c, i) for i in range(c.n_layer))


# (the pair, when it is asked for, why it cannot work and what to type)
REFUSED: list[tuple[str, Callable[[GPTConfig], bool], str]] = [
    (
        "--attention mla with --value-embeds",
        lambda c: c.attention == "mla" and c.value_embeds,
        "the cache keeps latents, not values; add --no-value-embeds",
    ),
    (
        "--attention mla with --qk-norm l2",
        lambda c: c.attention == "mla" and c.qk_norm == "l2",
        "its norm works on latents, which have no heads; use --qk-norm rms, layernorm or none",
    ),
    (
        "--attention mla with --mla-rope-dim",
        lambda c: c.attention == "mla" and (c.mla_rope_dim % 2 == 1 if c.mla_rope_dim >= 0 else False),
        "channels turn in pairs; use an even number",
    ),
    (
        "--rope-scaling with --positions",
        lambda c: rope_scaling(c)[0] != "none" and not uses_rope_somewhere(c),
        "no layer of these positions turns; use --positions rope or rnope, or --rope-scaling none",
    ),
    (
        "--window-pattern rope with --positions",
        lambda c: c.window_pattern == "rope" and not uses_rope_somewhere(c),
        "no layer of these positions turns; use --positions rnope, or letters such as SSSL",
    ),
    (
        "--document-mask",
        lambda c: c.document_mask and c.bos < 0,
        "the model was not told which token begins a document; set bos",
    ),
]


def check(c: GPTConfig) -> None:
    """Raise UserError for a name that is in no table, with the nearest one, and for flags that cannot work together."""
    for field, table in AXES.items():
        flag, name = f"--{field.replace('_', '-')}", getattr(c, field).partition(":")[0]
        if name not in table:
            raise UserError(f"{flag} is {name!r}; expected one of {', '.join(table)}{nearest(name, list(table))}")
    for pair, asked, why in REFUSED:
        if asked(c):
            raise UserError(f"{pair} cannot work: {why}")
