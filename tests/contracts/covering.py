"""Pairwise covering arrays: few rows in which every two values of two axes that may go together do so at least once.

Greedy, a row at a time: start from a pair that no row has yet, then give each further axis, in a random order, the
value that brings the most new pairs; of several such rows the best one is kept (AETG; Cohen et al., IEEE TSE 23(7),
1997). Sets of values are integers with a bit per value. Imports neither torch nor nanolab."""

import random
from collections.abc import Callable, Mapping, Sequence

Pair = frozenset[tuple[str, str]]  # two of (axis, value)


def every_pair(axes: Mapping[str, Sequence[str]]) -> list[Pair]:
    """All pairs of values of two different axes."""
    values = [(axis, value) for axis in axes for value in axes[axis]]
    return [frozenset((a, b)) for i, a in enumerate(values) for b in values[i + 1 :] if a[0] != b[0]]


def covering_rows(
    axes: Mapping[str, Sequence[str]],
    allowed: Callable[[Mapping[str, str]], bool],
    *,
    kept: Sequence[Mapping[str, str]] = (),
    seed: int = 0,
    tries: int = 30,
) -> tuple[list[dict[str, str]], list[Pair]]:
    """(rows, refused): every row gives each axis a value and is allowed; every pair is in some row or in `refused`.

    The rows begin with those of `kept`, whole rows that are allowed; what they leave uncovered is searched. The search
    takes axes and values by name, so that their order does not matter. `allowed` is asked about two values alone (axes
    left out are at their defaults), then about whole rows. Raises ValueError when a pair that is allowed alone fits
    into no row."""
    axes = {axis: sorted(axes[axis]) for axis in sorted(axes)}
    refused = [pair for pair in every_pair(axes) if not allowed(dict(pair))]
    search = _Search(axes, refused, random.Random(seed))
    rows = [dict(row) for row in kept]
    for row in rows:
        search.cover([search.number[value] for value in row.items()])
    while any(search.uncovered):
        found = [row for row in (search.row() for _ in range(tries)) if row and allowed(search.named(row))]
        if not found:
            raise ValueError(
                f"no allowed row holds {search.named(search.seed)}: a refusal depends on more than two values"
            )
        best = max(found, key=search.gain)
        search.cover(best)
        rows.append(search.named(best))
    return rows, refused


class _Search:
    """What is left to cover. A row is a list of value numbers, one per axis."""

    def __init__(self, axes: Mapping[str, Sequence[str]], refused: list[Pair], rng: random.Random):
        self.values = [(axis, value) for axis in axes for value in axes[axis]]
        self.rng, self.number = rng, (number := {value: i for i, value in enumerate(self.values)})
        self.axes = [[number[axis, value] for value in axes[axis]] for axis in axes]
        self.axis_of = [a for a, members in enumerate(self.axes) for _ in members]
        self.fits = [
            sum(1 << j for j in range(len(self.values)) if self.axis_of[j] != self.axis_of[i])
            for i in range(len(self.values))
        ]
        for a, b in (tuple(pair) for pair in refused):
            self.fits[number[a]] &= ~(1 << number[b])
            self.fits[number[b]] &= ~(1 << number[a])
        self.uncovered = list(self.fits)
        self.seed: list[int] = []

    def row(self) -> list[int]:
        """A row around an uncovered pair, or [] where the values chosen left some axis without any."""
        most = max(mask.bit_count() for mask in self.uncovered)
        first = self.rng.choice([i for i, mask in enumerate(self.uncovered) if mask.bit_count() == most])
        second = self.rng.choice([j for j in range(len(self.values)) if self.uncovered[first] >> j & 1])
        row = self.seed = [first, second]
        chosen, possible = 1 << first | 1 << second, self.fits[first] & self.fits[second]
        order = [a for a in range(len(self.axes)) if a not in (self.axis_of[first], self.axis_of[second])]
        self.rng.shuffle(order)
        for a in order:
            options = [i for i in self.axes[a] if possible >> i & 1]
            if not options:
                return []
            best = max(
                options,
                key=lambda i: (
                    (self.uncovered[i] & chosen).bit_count(),
                    (self.uncovered[i] & possible).bit_count(),
                    self.rng.random(),
                ),
            )
            row = [*row, best]
            chosen, possible = chosen | 1 << best, possible & self.fits[best]
        return row

    def gain(self, row: list[int]) -> int:
        mask = sum(1 << i for i in row)
        return sum((self.uncovered[i] & mask).bit_count() for i in row)

    def cover(self, row: list[int]) -> None:
        mask = sum(1 << i for i in row)
        for i in row:
            self.uncovered[i] &= ~mask

    def named(self, row: list[int]) -> dict[str, str]:
        return dict(sorted((self.values[i] for i in row), key=lambda value: value[0]))
