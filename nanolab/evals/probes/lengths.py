"""Loss on rows longer than those trained on, and by position.

The same tokens are scored at every length: a stream of validation text, documents joined by bos, is cut into rows of
1, 2, 4 and 8 times the training length T. Each row begins with bos, and a token sees what comes before it in its row.
Bits per byte as in evals/bpb.py; bos is read and not scored. The idea and the name of the question: Press et al., Train
Short, Test Long, arXiv 2108.12409; rows do not overlap there either ("nonoverlapping inference").

    {"x1": bits per byte on rows of T, "x2": of 2 T, "x4", "x8": ..., null where the model cannot read such rows,
     "nats": the same lengths -> nats per token, "length": T, "tokens", "bytes": that were scored at each length,
     "by_position": {"of": the longest length read, "from": [0, 1, 2, 4, ..., L / 2], "nats": [...], "tokens": [...]},
     "unread": the lengths that are null -> why}

by_position: nats per token of the targets at positions from[i] to from[i + 1] - 1 of the longest rows."""

import math
from typing import NamedTuple

import numpy as np
import torch

from nanolab.cli import UserError
from nanolab.evals.probes import Result
from nanolab.evals.probes.common import Given, cut_rows, row_batches, text_stream
from nanolab.runtime import print0

TIMES = (1, 2, 4, 8)


class Sums(NamedTuple):
    """By position of a row, (L,) each."""

    nats: np.ndarray
    n_bytes: np.ndarray
    n_tokens: np.ndarray

    @property
    def bpb(self) -> float:
        return float(self.nats.sum() / self.n_bytes.sum() / math.log(2))

    def per_token(self, first: int = 0, end: int | None = None) -> float | None:
        """Nats per token of these positions; None where none was scored."""
        n = self.n_tokens[first:end].sum()
        return float(self.nats[first:end].sum() / n) if n else None


def measure_lengths(given: Given) -> Result:
    """What the file's docstring says. Raises UserError where the text is shorter than a row of T."""
    T, ids = given.seq_len, text_stream(given)
    longest = max(k for k in TIMES if k * T <= len(ids))
    ids = ids[: len(ids) // (longest * T) * longest * T]
    sums: dict[int, Sums] = {}
    unread: dict[str, str] = {}
    for k in TIMES:
        try:
            if k > longest:
                raise UserError(f"the {len(ids)} tokens of text at hand are fewer; raise --probe-tokens, or add text")
            sums[k] = by_position(given, *cut_rows(ids, k * T, given.tokenizer.bos))
            says = f"{sums[k].bpb:.4f} bits per byte"
        except UserError as error:
            if k == 1:
                raise
            unread[f"x{k}"] = says = str(error)
        print0(f"probe           lengths: rows of {k * T} tokens: {says}")
    last = sums[max(sums)]
    edges = [0, *(1 << i for i in range((len(last.nats) - 1).bit_length()))]
    spans = list(zip(edges, [*edges[1:], len(last.nats)]))
    return {f"x{k}": sums[k].bpb if k in sums else None for k in TIMES} | {
        "nats": {f"x{k}": sums[k].per_token() if k in sums else None for k in TIMES},
        "length": T,
        "tokens": int(last.n_tokens.sum()),
        "bytes": int(last.n_bytes.sum()),
        "by_position": {
            "of": len(last.nats),
            "from": edges,
            "nats": [last.per_token(*span) for span in spans],
            "tokens": [int(last.n_tokens[slice(*span)].sum()) for span in spans],
        },
        "unread": unread,
    }


def by_position(given: Given, inputs: np.ndarray, targets: np.ndarray) -> Sums:
    """The sums over rows (N, L), of all ranks. Raises UserError, on every rank, where the model cannot read such
    rows.
    """
    runtime, token_bytes = given.runtime, given.tokenizer.token_bytes()
    device = runtime.device if runtime.device.type == "cuda" else torch.device("cpu")  # float64, which mps has not
    wanted = np.where(token_bytes[targets] > 0, targets, -1)
    nats = torch.zeros(inputs.shape[1], dtype=torch.float64, device=device)
    rows = max(1, given.batch_size * given.seq_len // inputs.shape[1])
    for x, y in row_batches(given, rows, inputs, wanted):
        if not len(x):  # no row is left for this rank: it reads one that does not count, lest the others be alone
            x = torch.full((1, inputs.shape[1]), given.tokenizer.bos, device=runtime.device)
            y = torch.full_like(x, -1)
        nats += given.model(x, y, reduction="none").to(device).double().sum(0)
    sizes = token_bytes[targets]
    return Sums(runtime.all_reduce_(nats).cpu().numpy(), sizes.sum(0, dtype=np.int64), (sizes > 0).sum(0))
