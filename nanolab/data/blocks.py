"""A block of documents: what is read and decoded at once, of whatever kind of file."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nanolab.cli import UserError

BLOCK_DOCUMENTS, BLOCK_BYTES = 1024, 4 << 20  # a block of a text file ends at whichever comes first
MAX_DOCUMENT = 64_000_000  # bytes; each stream of the loader holds the tokens of a whole document


class Block(NamedTuple):
    path: Path
    kind: str  # how it is read, where a suffix has several ways
    start: int  # row group number, or byte offset
    length: int  # bytes of text (of a row group: about)
    n: int  # documents


def too_long(path: Path, where: str, n_bytes: int, advice: str, **values: Any) -> UserError:
    seen = f"{path}: {where} holds {'more than ' if n_bytes > MAX_DOCUMENT else ''}{n_bytes:,} bytes of one document"
    return UserError(
        f"{seen}; expected at most {MAX_DOCUMENT:,}; {advice}", "document-too-long", path=str(path), **values
    )


Found = Iterator[tuple[str, int, int, int]]  # fields of blocks, after the path


class Format(NamedTuple):
    """How the files of a suffix are read."""

    # the blocks of a file, counting bytes of text and marks on the way; raises UserError for bad content
    index: Callable[[Path, Counter[str]], Found]
    read: Callable[[Block], Sequence[str | None]]  # the documents of a block, in file order
    scan: Callable[[Block], Iterable[str | None]]  # the same, for one pass: never in memory or on the disk as a whole
    unit: str  # what Block.start counts
