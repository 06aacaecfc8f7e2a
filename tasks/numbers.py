"""Numbers in replies: found, read exactly, compared as numbers. Imports no torch."""

import re
from fractions import Fraction
from typing import Any

from nanolab.data.chat import text_of
from tasks.common import Content

# A sign counts where no operand stands before it; commas count between groups of three digits; "3/4" is one number.
_WHOLE = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
NUMBER = re.compile(rf"(?<![\w.])(?:(?<![)\]])(?<![\d)\]] )-)?\$?(?:{_WHOLE}(?:\.\d+)?(?:/\d+(?![\d.]))?|\.\d+)")
MAX_DIGITS = 400  # longer ones are no answer to anything


def to_number(text: str) -> Fraction | None:
    """The number that `text` consists of, "$1,000." and "18.0" included; None if it is not one."""
    bare = text.strip().rstrip(".%").replace("\u2212", "-")
    return _value(bare) if NUMBER.fullmatch(bare) else None


def last_number(text: str) -> Fraction | None:
    """The answer of a reply: the number after the last "####" that has one, else the last number of the text, else
    None.
    """
    text = text.replace("\u2212", "-")
    found = _marked(text) or list(NUMBER.finditer(text))
    return _value(found[-1].group()) if found else None


def marked_number(text: str) -> Fraction | None:
    """The number after the last "####" that has one, else None."""
    found = _marked(text.replace("\u2212", "-"))
    return _value(found[-1].group()) if found else None


def _marked(text: str) -> list[re.Match[str]]:
    return [m for m in (NUMBER.search(line) for line in re.findall(r"####([^\n#]*)", text)) if m]


def _value(text: str) -> Fraction | None:
    bare = re.sub(r"[$,]", "", text)
    if len(bare) > MAX_DIGITS:
        return None
    try:
        return (
            Fraction(bare)
            if "/" not in bare or "." not in bare
            else Fraction(bare.split("/")[0]) / int(bare.split("/")[1])
        )
    except ZeroDivisionError:
        return None


def same_number(answer: Any, content: Content) -> bool:
    """Whether the reply's number (last_number of its text) is `answer`, as numbers: 18.0 is 18, $1,000 is 1000."""
    found = last_number(text_of(content))
    return found is not None and found == answer
