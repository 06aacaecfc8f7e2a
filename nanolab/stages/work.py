"""What rollouts cost: tokens, and FLOPs of drawing replies and of training on them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nanolab.model.accounting import decode_flops_per_token, prompt_flops, train_flops_per_token
from nanolab.model.config import GPTConfig


@dataclass
class Work:
    """What a run has computed so far, over all ranks. Padding is not counted; FLOPs are by the formulas of
    model/accounting.py, and of the tokens that are read: of a text, all but the last."""

    tokens: int = 0  # of prompts and replies, what a tool said included; those of a rollout count in each update on it
    drawn: int = 0  # of replies alone, once
    # forward and backward; where there is a --kl, also the start model's forward over each rollout
    training_flops: int = 0
    generating_flops: int = 0  # reading prompts, and one pass for each token of a reply


def training_flops(c: GPTConfig, lengths: Sequence[int]) -> int:
    """One update on texts of so many tokens."""
    return sum(count * (n - 1) * train_flops_per_token(c, n - 1) for n, count in Counter(lengths).items())


def generating_flops(c: GPTConfig, replies: Sequence[Any]) -> int:
    """Replies that are drawn together: equal prompts are read once, and each token of a reply but the last."""
    prompts = Counter(len(prompt) for prompt in {tuple(r.prompt) for r in replies})
    contexts = Counter(context for r in replies for context in range(len(r.prompt) + 1, len(r.prompt) + len(r.ids)))
    reading = sum(count * prompt_flops(c, n) for n, count in prompts.items())
    return reading + sum(count * decode_flops_per_token(c, context) for context, count in contexts.items())
