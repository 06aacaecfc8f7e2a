"""Categorical tasks: the reply is the option letter with the largest logit right after the prompt; nothing is sampled.

Prompts of like lengths are read together, padded on the right: attention is causal, so that nothing behind a prompt's
last token reaches its logits. Dims: B rows, T tokens, V vocabulary."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from nanolab.cli import UserError
from nanolab.data.tokenizer import Tokenizer
from nanolab.evals.likelihood import logits_at, padded
from nanolab.evals.score import Graded, GradedTask, OnReply, Result, check_problems, readable_prompts, summary
from nanolab.inference.engine import Engine
from nanolab.model.gpt import GPT
from nanolab.runtime import Stop
from nanolab.terminal import progress


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
