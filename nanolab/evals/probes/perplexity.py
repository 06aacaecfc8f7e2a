"""Perplexity, and what rounding to 8-bit integers costs.

    e^loss, and 2^loss of the same loss in nats, which is no perplexity but the number of nanoGPT_softmax1's rule

loss: mean nats per token of text on the validation rows of the training length (data/validation.py). It is measured
three times: as the model is; with the weights of its linear maps rounded, each row (output) by itself; and with their
inputs rounded too, all values that one map reads by one scale:

    q(x) = s round(x / s), s = max |x| / 127        symmetric, round half to even; the maximum of inputs is that of the
                                                    whole text, under rounded weights

The second is what serving with --int8 keeps (inference/prepare.py: torchao's weight-only int8, a scale per output). The
third is where large activations cost: Bondarenko et al., arXiv 2306.12929. Rounded are the linear maps of the blocks
and a head of its own; gates, a tied head, tables and norms are not.

    {"loss", "ppl": e^loss, "ppl_base2": 2^loss, "tokens",
     "int8": {"loss", "ppl", "rise": ppl / ppl of the model as it is - 1}, "int8_activations": the same,
     "rounded": how many linear maps}"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nanolab.data.validation import validation_rows
from nanolab.evals.bpb import bits_per_byte
from nanolab.evals.probes import Result
from nanolab.evals.probes.common import Given, token_limit
from nanolab.evals.score import perplexity
from nanolab.model.gpt import Linear

LEVELS = 127
Before = Callable[[nn.Module, Tensor], Tensor | None]  # (linear map, its input) -> another input


def rounded(x: Tensor, largest: Tensor | float) -> Tensor:
    """x by 8-bit integers of which 127 stands for `largest`."""
    scale = torch.as_tensor(largest, dtype=x.dtype, device=x.device).clamp_min(torch.finfo(x.dtype).tiny) / LEVELS
    return (x / scale).round().clamp(-LEVELS, LEVELS) * scale


@contextmanager
def int8_weights(model: nn.Module) -> Iterator[list[nn.Module]]:
    """The model's linear maps, with rounded weights."""
    linear = [module for module in model.modules() if isinstance(module, Linear) and module.kind != "gate"]
    kept = [module.weight.data for module in linear]
    try:
        for module, weight in zip(linear, kept):
            module.weight.data = rounded(weight, weight.abs().amax(1, keepdim=True))
        yield linear
    finally:
        for module, weight in zip(linear, kept):
            module.weight.data = weight


@contextmanager
def inputs_through(modules: list[nn.Module], before: Before) -> Iterator[None]:
    hooks = [module.register_forward_pre_hook(lambda m, args: before(m, args[0])) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def measure_perplexity(given: Given) -> Result:
    """What the file's docstring says. Raises UserError where the text is empty."""
    limit = token_limit(given.tokens, given.runtime)
    rows: Any = validation_rows(given.documents, given.tokenizer, given.seq_len, limit)[:2]
    token_bytes = given.tokenizer.token_bytes()
    largest: dict[nn.Module, float] = {}

    def loss() -> tuple[float, int]:
        found = bits_per_byte(given.model, rows, token_bytes, given.runtime, given.batch_size, given.stop)
        return found.nats / found.n_tokens, found.n_tokens

    def note(module: nn.Module, x: Tensor) -> None:
        largest[module] = max(largest.get(module, 0.0), x.abs().max().item())

    plain, tokens = loss()
    with int8_weights(given.model) as linear:
        with inputs_through(linear, note):
            weights = loss()[0]
        of_ranks = given.runtime.gather_objects([largest.get(module, 0.0) for module in linear])
        largest = dict(zip(linear, map(max, zip(*of_ranks))))
        with inputs_through(linear, lambda module, x: rounded(x, largest[module])):
            activations = loss()[0]
    found: Result = {"loss": plain, "ppl": perplexity(plain), "ppl_base2": perplexity(plain * math.log(2))}
    for name, nats in (("int8", weights), ("int8_activations", activations)):
        found[name] = {"loss": nats, "ppl": perplexity(nats), "rise": perplexity(nats - plain) - 1}
    return found | {"rounded": len(linear), "tokens": tokens}
