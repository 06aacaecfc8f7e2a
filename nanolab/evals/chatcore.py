"""ChatCORE: one number for a chat model, the mean over tasks of accuracy above chance.

    ChatCORE = mean over tasks of (accuracy - baseline) / (1 - baseline)        baseline: what blind guessing reaches

so that 0 is a model that guesses and 1 one that is always right, whatever the number of options. Its tasks are MEMBERS; a
mean over fewer is called "ChatCORE-k of n" and is not to be compared with one over others. The interval follows from those
of the tasks, which are independent: Zou & Donner, Statistics in Medicine 27 (2008), 1693.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from nanolab.evals import generative, multiple_choice
from nanolab.evals.score import Interval, OnReply, Result, Task
from nanolab.inference.engine import Engine

MEMBERS = ("arc-easy", "arc-challenge", "mmlu", "gsm8k", "humaneval", "spellingbee")  # as in karpathy/nanochat


class Score(NamedTuple):
    label: str  # "ChatCORE", or "ChatCORE-k of n"
    value: float
    interval: Interval


def centred(accuracy: float, baseline: float) -> float:
    """0 where guessing is always right, and nothing could be better."""
    return (accuracy - baseline) / (1 - baseline) if baseline < 1 else 0.0


def chatcore_score(found: Sequence[tuple[str, float, float, Interval]]) -> Score | None:
    """The score of (task name, baseline, accuracy, its interval) of each task; those that are not members do not count.

    None where fewer than two members are among them.
    """
    rows = [(centred(accuracy, b), centred(low, b), centred(high, b)) for name, b, accuracy, (low, high) in found if name in MEMBERS]
    if len(rows) < 2:
        return None
    k, value = len(rows), math.fsum(row[0] for row in rows) / len(rows)
    down, up = (math.sqrt(math.fsum((row[0] - row[side]) ** 2 for row in rows)) / k for side in (1, 2))
    label = "ChatCORE" if k == len(MEMBERS) else f"ChatCORE-{k} of {len(MEMBERS)}"
    return Score(label, value, Interval(value - down, value + up))


def evaluate(
    engine: Engine,
    task: Task,
    limit: int = -1,
    *,
    num_samples: int = 1,
    max_tokens: int = 512,
    temperature: float = 0.0,
    top_k: int = 50,
    seed: int = 42,
    tools: Callable[[str], str] | None = None,
    batch_size: int = 32,
    on_reply: OnReply | None = None,
) -> Result:
    """The task's first `limit` problems (-1: all), by option letters or by sampling, as its kind asks.

    Tasks come shuffled, by a seed that has nothing to do with the model: the first ones are a fair sample, the same for all.
    """
    indices = range(len(task) if limit < 0 else min(limit, len(task)))
    if task.kind == "categorical":
        return multiple_choice.evaluate(engine, task, indices, batch_size=batch_size, on_reply=on_reply)
    return generative.evaluate(
        engine, task, indices, num_samples=num_samples, max_tokens=max_tokens, temperature=temperature, top_k=top_k, seed=seed, tools=tools,
        batch_size=batch_size, on_reply=on_reply,
    )  # fmt: skip


def chatcore(
    engine: Engine,
    tasks: Sequence[Task],
    limit_categorical: int = -1,
    limit_generative: int = -1,
    *,
    max_tokens: int = 256,
    tools: Callable[[str], str] | None = None,
    batch_size: int = 32,
) -> dict[str, float]:
    """{"chatcore/TASK": accuracy, ..., "chatcore/LABEL": score}: greedy replies, for a look while training. On every rank.

    LABEL says how many members are among the tasks; with fewer than two there is no score. limit_*: problems of each task of that
    kind, -1 for all. Other tasks than members are measured beside it.
    """
    limits = {"categorical": limit_categorical, "generative": limit_generative}
    results = [(task, evaluate(engine, task, limits[task.kind], max_tokens=max_tokens, tools=tools, batch_size=batch_size)) for task in tasks]
    score = chatcore_score([(task.name, task.baseline, r.accuracy, r.interval) for task, r in results])
    found = {f"chatcore/{task.name}": r.accuracy for task, r in results}
    return found | ({f"chatcore/{score.label}": score.value} if score else {})
