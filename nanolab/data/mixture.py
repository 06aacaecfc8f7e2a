"""The grammar of mixtures, of corpora and of tasks: NAME:WEIGHT,NAME,... Imports no torch."""

from collections.abc import Callable, Iterator

from nanolab.cli import UserError


def weighted(spec: str, known: Callable[[str], bool]) -> Iterator[tuple[str, str]]:
    """(name, weight as it was typed) of each part of a mixture; "1" without a weight. known: as of `split_weight`."""
    for part in spec.split(","):
        yield split_weight(part.strip(), known)


def split_weight(part: str, known: Callable[[str], bool]) -> tuple[str, str]:
    """NAME:WEIGHT of a mixture as (name, weight as it was typed); "1" without one.

    known: whether a name stands for something. A path may have colons of its own: they stay with a part that is known
    as a whole, unless what precedes the last one is known too and a number follows; and with one that is not known at
    all and does not end with a number."""
    name, colon, weight = part.rpartition(":")
    try:
        number = float(weight) is not None
    except ValueError:
        number = False
    weighted = known(name) and number if known(part) else known(name) or number
    return (name, weight) if colon and weighted else (part, "1")


def positive(weight: str, name: str, spec: str, advice: str) -> float:
    """The weight of `name` in the mixture `spec`. Raises UserError for one that is not a positive number."""
    try:
        value = float(weight)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise UserError(
            f"{name!r} in {spec!r} has the weight {weight!r}; expected a positive number after the colon; try {advice}",
            "bad-weight",
            name=name,
            weight=weight,
        )
    return value
