"""Best fit: of the pieces that wait, the oldest, the largest that fits into a room, or the smallest. O(log n) to find.

Used by all that packs: rows of documents (packing.Packer), of conversations, and of validation text."""

from bisect import bisect_left, insort
from collections.abc import Iterable
from typing import Generic, TypeVar

T = TypeVar("T")
ARRIVAL_BITS = 48


class BestFit(Generic[T]):
    """Pieces by their size, in order of arrival. Of equal sizes `largest` takes the latest, `smallest` the oldest."""

    def __init__(self, pieces: Iterable[tuple[int, T]] = ()) -> None:
        # A key is (size, arrival) in one integer: sorted it finds the best fit, and _pieces keeps it by arrival.
        self._pieces: dict[int, T] = {size << ARRIVAL_BITS | i: piece for i, (size, piece) in enumerate(pieces)}
        self._keys = sorted(self._pieces)
        self._arrivals = len(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def pieces(self) -> list[T]:
        """Oldest first."""
        return list(self._pieces.values())

    def add(self, size: int, piece: T) -> None:
        key = size << ARRIVAL_BITS | self._arrivals
        self._arrivals += 1
        insort(self._keys, key)
        self._pieces[key] = piece

    def oldest(self) -> tuple[int, T]:
        """Take the piece that has waited longest: (its size, it)."""
        key = next(iter(self._pieces))
        del self._keys[bisect_left(self._keys, key)]
        return key >> ARRIVAL_BITS, self._pieces.pop(key)

    def largest(self, room: int) -> tuple[int, T] | None:
        """Take the largest piece of at most `room`; None where there is none."""
        place = bisect_left(self._keys, (room + 1) << ARRIVAL_BITS)
        if not place:
            return None
        key = self._keys.pop(place - 1)
        return key >> ARRIVAL_BITS, self._pieces.pop(key)

    def smallest(self) -> tuple[int, T]:
        key = self._keys.pop(0)
        return key >> ARRIVAL_BITS, self._pieces.pop(key)
