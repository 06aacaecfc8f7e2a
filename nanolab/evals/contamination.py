"""Contamination: which items of an evaluation set share a run of N words with training or validation documents. Exact.

After Brown et al., "Language Models are Few-Shot Learners", arXiv 2005.14165, appendix C, whose N is 13 and which
lower-cases text and leaves punctuation out. What is done otherwise here: N is the same for every set, where they took
the 5th percentile of a set's lengths, from 8 to 13; punctuation separates words instead of being struck out of them, so
that don't is two words, whichever apostrophe it has; a run counts however many documents hold it, where they ignored
those of more than ten, so an instruction that all items of a set begin with can count for all of them (the examples
show it); documents are only read, none is cut.

A word is a longest run of letters, digits and combining marks, as Unicode has them, in the text after NFKC and
lower-casing. Scripts that put no space between words have few words, so little is found there.

How: the runs of the evaluation sets are indexed by 64-bit hashes; documents stream past, their runs are hashed with
numpy, and where a hash is in the index the words themselves are compared. A hash that two runs of the sets share gets a
second layer of the index."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nanolab.cli import UserError
from nanolab.data.corpus import Documents
from nanolab.data.formats import format_of
from nanolab.evals.bundle import open_bundle, read_rows
from nanolab.evals.ngrams import RunIndex, batches, split
from nanolab.evals.score import wilson
from nanolab.terminal import progress

EXAMPLES, EXAMPLE_WORDS = 5, 60  # of each set; the longest overlaps first
EITHER = "either"


@dataclass(frozen=True)
class EvalSet:
    """One file of items: numbers of their lines, and the texts of each."""

    name: str
    path: Path
    lines: list[int]
    items: list[list[str]]


def item_texts(item: dict[str, Any]) -> list[str]:
    """What is looked for of an item: the whole that is right as one text, every other option as one of its own.

    Items of another form: each string in them, however deep, by itself. Raises UserError where there is none.
    """
    keys = set(item)
    if {"query", "choices", "gold"} <= keys:
        (right, others), lead, tail = _chosen(item, "choices"), item["query"], ""
    elif {"context_options", "continuation", "gold"} <= keys:
        (right, others), lead, tail = _chosen(item, "context_options"), "", item["continuation"]
    elif {"context", "continuation"} <= keys:
        right, others, lead, tail = "", [], item["context"], item["continuation"]
    elif {"question", "answer"} <= keys and isinstance(item["answer"], str):
        right, others, lead, tail = "", [], item["question"], item["answer"]
    else:
        return _strings(item)
    return [f"{lead} {right} {tail}", *others]


def _chosen(item: dict[str, Any], key: str) -> tuple[str, list[str]]:
    options, gold = item[key], item["gold"]
    if not isinstance(options, list) or not isinstance(gold, int) or not 0 <= gold < len(options):
        raise UserError(
            f"gold is {gold!r} of {len(options) if isinstance(options, list) else 'no'} {key}; expected the number of"
            " one of them, from 0"
        )
    return options[gold], options[:gold] + options[gold + 1 :]


def _strings(value: Any) -> list[str]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [value] if isinstance(value, str) else [text for part in inner for text in _strings(part)]


def read_set(path: Path, name: str) -> EvalSet:
    """Raises UserError for a file that is not one of items, naming the line."""
    lines, items = [], []
    for n, row in read_rows(path):
        try:
            texts = item_texts(row)
            if not texts or not all(isinstance(text, str) for text in texts):
                raise UserError(
                    f"the fields {', '.join(row) or '(none)'} hold no text; expected question and options, context and"
                    " continuation, or other strings"
                )
        except UserError as error:
            raise UserError(f"{path}:{n}: {error}; fix the line") from None
        lines.append(n)
        items.append(texts)
    return EvalSet(name, path, lines, items)


def read_sets(where: str | Path) -> tuple[list[EvalSet], dict[str, str]]:
    """(sets, name -> what is wrong with it) of one .jsonl file, or of all tasks of an evaluation bundle, a file only
    once.

    Raises UserError where nothing can be read.
    """
    where = Path(where).expanduser()
    if where.is_dir():
        bundle = open_bundle(
            where, [name for name in ("core.yaml", "extra.yaml") if name == "core.yaml" or (where / name).exists()]
        )
        names: dict[Path, list[str]] = {}
        for task in bundle.tasks.values():
            names.setdefault(task.path, []).append(task.label)
        wanted, broken = {path: ", ".join(labels) for path, labels in names.items()}, dict(bundle.broken)
    elif where.is_file() and where.suffix == ".jsonl":
        wanted, broken = {where: where.stem}, {}
    else:
        seen = "does not exist" if not where.exists() else f"ends in {where.suffix or 'no suffix'}"
        raise UserError(
            f"{where} {seen}; expected a .jsonl file, one item per line, or the folder of an evaluation bundle; type"
            " --eval-set PATH"
        )
    sets = []
    for path, name in wanted.items():
        try:
            sets.append(read_set(path, name))
        except (UserError, OSError) as error:
            broken[name] = str(error)
    if not sets:
        raise UserError("; ".join(f"{name}: {why}" for name, why in broken.items()))
    return sets, broken


# ---- the search ----


class Best(NamedTuple):
    """Of each item, its longest stretch of words whose runs of N are all in one document, and where; 0 words where
    there is none.

    The first document wins a tie.
    """

    words: np.ndarray
    place: np.ndarray  # of its first word, in the index
    block: np.ndarray
    document: np.ndarray  # in the block

    @classmethod
    def none(cls, n_items: int) -> "Best":
        return cls(*(np.zeros(n_items, np.int64) for _ in range(4)))

    def take(self, items: np.ndarray, words: np.ndarray, places: np.ndarray, block: int, document: int) -> None:
        """Keep what is longer; of what is given for one item, the last."""
        better = words > self.words[items]
        items = items[better]
        self.words[items], self.place[items], self.block[items], self.document[items] = (
            words[better],
            places[better],
            block,
            document,
        )


class Search:
    """Evaluation sets, indexed to be looked for in any number of corpora."""

    def __init__(self, sets: Sequence[EvalSet], n: int) -> None:
        """n: words in a run. Raises UserError for fewer than 2."""
        if n < 2:
            raise UserError(f"--ngram is {n}; expected at least 2 words, so that chance finds little; try --ngram 13")
        self.sets, items = list(sets), [item for s in sets for item in s.items]
        self.index = RunIndex([text for item in items for text in item], n)
        self.n_items = len(items)
        self.text_item = np.repeat(np.arange(len(items)), [len(item) for item in items])
        sizes = np.diff(self.index.words.firsts)
        self.long_enough = np.bincount(self.text_item, sizes >= n, self.n_items) > 0

    def item_at(self, places: np.ndarray) -> np.ndarray:
        """The items that these words of the index belong to."""
        return self.text_item[np.searchsorted(self.index.words.firsts, places, side="right") - 1]

    def overlaps(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(item, words, first word) of the stretches of items that runs at these places, in order, cover; an item's
        longest last, a tie's first.
        """
        first = np.flatnonzero(np.diff(places, prepend=-2) != 1)
        words = np.diff(first, append=len(places)) + self.index.n - 1
        order = np.lexsort((-first, words))
        return self.item_at(places[first])[order], words[order], places[first][order]

    def scan(self, documents: Documents, label: str) -> Best:
        """Of each item, its longest overlap with a document. Reads a block at a time, about 30 MB of text a second."""
        best, blocks = Best.none(self.n_items), documents.blocks
        for number in progress(range(len(blocks)), f"reading {label}", len(blocks)):
            before = 0
            block = blocks[number]
            for texts in batches([documents.kept(text) or "" for text in format_of(block.path).scan(block)]):
                text, runs_found = self.index.find(split(texts))
                for d in np.unique(text):
                    best.take(*self.overlaps(self.index.places(runs_found[text == d])), number, before + int(d))
                before += len(texts)
        return best

    def report(self, found: dict[str, tuple[Documents, Best]]) -> list[dict[str, Any]]:
        """One entry per set: counts, shares of the items long enough with 95 % intervals by split, longest overlap,
        examples, contaminated items.
        """
        out, before = [], 0
        for s in self.sets:
            mine = slice(before, before + len(s.items))
            words = {split_name: best.words[mine] for split_name, (_, best) in found.items()}
            longest = np.max(list(words.values()), axis=0)
            enough = int(self.long_enough[mine].sum())
            rows = [self._item(found, s, before, i) for i in np.flatnonzero(longest)]
            # of items on one passage, one
            shown = {row["text"]: row for row in sorted(rows, key=lambda row: row["words"])}
            out.append(
                {
                    "set": s.name,
                    "file": str(s.path),
                    "items": len(s.items),
                    "long_enough": enough,
                    "longest": int(longest.max()),
                    "overlap": {
                        name: overlap_share(int((column > 0).sum()), enough)
                        for name, column in (words | {EITHER: longest}).items()
                    },
                    "examples": list(shown.values())[: -EXAMPLES - 1 : -1],
                    "contaminated": rows,
                }
            )
            before += len(s.items)
        return out

    def _item(self, found: dict[str, tuple[Documents, Best]], s: EvalSet, before: int, i: int) -> dict[str, Any]:
        """Where item i of a set is, and its longest overlap with where that is."""
        row: dict[str, Any] = {
            "set": s.name,
            "index": int(i),
            "line": s.lines[i],
            "splits": [name for name, (_, b) in found.items() if b.words[before + i]],
        }
        name = max(row["splits"], key=lambda name: found[name][1].words[before + i])
        documents, best = found[name]
        n, place, number, document = (int(column[before + i]) for column in best)
        block = documents.blocks[number]
        where = f"{block.path} {'row group' if block.kind == 'parquet' else 'byte'} {block.start}, document {document}"
        shown = self.index.words.text(place, min(n, EXAMPLE_WORDS)) + (" ..." if n > EXAMPLE_WORDS else "")
        return row | {"words": n, "split": name, "where": where, "text": shown}


def overlap_share(hits: int, n: int) -> dict[str, Any]:
    """How many of n items, what part of them, and its 95 % interval; of none, None."""
    return {"items": hits, "share": hits / n if n else None, "interval": list(wilson(hits / n, n)) if n else None}
