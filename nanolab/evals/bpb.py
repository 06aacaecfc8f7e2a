"""Bits per byte: the loss of a language model in units that do not depend on its tokenizer.

    bpb = sum of nats over counted targets / (ln 2 * sum of those targets' bytes)

Cross entropy per token is lower for a model with shorter tokens; per byte of text, models with any tokenizer compare
with one another and with compressors. Dims: N rows, T tokens, V vocabulary.

A ratio of two sums over rows has a standard error (Cochran, Sampling Techniques, 3rd ed. 1977, section 6.4, of a large
population):

    error(sum x / sum b)^2 = n / (n - 1) * sum (x - R b)^2 / (sum b)^2        x nats and b bytes of a row, R the ratio,
    n rows that count

so the interval says how far other text of this kind, as much of it, would lie. It takes rows as independent, which
those cut from one book or site are not: for such text it is too narrow."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from nanolab.cli import UserError
from nanolab.evals.score import Z95, Interval
from nanolab.model.gpt import GPT
from nanolab.runtime import Runtime, Stop


class BPB(NamedTuple):
    """bpb, the three sums it is made of (tokens are those that were counted), and its standard error, None of a single
    row.
    """

    bpb: float
    nats: float
    n_bytes: int
    n_tokens: int
    error: float | None

    @property
    def interval(self) -> Interval | None:
        """The normal approximation's 95 % interval."""
        return None if self.error is None else Interval(self.bpb - Z95 * self.error, self.bpb + Z95 * self.error)


@torch.no_grad()
def bits_per_byte(
    model: GPT,
    rows: Sequence[np.ndarray],
    token_bytes: np.ndarray,
    runtime: Runtime,
    batch_size: int = 32,
    stop: Stop | None = None,
    keep: list[tuple[float, int]] | None = None,
    shared: bool = False,
    full: bool = False,
) -> BPB:
    """Bits per byte of the model on rows, the same ones on every rank.

    rows: inputs (N, T) and targets (N, T), the first two of what `validation_rows` gives. token_bytes: (V,) bytes that
    each id stands for. Targets of -1, and targets of 0 bytes (special tokens), count neither as nats nor as bytes. Rank
    r evaluates rows r, r + W, ...; the sums are exact over ranks and independent of `batch_size` but for rounding.
    keep: gets (nats, bytes) of each row, on every rank. stop: asked before each batch; Stopped is raised where a rank
    says so. shared: each rank's rows are its own share, N of them on each. full: the last batch is filled up with rows
    that do not count, since a compiled model is compiled again for a batch of another size. Raises UserError when no
    byte is left to count."""
    n_rows = len(rows[0]) * (runtime.world_size if shared else 1)
    inputs, targets = (
        np.asarray(half) if shared else np.asarray(half)[runtime.rank :: runtime.world_size] for half in rows
    )
    # float64, which mps has not: its sums are made on the CPU
    device = runtime.device if runtime.device.type == "cuda" else torch.device("cpu")
    nats, n_bytes = (torch.zeros(len(inputs), dtype=torch.float64, device=device) for _ in range(2))  # of each row
    n_counted = 0
    for first in range(
        0, -(-n_rows // runtime.world_size), batch_size
    ):  # as many on each rank, since they agree on `stop`
        if stop:
            runtime.check_stop(stop())
        batch = slice(first, first + batch_size)
        x, y = (half[batch].astype(np.int64) for half in (inputs, targets))
        counted = y >= 0
        counted[counted] = token_bytes[y[counted]] > 0
        if not counted.any():
            continue
        n, n_counted = len(x), n_counted + int(counted.sum())
        y = np.where(counted, y, -1)
        n_bytes[batch] = torch.from_numpy(np.where(counted, token_bytes[y], 0).sum(1, dtype=np.float64)).to(device)
        if full and n < batch_size:
            x, y = (
                np.concatenate((half, np.full((batch_size - n, half.shape[1]), fill)))
                for half, fill in ((x, 0), (y, -1))
            )
        x, y = (torch.from_numpy(half).to(runtime.device) for half in (x, y))
        nats[batch] = model(x, y, reduction="none")[:n].to(device).double().sum(1)
    n_tokens = torch.tensor(float(n_counted), dtype=torch.float64, device=device)
    sums = torch.stack(
        [
            nats.sum(),
            n_bytes.sum(),
            n_tokens,
            (n_bytes > 0).sum(),
            (nats**2).sum(),
            (nats * n_bytes).sum(),
            (n_bytes**2).sum(),
        ]
    )
    found = _of_sums(*runtime.all_reduce_(sums).tolist())
    if keep is not None:
        keep += [(0.0, 0)] * n_rows
        for rank, part in enumerate(runtime.gather_objects((nats.tolist(), n_bytes.tolist()))):
            keep[rank :: runtime.world_size] = [(x, int(b)) for x, b in zip(*part)]
    return found


def paired_bpb(before: Sequence[Sequence[float]], after: Sequence[Sequence[float]]) -> tuple[float, Interval | None]:
    """(bits per byte of `after` less those of `before`, its 95 % interval) from (nats, bytes) of the same rows; no
    interval of a single row.

    The ratio's error, above, of the differences of a row's nats: what is hard in a row is hard for both.
    """
    rows = [(b - a, size) for (a, size), (b, _) in zip(before, after, strict=True) if size]
    d, sizes = np.array(rows, dtype=np.float64).T
    ratio = d.sum() / sizes.sum()
    if (n := len(rows)) < 2:
        return ratio / math.log(2), None
    half = Z95 * math.sqrt(n / (n - 1) * ((d - ratio * sizes) ** 2).sum()) / sizes.sum()
    return ratio / math.log(2), Interval((ratio - half) / math.log(2), (ratio + half) / math.log(2))


def _of_sums(
    nats: float, n_bytes: float, n_tokens: float, n: float, nats2: float, product: float, n_bytes2: float
) -> BPB:
    """The score from sums over rows; n: rows that count."""
    if not n_bytes:
        raise UserError(
            "no byte to count in the evaluation rows; expected text after the first token of a document; try more"
            " --split-tokens or other --val-data"
        )
    ratio = nats / n_bytes
    squares = max(0.0, nats2 - 2 * ratio * product + ratio**2 * n_bytes2)  # 0 up to rounding where all rows are alike
    error = math.sqrt(n / (n - 1) * squares) / n_bytes / math.log(2) if n > 1 else None
    return BPB(ratio / math.log(2), nats, int(n_bytes), int(n_tokens), error)
