"""ChatCORE: one number for a chat model, the mean over tasks of accuracy above chance.

    ChatCORE = mean over tasks of (accuracy - baseline) / (1 - baseline)        baseline: what blind guessing reaches

so that 0 is a model that guesses and 1 one that is always right, whatever the number of options. Its tasks are MEMBERS;
a mean over fewer is called "ChatCORE-k of n" and is not to be compared with one over others."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from nanolab.evals import generative, multiple_choice
from nanolab.evals.generative import GREEDY
from nanolab.evals.score import GradedTask, Interval, OnReply, Result
from nanolab.inference.engine import Engine, Request
from nanolab.runtime import Stop

MEMBERS = ("arc-easy", "arc-challenge", "mmlu", "gsm8k", "humaneval", "spellingbee")  # as in karpathy/nanochat


class ChatScore(NamedTuple):
    label: str  # "ChatCORE", or "ChatCORE-k of n"
    value: float
    interval: Interval


def centred(accuracy: float, baseline: float) -> float:
    """0 where guessing is always right, and nothing could be better."""
    return (accuracy - baseline) / (1 - baseline) if baseline < 1 else 0.0


def mean_above_chance(tasks: Sequence[tuple[float, Interval, float]]) -> tuple[float, Interval]:
    """The mean of centred accuracies and its interval, from (accuracy, its interval, baseline) of independent tasks.

    Zou & Donner, Statistics in Medicine 27 (2008), 1693.
    """
    rows = [[centred(x, baseline) for x in (accuracy, *interval)] for accuracy, interval, baseline in tasks]
    value = math.fsum(row[0] for row in rows) / len(rows)
    down, up = (math.sqrt(math.fsum((row[0] - row[side]) ** 2 for row in rows)) / len(rows) for side in (1, 2))
    return value, Interval(value - down, value + up)


def chatcore_score(found: Sequence[tuple[str, float, float, Interval]]) -> ChatScore | None:
    """The score of (task name, baseline, accuracy, its interval) of each task; those that are not members do not count.

    None where fewer than two members are among them.
    """
    members = [(accuracy, interval, baseline) for name, baseline, accuracy, interval in found if name in MEMBERS]
    if len(members) < 2:
        return None
    label = "ChatCORE" if len(members) == len(MEMBERS) else f"ChatCORE-{len(members)} of {len(MEMBERS)}"
    return ChatScore(label, *mean_above_chance(members))


def evaluate_task(
    engine: Engine,
    task: GradedTask,
    limit: int = -1,
    request: Request = GREEDY,
    *,
    num_samples: int = 1,
    batch_size: int = 32,
    on_reply: OnReply | None = None,
    stop: Stop = lambda: False,
) -> Result:
    """The task's first `limit` problems (-1: all), by option letters or by sampling, as its kind asks.

    Tasks come shuffled, by a seed that has nothing to do with the model: the first ones are a fair sample, the same for
    all."""
    indices = range(len(task) if limit < 0 else min(limit, len(task)))
    if task.kind == "categorical":
        return multiple_choice.evaluate_letters(
            engine, task, indices, batch_size=batch_size, on_reply=on_reply, stop=stop
        )
    return generative.evaluate_sampled(
        engine, task, indices, request, num_samples=num_samples, batch_size=batch_size, on_reply=on_reply, stop=stop
    )


def chatcore(
    engine: Engine,
    tasks: Sequence[GradedTask],
    limit_categorical: int = -1,
    limit_generative: int = -1,
    *,
    max_tokens: int = 256,
    tools: Callable[[str], str] | None = None,
    batch_size: int = 32,
    stop: Stop = lambda: False,
) -> dict[str, float]:
    """{"chatcore/TASK": accuracy, ..., "chatcore/LABEL": score}: greedy replies, for a look while training. On every
    rank.

    LABEL says how many members are among the tasks; with fewer than two there is no score. limit_*: problems of each
    task of that kind, -1 for all. Other tasks than members are measured beside it."""
    limits = {"categorical": limit_categorical, "generative": limit_generative}
    request = replace(GREEDY, max_tokens=max_tokens, tools=tools)
    results = [
        (task, evaluate_task(engine, task, limits[task.kind], request, batch_size=batch_size, stop=stop))
        for task in tasks
    ]
    score = chatcore_score([(task.name, task.baseline, r.accuracy, r.interval) for task, r in results])
    found = {f"chatcore/{task.name}": r.accuracy for task, r in results}
    return found | ({f"chatcore/{score.label}": score.value} if score else {})
