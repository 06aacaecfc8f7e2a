"""Arithmetic: sums, differences and products asked in many ways, answered through the calculator. Generated, offline.

The drill that teaches the use of a tool, and a probe of it. A question is a frame (a verb phrase and an ending) around
an expression, or one in four times a word problem (a setting, an event and a question). Splits, all but train with
pairs of numbers that training never shows in any operation or order:

    train     ordinary
    test      frames, expressions and problems as in training
    phrasings verb phrases and endings that are never in training, around the same expressions; no word problems
    problems  word problems whose setting and event are never in training
"""

from collections.abc import Sequence
from typing import NamedTuple

from nanolab.data.chat import parts_of
from tasks.common import Content, Draws, Example, Task, share, tool_call
from tasks.numbers import same_number, to_number
from tasks.sentences import ENDINGS, EVENTS, EXPRESSIONS, PROBLEM_QUESTIONS, SETTINGS, THINGS, VERB_PHRASES

HELD_OUT_PAIRS = 0.1  # share of the pairs of numbers
LOW, HIGH = 2, 99  # both numbers of sums and differences, the first of products; what is held out has two digits
FACTOR_HIGH = 12  # of the second number of products
OPERATIONS = ("+", "+", "-", "-", "*")  # how often each is asked
SIZES = {"train": 100_000, "test": 1000, "phrasings": 1000, "problems": 1000}


class Sum(NamedTuple):
    a: int
    operation: str  # +, - or *
    b: int

    @property
    def value(self) -> int:
        return {"+": self.a + self.b, "-": self.a - self.b, "*": self.a * self.b}[self.operation]

    @property
    def expression(self) -> str:
        return f"{self.a}{self.operation}{self.b}"


class Arithmetic(Task):
    kind = "generate"
    version = 2
    splits = ("train", "test", "phrasings", "problems")

    def open(self) -> Sequence[Example]:
        return self.generated(SIZES[self.split], lambda i: exercise(self.draws(i), self.split))

    def correct(self, example: Example, content: Content) -> bool:
        return same_number(example.answer.value, content)

    def rewards(self, example: Example, content: Content) -> dict[str, float]:
        """correct; format: one call of the tool, its output, and a sentence; tool: the call's own value is the
        answer.
        """
        from nanolab.inference.calculator import calculator

        parts = parts_of(content)
        calls = [calculator(part["text"]) for part in parts if part["type"] == "python"]
        return {
            "correct": float(self.correct(example, content)),
            "format": float([part["type"] for part in parts] == ["python", "python_output", "text"]),
            "tool": float(any(to_number(value) == example.answer.value for value in calls)),
        }


def exercise(draws: Draws, split: str) -> Example:
    sum_ = numbers(draws, held_out=split != "train")
    word_problem = split == "problems" or (split != "phrasings" and draws.below(4) == 0)
    question = problem(draws, sum_, split == "problems") if word_problem else phrase(draws, sum_, split == "phrasings")
    reply = [*tool_call(sum_.expression, sum_.value), {"type": "text", "text": f"It is {sum_.value}."}]
    return Example([{"role": "user", "content": question}, {"role": "assistant", "content": reply}], sum_)


def is_held_out(a: int, b: int) -> bool:
    """Whether the pair, in either order, is kept from training."""
    return share("pair", min(a, b), max(a, b)) < HELD_OUT_PAIRS


def numbers(draws: Draws, held_out: bool) -> Sum:
    """An operation and a pair of the right kind; differences are not negative."""
    operation, low = draws.pick(OPERATIONS), 10 if held_out else LOW
    while True:
        a, b = (
            draws.between(low, HIGH),
            draws.between(LOW, FACTOR_HIGH) if operation == "*" else draws.between(low, HIGH),
        )
        if is_held_out(a, b) == held_out:
            return Sum(max(a, b), "-", min(a, b)) if operation == "-" else Sum(a, operation, b)


def phrase(draws: Draws, sum_: Sum, held_out: bool) -> str:
    """A frame around an expression; one in five starts in lower case, one in five has no mark at its end."""
    verb = draws.pick(VERB_PHRASES[held_out])  # with its mark as last character
    expression = draws.pick(EXPRESSIONS[sum_.operation]).format(a=sum_.a, b=sum_.b)
    text = f"{verb[:-1]} {expression}{draws.pick(ENDINGS[held_out])}{verb[-1]}"
    text = text[0].lower() + text[1:] if draws.below(5) == 0 else text
    return text[:-1] if draws.below(5) == 0 else text


def problem(draws: Draws, sum_: Sum, held_out: bool) -> str:
    """A setting with the first number, an event with the second, and a question."""
    operation, thing = sum_.operation, draws.pick(THINGS)
    texts = (SETTINGS[operation][held_out], EVENTS[operation][held_out], PROBLEM_QUESTIONS[operation])
    return " ".join(draws.pick(choices) for choices in texts).format(a=sum_.a, b=sum_.b, things=thing)
