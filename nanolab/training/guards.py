"""Contexts around training: no garbage collection pauses, evaluations without a trace, memory errors in words."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from nanolab.cli import UserError
from nanolab.runtime import out_of_memory

COLLECT_EVERY = 5000  # steps


@contextmanager
def quiet_gc() -> Iterator[Callable[[int], None]]:
    """Yields a function to call after every step with the number of steps done in this process.

    Scanning a big heap can hold up a step by half a second. After the first step everything that lives is frozen and
    automatic collection is off; every 5000 steps garbage is collected by hand. On leaving, all is as it was; where
    something was frozen before, what lives then stays frozen too.
    """
    was_on, was_frozen = gc.isenabled(), gc.get_freeze_count() > 0

    def after_step(n: int) -> None:
        if n == 1:
            gc.collect()
            gc.freeze()
            gc.disable()
        elif n % COLLECT_EVERY == 0:
            gc.collect()

    try:
        yield after_step
    finally:
        if not was_frozen:
            gc.unfreeze()
        if was_on:
            gc.enable()


@contextmanager
def undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode, no gradients; afterwards training mode and the generators' states are as before.

    Of --deterministic, what has no such algorithm on GPUs is a warning in here: samples are drawn by a sum that torch
    refuses."""
    training, deterministic = model.training, torch.are_deterministic_algorithms_enabled()
    devices = [device] if device.type == "cuda" else []
    if deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            model.train(training)
            if deterministic:
                torch.use_deterministic_algorithms(True)


@contextmanager
def out_of_memory_named(rows: int, grad_accum: int) -> Iterator[None]:
    """Turn the device's out-of-memory error into a UserError that names the flag and a smaller value that fits the
    batch.

    rows: --device-batch-size; rows * grad_accum divides the rows of a step, so a smaller value that divides it fits
    them too."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        smaller = next((n for n in range(rows // 2, 0, -1) if rows * grad_accum % n == 0), None)
        remedy = (
            f"type --device-batch-size {smaller}" if smaller else "type half the --max-seq-len, or a smaller --depth"
        )
        first_line = str(error).strip().split("\n")[0][:300]
        raise UserError(
            f"out of memory with --device-batch-size {rows}: {first_line}. Expected a micro-batch that fits; {remedy}"
            " (the same total batch in more, smaller parts)"
        ) from error
