"""Spelling: SimpleSpelling (write a word letter by letter) and SpellingBee (count a letter in a word, spelling it
first).

spelling, spelling=FILE (one word per line) or spelling=COUNT (so many of the commonest words of the offline corpus;
2,000 without). One word in ten is held out by the hash of its letters. Splits: train; seen (training words in other
sentences); test (held-out words). Counting has a guess that is often right, the count 1: it is right about half of the
time, and not nine times in ten, because repeated letters are asked for more often than chance would."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

from nanolab.cli import UserError
from nanolab.data.chat import parts_of, text_of
from tasks.common import Content, Draws, Example, Task, permutation, share, tool_call
from tasks.numbers import same_number

HELD_OUT = 0.1  # share of the words
COMMON_WORDS = 2000
SIZES = {"train": 20_000, "seen": 500, "test": 500}
# {w}: the word, with or without quotes; {l}: the letter.
SPELL = (
    "Spell the word {w}.",
    "Spell {w}.",
    "Please spell {w}.",
    "How do you spell {w}?",
    "How is {w} spelled?",
    "Can you spell {w}?",
    "Spell {w} letter by letter.",
    "Write {w} one letter at a time.",
    "What are the letters of {w}?",
    "Which letters make up {w}?",
    "Give me the letters of {w}.",
    "Tell me how to spell {w}.",
    "Take {w} apart into letters.",
    "I need the spelling of {w}.",
    "Write out the letters in {w}, please.",
    "Could you spell {w} for me?",
    "List the letters of the word {w}.",
    "{w}: spell it.",
)
COUNT = (
    "How many {l} are in {w}?",
    "How many {l} are there in {w}?",
    "How many times does {l} occur in {w}?",
    "Count the {l} in {w}.",
    "How often does the letter {l} appear in {w}?",
    "Please count how often {l} is in {w}.",
    "What is the number of {l} in the word {w}?",
    "In {w}, how many letters are {l}?",
    "How many of the letters of {w} are {l}?",
    "Tell me how many {l} the word {w} has.",
    "Count the letter {l} in {w}, please.",
    "Look at {w}: how many {l} do you see?",
    "How many times is the letter {l} used in {w}?",
    "Find every {l} in {w} and count them.",
    "The word {w} has how many {l}?",
    "Can you count the {l} in {w}?",
    "I want to know how many {l} are in {w}.",
    "Give the number of times that {l} occurs in {w}.",
)
QUOTES = ("{}", "{}", "{}", '"{}"', "'{}'")


class Count(NamedTuple):
    word: str
    letter: str
    n: int


class SimpleSpelling(Task):
    kind = "generate"
    splits = ("train", "seen", "test")
    argument_is = "FILE or COUNT?"

    def open(self) -> Sequence[Example]:
        words = words_of(self)
        return self.generated(SIZES[self.split], lambda i: spell(words(i), self.draws(i)))

    def correct(self, example: Example, content: Content) -> bool:
        """The letters one by one, after the last colon if there is one; blanks, commas and dashes between them do not
        matter.
        """
        return letters_of(text_of(content)) == list(example.answer)

    def rewards(self, example: Example, content: Content) -> dict[str, float]:
        """correct; format: single letters; letters: share of the places with the right letter."""
        found = letters_of(text_of(content))
        right = sum(a == b for a, b in zip(found, example.answer)) / max(len(found), len(example.answer))
        return {"correct": float(self.correct(example, content)), "format": float(bool(found)), "letters": right}


class SpellingBee(Task):
    kind = "generate"
    baseline = 0.5  # about; an instance measures its own: the share of its commonest answer
    splits = ("train", "seen", "test")
    argument_is = "FILE or COUNT?"

    def open(self) -> Sequence[Example]:
        words = words_of(self)
        examples = self.generated(SIZES[self.split], lambda i: count(words(i), self.draws(i)))
        counts = Counter(examples[i].answer.n for i in range(min(len(examples), SIZES["test"])))
        self.baseline = max(counts.values(), default=0) / max(counts.total(), 1)
        return examples

    def correct(self, example: Example, content: Content) -> bool:
        return same_number(example.answer.n, content)

    def rewards(self, example: Example, content: Content) -> dict[str, float]:
        """correct; format: one call of the tool; spelling: the first line spells the word; call: the tool is asked the
        right thing.
        """
        parts = parts_of(content)
        calls = [part["text"] for part in parts if part["type"] == "python"]
        first = parts[0]["text"].strip().split("\n")[0] if parts and parts[0]["type"] == "text" else ""
        return {
            "correct": float(self.correct(example, content)),
            "format": float(len(calls) == 1),
            "spelling": float(letters_of(first) == list(example.answer.word)),
            "call": float(calls == [expression(example.answer.word, example.answer.letter)]),
        }


def spell(word: str, draws: Draws) -> Example:
    question = filled_template(draws, SPELL, w=draws.pick(QUOTES).format(word))
    return Example([{"role": "user", "content": question}, {"role": "assistant", "content": spelled(word)}], word)


def count(word: str, draws: Draws) -> Example:
    letter = asked_letter(word, draws)
    n = word.count(letter)
    question = filled_template(draws, COUNT, w=draws.pick(QUOTES).format(word), l=draws.pick(QUOTES).format(letter))
    reply = [
        {"type": "text", "text": spelled(word) + "\n"},
        *tool_call(expression(word, letter), n),
        {"type": "text", "text": f"It is {n}."},
    ]
    return Example(
        [{"role": "user", "content": question}, {"role": "assistant", "content": reply}], Count(word, letter, n)
    )


def asked_letter(word: str, draws: Draws) -> str:
    """One that is repeated in two of five cases where there is one, a letter of the alphabet in one of five, else one
    of the word's.
    """
    repeated = sorted({c for c in word if word.count(c) > 1})
    kind = draws.below(5)
    return draws.pick(repeated if kind < 2 and repeated else "abcdefghijklmnopqrstuvwxyz" if kind == 4 else word)


def spelled(word: str) -> str:
    """ "tree: t r e e": after a blank each letter is a token of its own to nearly every tokenizer."""
    return f"{word}: {' '.join(word)}"


def expression(word: str, letter: str) -> str:
    return f"'{word}'.count('{letter}')"


def letters_of(text: str) -> list[str]:
    """The single letters that `text` lists after its last colon; [] when something else stands among them."""
    found = [x for x in re.split(r"[\s,.\-]+", text.rpartition(":")[2].lower()) if x]
    return found if all(len(x) == 1 and x.isalpha() for x in found) else []


def filled_template(draws: Draws, templates: Sequence[str], w: str, l: str = "") -> str:  # noqa: E741
    """A template filled; one in five in lower case, one in five without its last mark."""
    text = draws.pick(templates)
    text = text[0].lower() + text[1:] if draws.below(5) == 0 else text
    text = text[:-1] if draws.below(5) == 0 else text
    return text.format(w=w, l=l)


def words_of(task: Task) -> Callable[[int], str]:
    """A function i -> word of the task's split: every word comes once before one comes again."""
    argument = task.argument or str(COMMON_WORDS)
    words = common_words(int(argument)) if argument.isdecimal() else read_words(argument)
    words = [w for w in words if (share("word", w) < HELD_OUT) == (task.split == "test")]
    if not words:
        raise UserError(
            f"no word of {argument} falls into the split {task.split} of {task.name}; expected at least one; give more"
            " words"
        )
    orders = lru_cache(4)(lambda turn: permutation(len(words), task.name, task.version, task.split, task.seed, turn))
    return lambda i: words[orders(i // len(words))[i % len(words)]]


def read_words(path: str) -> list[str]:
    """The words of a file, one per line, in lower case, each once; single letters are left out. Raises UserError naming
    the line.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(
            f"{path} is not a file; expected one with a word per line, or a number of words; try spelling=2000"
        )
    words = []
    for n, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        word = line.strip().lower()
        if word and not word.isalpha():
            raise UserError(
                f"{file}:{n}: {line[:40]!r} is not a word; expected letters only, one word per line; fix or delete the"
                " line"
            )
        words += [word] if len(word) > 1 else []
    return list(dict.fromkeys(words))


def common_words(n: int) -> list[str]:
    """The n commonest words of 3 to 12 letters in the training part of the corpus pydocs, which is built if it is not
    there.
    """
    from nanolab.data.corpus import CORPORA

    train, _ = CORPORA["pydocs"](-1, 2)
    return [word for word, _ in sorted(word_counts(train[0]).items(), key=lambda item: (-item[1], item[0]))[:n]]


@cache  # several tasks of one command read the same file
def word_counts(path: str) -> Counter[str]:
    import pyarrow.parquet as pq

    seen: Counter[str] = Counter()
    for text in pq.ParquetFile(path).read(["text"])["text"].to_pylist():
        seen.update(re.findall(r"(?<![\w.])[a-z]{3,12}(?![\w.(=])", text))
    return seen
