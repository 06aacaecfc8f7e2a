"""What a task is, where its rows come from, and what several tasks share: draws, options with letters. Imports no
torch.

Example i of a task depends on (name, version, split, seed, i) and its rows alone, never on how many examples are asked
for."""

import json
import os
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from nanolab.cli import UserError, nearest
from nanolab.data.chat import Message, text_of
from nanolab.data.chat_files import read_jsonl
from nanolab.data.turn import Part
from nanolab.evals.bundle import read_rows, sample
from nanolab.evals.icl import KINDS, Question

T = TypeVar("T")
Content = str | list[Part]  # an assistant's message content
LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")


class Example(NamedTuple):
    messages: list[Message]  # ends with the reference assistant turn
    answer: Any = None  # what a reply is compared with
    letters: tuple[str, ...] = ()  # kind letters: the possible answers, each one token


class Task:
    """A numbered set of conversations with a way to grade a reply. The class attributes are what the task table says of
    it.

    kind: how a model is measured on it. "letters": its reply is the likeliest of `letters`; "generate": a reply is
    sampled and graded; "likelihood": the loss of the reference replies, nothing is graded. baseline: accuracy that
    blind guessing reaches, in [0, 1]. version: raised when the same index would give other text."""

    kind = "likelihood"
    baseline = 0.0
    measures = ""  # what `correct` looks at, where it is not the answer
    version = 1
    runs_code = False  # whether grading runs what a model has written
    former: tuple[int, ...] = ()  # earlier versions that it can still make, for a run that began with one
    splits: tuple[str, ...] = ("train", "test")
    argument_is = ""  # what may follow "=" in a spec; ends with "?" where it may be left out; empty: nothing

    def __init__(
        self,
        name: str,
        split: str = "train",
        data: str = "",
        limit: int = -1,
        seed: int = 42,
        argument: str = "",
        version: int = 0,
    ) -> None:
        """limit: how many examples at most (of a generated task: how many), -1 for its own number. version: 0 for the
        newest. Raises UserError.
        """
        if split not in self.splits:
            raise UserError(
                f"task {name} has no split {split!r}; expected one of"
                f" {', '.join(self.splits)}{nearest(split, list(self.splits))}"
            )
        if argument and not self.argument_is:
            raise UserError(f"task {name}={argument}: {name} takes nothing after '='; type {name}")
        if not argument and self.argument_is and not self.argument_is.endswith("?"):
            raise UserError(f"task {name} names no file; expected {name}={self.argument_is}")
        if version and version not in (self.version, *self.former):
            raise UserError(
                f"task {name} has version {self.version} here, and version {version} was asked for; expected the"
                " nanolab that made it; use that one, or start a new --run",
                "task-version",
                task=name,
                version=version,
            )
        self.version = version or self.version
        self.name, self.split, self.data, self.limit, self.seed, self.argument = (
            name,
            split,
            data,
            limit,
            seed,
            argument,
        )
        self.notes: list[str] = []  # what a reader of a plan should know of its data, a line each
        self.examples: Sequence[Example] = self.open()

    def open(self) -> Sequence[Example]:
        """The examples, made when they are asked for. Raises UserError for data that is missing or malformed."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.examples)

    def example(self, i: int) -> Example:
        """Example i, 0 <= i < len. Raises IndexError outside."""
        if not 0 <= i < len(self):
            raise IndexError(f"{self.name} {self.split} has {len(self)} examples, not one numbered {i}")
        return self.examples[i]

    def correct(self, example: Example, content: Content) -> bool:
        """Whether `content` answers `example`. Raises UserError for a chat task, which has no answers."""
        raise UserError(
            f"task {self.name} is plain chat and has no answers; expected a task that can be graded; try gsm8k or"
            " arithmetic"
        )

    def rewards(self, example: Example, content: Content) -> dict[str, float]:
        """Named parts of a reward, each in [0, 1]; "correct" is always one of them."""
        return {"correct": float(self.correct(example, content))}

    def draws(self, i: int) -> "Draws":
        """The randomness of example i."""
        return Draws(self.name, self.version, self.split, self.seed, i)

    def shuffled(self, n: int, get: Callable[[int], Example]) -> Sequence[Example]:
        """Examples get(0) ... get(n - 1) in an order of this split and seed, so that a limit takes a fair sample."""
        order = permutation(n, self.name, self.version, self.split, self.seed)
        return Lazy(n if self.limit < 0 else min(n, self.limit), lambda i: get(int(order[i])))

    def generated(self, n: int, make: Callable[[int], Example]) -> Sequence[Example]:
        """As many examples make(i) as the limit says, n without one."""
        return Lazy(n if self.limit < 0 else self.limit, make)


class Lazy(Sequence[T]):
    """n items, each made by get(i) when it is asked for."""

    def __init__(self, n: int, get: Callable[[int], T]) -> None:
        self.n, self.get = n, get

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> T:  # type: ignore[override]
        if not 0 <= i < self.n:
            raise IndexError(i)
        return self.get(i)


class Draws:
    """Random choices from a key, the same on every machine. Uses only random(), whose sequence Python promises to
    keep.
    """

    def __init__(self, *key: Any) -> None:
        self.random = random.Random(repr(key)).random

    def below(self, n: int) -> int:
        return int(self.random() * n)

    def between(self, low: int, high: int) -> int:
        """A whole number in [low, high]."""
        return low + self.below(high - low + 1)

    def pick(self, items: Sequence[T]) -> T:
        return items[self.below(len(items))]


def permutation(n: int, *key: Any) -> np.ndarray:
    """(n,) the numbers below n in an order fixed by `key`."""
    # RandomState's stream is frozen (NEP 19)
    seeds = [Draws(key, k).below(2**32) for k in range(4)]
    return np.random.RandomState(seeds).permutation(n)


def share(*key: Any) -> float:
    """A number in [0, 1) that stands for `key`: what is pinned to a split by hash is compared with it."""
    return Draws("share", *key).random()


def hold_out(items: Sequence[str], n: int) -> tuple[list[str], list[str]]:
    """(the others, the n with the smallest hash), both in their given order: a split that new items disturb little."""
    held = set(sorted(items, key=share)[:n])
    return [x for x in items if x not in held], [x for x in items if x in held]


# --- rows of published datasets ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dataset:
    """Where the rows of a published dataset lie, by split: under a local folder, and on the Hugging Face hub."""

    files: dict[str, str]  # our split -> path under the folder
    repo: str
    subset: str
    revision: str  # commit; empty: the newest at the first use, then kept (`revision_of`)
    hub: dict[str, str]  # our split -> the hub's


class RowReader:
    """One row, read field by field; `where` heads every error."""

    def __init__(self, row: Any, where: str) -> None:
        if not isinstance(row, dict):
            raise UserError(
                f"{where}: a {type(row).__name__}; expected an object with named fields; fix or delete the line"
            )
        self.row, self.where = row, where

    def get(self, field: str, kind: type[T]) -> T:
        value = self.row.get(field)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
            seen = (
                f"field {field} is a {type(value).__name__}"
                if field in self.row
                else f"no field {field} (there are: {', '.join(self.row) or 'none'})"
            )
            raise UserError(f"{self.where}: {seen}; expected a {kind.__name__}; fix or delete the line")
        return value

    def has(self, field: str) -> bool:
        return field in self.row

    def question(self) -> Question:
        """Of a row as evaluation bundles have it: query, choices, gold."""
        try:
            return KINDS["multiple_choice"].item(self.row)
        except UserError as error:
            raise UserError(f"{self.where}: {error}; fix or delete the line") from None

    def refuse(self, seen: str, expected: str) -> UserError:
        return UserError(f"{self.where}: {seen}; expected {expected}; fix or delete the line")


def local_path(task: Task, source: Dataset) -> Path:
    """The file of the task's split in its folder. Raises UserError where there is none."""
    path = Path(task.data).expanduser() / source.files.get(task.split, "")
    if not path.is_file():
        have = [s for s, f in source.files.items() if (Path(task.data).expanduser() / f).is_file()]
        seen = (
            f"no file for split {task.split} of {task.name} under {task.data} (there are: {', '.join(have) or 'none'})"
        )
        raise UserError(
            f"{seen}; expected {source.files.get(task.split, 'another split')}; add it, or leave --data out to read it"
            " from the hub"
        )
    return path


def revision_of(task: Task, source: Dataset) -> str | None:
    """The commit of the dataset that is read: the one in the code, or the newest at the first use, kept in the base
    directory; None where the hub cannot say.

    One that is not in the code is a note of the task.
    """
    if source.revision:
        return source.revision
    from nanolab.files import locked, write_text
    from nanolab.runtime import base_dir

    path = base_dir() / "revisions.json"
    with locked(path):
        known = json.loads(path.read_text()) if path.exists() else {}
        if source.repo not in known:
            import huggingface_hub
            from huggingface_hub.errors import HTTPError

            try:
                known[source.repo] = (
                    huggingface_hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
                    .dataset_info(source.repo, timeout=30)
                    .sha
                )
                write_text(path, json.dumps(known, indent=1) + "\n")
            except (OSError, ValueError, HTTPError) as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                task.notes.append(
                    f"{task.name}: which revision of {source.repo} is read is not known ({reason}): what is on this"
                    " machine, or the newest"
                )
                return None
    task.notes.append(
        f"{task.name}: {source.repo} at revision {known[source.repo]}, the newest at its first use here ({path})"
    )
    return known[source.repo]


def hub_rows(task: Task, source: Dataset) -> Any:
    """The hub's table of the task's split, downloaded at the first use."""
    name, split = task.name, source.hub[task.split]
    try:
        import datasets
    except ImportError:
        seen = (
            f"task {name} reads {source.repo} from the hub, which needs the package datasets, and it is not installed"
        )
        raise UserError(f"{seen}; type: bash runs/setup.sh tasks (or give a local folder with --data)") from None
    try:
        return datasets.load_dataset(
            source.repo, source.subset or None, split=split, revision=revision_of(task, source)
        )
    except (OSError, ValueError) as error:  # offline, unknown revision, unknown split
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"task {name}: {source.repo} could not be read from the hub ({reason}); expected a network; try a local"
            " folder with --data"
        ) from None


# --- parts of examples and of grading ---------------------------------------------------------------------------------


def multiple_choice(row: RowReader, question: str, choices: Sequence[str], answer: int, intro: str) -> Example:
    """An example of kind letters. Each option is followed by its letter in brackets. Raises UserError.

    The letter comes after the option, where a small model finds it by looking back, and has no blank before it: " (" is
    a piece of its own to every tokenizer of ours, so that the letter is the very token that the reply consists of."""
    if not 2 <= len(choices) <= len(LETTERS) or not all(
        isinstance(choice, str) and choice.strip() for choice in choices
    ):
        raise row.refuse(f"the options {choices}", "at least two texts")
    if not 0 <= answer < len(choices):
        raise row.refuse(f"answer {answer} of {len(choices)} options", f"a number from 0 to {len(choices) - 1}")
    letters = LETTERS[: len(choices)]
    options = "\n".join(f"- {choice.strip()} ({letter})" for choice, letter in zip(choices, letters))
    prompt = f"{intro}\n\n{question.strip()}\n{options}\n\nReply with the letter alone."
    return Example(
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": letters[answer]}],
        letters[answer],
        letters,
    )


def tool_call(expression: str, output: Any) -> list[Part]:
    """A call of the calculator and what it answers."""
    return [{"type": "python", "text": expression}, {"type": "python_output", "text": str(output)}]


def same_letter(example: Example, content: Content) -> bool:
    """Whether the reply is the right letter, with or without brackets, dots and blanks around it."""
    return re.sub(r"[\s().:*]", "", text_of(content)) == example.answer


# --- tasks of published datasets --------------------------------------------------------------------------------------


class Published(Task):
    """A task whose rows are a published dataset; a subclass says where they lie and what an example of a row is."""

    sources: dict[str, Dataset]  # name of the task -> where its rows lie

    def open(self) -> Sequence[Example]:
        """Shuffled; local rows are all read and checked now, the hub's when they are asked for."""
        source = self.sources[self.name]
        if self.data:
            examples = [self.read(RowReader(row, where)) for where, row in read_jsonl(local_path(self, source))]
            return self.shuffled(len(examples), examples.__getitem__)
        table, where = hub_rows(self, source), f"{source.repo} {source.hub[self.split]} row"
        return self.shuffled(len(table), lambda i: self.read(RowReader(table[i], f"{where} {i}")))

    def read(self, row: RowReader) -> Example:
        """The example of a row. Raises UserError for one that is not as expected."""
        raise NotImplementedError


class Letters(Published):
    """Questions with four options. `question` describes the dataset, and both kinds are made of it: letters, where a
    chat model is given the options and its reply is the letter with the largest logit; and likelihood, where a base
    model is not, and the likeliest option is its answer (`questions`).
    """

    kind = "letters"
    baseline = 0.25

    @staticmethod
    def question(row: RowReader) -> Question:
        """One context, the options, and the number of the right one."""
        raise NotImplementedError

    @classmethod
    def questions(cls, path: Path, max_items: int = -1) -> list[Question]:
        """Of a file, in the order of CORE's shuffle, `max_items` at most (-1: all). Raises UserError."""
        return sample(
            [cls.question(RowReader(row, f"{path}:{n}")) for n, row in read_rows(path)], max_items, 0, str(path)
        )

    def read(self, row: RowReader) -> Example:
        intro, asked = self.chat(row, self.question(row))
        return multiple_choice(row, asked.contexts[0], asked.answers, asked.gold, intro)

    def chat(self, row: RowReader, asked: Question) -> tuple[str, Question]:
        """(what a chat model is told to do, `asked` as it is shown to one)."""
        raise NotImplementedError

    def correct(self, example: Example, content: Content) -> bool:
        return same_letter(example, content)
