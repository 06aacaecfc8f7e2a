"""Text files as blocks of documents: parquet, jsonl, txt; checked and indexed in one streaming pass.

A block is what is read and decoded at once: a row group of a parquet file, or a run of lines of a text file. The index
of a file (its blocks and the sha256 of its bytes) is made in one streaming pass that also checks every line of text
files, and is kept under the base directory by path, size and modification time, so that a 10 GB file is neither held in
memory nor read twice. A long line of a text file is cut into documents, and a large row group is read in parts, so that
memory does not depend on either."""

import codecs
import hashlib
import io
import json
import os
import shlex
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nanolab.cli import UserError
from nanolab.data.encoding import HEAD, check_utf8
from nanolab.data.kinds import check_kind, recognise
from nanolab.files import replacing, sha256_file, write_text
from nanolab.runtime import base_dir, print0

INDEX_FORMAT = 2
BLOCK_DOCUMENTS, BLOCK_BYTES = 1024, 4 << 20  # a block of a text file ends at whichever comes first
SEPARATOR = b"<|endoftext|>"  # alone on a line of a .txt file: the next document begins
TXT_CHARS = 4000  # without separators, paragraphs are gathered into documents of about this size
# In a .txt file with a line of LONG_LINE bytes, lines are cut at blanks into parts of at most CUT_BYTES, each the end
# of a document. Other files keep the documents they always had: changing those would change the data of runs that are
# resumed.
LONG_LINE, CUT_BYTES = 256 << 10, 2 * TXT_CHARS
MAX_DOCUMENT = 64_000_000  # bytes; each stream of the loader holds the tokens of a whole document
LARGE_ROW_GROUP = 64_000_000  # bytes; a larger one goes through a temporary file
PART_BYTES = 4 << 20  # of a row group, decoded at once


class Block(NamedTuple):
    path: Path
    kind: str  # parquet, or a key of TEXT_KINDS
    start: int  # row group number, or byte offset
    length: int  # bytes of text (of a row group: about)
    n: int  # documents


class Index(NamedTuple):
    """What is known of one file without reading it again."""

    # sha256 of its bytes; "-cut" follows where lines are cut, since the same bytes then give other documents than they
    # once did
    identity: str
    blocks: list[Block]
    n_bytes: int  # of text; of a parquet file about
    marks: int  # separators inside lines or texts, which divide nothing; not counted in parquet files


def find_files(where: str | Path) -> tuple[list[Path], str]:
    """The text files at `where` (one file, or a folder searched recursively), sorted by path, and a line on those that
    are not read, if any.

    Links are followed; a folder that is reached twice is read once. Raises UserError for a link to nothing, and if
    there is no text."""
    where = Path(where).expanduser()
    if not where.exists():
        raise UserError(f"{where} does not exist; expected a folder or file with text; type --data-dir PATH")
    seen, left_out = ([where], Counter()) if where.is_file() else _walk(where)
    files = []
    for path in seen:
        if any(part.startswith(".") for part in path.relative_to(where).parts):
            left_out["hidden"] += 1
        elif path.suffix.lower() in SUFFIXES and path.is_file():
            files.append(path)
        else:
            left_out[path.suffix.lower() or "without a suffix"] += 1
    kinds = ", ".join(f"{n} {kind}" for kind, n in left_out.most_common())
    if not files:
        names = ", ".join(p.name for p in seen[:5]) or "nothing"
        known = where.is_file() and recognise(where)
        advice = f"; {where.name} is {known[0]}: type {known[1]}" if known else ""
        raise UserError(
            f"no text under {where}: saw {names}; expected .parquet (a `text` column), .jsonl (a `text` field) or .txt"
            f" files{advice}",
            "no-text",
            path=str(where),
            kinds=dict(left_out),
        )
    return files, f"{where.name}: {left_out.total()} files not read: {kinds}" if left_out else ""


def _walk(top: Path) -> tuple[list[Path], Counter[str]]:
    """Everything under `top` that is not a folder, sorted, and a count of linked folders that were reached before."""
    found: list[Path] = []
    left_out: Counter[str] = Counter()
    folders, links, entered = [top], [], set()  # real folders first, so that a link to one of them adds nothing
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        if (real := folder.resolve()) in entered:
            left_out["linked folders seen before"] += 1
            continue
        entered.add(real)
        try:
            paths = sorted(folder.iterdir())
        except OSError as error:
            raise UserError(
                f"{folder} cannot be read ({error.strerror}); expected a folder; check its permissions",
                "folder-not-readable",
                path=str(folder),
            ) from error
        for path in paths:
            hidden = any(part.startswith(".") for part in path.relative_to(top).parts)
            if path.is_dir() and not (hidden and path.is_symlink()):
                (links if path.is_symlink() else folders).append(path)
            elif hidden or path.exists():
                found.append(path)
            else:
                seen = f"{path} is a link to {os.readlink(path)}, which does not exist"
                raise UserError(
                    f"{seen}; expected a file; complete the download it belongs to, or delete the link",
                    "dangling-link",
                    path=str(path),
                )
    return sorted(found), left_out


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def too_long(path: Path, where: str, n_bytes: int, advice: str, **values: Any) -> UserError:
    seen = f"{path}: {where} holds {'more than ' if n_bytes > MAX_DOCUMENT else ''}{n_bytes:,} bytes of one document"
    return UserError(
        f"{seen}; expected at most {MAX_DOCUMENT:,}; {advice}", "document-too-long", path=str(path), **values
    )


def _is_text(kind: pa.DataType) -> bool:
    return (
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_string_view(kind)
        or (pa.types.is_dictionary(kind) and _is_text(kind.value_type))
    )


def _parquet_blocks(path: Path, counts: Counter[str]) -> Iterator[tuple[str, int, int, int]]:
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
            if block.length > MAX_DOCUMENT:  # only such a row group can hold a cell that is too long
                for j, text in enumerate(_read_parts(block)):
                    if text and len(text) > MAX_DOCUMENT // 4 and (n := len(text.encode())) > MAX_DOCUMENT:
                        raise too_long(path, f"row {row + j}", n, "divide it into documents", row=row + j)
            counts["bytes"] += block.length
            yield block[1:]
        row += group.num_rows


def _read_parts(block: Block) -> Iterator[str | None]:
    """The documents of a row group, of which only a part is decoded at a time."""
    rows = max(1, min(block.n, BLOCK_DOCUMENTS, block.n * PART_BYTES // max(block.length, 1)))
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


def _read_parquet(block: Block) -> Sequence[str | None]:
    if block.length > LARGE_ROW_GROUP:
        return _LargeRowGroup(block)
    with _naming_damage(block), pq.ParquetFile(block.path) as file:
        return file.read_row_group(block.start, columns=["text"]).column(0).to_pylist()


def _decode(raw: bytes, path: Path, offset: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        seen = f"{path} is not UTF-8 at byte {offset + error.start} (0x{raw[error.start]:02x})"
        raise UserError(
            f"{seen}; expected UTF-8 text; convert it, for example: iconv -f latin1 -t utf-8 IN > OUT"
        ) from error


def _json_text(line: bytes, path: Path, offset: int) -> str | None:
    text = _decode(line.removeprefix(codecs.BOM_UTF8), path, offset)
    try:
        record = json.loads(text)
    except (
        ValueError,
        RecursionError,
    ) as error:  # JSONDecodeError; a number of thousands of digits; brackets nested too deep
        if text.lstrip().startswith("[") and isinstance(error, json.JSONDecodeError):  # spread over several lines
            raise _json_array(path, None) from error
        line = _line_at(path, offset)
        seen = f"{path}:{line}: the line at byte {offset} is not JSON that can be read ({getattr(error, 'msg', error)})"
        expected = "expected one object with a text field per line"
        raise UserError(
            f"{seen}; {expected}; mend or delete the line", "not-json", file=str(path), line=line, byte=offset
        ) from error
    if isinstance(record, dict) and "text" in record and record["text"] is None:
        return None  # a blank document, as in a parquet file
    if isinstance(record, list):
        raise _json_array(path, record)
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        saw = f"the fields {', '.join(record)}" if isinstance(record, dict) else f"a {type(record).__name__}"
        raise UserError(
            f"{path}: the line at byte {offset} has {saw}; expected an object with a string field text; rename the"
            " field"
        )
    return record["text"].encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair cannot be encoded


def _line_at(path: Path, offset: int) -> int:
    """The number of the line that begins at byte `offset`."""
    n, left = 1, offset
    with open(path, "rb") as file:
        while part := file.read(min(left, 1 << 20)):
            n, left = n + part.count(b"\n"), left - len(part)
    return n


def _json_array(path: Path, items: list[Any] | None) -> UserError:
    """items: None where the array goes on over several lines."""
    query = ".[] | {text: .}" if items and isinstance(items[0], str) else ".[]"
    expected = (
        f"expected one object with a text field per line; type: jq -c '{query}' {shlex.quote(str(path))} > OUT.jsonl"
    )
    return UserError(f"{path} has a list, a JSON array, in place of lines; {expected}", "json-array", path=str(path))


def _jsonl_documents(lines: Iterable[bytes], path: Path, offset: int) -> Iterator[tuple[int, str | None]]:
    """(bytes consumed, text) of each document in `lines`."""
    consumed = 0
    for line in lines:
        consumed += len(line)
        if line.strip():
            text = _json_text(line, path, offset + consumed - len(line))
            yield consumed, text
            offset, consumed = offset + consumed, 0


def _txt_documents(lines: Iterable[bytes], path: Path, offset: int, marked: bool) -> Iterator[tuple[int, str]]:
    """(bytes consumed, text) of each document: up to a separator line if `marked`, else up to a blank line past
    TXT_CHARS.

    A part of a line, as `_cut` gives it, ends a document too.
    """
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
            if size > MAX_DOCUMENT:
                advice = f"put a line {SEPARATOR.decode()} between documents, or leave out all such lines"
                raise too_long(path, f"the text from byte {offset} on", size, advice, byte=offset)
        else:
            kept.append(line)
            end = size >= (2 if bare else 1) * TXT_CHARS  # text without blank lines is cut at the end of a line
        if end or line[-1:] != b"\n":
            yield size, document()
            offset, size, kept = offset + size, 0, []
    if kept:
        yield size, document()


def _txt_marked(lines: Iterable[bytes], path: Path, offset: int) -> Iterator[tuple[int, str]]:
    return _txt_documents(lines, path, offset, True)


def _txt_gathered(lines: Iterable[bytes], path: Path, offset: int) -> Iterator[tuple[int, str]]:
    return _txt_documents(lines, path, offset, False)


def _cut(file: IO[bytes]) -> Iterator[bytes]:
    """The lines of `file`; of one longer than CUT_BYTES, parts of at most so many bytes that end before a blank, or
    else between characters.
    """
    rest = b""
    while line := rest + file.readline(CUT_BYTES - len(rest)):
        end = len(line)
        if end == CUT_BYTES and line[-1:] != b"\n":
            end = max(line.rfind(blank, CUT_BYTES // 2) for blank in (b" ", b"\t", b"\r"))
            if end < 0:  # no blank: step back over the bytes of a character that may go on
                end = next((CUT_BYTES - i for i in range(1, 4) if line[-i] >= 0xC0), CUT_BYTES)
        yield line[:end]
        rest = line[end:]


def _txt_marked_cut(file: IO[bytes], path: Path, offset: int) -> Iterator[tuple[int, str]]:
    return _txt_documents(_cut(file), path, offset, True)


def _txt_gathered_cut(file: IO[bytes], path: Path, offset: int) -> Iterator[tuple[int, str]]:
    return _txt_documents(_cut(file), path, offset, False)


TEXT_KINDS = {
    "jsonl": _jsonl_documents,
    "txt-marked": _txt_marked,
    "txt-gathered": _txt_gathered,
    "txt-marked-cut": _txt_marked_cut,
    "txt-gathered-cut": _txt_gathered_cut,
}


def _bounded(file: IO[bytes], path: Path) -> Iterator[bytes]:
    """The lines of a .jsonl file, none of them too long."""
    number = 0
    while line := file.readline(MAX_DOCUMENT + 1):
        number += 1
        if len(line) > MAX_DOCUMENT:
            raise too_long(path, f"line {number}", len(line), "divide it into documents", line=number)
        yield line


def _text_blocks(path: Path, kind: str, counts: Counter[str]) -> Iterator[tuple[str, int, int, int]]:
    start = length = n = 0
    with open(path, "rb") as file:
        for consumed, text in TEXT_KINDS[kind](_bounded(file, path) if kind == "jsonl" else file, path, 0):
            counts["bytes"] += len((text or "").encode())
            counts["marks"] += (text or "").count(SEPARATOR.decode())
            length, n = length + consumed, n + 1
            if n == BLOCK_DOCUMENTS or length >= BLOCK_BYTES:
                yield kind, start, length, n
                start, length, n = start + length, 0, 0
    if n:
        yield kind, start, length, n


def _txt_blocks(path: Path, counts: Counter[str]) -> Iterator[tuple[str, int, int, int]]:
    marked = cut = False
    with open(path, "rb") as file:
        while line := file.readline(LONG_LINE):
            marked = marked or line.strip() == SEPARATOR
            cut = cut or len(line) == LONG_LINE
    return _text_blocks(path, ("txt-marked" if marked else "txt-gathered") + ("-cut" if cut else ""), counts)


SUFFIXES = {
    ".parquet": _parquet_blocks,
    ".jsonl": lambda path, counts: _text_blocks(path, "jsonl", counts),
    ".txt": _txt_blocks,
}


def iter_block(block: Block) -> Iterable[str | None]:
    """As `read_block`, for one pass: a large row group is never in memory or on the disk as a whole."""
    return _read_parts(block) if block.kind == "parquet" and block.length > LARGE_ROW_GROUP else read_block(block)


def read_block(block: Block) -> Sequence[str | None]:
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


def write_documents(path: Path, texts: Sequence[str], **columns: Sequence[str]) -> str:
    """Write a parquet file with `texts` as its column text, in row groups of 1,024; returns its sha256."""
    table = pa.table(
        {"text": pa.array(texts, pa.string()), **{k: pa.array(v, pa.string()) for k, v in columns.items()}}
    )
    with replacing(path) as fresh:
        pq.write_table(table, fresh, row_group_size=BLOCK_DOCUMENTS, compression="zstd")
    return sha256_file(path)


def index_file(path: Path) -> Index:
    """What the documents of one file are, from the cache where size and time still agree. Raises UserError for bad
    content.
    """
    status = path.stat()
    key = [INDEX_FORMAT, status.st_size, status.st_mtime_ns, path.suffix.lower()]
    cache = base_dir() / "index" / (hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:24] + ".json")
    if not (cache.exists() and (entry := json.loads(cache.read_text()))["key"] == key):
        if status.st_size == 0:
            raise UserError(f"{path} is empty (0 bytes); expected text; delete it or point --data-dir elsewhere")
        suffix, counts = path.suffix.lower(), Counter()
        check_kind(path, suffix)
        if suffix in (".txt", ".jsonl"):
            with open(path, "rb") as file:
                check_utf8(path, file.read(HEAD))
        if status.st_size > 500e6:
            print0(f"indexing {path} ({status.st_size / 1e9:.1f} GB), once")
        blocks = [Block(path, *b) for b in SUFFIXES[suffix](path, counts)]
        if not blocks:
            raise UserError(
                f"{path} holds no documents; expected at least one; delete it or point --data-dir elsewhere"
            )
        if blocks[0].kind.startswith("txt"):
            with open(path, "rb") as file:
                nulls = sum(chunk.count(0) for chunk in iter(lambda: file.read(1 << 20), b""))
            if nulls:
                print0(
                    f"note: {path} has {nulls:,} NULs, which are trained on as text; without them: tr -d '\\000' < IN"
                    " > OUT"
                )
        entry = {
            "path": str(path.resolve()),
            "key": key,
            "sha256": sha256_file(path),
            "bytes": counts["bytes"],
            "marks": counts["marks"],
        }
        entry["blocks"] = [list(b[1:]) for b in blocks]
        write_text(cache, json.dumps(entry))
    blocks = [Block(path, *b) for b in entry["blocks"]]
    cut = "-cut" if any(block.kind.endswith("-cut") for block in blocks) else ""
    return Index(entry["sha256"] + cut, blocks, entry["bytes"], entry["marks"])
