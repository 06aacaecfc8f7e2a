"""What a file is by its first bytes, and a command that makes a readable one of it: packed and binary files, text that
is not UTF-8. Imports no torch.
"""

import codecs
import os
import shlex
from pathlib import Path

from nanolab.cli import UserError

# first bytes, kind, its suffix, command that unpacks NAME.SUFFIX to NAME
PACKED = [
    (b"\x1f\x8b", "gzip", ".gz", "gunzip -k"),
    (b"\x28\xb5\x2f\xfd", "zstd", ".zst", "zstd -d"),
    *[
        (bytes([0x50 + i]) + b"\x2a\x4d\x18", "zstd", ".zst", "zstd -d") for i in range(16)
    ],  # a skippable frame: pzstd begins with one
    *[(b"BZh%d1AY&SY" % i, "bzip2", ".bz2", "bunzip2 -k") for i in range(1, 10)],
    (b"\xfd7zXZ\x00", "xz", ".xz", "unxz -k"),
    (b"\x04\x22\x4d\x18", "lz4", ".lz4", "lz4 -d"),
    (b"PK\x03\x04", "zip", ".zip", "unzip"),
]
ARROW = (
    "import sys, pyarrow, pyarrow.parquet; pyarrow.parquet.write_table(pyarrow.ipc.open_file(sys.argv[1]).read_all(),"
    " sys.argv[2])"
)
ROWS = (
    "import sys, json, pyarrow.parquet as p; [print(json.dumps(row, default=str)) for b in"
    " p.ParquetFile(sys.argv[1]).iter_batches() for row in b.to_pylist()]"
)
# UTF-32's little-endian mark begins with UTF-16's
MARKS = [
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
]
HEAD = 4096  # bytes that are looked at


def recognise(path: Path, suffix: str = "", reads_parquet: bool = True) -> tuple[str, str] | None:
    """(kind, command that makes a readable file of it) of a file that is packed or binary; None for text, and for what
    `suffix` promises.
    """
    with open(path, "rb") as file:
        head = file.read(64)
        file.seek(max(os.path.getsize(path) - 4, 0))
        tail = file.read(4)
    name, stem = shlex.quote(str(path)), path.with_suffix("")
    if head[:4] == tail == b"PAR1" and suffix != ".parquet":
        to_lines = f"python -c '{ROWS}' {name} > OUT.jsonl"
        return "parquet", f"mv {name} {shlex.quote(f'{stem}.parquet')}" if reads_parquet else to_lines
    if head.lstrip()[:1] == b"{" and suffix == ".parquet":
        return "JSON lines", f"mv {name} {shlex.quote(f'{stem}.jsonl')}"
    if head.startswith(b"ARROW1\0\0"):
        return "arrow", f"python -c '{ARROW}' {name} OUT.parquet"
    if head.startswith(b"version https://git-lfs"):
        return "git-lfs pointer", f"cd {shlex.quote(str(path.parent))} && git lfs pull"
    for start, kind, ending, unpack in PACKED:
        if head.startswith(start):
            packed = name if path.suffix == ending else shlex.quote(f"{path}{ending}")
            return kind, f"{unpack} {packed}" if packed == name else f"mv {name} {packed} && {unpack} {packed}"
    return None


def check_pointer(path: Path) -> None:
    """Raises UserError for a git-lfs pointer in the place of a file."""
    if path.is_file() and (known := recognise(path)) and known[0] == "git-lfs pointer":
        raise UserError(
            f"{path} is a git-lfs pointer; expected the file that it points to; type: {known[1]}",
            "git-lfs-pointer",
            path=str(path),
            command=known[1],
        )


def check_kind(path: Path, suffix: str, reads_parquet: bool = True) -> None:
    """Raises UserError for a file that holds another kind of data than `suffix` says, naming the kind and a command
    that converts it.
    """
    if known := recognise(path, suffix, reads_parquet):
        kind, command = known
        whole = "not a whole parquet file" if suffix == ".parquet" else f"not a {suffix} file"
        seen = f"{path} is {whole}: by its first bytes it is {kind}"
        raise UserError(
            f"{seen}; expected what its name says; type: {command}",
            "file-kind",
            path=str(path),
            kind=kind,
            suffix=suffix,
            command=command,
        )


def check_utf8(path: Path, head: bytes) -> None:
    """Raise UserError where `head`, a file's first bytes, has a mark of UTF-16 or UTF-32, or so many NULs that it
    cannot be UTF-8 text.
    """
    mark = next((name for mark, name in MARKS if head.startswith(mark)), "")
    if not mark and 16 * head.count(0) <= len(head):
        return
    name = mark or by_nulls(head)
    seen = (
        f"is {name.upper()} ({'its byte order mark says so' if mark else 'by its NULs'})"
        if name
        else f"has {head.count(0)} NULs in its first {len(head)} bytes"
    )
    remedy = f"iconv -f {name} -t utf-8 IN > OUT" if name else r"tr -d '\000' < IN > OUT, if it is text at all"
    raise UserError(
        f"{path} {seen}; expected UTF-8 text; convert it: {remedy}", "not-utf-8", path=str(path), encoding=name
    )


def by_nulls(head: bytes) -> str:
    """What a text without a mark is: high bytes, 0 in most text, are every second one, or two and more of four; ""
    where NULs stand otherwise.
    """
    quarter = len(head) // 4
    nulls = [head[i : 4 * quarter : 4].count(0) for i in range(4)]
    for name, first, second in (("utf-32be", 0, 1), ("utf-32le", 2, 3)):
        if min(nulls[first], nulls[second]) > 0.9 * quarter:
            return name
    even, odd = nulls[0] + nulls[2], nulls[1] + nulls[3]
    return "utf-16be" if even > 10 * odd else "utf-16le" if odd > 10 * even else ""
