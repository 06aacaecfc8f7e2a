"""Runs of words that texts share: hashed, looked up at once, and compared word by word, so that no hash decides."""

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

LETTER_BASE, WORD_BASE = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD1342543DE82EF95)  # odd, otherwise arbitrary
SEPARATOR = "\x1e"  # between texts that are split together
BATCH_CHARS = 1 << 20  # split at once
COMPARED = 1 << 19  # words compared at once


class Words(NamedTuple):
    """Texts as words."""

    letters: np.ndarray  # (L,) uint32: those of all words, with nothing between them
    starts: np.ndarray  # (W + 1,): where each word begins among the letters
    firsts: np.ndarray  # (texts + 1,): where each text begins among the words

    def text(self, first: int, n: int) -> str:
        """n words as they were compared."""
        return " ".join(
            self.letters[a:b].tobytes().decode("utf-32-le")
            for a, b in zip(self.starts[first : first + n], self.starts[first + 1 : first + n + 1])
        )


@lru_cache(1)
def word_characters() -> np.ndarray:
    """Of every code point, whether it belongs to a word."""
    characters = map(chr, range(0x110000))
    return np.fromiter((c.isalnum() or unicodedata.category(c)[0] == "M" for c in characters), bool, 0x110000)


def split(texts: Sequence[str]) -> Words:
    """The words of each text."""
    plain = (t if t.isascii() else unicodedata.normalize("NFKC", t) for t in texts)
    joined = SEPARATOR.join(t.replace(SEPARATOR, " ") for t in plain).lower()
    codes = np.frombuffer(joined.encode("utf-32-le", "replace"), np.uint32)  # half a surrogate pair becomes ?
    inside = word_characters()[codes]
    edges = np.flatnonzero(np.diff(inside, prepend=False, append=False))
    begins, lengths = edges[::2], edges[1::2] - edges[::2]
    inner = np.searchsorted(begins, np.flatnonzero(codes == ord(SEPARATOR)))
    return Words(
        codes[inside], _ends(lengths), np.concatenate([[0], inner, [len(begins)]]) if texts else np.zeros(1, np.int64)
    )


def merged(parts: Sequence[Words]) -> Words:
    """Several of them as one."""
    starts = [part.starts[:-1] + shift for part, shift in zip(parts, _ends([len(p.letters) for p in parts]))]
    firsts = [part.firsts[:-1] + shift for part, shift in zip(parts, _ends([len(p.starts) - 1 for p in parts]))]
    letters = np.concatenate([part.letters for part in parts])
    return Words(letters, np.concatenate([*starts, [len(letters)]]), np.concatenate([*firsts, [sum(map(len, starts))]]))


def _ends(sizes: Iterable[int]) -> np.ndarray:
    """0 and the cumulative sums."""
    return np.concatenate([[0], np.cumsum(np.asarray(sizes, np.int64), dtype=np.int64)])


def mixed(h: np.ndarray) -> np.ndarray:
    """uint64 -> uint64, one to one, every bit depending on every other: the finaliser of splitmix64 (Steele et al.,
    OOPSLA 2014).
    """
    h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return h ^ (h >> np.uint64(31))


def runs(words: Words, n: int) -> tuple[np.ndarray, np.ndarray]:
    """(place of the first word, hash) of every run of n words inside one text: polynomials modulo 2^64, of letters and
    then of words.
    """
    count = len(words.starts) - n  # runs, those across texts included
    if count < 1:
        return np.zeros(0, np.int64), np.zeros(0, np.uint64)
    lengths = np.diff(words.starts)
    powers = np.cumprod(np.full(lengths.max(), LETTER_BASE))
    offsets = np.arange(len(words.letters)) - np.repeat(words.starts[:-1], lengths)
    hashes = mixed(np.add.reduceat(words.letters * powers[offsets], words.starts[:-1]))
    out = np.zeros(count, np.uint64)
    for k in range(n):
        out *= WORD_BASE
        out += hashes[k : k + count]
    text = np.repeat(np.arange(len(words.firsts) - 1), np.diff(words.firsts))
    places = np.flatnonzero(text[:count] == text[n - 1 :])
    return places, mixed(out[places])


def ranges(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Of each start, the numbers start ... start + size - 1, all in one array."""
    return np.arange(sizes.sum()) + np.repeat(starts - _ends(sizes)[:-1], sizes)


def equal(a: Words, at_a: np.ndarray, b: Words, at_b: np.ndarray, n: int) -> np.ndarray:
    """Whether the n words at each place of `a` are those at the place of `b`, letter by letter."""
    same, step = np.zeros(len(at_a), bool), max(1, COMPARED // n)
    for first in range(0, len(at_a), step):
        chunk = slice(first, first + step)
        edges_a, edges_b = (words.starts[at[chunk, None] + np.arange(n + 1)] for words, at in ((a, at_a), (b, at_b)))
        alike = first + np.flatnonzero((np.diff(edges_a) == np.diff(edges_b)).all(1))
        if len(alike):
            sizes = (edges_a[:, -1] - edges_a[:, 0])[alike - first]
            unlike = a.letters[ranges(a.starts[at_a[alike]], sizes)] != b.letters[ranges(b.starts[at_b[alike]], sizes)]
            same[alike] = ~np.logical_or.reduceat(unlike, _ends(sizes)[:-1])
    return same


class RunIndex:
    """Every run of n words of the texts, and where it is."""

    def __init__(self, texts: Sequence[str], n: int) -> None:
        self.n = n
        parts, found, words_before = [], [], 0
        for batch in batches(texts):
            parts.append(split(batch))
            places, hashes = runs(parts[-1], n)
            found.append((places + words_before, hashes))
            words_before += len(parts[-1].starts) - 1
        self.words = merged(parts)
        places, hashes = (np.concatenate(halves) for halves in zip(*found))
        self.layers: list[tuple[np.ndarray, int]] = []  # hashes in order, number of the first run
        occurrences, counts = [], []
        while len(places):
            order = np.argsort(hashes, kind="stable")
            places, hashes = places[order], hashes[order]
            unique, first, count = np.unique(hashes, return_index=True, return_counts=True)
            model = np.repeat(places[first], count)
            same = places == model
            same[~same] = equal(self.words, places[~same], self.words, model[~same], n)
            self.layers.append((unique, sum(map(len, counts))))
            occurrences.append(places[same])
            counts.append(np.add.reduceat(same.astype(np.int64), first))
            places, hashes = places[~same], hashes[~same]
        self.occurrences = np.concatenate([*occurrences, np.zeros(0, np.int64)])  # places of run 0, of run 1, ...
        self.bounds = _ends(np.concatenate([*counts, np.zeros(0, np.int64)]))
        self.shift = np.uint64(64 - min(27, max(8, 3 + len(self.bounds).bit_length())))
        self.maybe = np.zeros(1 << (64 - int(self.shift)), bool)  # by the upper bits of a hash: spares most searches
        for unique, _ in self.layers:
            self.maybe[unique >> self.shift] = True

    def find(self, words: Words) -> tuple[np.ndarray, np.ndarray]:
        """(text, run) of the runs of `words` that are in the index, by text."""
        places, hashes = runs(words, self.n)
        near = self.maybe[hashes >> self.shift]
        places, hashes = places[near], hashes[near]
        at, numbers = [], []
        for unique, first in self.layers:
            i = np.minimum(np.searchsorted(unique, hashes), len(unique) - 1)
            hit = np.flatnonzero(unique[i] == hashes)
            number = first + i[hit]
            right = equal(words, places[hit], self.words, self.occurrences[self.bounds[number]], self.n)
            at.append(places[hit][right])
            numbers.append(number[right])
        at, numbers = (np.concatenate([*found, np.zeros(0, np.int64)]) for found in (at, numbers))
        text = np.searchsorted(words.firsts, at, side="right") - 1
        order = np.argsort(text, kind="stable")
        return text[order], numbers[order]

    def places(self, numbers: np.ndarray) -> np.ndarray:
        """Places of all occurrences of these runs, in order."""
        numbers = np.unique(numbers)
        return np.sort(self.occurrences[ranges(self.bounds[numbers], np.diff(self.bounds)[numbers])])


def batches(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """The texts in lots of about BATCH_CHARS."""
    first = chars = 0
    for i, text in enumerate(texts):
        chars += len(text)
        if chars >= BATCH_CHARS:
            yield texts[first : i + 1]
            first, chars = i + 1, 0
    if first < len(texts) or not texts:
        yield texts[first:]
