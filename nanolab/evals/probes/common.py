"""What probes are given, how they are run, and the rows of text that they share.

The result of a probe is the same on every rank. Dims: N rows, L tokens of a row."""

import importlib
import json
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from nanolab.cli import UserError, as_json
from nanolab.data.tokenizer import Tokenizer
from nanolab.evals.probes import Result
from nanolab.model.gpt import GPT
from nanolab.runtime import Runtime, Stop, print0

TOKENS = {"cuda": 1 << 20}  # of validation text that a probe reads at most, by device; elsewhere:
TOKENS_ELSEWHERE = 1 << 13


class Given(NamedTuple):
    """What a probe measures, and on what."""

    model: GPT  # in eval mode, not prepared for inference; a probe leaves it as it was
    tokenizer: Tokenizer
    runtime: Runtime
    documents: Any  # of the validation text: an object whose iterate() gives texts
    tokens: int  # of text at most; -1: by device
    batch_size: int  # rows of the training length in one forward pass
    stop: Stop | None = None  # asked before each pass; Stopped is raised, on every rank, where one says so
    bundle: str = ""  # folder of the evaluation bundle; default: eval_bundle in the base directory
    max_per_task: int = -1  # items of each of its tasks at most; -1: all

    @property
    def seq_len(self) -> int:
        """The training length."""
        return self.model.config.sequence_len

    def check_stop(self) -> None:
        if self.stop:
            self.runtime.check_stop(self.stop())


def token_limit(tokens: int, runtime: Runtime) -> int:
    """--probe-tokens, resolved."""
    return tokens if tokens > 0 else TOKENS.get(runtime.device.type, TOKENS_ELSEWHERE)


@torch.no_grad()
def measure_probes(names: Iterable[str], given: Given) -> dict[str, Result]:
    """{name: result} of these probes, one after the other, each printed with what it cost.

    Called on every rank. A probe that cannot be measured has its reason in `failed`, by name."""
    found: dict[str, Result] = {}
    for name in dict.fromkeys(names):
        began = time.perf_counter()
        measure = getattr(importlib.import_module(f"{__package__}.{name}"), f"measure_{name}")
        try:
            found[name] = json.loads(as_json(measure(given), name))  # without "not a number", which no record holds
        except UserError as error:
            found[name] = {"failed": {name: str(error)}}
            print0(f"failed: {name}: {error}")
        found[name]["seconds"] = round(time.perf_counter() - began, 3)
        print0(f"probe           {name} took {found[name]['seconds']:.1f} s")
    return found


def probe_names(text: str) -> list[str]:
    """The names in "lengths, attention"."""
    return [name for part in text.split(",") if (name := part.strip())]


def text_stream(given: Given) -> np.ndarray:
    """The first `given.tokens` tokens of the validation text (fewer where it is shorter), int32, documents joined by
    bos. Raises UserError where they are fewer than a row of the training length.
    """
    n = token_limit(given.tokens, given.runtime)
    parts: list[Any] = []
    size = -1  # without the first bos: rows begin with their own
    texts = iter(given.documents.iterate())
    while size < n and (text := next(texts, None)) is not None:
        parts += [[given.tokenizer.bos], given.tokenizer.encode_arrays([text])[0]]
        size += 1 + len(parts[-1])
    if (have := max(0, min(n, size))) < given.seq_len:
        raise UserError(
            f"{have} tokens of validation text are at hand; expected a row of {given.seq_len} at least; raise"
            " --probe-tokens, or name more text with --val-data",
            "text-too-short",
            tokens=have,
            needed=given.seq_len,
        )
    return np.concatenate(parts, dtype=np.int32)[1 : n + 1]


def row_batches(given: Given, rows: int, *arrays: np.ndarray) -> Iterator[tuple[torch.Tensor, ...]]:
    """So many rows of each of `arrays` (N, L) at a time, int64 on the device: this rank's. Every rank gets as many
    batches, the last one may be empty on some; before each it is asked whether to stop.
    """
    for first in range(0, len(arrays[0]), rows * given.runtime.world_size):
        given.check_stop()
        begin = first + given.runtime.rank * rows
        parts = (torch.from_numpy(array[begin : begin + rows].astype(np.int64)) for array in arrays)
        yield tuple(part.to(given.runtime.device) for part in parts)


def cut_rows(ids: np.ndarray, length: int, bos: int) -> tuple[np.ndarray, np.ndarray]:
    """inputs (N, L) and targets (N, L): every token of `ids`, whose number is a multiple of L, is a target once. A row
    reads bos and those of its tokens that come before the target.
    """
    targets = ids.reshape(-1, length)
    return np.concatenate((np.full_like(targets[:, :1], bos), targets[:, :-1]), axis=1), targets
