"""Chat models on graded tasks, each read as its kind says; and ChatCORE, one number of several tasks.

    letters     the reply is the option letter with the largest logit right after the prompt; nothing is sampled
    generate    replies are sampled with the batched engine, many problems at once, and graded by the task
    likelihood  the loss of given replies, which are not graded (lab/evaluate_chat.py)

    ChatCORE = mean over tasks of (accuracy - baseline) / (1 - baseline)        baseline: what blind guessing reaches

so that 0 is a model that guesses and 1 one that is always right, whatever the number of options. Its tasks are MEMBERS;
a mean over fewer is called "ChatCORE-k of n" and is not to be compared with one over others.

Prompts of similar length are read together, padded on the right: attention is causal, so that padding does not change
the logits of a prompt's last token. Dims: B rows, T tokens, V vocabulary."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanolab.cli import UserError
from nanolab.data.chat import parse_reply
from nanolab.data.tokenizer import Tokenizer
from nanolab.evals.likelihood import logits_at, padded
from nanolab.evals.score import (
    Graded,
    GradedTask,
    Interval,
    OnReply,
    Result,
    check_problems,
    mean_above_chance,
    readable_prompts,
    summary,
)
from nanolab.inference.engine import Engine, Request
from nanolab.inference.sampling import COLDEST
from nanolab.model.gpt import GPT
from nanolab.runtime import Stop
from nanolab.terminal import progress

MEMBERS = ("arc-easy", "arc-challenge", "mmlu", "gsm8k", "humaneval", "spellingbee")  # as in karpathy/nanochat
GREEDY = Request(max_tokens=512, temperature=0.0, top_k=50)


@torch.no_grad()
def evaluate_letters(
    engine: Engine,
    task: GradedTask,
    indices: Sequence[int],
    *,
    batch_size: int = 32,
    on_reply: OnReply | None = None,
    stop: Stop = lambda: False,
) -> Result:
    """Accuracy on the task's problems `indices`, the same ones on every rank; rank r of W answers indices r, r + W, ...

    Ties go to the first letter. on_reply is called with every graded reply of this rank. Raises UserError where an
    option is not one token, or there is no problem. stop: asked before each batch; Stopped is raised on all ranks when
    the others are done or asked too."""
    check_problems(task, indices)
    runtime, found, cut = engine.runtime, [], False
    prompts = readable_prompts(engine.tokenizer, task, indices[runtime.rank :: runtime.world_size], engine.limit)
    order = list(prompts)
    for batch in progress([order[lo : lo + batch_size] for lo in range(0, len(order), batch_size)], task.name):
        if cut := stop():
            break
        logits = last_logits(engine.model, [prompts[i] for i in batch], runtime.device).cpu()
        for i, row in zip(batch, logits):
            example = task.example(i)
            letter = example.letters[int(row[letter_ids(engine.tokenizer, example.letters, task.name)].argmax())]
            found.append(Graded(i, 0, letter, task.correct(example, letter), True))
            if on_reply:
                on_reply(found[-1])
    runtime.check_stop(cut)
    return summary(task.name, indices, 1, [g for part in runtime.gather_objects(found) for g in part])


def last_logits(model: GPT, prompts: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Logits (B, V) after the last token of each prompt."""
    return torch.cat(
        list(
            logits_at(
                model, padded(prompts), np.arange(len(prompts)), np.array([len(ids) - 1 for ids in prompts]), device
            )
        )
    )


def letter_ids(tokenizer: Tokenizer, letters: Iterable[str], task: str) -> list[int]:
    """The token of each letter. Raises UserError for one that is several tokens."""
    out = []
    for letter in letters:
        ids = tokenizer.encode(letter)
        if len(ids) != 1:
            raise UserError(
                f"option {letter!r} of task {task} is {len(ids)} tokens; expected one, whose logit is compared; name"
                " the options by single letters"
            )
        out += ids
    return out


def evaluate_sampled(
    engine: Engine,
    task: GradedTask,
    indices: Sequence[int],
    request: Request = GREEDY,
    *,
    num_samples: int = 1,
    batch_size: int = 32,
    on_reply: OnReply | None = None,
    stop: Stop = lambda: False,
) -> Result:
    """pass@1 ... pass@num_samples on the task's problems `indices`, the same ones on every rank.

    request: how to answer. Rank r of W answers indices r, r + W, ... A reply depends on the request's seed, its problem
    and its number alone, not on batch_size (replies drawn at once on one rank) or W. on_reply is called with every
    graded reply of this rank. stop: asked at each token; where a rank is asked, Stopped is raised on all, when the
    others have answered theirs or were asked too. Raises UserError for no problems, for settings that have no meaning,
    and for several samples at temperature 0."""
    check_problems(task, indices)
    if num_samples < 1 or batch_size < 1:
        raise UserError(
            f"{num_samples} replies to a problem, {batch_size} at once; expected at least 1 of each; try --num-samples"
            " 1 --device-batch-size 32"
        )
    if num_samples > 1 and request.temperature < COLDEST:
        raise UserError(
            f"{num_samples} replies to a problem at temperature {request.temperature:g} are all the same; expected"
            " different ones; try --temperature 1"
        )
    runtime, found, cut = engine.runtime, [], False
    prompts = readable_prompts(engine.tokenizer, task, indices[runtime.rank :: runtime.world_size], engine.limit)
    places = [(i, sample) for i in prompts for sample in range(num_samples)]
    for batch in progress([places[lo : lo + batch_size] for lo in range(0, len(places), batch_size)], task.name):
        ids, ended = [[] for _ in batch], [False] * len(batch)
        seeds = [reply_seed(request.seed, i, sample) for i, sample in batch]
        steps = engine.generate([prompts[i] for i, _ in batch], request, seeds)
        for step in steps:
            if stop():
                break
            for new in step:
                ids[new.row].append(new.token)
                ended[new.row] = new.finish == "stop"
        if cut := stop():
            break
        for (i, sample), reply, end in zip(batch, ids, ended):
            content = parse_reply(engine.tokenizer, reply)
            found.append(Graded(i, sample, content, task.correct(task.example(i), content), end))
            if on_reply:
                on_reply(found[-1])
    runtime.check_stop(cut)
    return summary(task.name, indices, num_samples, [g for part in runtime.gather_objects(found) for g in part])


def reply_seed(seed: int, index: int, sample: int) -> int:
    """The seed of one reply, unlike that of any other."""
    return int(np.random.SeedSequence([seed, index, sample]).generate_state(1, np.uint64)[0])


class ChatScore(NamedTuple):
    label: str  # "ChatCORE", or "ChatCORE-k of n"
    value: float
    interval: Interval


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
    if task.kind == "letters":
        return evaluate_letters(engine, task, indices, batch_size=batch_size, on_reply=on_reply, stop=stop)
    return evaluate_sampled(
        engine, task, indices, request, num_samples=num_samples, batch_size=batch_size, on_reply=on_reply, stop=stop
    )


def chatcore(
    engine: Engine,
    tasks: Sequence[GradedTask],
    limit_letters: int = -1,
    limit_generate: int = -1,
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
    limits = {"letters": limit_letters, "generate": limit_generate}
    request = replace(GREEDY, max_tokens=max_tokens, tools=tools)
    results = [
        (task, evaluate_task(engine, task, limits[task.kind], request, batch_size=batch_size, stop=stop))
        for task in tasks
    ]
    score = chatcore_score([(task.name, task.baseline, r.accuracy, r.interval) for task, r in results])
    found = {f"chatcore/{task.name}": r.accuracy for task, r in results}
    return found | ({f"chatcore/{score.label}": score.value} if score else {})
