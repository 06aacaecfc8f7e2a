"""Text files as blocks of documents: parquet, jsonl, txt; checked and indexed in one streaming pass.

A block is what is read and decoded at once: a row group of a parquet file, or a run of lines of a text file. The index of a
file (its blocks and the sha256 of its bytes) is made in one streaming pass that also checks every line of text files, and is
kept under the base directory by path, size and modification time, so that a 10 GB file is neither held in memory nor read twice.
"""

import codecs
import fcntl
import hashlib
import io
import json
import os
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import Iterable, Iterator, NamedTuple, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from nanolab.config import UserError
from nanolab.data.encoding import HEAD, check_utf8
from nanolab.runtime import base_dir, print0

INDEX_FORMAT = 1
BLOCK_DOCUMENTS, BLOCK_BYTES = 1024, 4 << 20  # a block of a text file ends at whichever comes first
SEPARATOR = b"<|endoftext|>"  # alone on a line of a .txt file: the next document begins
TXT_CHARS = 4000  # without separators, paragraphs are gathered into documents of about this size


class Block(NamedTuple):
    path: Path
    kind: str  # parquet, or a key of TEXT_KINDS
    start: int  # row group number, or byte offset
    length: int  # bytes of text (of a row group: about)
    n: int  # documents


def find_files(where: str | Path) -> list[Path]:
    """The text files at `where` (one file, or a folder searched recursively), sorted by path. Raises UserError if there are none."""
    where = Path(where).expanduser()
    if not where.exists():
        raise UserError(f"{where} does not exist; expected a folder or file with text; type --data-dir PATH")
    seen = [where] if where.is_file() else [p for p in sorted(where.rglob("*")) if p.is_file()]
    files = [p for p in seen if p.suffix in SUFFIXES and not any(part.startswith(".") for part in p.relative_to(where).parts)]
    if not files:
        names = ", ".join(p.name for p in seen[:5]) or "nothing"
        raise UserError(f"no text under {where}: saw {names}; expected .parquet (a `text` column), .jsonl (a `text` field) or .txt files")
    return files


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _parquet_blocks(path: Path) -> Iterator[tuple[str, int, int, int]]:
    try:
        with pq.ParquetFile(path) as file:
            schema, groups = file.schema_arrow, [file.metadata.row_group(i) for i in range(file.num_row_groups)]
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a whole parquet file ({_first_line(error)}); expected one; copy or download it again") from error
    if "text" not in schema.names:
        columns = ", ".join(schema.names) or "none"
        raise UserError(f"{path} has no column text (it has: {columns}); expected one; rename the column that holds the documents to text")
    kind = schema.field("text").type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise UserError(f"column text of {path} has type {kind}; expected string; convert the column")
    for i, group in enumerate(groups):
        columns = (group.column(j) for j in range(group.num_columns))
        if group.num_rows:
            yield "parquet", i, sum(c.total_uncompressed_size for c in columns if c.path_in_schema == "text"), group.num_rows


def _read_parquet(block: Block) -> list[str | None]:
    try:
        with pq.ParquetFile(block.path) as file:
            return file.read_row_group(block.start, columns=["text"]).column(0).to_pylist()
    except UnicodeDecodeError as error:
        raise UserError(f"row group {block.start} of {block.path} is not UTF-8 ({error}); expected UTF-8 text; write it again") from error
    except (pa.ArrowException, OSError) as error:
        seen = f"row group {block.start} of {block.path} is damaged ({_first_line(error)})"
        raise UserError(f"{seen}; expected a whole file; copy or download it again") from error


def _decode(raw: bytes, path: Path, offset: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        seen = f"{path} is not UTF-8 at byte {offset + error.start} (0x{raw[error.start]:02x})"
        raise UserError(f"{seen}; expected UTF-8 text; convert it, for example: iconv -f latin1 -t utf-8 IN > OUT") from error


def _json_text(line: bytes, path: Path, offset: int) -> str:
    text = _decode(line.removeprefix(codecs.BOM_UTF8), path, offset)
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        seen = f"{path}: the line at byte {offset} is not JSON ({error.msg})"
        raise UserError(f"{seen}; expected one object with a text field per line; mend or delete the line") from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        saw = f"the fields {', '.join(record)}" if isinstance(record, dict) else f"a {type(record).__name__}"
        raise UserError(f"{path}: the line at byte {offset} has {saw}; expected an object with a string field text; rename the field")
    return record["text"].encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair cannot be encoded


def _jsonl_documents(lines: Iterable[bytes], path: Path, offset: int) -> Iterator[tuple[int, str]]:
    """(bytes consumed, text) of each document in `lines`."""
    consumed = 0
    for line in lines:
        consumed += len(line)
        if line.strip():
            text = _json_text(line, path, offset + consumed - len(line))
            yield consumed, text
            offset, consumed = offset + consumed, 0


def _txt_documents(lines: Iterable[bytes], path: Path, offset: int, marked: bool) -> Iterator[tuple[int, str]]:
    """(bytes consumed, text) of each document: up to a separator line if `marked`, else up to a blank line past TXT_CHARS."""
    kept: list[bytes] = []
    size = 0

    def document() -> str:
        return _decode(b"".join(kept), path, offset).removeprefix("\ufeff").strip("\r\n")

    for line in lines:
        bare = line.strip()
        size += len(line)
        if marked:
            end = bare == SEPARATOR
            kept += [] if end else [line]
        else:
            kept.append(line)
            end = size >= (2 if bare else 1) * TXT_CHARS  # text without blank lines is cut at the end of a line
        if end:
            yield size, document()
            offset, size, kept = offset + size, 0, []
    if kept:
        yield size, document()


def _txt_marked(lines: Iterable[bytes], path: Path, offset: int) -> Iterator[tuple[int, str]]:
    return _txt_documents(lines, path, offset, True)


def _txt_gathered(lines: Iterable[bytes], path: Path, offset: int) -> Iterator[tuple[int, str]]:
    return _txt_documents(lines, path, offset, False)


TEXT_KINDS = {"jsonl": _jsonl_documents, "txt-marked": _txt_marked, "txt-gathered": _txt_gathered}


def _text_blocks(path: Path, kind: str) -> Iterator[tuple[str, int, int, int]]:
    start = length = n = 0
    with open(path, "rb") as file:
        for consumed, _ in TEXT_KINDS[kind](file, path, 0):
            length, n = length + consumed, n + 1
            if n == BLOCK_DOCUMENTS or length >= BLOCK_BYTES:
                yield kind, start, length, n
                start, length, n = start + length, 0, 0
    if n:
        yield kind, start, length, n


def _txt_blocks(path: Path) -> Iterator[tuple[str, int, int, int]]:
    with open(path, "rb") as file:
        marked = any(line.strip() == SEPARATOR for line in file)
    return _text_blocks(path, "txt-marked" if marked else "txt-gathered")


SUFFIXES = {".parquet": _parquet_blocks, ".jsonl": lambda path: _text_blocks(path, "jsonl"), ".txt": _txt_blocks}


def read_block(block: Block) -> list[str | None]:
    """The documents of `block`, in file order. Raises UserError when the file is damaged."""
    if block.kind == "parquet":
        return _read_parquet(block)
    with open(block.path, "rb") as file:
        file.seek(block.start)
        lines = io.BytesIO(file.read(block.length))
    texts = [text for _, text in TEXT_KINDS[block.kind](lines, block.path, block.start)]
    if len(texts) != block.n:
        seen = f"{block.path} changed while it was in use ({len(texts)} documents at byte {block.start})"
        raise UserError(f"{seen}; expected {block.n}; leave data files alone during a run and start it again")
    return texts


def sha256_file(path: Path) -> str:
    h = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            h.update(chunk)
    return h.hexdigest()


def write_atomically(path: Path, content: str) -> None:
    """Write a small text file so that no reader ever sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    temporary.write_text(content)
    os.replace(temporary, path)


def write_documents(path: Path, texts: Sequence[str], **columns: Sequence[str]) -> str:
    """Write a parquet file with `texts` as its column text, in row groups of 1,024; returns its sha256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    table = pa.table({"text": pa.array(texts, pa.string()), **{k: pa.array(v, pa.string()) for k, v in columns.items()}})
    pq.write_table(table, temporary, row_group_size=BLOCK_DOCUMENTS, compression="zstd")
    os.replace(temporary, path)
    return sha256_file(path)


@contextmanager
def locked(name: str) -> Iterator[None]:
    """One process at a time: the others wait here. `name` is a path under the base directory."""
    path = base_dir() / f"{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def index_file(path: Path) -> tuple[str, list[Block]]:
    """(sha256, blocks) of one file, from the cache where size and time still agree. Raises UserError for bad content."""
    status = path.stat()
    if path.suffix in (".txt", ".jsonl"):  # also where the index is kept
        with open(path, "rb") as file:
            check_utf8(path, file.read(HEAD))
    key = [INDEX_FORMAT, status.st_size, status.st_mtime_ns]
    cache = base_dir() / "index" / (hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:24] + ".json")
    if cache.exists() and (entry := json.loads(cache.read_text()))["key"] == key:
        return entry["sha256"], [Block(path, *b) for b in entry["blocks"]]
    if status.st_size == 0:
        raise UserError(f"{path} is empty (0 bytes); expected text; delete it or point --data-dir elsewhere")
    if status.st_size > 500e6:
        print0(f"indexing {path} ({status.st_size / 1e9:.1f} GB), once")
    blocks = [Block(path, *b) for b in SUFFIXES[path.suffix](path)]
    if not blocks:
        raise UserError(f"{path} holds no documents; expected at least one; delete it or point --data-dir elsewhere")
    if blocks[0].kind.startswith("txt"):
        with open(path, "rb") as file:
            nulls = sum(chunk.count(0) for chunk in iter(lambda: file.read(1 << 20), b""))
        if nulls:
            print0(f"note: {path} has {nulls:,} NULs, which are trained on as text; without them: tr -d '\\000' < IN > OUT")
    entry = {"path": str(path.resolve()), "key": key, "sha256": sha256_file(path), "blocks": [list(b[1:]) for b in blocks]}
    write_atomically(cache, json.dumps(entry))
    return entry["sha256"], blocks
