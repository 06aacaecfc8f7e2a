"""Numbers in replies. Oracle: the table."""

from fractions import Fraction

import pytest

from tasks.numbers import last_number, same_number, to_number


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("18", 18),
        ("18.0", 18),
        ("18.", 18),
        (" 18 ", 18),
        ("$1,000", 1000),
        ("1,000,000.50", Fraction("1000000.5")),
        ("-3", -3),
        ("\u22123", -3),
        ("-$5", -5),
        ("3/4", Fraction(3, 4)),
        ("1.5/2", Fraction(3, 4)),
        (".5", Fraction(1, 2)),
        ("5%", 5),
        ("007", 7),
        ("", None),
        ("x", None),
        ("1,2", None),
        ("1,0000", None),
        ("1 2", None),
        ("1/0", None),
        ("1.2.3", None),
        ("1e3", None),
        ("9" * 5000, None),
        ("0x10", None),
    ],
)
def test_to_number(text, value):
    assert to_number(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("#### 18", 18),
        ("so it is 4.\n#### $1,234.", 1234),
        ("####18", 18),
        ("#### -3", -3),
        ("#### 70,000 dollars", 70000),
        ("#### 18.00", 18),
        ("#### 3\nwait\n#### 4", 4),
        ("#### 3 #### 4", 4),  # the last mark counts
        ("7 then ####", 7),
        ("#### none, 7", 7),
        ("#### 5\nSo 6 remain.", 5),
        ("#### \n8", 8),  # a mark without a number does not
        ("It is 42.", 42),
        ("It is -7.", -7),
        ("12 + 30 = 42", 42),
        ("5-3", 3),
        ("5 - 3", 3),
        ("5 -3", 3),
        ("(4)-3", 3),
        ("x = -3", -3),
        ("1,2,3", 3),
        ("48/2=24", 24),
        ("7 apples", 7),
        ("10am", 10),
        ("no number", None),
        ("", None),
        ("room x2", None),
        ("1/0", None),
    ],
)
def test_last_number(text, value):
    assert last_number(text) == value


def test_only_what_is_said_counts():
    call = [{"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}]
    assert not same_number(2, call)
    assert same_number(2, [*call, {"type": "text", "text": "It is 2.0"}])
    assert same_number(Fraction(1, 2), "0.5")
