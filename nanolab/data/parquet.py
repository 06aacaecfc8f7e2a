"""Parquet files with a column `text`: a block is a row group. A large one is read in parts, so that memory does not
depend on its size."""

import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nanolab.cli import UserError
from nanolab.data import blocks
from nanolab.data.blocks import Block, too_long
from nanolab.files import replacing, sha256_file
from nanolab.runtime import base_dir

LARGE_ROW_GROUP = 64_000_000  # bytes; a larger one goes through a temporary file
PART_BYTES = 4 << 20  # of a row group, decoded at once


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _is_text(kind: pa.DataType) -> bool:
    return (
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_string_view(kind)
        or (pa.types.is_dictionary(kind) and _is_text(kind.value_type))
    )


def index_parquet(path: Path, counts: Counter[str]) -> blocks.Found:
    try:
        with pq.ParquetFile(path) as file:
            schema, groups = file.schema_arrow, [file.metadata.row_group(i) for i in range(file.num_row_groups)]
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{path} is not a whole parquet file ({_first_line(error)}); expected one; copy or download it again"
        ) from error
    if "text" not in schema.names:
        columns = ", ".join(schema.names) or "none"
        raise UserError(
            f"{path} has no column text (it has: {columns}); expected one; rename the column that holds the documents"
            " to text"
        )
    kind = schema.field("text").type
    if not _is_text(kind):
        raise UserError(f"column text of {path} has type {kind}; expected string; convert the column")
    row = 0
    for i, group in enumerate(groups):
        columns = (group.column(j) for j in range(group.num_columns))
        if group.num_rows:
            block = Block(
                path,
                "parquet",
                i,
                sum(c.total_uncompressed_size for c in columns if c.path_in_schema == "text"),
                group.num_rows,
            )
            if block.length > blocks.MAX_DOCUMENT:  # only such a row group can hold a cell that is too long
                for j, text in enumerate(_read_parts(block)):
                    if (
                        text
                        and len(text) > blocks.MAX_DOCUMENT // 4
                        and (n := len(text.encode())) > blocks.MAX_DOCUMENT
                    ):
                        raise too_long(path, f"row {row + j}", n, "divide it into documents", row=row + j)
            counts["bytes"] += block.length
            yield block[1:]
        row += group.num_rows


def _read_parts(block: Block) -> Iterator[str | None]:
    """The documents of a row group, of which only a part is decoded at a time."""
    rows = max(1, min(block.n, blocks.BLOCK_DOCUMENTS, block.n * PART_BYTES // max(block.length, 1)))
    with _naming_damage(block), pq.ParquetFile(block.path, pre_buffer=False, buffer_size=1 << 20) as file:
        for batch in file.iter_batches(rows, row_groups=[block.start], columns=["text"]):
            yield from batch.column(0).to_pylist()


class _LargeRowGroup:
    """The documents of a large row group by number, in a temporary file: the shuffle asks for them in any order, and
    memory may not hold them.
    """

    def __init__(self, block: Block) -> None:
        self.lengths = np.full(block.n, -1, dtype=np.int64)  # bytes; -1: null
        base_dir().mkdir(parents=True, exist_ok=True)
        try:
            self.file = tempfile.TemporaryFile(dir=base_dir(), buffering=1 << 20)
            for i, text in enumerate(_read_parts(block)):
                if text is not None:
                    raw = text.encode()
                    self.lengths[i] = len(raw)
                    self.file.write(raw)
            self.file.flush()
        except OSError as error:
            seen = f"row group {block.start} of {block.path} does not fit under {base_dir()} ({error.strerror})"
            raise UserError(
                f"{seen}; expected room for its {block.length:,} bytes; make room, or write it in smaller row groups",
                "no-room",
                path=str(block.path),
            ) from error
        self.ends = np.cumsum(np.maximum(self.lengths, 0))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> str | None:
        n = int(self.lengths[i])
        return os.pread(self.file.fileno(), n, int(self.ends[i]) - n).decode() if n >= 0 else None


@contextmanager
def _naming_damage(block: Block) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(
            f"row group {block.start} of {block.path} is not UTF-8 ({error}); expected UTF-8 text; write it again"
        ) from error
    except (pa.ArrowException, OSError) as error:
        seen = f"row group {block.start} of {block.path} is damaged ({_first_line(error)})"
        raise UserError(f"{seen}; expected a whole file; copy or download it again") from error


def read_parquet(block: Block) -> Sequence[str | None]:
    if block.length > LARGE_ROW_GROUP:
        return _LargeRowGroup(block)
    with _naming_damage(block), pq.ParquetFile(block.path) as file:
        return file.read_row_group(block.start, columns=["text"]).column(0).to_pylist()


def scan_parquet(block: Block) -> Iterable[str | None]:
    """As `read_parquet`, for one pass."""
    return _read_parts(block) if block.length > LARGE_ROW_GROUP else read_parquet(block)


def write_documents(path: Path, texts: Sequence[str], **columns: Sequence[str]) -> str:
    """Write a parquet file with `texts` as its column text, in row groups of 1,024; returns its sha256."""
    table = pa.table(
        {"text": pa.array(texts, pa.string()), **{k: pa.array(v, pa.string()) for k, v in columns.items()}}
    )
    with replacing(path) as fresh:
        pq.write_table(table, fresh, row_group_size=blocks.BLOCK_DOCUMENTS, compression="zstd")
    return sha256_file(path)
