"""Tools that a model calls inside its reply: the calculator, Python, and the protocol of special tokens around them.

A call is <|python_start|> code <|python_end|>; the answer is put into the reply as <|output_start|> result
<|output_end|>.
Imports no torch.
"""

import logging
import operator
import re
from collections.abc import Callable, Sequence
from decimal import Context, Decimal
from fractions import Fraction
from typing import NamedTuple

from nanolab.cli import UserError, nearest
from nanolab.data.tokenizer import Tokenizer
from nanolab.data.turn import PARTS, Event
from nanolab.inference.sandbox import run_python

log = logging.getLogger(__name__)

MAX_LENGTH = 1000  # characters of an expression
MAX_NESTING = 50  # parentheses, signs and right operands inside one another
MAX_BITS = 2048  # of a numerator or denominator on the way; a power that would pass it is not computed
MAX_DIGITS = 100  # of a result
SIGNIFICANT = 10  # digits of a result whose decimals do not end
LONGEST = 20  # digits of a result whose decimals do end; longer ones are rounded too
TINIEST = -20  # power of ten below which a result is written as 1.5e-21
SHOWN = 1000  # characters of a program's output that the model gets to see


class ToolError(Exception):
    """What is wrong with a call, in the few words that the model is shown."""


def calculator(expression: str) -> str:
    """The value of an arithmetic expression, or "error: " and a reason; never raises, and takes milliseconds at most.

    + - * / // % ** and parentheses on decimal numbers (1,234.5 and 2e3 too), with Python's precedences and its floor
    for // and %; `"text".count("t")` on string literals. Computed exactly, in fractions: 0.1 + 0.2 is 0.3. Decimals
    that do not end are rounded to SIGNIFICANT digits. A grammar of its own reads the text; none of it reaches Python's.
    """
    try:
        if len(expression) > MAX_LENGTH:
            raise ToolError(f"more than {MAX_LENGTH} characters")
        return written(Parser(tokens(expression)).whole())
    except ToolError as error:
        return f"error: {error}"


TOKEN = re.compile(
    r"""(?P<number>(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?(?:[eE][+-]?[0-9]{1,3})?|\.[0-9]+(?:[eE][+-]?[0-9]{1,3})?)"""
    r"""|(?P<text>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')|(?P<sign>\*\*|//|\.count\b|[-+*/%()])|(?P<end>\Z)""",
    re.DOTALL,
)
ESCAPES = {"n": "\n", "t": "\t", "\\": "\\", "'": "'", '"': '"'}


def tokens(text: str) -> list[tuple[str, str]]:
    """(kind, text) of each token, the last of kind "end"."""
    found, at = [], 0
    text = text.strip()
    while not found or found[-1][0] != "end":
        match = TOKEN.match(text, at)
        if not match:
            raise ToolError(f"unexpected {text[at]!r}")
        found.append((match.lastgroup or "", match[0]))
        at = match.end()
        while at < len(text) and text[at].isspace():
            at += 1
    return found


def power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise ToolError("the exponent is not a whole number")
    if abs(base) not in (0, 1):
        bits = max(abs(base.numerator), base.denominator).bit_length()
        if (bits - 1) * abs(exponent) > MAX_BITS:
            raise ToolError("number too large")
    return Fraction(base) ** int(exponent)


class Operator(NamedTuple):
    level: int  # binds tighter than lower ones
    right: int  # least level of an operator inside the right operand
    apply: Callable[[Fraction, Fraction], Fraction | int]


SIGN = 3  # the level of a leading + or -
OPERATORS = {
    "+": Operator(1, 2, operator.add),
    "-": Operator(1, 2, operator.sub),
    "*": Operator(2, 3, operator.mul),
    "/": Operator(2, 3, operator.truediv),
    "//": Operator(2, 3, operator.floordiv),
    "%": Operator(2, 3, operator.mod),
    "**": Operator(4, SIGN, power),
}


class Parser:
    """Precedence climbing over tokens; evaluates as it goes."""

    def __init__(self, found: list[tuple[str, str]]):
        self.found, self.at = found, 0

    def whole(self) -> Fraction:
        value = self.value(0, 0)
        self.expect("")
        return value

    def take(self) -> tuple[str, str]:
        self.at += 1
        return self.found[self.at - 1]

    def expect(self, text: str) -> None:
        kind, seen = self.take()
        if seen != text or kind == "text":
            raise ToolError(f"expected {text or 'the end'}, found {seen[:20] or 'the end'}")

    def value(self, level: int, depth: int) -> Fraction:
        """An operand and all operators of at least `level` behind it."""
        if depth > MAX_NESTING:
            raise ToolError("nested too deep")
        value = self.operand(depth)
        while (found := OPERATORS.get(self.found[self.at][1])) and found.level >= level:
            self.take()
            right = self.value(found.right, depth + 1)
            try:
                value = fitting(Fraction(found.apply(value, right)))
            except ZeroDivisionError:
                raise ToolError("division by zero") from None
        return value

    def operand(self, depth: int) -> Fraction:
        kind, text = self.take()
        if kind == "number":
            return fitting(Fraction(text.replace(",", "")))
        if kind == "text":
            return Fraction(self.count(text))
        if text in ("+", "-"):
            value = self.value(SIGN, depth + 1)
            return -value if text == "-" else value
        if text == "(":
            value = self.value(0, depth + 1)
            self.expect(")")
            return value
        raise ToolError(f"expected a number, found {text[:20] or 'the end'}")

    def count(self, text: str) -> int:
        """The rest of `"text".count("part")`."""
        self.expect(".count")
        self.expect("(")
        kind, part = self.take()
        if kind != "text":
            raise ToolError(f"expected a string, found {part[:20] or 'the end'}")
        self.expect(")")
        return unquoted(text).count(unquoted(part))


def unquoted(literal: str) -> str:
    def character(match: re.Match[str]) -> str:
        if match[1] not in ESCAPES:
            raise ToolError(f"unknown escape {match[0]}")
        return ESCAPES[match[1]]

    return re.sub(r"\\(.)", character, literal[1:-1], flags=re.DOTALL)


def fitting(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise ToolError("number too large")
    return value


def written(value: Fraction) -> str:
    """A whole number or a decimal fraction, exact where that is short."""
    near = Context(prec=SIGNIFICANT, Emax=10**6, Emin=-(10**6)).divide(
        Decimal(value.numerator), Decimal(value.denominator)
    )
    if near.adjusted() >= MAX_DIGITS:
        raise ToolError(f"a result of more than {MAX_DIGITS} digits")
    if value and near.adjusted() < TINIEST:
        mantissa, exponent = f"{near:.{SIGNIFICANT - 1}e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{exponent}"
    places = next((n for n in range(LONGEST - TINIEST) if 10**n % value.denominator == 0), LONGEST - TINIEST)
    if places and near.adjusted() + 1 + places > LONGEST:
        places = max(2, SIGNIFICANT - 1 - near.adjusted())
    scaled = round(value * 10**places)
    whole, part = divmod(abs(scaled), 10**places)
    decimals = f".{part:0{places}}".rstrip("0") if places else ""
    return f"{'-' if scaled < 0 else ''}{whole}{decimals.rstrip('.')}"


def python(code: str) -> str:
    """What a program prints, run in the sandbox, or "error: " and the last line of its complaint."""
    outcome = run_python(code)
    if outcome.status == "ok":
        return outcome.stdout.strip()[:SHOWN]
    if outcome.status == "error":
        complaint = outcome.stderr.strip().splitlines() or ["the program gave up"]
        return f"error: {complaint[-1]}"[:SHOWN]
    return f"error: stopped, {outcome.status} limit"


TOOLS: dict[str, Callable[[str], str]] = {"calculator": calculator, "python": python}


def find_tool(name: str) -> Callable[[str], str] | None:
    """The tool of that name; None for "". Raises UserError for one that is not there."""
    if name and name not in TOOLS:
        raise UserError(
            f"tool {name!r} is unknown; expected one of {', '.join(TOOLS)}, or"
            f" nothing{nearest(name, list(TOOLS), prefix='--tool ')}"
        )
    return TOOLS[name] if name else None


class ToolUse:
    """One row's tool: knows the end of a call, and answers it with the tokens to put in next."""

    def __init__(self, tokenizer: Tokenizer, tool: Callable[[str], str]):
        self.tokenizer, self.tool = tokenizer, tool
        self.end = tokenizer.special(PARTS["python"].end)

    def ends(self, token: int, events: Sequence[Event]) -> bool:
        """Whether this token, which the parser made these events of, ends a call: the first event is the call's. A call
        that another mark breaks off is none.
        """
        return token == self.end and bool(events)

    def answer(self, code: str) -> list[int]:
        """Run the tool. Whatever it raises is logged and its result, not the end of the engine."""
        try:
            return self._written(self.tokenizer.encode(self.tool(code)))
        except (Exception, SystemExit) as error:
            return self.failed(error)

    def failed(self, error: BaseException) -> list[int]:
        """The answer of a tool that failed."""
        log.warning("a tool failed: %s: %s", type(error).__name__, error, exc_info=error)
        return self._written(self.tokenizer.encode(f"error: {type(error).__name__}"))

    def _written(self, ids: list[int]) -> list[int]:
        start, end, _ = PARTS["python_output"]
        return [self.tokenizer.special(start), *ids, self.tokenizer.special(end)]
