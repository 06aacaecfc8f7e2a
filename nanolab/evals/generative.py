"""Generative tasks: replies are sampled with the batched engine, many problems at once, and graded by the task."""

from collections.abc import Sequence

import numpy as np

from nanolab.cli import UserError
from nanolab.data.chat import parse_reply
from nanolab.evals.score import Graded, GradedTask, OnReply, Result, check_problems, readable_prompts, summary
from nanolab.inference.engine import Engine, Request
from nanolab.inference.sampling import COLDEST
from nanolab.runtime import Stop
from nanolab.terminal import progress

GREEDY = Request(max_tokens=512, temperature=0.0, top_k=50)


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
