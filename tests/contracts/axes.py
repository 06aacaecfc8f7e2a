"""The axes of the architecture and the values that tests give them, read from the tables and from the fields of
Architecture.

An entry of a table and a boolean are here by being there. A number or a pattern needs an entry of `NUMBERS`; a number
that only one entry of a table reads goes to `MORE`, beside that entry."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from covering import Pair, covering_rows

from nanolab.cli import UserError
from nanolab.model.config import Architecture, GPTConfig
from nanolab.model.variants import tables

Settings = dict[str, Any]  # fields of GPTConfig

# The tiny model that every value is tried on: the defaults, but what rules other values out is off (value embeddings:
# MLA). Four layers: R,R,R,N has an N, and backout, which takes from the middle layer, has a layer between the middle
# and the end.
BASE = GPTConfig(
    sequence_len=32,
    vocab_size=61,
    n_layer=4,
    n_head=4,
    n_embd=32,
    bos=0,
    value_embeds=False,
    window_pattern="SL",
    window_size=9,
)

# table -> entry -> settings, each a value of the axis beside the entry itself
MORE: dict[str, dict[str, list[Settings]]] = {
    "embedding": {"bigram": [dict(bigram_rows=23)]},
    "positions": {
        "rope": [
            dict(rope_layout="interleaved"),
            dict(rope_base=50.0, rope_fraction=0.5),
            dict(rope_layout="interleaved", rope_fraction=0.75, rope_scaling="linear:2"),
            dict(rope_base=10.0, rope_scaling="yarn:4"),
        ],
        "rnope": [dict(position_pattern="R,R,R,N", rope_layout="interleaved")],
    },
    "attention": {"mla": [dict(mla_kv_rank=12, mla_q_rank=20, mla_rope_dim=6), dict(mla_kv_rank=6, mla_rope_dim=0)]},
    "softmax": {"softmax_n": [dict(softmax_n=0.5), dict(softmax_n=3.0)]},
}

# axis -> values, the base model's first
NUMBERS: dict[str, list[Settings]] = {
    "windows": [
        dict(window_pattern="SL", window_size=9),
        dict(window_pattern="L"),
        dict(window_pattern="SSSL", window_size=1),
        dict(window_pattern="rope", window_size=5),
    ],
    "qk_gain": [dict(qk_gain=1.2), dict(qk_gain=0.7)],
    "score_softcap": [dict(score_softcap=0.0), dict(score_softcap=2.0)],
    "softcap": [dict(softcap=15.0), dict(softcap=0.0)],
    "bias": [dict(bias=parts) for parts in ("", "qkv", "out,mlp", "norm", "head", "qkv,out,mlp,norm,head")],
    "pad_vocab_to": [dict(pad_vocab_to=64), dict(pad_vocab_to=1)],
    "embed_dropout": [dict(embed_dropout=0.0), dict(embed_dropout=0.1)],
    "attn_dropout": [dict(attn_dropout=0.0), dict(attn_dropout=0.1)],
    "resid_dropout": [dict(resid_dropout=0.0), dict(resid_dropout=0.1)],
    "mlp_dropout": [dict(mlp_dropout=0.0), dict(mlp_dropout=0.1)],
}

# field that MORE sets -> (flag, entry) that it is beside
INNER: dict[str, list[tuple[str, str]]] = {}
for _flag, _table in MORE.items():
    for _entry, _values in _table.items():
        for _field in dict.fromkeys(name for value in _values for name in value):
            INNER.setdefault(_field, []).append((_flag, _entry))


def axes() -> dict[str, dict[str, Settings]]:
    """axis -> label of a value -> its settings. The base model's own value is among them and has the label it would
    have.
    """
    found: dict[str, dict[str, Settings]] = {}
    for flag, table in tables.AXES.items():
        if flag in INNER:
            continue
        values = [
            {flag: shown(name)} | more
            for name, entry in table.items()
            for more in [{}, *MORE.get(flag, {}).get(name, [])]
        ]
        for inner in (
            INNER.keys() & tables.AXES.keys()
        ):  # a table that is on this axis: its entries that MORE does not name
            known = {getattr(BASE, inner), *(value.get(inner) for value in values)}
            if INNER[inner][0][0] == flag:
                values += [{flag: INNER[inner][0][1], inner: name} for name in tables.AXES[inner] if name not in known]
        found[flag] = {label(value): value for value in values}
    for field in dataclasses.fields(Architecture):
        if field.type in (bool, "bool"):
            found[field.name] = {
                label(value): value
                for value in ({field.name: getattr(BASE, field.name)}, {field.name: not getattr(BASE, field.name)})
            }
    return found | {axis: {label(value): value for value in values} for axis, values in NUMBERS.items()}


def shown(entry: str) -> str:
    """An entry as it is typed: gqa has a number."""
    return f"{entry}:2" if entry == "gqa" else entry


def label(settings: Settings) -> str:
    """Of signs that `pytest -k` takes (not "=" and blanks)."""
    return "/".join(f"{name}:{value}" for name, value in settings.items())


def settings(row: Mapping[str, str], table: Mapping[str, dict[str, Settings]] | None = None) -> Settings:
    """The settings of a row: axis -> label."""
    table = axes() if table is None else table
    return {name: value for axis, chosen in row.items() for name, value in table[axis][chosen].items()}


def config(changes: Settings) -> GPTConfig:
    """The base model with these settings. Raises UserError where they cannot go together."""
    c = dataclasses.replace(BASE, **changes)
    tables.check(c)
    return c


def allowed(row: Mapping[str, str], table: Mapping[str, dict[str, Settings]] | None = None) -> bool:
    try:
        config(settings(row, table))
    except UserError:
        return False
    return True


def singles() -> dict[str, GPTConfig]:
    """label -> the base model with one value of one axis. Values that are the base model's own count once, as
    "base".
    """
    found = {"base": config({})}
    for values in axes().values():
        for name, value in values.items():
            if (c := config(value)) != BASE:
                found[name] = c
    return found


def uncovered(architecture: type = Architecture) -> list[str]:
    """Fields of `architecture` to which no axis gives two values, and flag=name of every entry of a table that no axis
    has.
    """
    given: dict[str, set[Any]] = {f.name: {getattr(BASE, f.name, None)} for f in dataclasses.fields(architecture)}
    for values in axes().values():
        for value in values.values():
            for name, setting in value.items():
                given[name].add(setting)
    fields = [name for name, settings in given.items() if len(settings) < 2]
    entries = [(flag, shown(name)) for flag, table in tables.AXES.items() for name, entry in table.items()]
    return fields + [f"{flag}={value}" for flag, value in entries if value not in given[flag]]


ROWS = Path(__file__).parent / "rows.txt"  # a row a line, a label for each axis of its day; dev/variants.py writes it


def rows() -> tuple[list[dict[str, str]], list[Pair]]:
    """(rows, refused pairs) of the covering array: the rows of rows.txt, then new ones for what these leave uncovered.

    So a new entry adds rows and changes none. A row that was written before an axis existed has the base model's value
    of it; one that names a value that is gone, or that is refused by now, is left out."""
    table = axes()
    base = {
        axis: next(name for name, value in values.items() if dataclasses.replace(BASE, **value) == BASE)
        for axis, values in table.items()
    }
    axis_of = {name: axis for axis, values in table.items() for name in values}
    written = [line.split() for line in ROWS.read_text().splitlines()] if ROWS.exists() else []
    kept = [base | {axis_of[name]: name for name in row} for row in written if set(row) <= set(axis_of)]

    def fits(row: Mapping[str, str]) -> bool:
        return allowed(row, table)

    found, refused = covering_rows(
        {axis: list(values) for axis, values in table.items()}, fits, kept=list(filter(fits, kept))
    )
    return [{axis: row[axis] for axis in table} for row in found], refused


def row_id(row: Mapping[str, str]) -> str:
    """The entry of every table, defaults too, and what else differs from the base model: `pytest -k swiglu`, or to be
    exact `-k /mlp:relu/`.
    """
    c = dataclasses.replace(BASE, **settings(row))
    chosen = [
        flag
        for flag in tables.AXES
        if flag not in INNER or any(getattr(c, outer) == entry for outer, entry in INNER[flag])
    ]
    rest = [
        f.name
        for f in dataclasses.fields(c)
        if f.name not in tables.AXES and getattr(c, f.name) != getattr(BASE, f.name)
    ]
    return f"/{label({name: getattr(c, name) for name in chosen + rest})}/"
