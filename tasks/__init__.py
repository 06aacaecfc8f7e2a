"""The only list of tasks; a task or a mixture of tasks from a line of text. Imports no torch.

A spec is NAME, NAME=FILE, either with @COUNT: "gsm8k", "jsonl=chats.jsonl", "arithmetic@2000", "identity=me.toml@500".
A mixture is specs with commas, each with a weight: how often its examples come:
"smoltalk:1,gsm8k:4,arithmetic@3000:0.5". A colon or an at sign may also be part of a file's name."""

import os
from collections.abc import Mapping

import numpy as np

from nanolab.cli import UserError, nearest
from nanolab.data.mixture import positive, weighted
from tasks.arc import Arc
from tasks.arithmetic import Arithmetic
from tasks.common import Example, Task, permutation
from tasks.conversations import ConversationFile
from tasks.documentation import Documentation
from tasks.gsm8k import GSM8K
from tasks.hellaswag import HellaSwag
from tasks.humaneval import HumanEval
from tasks.identity import IdentityQuestions
from tasks.mmlu import MMLU
from tasks.smalltalk import Smalltalk
from tasks.smoltalk import SmolTalk
from tasks.spelling import SimpleSpelling, SpellingBee

TASKS: dict[str, type[Task]] = {
    "arc-easy": Arc,
    "arc-challenge": Arc,
    "mmlu": MMLU,
    "hellaswag": HellaSwag,
    "gsm8k": GSM8K,
    "humaneval": HumanEval,
    "smoltalk": SmolTalk,
    "jsonl": ConversationFile,
    "spelling": SimpleSpelling,
    "spellingbee": SpellingBee,
    "arithmetic": Arithmetic,
    "identity": IdentityQuestions,
    "smalltalk": Smalltalk,
    "documentation": Documentation,
}


def build(
    spec: str, split: str, data: str = "", limit: int = -1, seed: int = 42, versions: Mapping[str, int] = {}
) -> Task:
    """The task that `spec` names. data: a local folder with published datasets, empty for the hub. limit: examples at
    most. versions: other than the newest.

    Raises UserError for a spec, split or folder that is not there, and for malformed data.
    """
    spec, count = _counted(spec.strip())
    if count >= 0:
        limit = count if limit < 0 else min(count, limit)
    name, _, argument = spec.strip().partition("=")
    if name not in TASKS:
        raise UserError(f"task {name!r} is unknown; expected one of {', '.join(TASKS)}{nearest(name, list(TASKS))}")
    return TASKS[name](name, split, data, limit, seed, argument, versions.get(name, 0))


def _counted(spec: str) -> tuple[str, int]:
    """NAME@COUNT as (NAME, COUNT), -1 without one. An "@" of a file's own name stays with it."""
    rest, at, count = spec.rpartition("@")
    return (rest, int(count)) if at and count.isdecimal() and (_there(rest) or not _there(spec)) else (spec, -1)


def _there(spec: str) -> bool:
    """Whether NAME is a task, or the FILE of NAME=FILE exists."""
    name, equals, argument = spec.partition("=")
    return os.path.exists(os.path.expanduser(argument)) if equals else name in TASKS


def tasks_of(spec: str) -> list[tuple[str, float]]:
    """ "a:2,b" as [("a", 2.0), ("b", 1.0)]. Raises UserError for a weight that is not a positive number."""

    def known(name: str) -> bool:
        return _there(_counted(name)[0])

    spec = ",".join(filter(str.strip, spec.split(",")))
    out = [
        (name, positive(weight if name else "", name, spec, f"{name if known(name) else 'gsm8k'}:1"))
        for name, weight in (weighted(spec, known) if spec else ())
    ]
    if not out:
        raise UserError("the mixture names no task; expected at least one; try arithmetic:1,identity:1")
    return out


class Mixture:
    """The examples of several tasks, shuffled together. A weight of 2 gives each example twice, of 0.5 the first half
    once.
    """

    def __init__(self, tasks: list[tuple[Task, float]], seed: int = 42) -> None:
        """Raises UserError when nothing is in it."""
        self.tasks = [task for task, _ in tasks]
        self.notes = list(dict.fromkeys(note for task in self.tasks for note in task.notes))
        self.counts = [round(weight * len(task)) for task, weight in tasks]
        if not sum(self.counts):
            raise UserError("the mixture holds no examples; expected at least one; raise a weight or a count")
        self.ends = np.cumsum(self.counts)
        self.order = permutation(sum(self.counts), "mixture", seed)

    def __len__(self) -> int:
        return len(self.order)

    def example(self, i: int) -> Example:
        """Example i, 0 <= i < len. Raises IndexError outside."""
        if not 0 <= i < len(self):
            raise IndexError(f"the mixture has {len(self)} examples, not one numbered {i}")
        place = self.order[i]
        t = int(np.searchsorted(self.ends, place, side="right"))
        return self.tasks[t].example(int(place - self.ends[t] + self.counts[t]) % len(self.tasks[t]))


def mixture(
    spec: str, split: str, data: str = "", limit: int = -1, seed: int = 42, versions: Mapping[str, int] = {}
) -> Mixture:
    """The mixture that `spec` names; limit: examples at most of each task. Raises UserError as `build` does."""
    return Mixture([(build(name, split, data, limit, seed, versions), weight) for name, weight in tasks_of(spec)], seed)
