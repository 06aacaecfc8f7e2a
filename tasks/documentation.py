"""Documentation: what does this function or class do, from the offline corpus pydocs. Question and first sentence of
its docstring.

The split test comes from the corpus's validation part, whose packages pretraining never reads.
"""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tasks.common import Draws, Example, Task

# A heading as the corpus writes it ("name(arguments)" or "class Name"), a blank line, and a paragraph.
ENTRY = re.compile(r"^(class [\w.]+|[\w.]+\([^()\n]*\))\n\n(\S.*(?:\n\S.*)*)", re.M)
# Up to the first mark that a capital letter or nothing follows, so that "e.g. this" goes on.
SENTENCE = re.compile(r"\A[A-Z](?:[^.!?]|[.!?](?! [A-Z]|\Z))*[.!?](?= [A-Z]|\Z)(?<!e\.g\.)(?<!i\.e\.)")
LENGTH = (25, 160)  # characters of an answer
QUESTIONS = (
    "What does {it} do?",
    "What is {it} for?",
    "Explain {it}.",
    "Describe {it}.",
    "In Python, what does {it} do?",
    "What is {it}?",
    "Tell me about {it}.",
    "I found {it} in a library. What does it do?",
    "What is the purpose of {it}?",
    "Document {it} in one sentence.",
)


class Entry(NamedTuple):
    name: str  # "the class Path", "Path.exists"
    sentence: str


class Documentation(Task):
    def open(self) -> Sequence[Example]:
        entries = sorted(set(read_entries(self.split)))
        return self.shuffled(len(entries), lambda i: ask(entries[i], self.draws(i)))


def ask(entry: Entry, draws: Draws) -> Example:
    question = draws.pick(QUESTIONS).format(it=entry.name)
    return Example([{"role": "user", "content": question}, {"role": "assistant", "content": entry.sentence}])


def read_entries(split: str) -> Iterator[Entry]:
    """The entries of the corpus's training or validation files; the corpus is built if it is not there."""
    import pyarrow.parquet as pq

    from nanolab.data.corpus import CORPORA

    train, val = CORPORA["pydocs"](-1, 2)
    for path in train if split == "train" else val:
        for text in pq.ParquetFile(path).read(["text"])["text"].to_pylist():
            yield from entries_of(text)


def entries_of(text: str) -> Iterator[Entry]:
    """The entries of one document: public names, plain sentences."""
    for heading, paragraph in ENTRY.findall(text):
        name = "the " + heading if heading.startswith("class ") else heading.partition("(")[0]
        sentence = SENTENCE.match(" ".join(paragraph.split()))
        public = not any(part.startswith("_") for part in name.removeprefix("the class ").split("."))
        if (
            public
            and sentence
            and LENGTH[0] <= len(sentence.group()) <= LENGTH[1]
            and not re.search(r"[`:*<>|{}\[\]]|\\", sentence.group())
        ):
            yield Entry(name, sentence.group())
