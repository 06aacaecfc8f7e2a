"""Smalltalk: what people type first, and what has numbers in it without being a calculation. smalltalk or
smalltalk=FILE.toml.

tasks/smalltalk.toml holds all sentences. In training numbers are drawn anew for each example. The split test is prompts
whose sentences are not in training, many with numbers, none of which asks for a calculation: a reply is right when it
says something and calls no tool. What it says is not judged, and a model that never calls a tool is always right, so
that this number means something only beside the arithmetic task's."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nanolab.cli import UserError, nearest, read_toml
from nanolab.data.chat import parts_of, text_of
from tasks.common import Content, Draws, Example, Task

DEFAULT = Path(__file__).with_name("smalltalk.toml")
TRAIN = 10_000
RANGE = re.compile(r"\{(\d+)-(\d+)\}")
SHAPE = 'tables like [[topic]] with questions = ["Hello!"] and answers = ["Hello!"], and one [test] of the same form'


class SmalltalkTopic(NamedTuple):
    questions: list[str]  # {2-90}: a number from 2 to 90
    answers: list[str]  # each fits each question


class Smalltalk(Task):
    kind = "generate"
    measures = "no tool called; what is said is not judged"
    version = 2
    argument_is = "FILE.toml?"

    def open(self) -> Sequence[Example]:
        topics, test = read_topics(Path(self.argument).expanduser() if self.argument else DEFAULT)
        if self.split == "test":
            return self.shuffled(
                len(test.questions), lambda i: conversation(test.questions[i], self.draws(i).pick(test.answers))
            )
        asked = [(question, topic.answers) for topic in topics for question in topic.questions]
        # twice as often: they have many texts
        asked += [(question, answers) for question, answers in asked if RANGE.search(question)]

        def make(i: int) -> Example:
            draws = self.draws(i)
            question, answers = draws.pick(asked)
            return conversation(as_typed(draws, question), draws.pick(answers))

        return self.generated(TRAIN, make)

    def correct(self, example: Example, content: Content) -> bool:
        """Whether the reply has some text and calls no tool."""
        return bool(text_of(content).strip()) and not any(part["type"] == "python" for part in parts_of(content))


def conversation(question: str, answer: str) -> Example:
    return Example([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])


def as_typed(draws: Draws, question: str) -> str:
    """The question with its numbers; one in five is in lower case, one in five has no mark at its end."""
    text = RANGE.sub(lambda found: str(draws.between(int(found[1]), int(found[2]))), question)
    text = text.lower() if draws.below(5) == 0 else text
    return text[:-1] if draws.below(5) == 0 else text


def sentences(text: str) -> list[str]:
    """The sentences of a text in lower case, without marks, any number as #."""
    text = re.sub(r"[\d#]+", "#", RANGE.sub("#", text.lower()))
    return [" ".join(re.findall(r"\w+|#", part)) for part in re.split(r"(?<=[.?!])\s+", text)]


def read_topics(path: Path) -> tuple[list[SmalltalkTopic], SmalltalkTopic]:
    """The topics of training and the split test. Raises UserError for a file of another shape, or a sentence that is in
    both.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file; expected a TOML with {SHAPE}; copy tasks/smalltalk.toml and change it")
    tables = read_toml(path)
    for key in tables:
        if key not in ("topic", "test"):
            raise UserError(f"{path} has the table {key!r}; expected {SHAPE}{nearest(key, ['topic', 'test'])}")
    if not isinstance(tables.get("topic"), list) or "test" not in tables:
        raise UserError(
            f"{path}: no {'[test]' if isinstance(tables.get('topic'), list) else '[[topic]]'}; expected {SHAPE}"
        )
    topics = [topic_of(table, f"{path}: topic {k}") for k, table in enumerate(tables["topic"], 1)]
    test = topic_of(tables["test"], f"{path}: test")
    known = {sentence for topic in topics for question in topic.questions for sentence in sentences(question)}
    for question in test.questions:
        if known & set(sentences(question)):
            raise UserError(
                f"{path}: test asks {question!r}, which is in a topic too (whatever its numbers); expected an unseen"
                " sentence; change one of them"
            )
    return topics, test


def topic_of(table: Any, where: str) -> SmalltalkTopic:
    """A table as a topic. Raises UserError, headed by `where`."""
    fields = table if isinstance(table, dict) else {}
    if set(fields) != set(SmalltalkTopic._fields):
        raise UserError(f"{where} has {', '.join(fields) or 'nothing'}; expected questions and answers; write {SHAPE}")
    for field, texts in fields.items():
        if (
            not isinstance(texts, list)
            or not texts
            or not all(isinstance(text, str) and text.strip() for text in texts)
        ):
            raise UserError(f'{where}: {field} is {texts!r}; expected a list of texts; write {field} = ["Hello!"]')
    for question in fields["questions"]:
        if re.search("[{}]", RANGE.sub("", question)) or any(
            int(low) > int(high) for low, high in RANGE.findall(question)
        ):
            raise UserError(
                f"{where}: {question!r} has braces; expected a range of numbers between them; write {{2-90}}"
            )
    return SmalltalkTopic(**fields)
