"""The calculator: arithmetic on decimal numbers, computed exactly, in a grammar of its own. Imports no torch."""

import operator
import re
from collections.abc import Callable
from decimal import Context, Decimal
from fractions import Fraction
from typing import NamedTuple

MAX_LENGTH = 1000  # characters of an expression
MAX_NESTING = 50  # parentheses, signs and right operands inside one another
MAX_BITS = 2048  # of a numerator or denominator on the way; a power that would pass it is not computed
MAX_DIGITS = 100  # of a result
SIGNIFICANT = 10  # digits of a result whose decimals do not end
LONGEST = 20  # digits of a result whose decimals do end; longer ones are rounded too
TINIEST = -20  # power of ten below which a result is written as 1.5e-21


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
    r"""(?P<number>(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?(?:[eE][+-]?[0-9]{1,3})?"""
    r"""|\.[0-9]+(?:[eE][+-]?[0-9]{1,3})?)"""
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
        """An operand and all operators of at least `level` after it."""
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
