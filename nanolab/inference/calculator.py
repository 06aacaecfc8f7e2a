"""The calculator: exact arithmetic on decimal numbers. Imports no torch."""

import ast
import operator
import re
from decimal import Context, Decimal
from fractions import Fraction
from itertools import accumulate

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
    that do not end are rounded to SIGNIFICANT digits. Nothing is executed.
    """
    try:
        if len(expression) > MAX_LENGTH:
            raise ToolError(f"more than {MAX_LENGTH} characters")
        return written(value(*parse(expression)))
    except ToolError as error:
        return f"error: {error}"


TEXT = r"""(?:"(?:[^"\\]|\\[nt\\'"])*"|'(?:[^'\\]|\\[nt\\'"])*')"""
TOKEN = re.compile(
    r"(?P<number>(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?(?:[eE][+-]?[0-9]{1,3})?"
    r"|\.[0-9]+(?:[eE][+-]?[0-9]{1,3})?)"
    rf"|(?P<text>{TEXT})(?:\s*\.count\s*\(\s*(?P<part>{TEXT})\s*\))?|(?P<space>\s+)|[^-+*/%()]"
)
MALFORMED = "not an arithmetic expression"


def parse(expression: str) -> tuple[ast.expr, list[Fraction]]:
    """The tree of an expression, in which a constant is an index into the operands: numbers as typed, and counts.

    Python's parser sees nothing but such indices, operators and parentheses.
    """
    operands: list[Fraction] = []

    def index(match: re.Match[str]) -> str:
        if match["space"]:
            return " "
        if match["number"]:
            operands.append(fitting(Fraction(match["number"].replace(",", ""))))
        elif match["part"]:
            operands.append(Fraction(unquoted(match["text"]).count(unquoted(match["part"]))))
        else:
            raise ToolError('expected "text".count("part")' if match["text"] else f"unexpected {match[0]!r}")
        return f" {len(operands) - 1} "

    source = TOKEN.sub(index, expression).strip()
    if source.count("(") > MAX_NESTING < max(accumulate((c == "(") - (c == ")") for c in source)):
        raise ToolError("nested too deep")
    try:
        return ast.parse(source, mode="eval").body, operands
    except (SyntaxError, RecursionError, MemoryError):
        raise ToolError(MALFORMED) from None


def unquoted(literal: str) -> str:
    return re.sub(r"\\(.)", lambda match: {"n": "\n", "t": "\t"}.get(match[1], match[1]), literal[1:-1])


def power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise ToolError("the exponent is not a whole number")
    if abs(base) not in (0, 1):
        bits = max(abs(base.numerator), base.denominator).bit_length()
        if (bits - 1) * abs(exponent) > MAX_BITS:
            raise ToolError("number too large")
    return Fraction(base) ** int(exponent)


OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: power,
}


def value(node: ast.expr, operands: list[Fraction], depth: int = 0) -> Fraction:
    """The value of a tree of `parse`. Recursive in right operands and signs alone: a sum may have hundreds of terms."""
    if depth > MAX_NESTING:
        raise ToolError("nested too deep")
    chain = []
    while isinstance(node, ast.BinOp):
        chain.append(node)
        node = node.left
    if isinstance(node, ast.Constant):
        result = operands[node.value]
    elif isinstance(node, ast.UnaryOp):
        result = value(node.operand, operands, depth + 1) * (-1 if isinstance(node.op, ast.USub) else 1)
    else:  # 2(3) is a call
        raise ToolError(MALFORMED)
    for node in reversed(chain):
        try:
            result = fitting(Fraction(OPERATORS[type(node.op)](result, value(node.right, operands, depth + 1))))
        except ZeroDivisionError:
            raise ToolError("division by zero") from None
    return result


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
