"""Text files, .jsonl and .txt: a block is a run of lines. Every line is checked; a long one of a .txt file is cut into
documents, so that memory does not depend on its length."""

import codecs
import io
import json
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from nanolab.cli import UserError
from nanolab.data import blocks
from nanolab.data.blocks import Block, too_long
from nanolab.data.kinds import HEAD, check_utf8

SEPARATOR = b"<|endoftext|>"  # alone on a line of a .txt file: the next document begins
TXT_CHARS = 4000  # without separators, paragraphs are gathered into documents of about this size
# In a .txt file with a line of LONG_LINE bytes, lines are cut at blanks into parts of at most CUT_BYTES, each the end
# of a document. Other files keep the documents they always had: changing those would change the data of runs that are
# resumed.
LONG_LINE, CUT_BYTES = 256 << 10, 2 * TXT_CHARS


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
            f"{seen}; {expected}; fix or delete the line", "not-json", file=str(path), line=line, byte=offset
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
            if size > blocks.MAX_DOCUMENT:
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


# kind of a block -> (lines, path, offset) -> (bytes consumed, text) of each document
TEXT_KINDS = {
    "jsonl": _jsonl_documents,
    "txt-marked": lambda file, path, offset: _txt_documents(file, path, offset, True),
    "txt-gathered": lambda file, path, offset: _txt_documents(file, path, offset, False),
    "txt-marked-cut": lambda file, path, offset: _txt_documents(_cut(file), path, offset, True),
    "txt-gathered-cut": lambda file, path, offset: _txt_documents(_cut(file), path, offset, False),
}


def _bounded(file: IO[bytes], path: Path) -> Iterator[bytes]:
    """The lines of a .jsonl file, none of them too long."""
    number = 0
    while line := file.readline(blocks.MAX_DOCUMENT + 1):
        number += 1
        if len(line) > blocks.MAX_DOCUMENT:
            raise too_long(path, f"line {number}", len(line), "divide it into documents", line=number)
        yield line


def _text_blocks(path: Path, kind: str, counts: Counter[str]) -> blocks.Found:
    start = length = n = 0
    with open(path, "rb") as file:
        for consumed, text in TEXT_KINDS[kind](_bounded(file, path) if kind == "jsonl" else file, path, 0):
            counts["bytes"] += len((text or "").encode())
            counts["marks"] += (text or "").count(SEPARATOR.decode())
            length, n = length + consumed, n + 1
            if n == blocks.BLOCK_DOCUMENTS or length >= blocks.BLOCK_BYTES:
                yield kind, start, length, n
                start, length, n = start + length, 0, 0
    if n:
        yield kind, start, length, n


def index_txt(path: Path, counts: Counter[str]) -> blocks.Found:
    _check_encoding(path)
    marked = cut = False
    with open(path, "rb") as file:
        while line := file.readline(LONG_LINE):
            marked = marked or line.strip() == SEPARATOR
            cut = cut or len(line) == LONG_LINE
    return _text_blocks(path, ("txt-marked" if marked else "txt-gathered") + ("-cut" if cut else ""), counts)


def index_jsonl(path: Path, counts: Counter[str]) -> blocks.Found:
    _check_encoding(path)
    return _text_blocks(path, "jsonl", counts)


def _check_encoding(path: Path) -> None:
    with open(path, "rb") as file:
        check_utf8(path, file.read(HEAD))


def read_lines(block: Block) -> Sequence[str | None]:
    """The documents of `block`, in file order. Raises UserError when the file is damaged."""
    with open(block.path, "rb") as file:
        file.seek(block.start)
        lines = io.BytesIO(file.read(block.length))
    texts = [text for _, text in TEXT_KINDS[block.kind](lines, block.path, block.start)]
    if len(texts) != block.n:
        seen = f"{block.path} changed while it was in use ({len(texts)} documents at byte {block.start})"
        raise UserError(f"{seen}; expected {block.n}; leave data files alone during a run and start it again")
    return texts
