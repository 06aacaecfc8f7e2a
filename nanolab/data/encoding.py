"""Text files that are not UTF-8 by their first bytes: refused by name, with the command that converts them. Imports no
torch.
"""

import codecs
from pathlib import Path

from nanolab.cli import UserError

# UTF-32's little-endian mark begins with UTF-16's
MARKS = [
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
]
HEAD = 4096  # bytes that are looked at


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
