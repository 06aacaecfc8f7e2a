"""Bits per byte: the loss of a language model in units that do not depend on its tokenizer.

    bpb = sum of nats over counted targets / (ln 2 * sum of those targets' bytes)

Cross entropy per token is lower for a model with shorter tokens; per byte of text, models with any tokenizer compare
with one another and with compressors. Dims: N rows, T tokens, V vocabulary.
"""

import math
from typing import NamedTuple, Sequence

import numpy as np
import torch

from nanolab.config import UserError
from nanolab.model.gpt import GPT
from nanolab.runtime import Runtime


class BPB(NamedTuple):
    """bpb, and the three sums it is made of (tokens are those that were counted)."""

    bpb: float
    nats: float
    n_bytes: int
    n_tokens: int


@torch.no_grad()
def bits_per_byte(
    model: GPT, rows: Sequence[np.ndarray], token_bytes: np.ndarray, runtime: Runtime, batch_size: int = 32
) -> BPB:
    """Bits per byte of the model on rows, the same ones on every rank.

    rows: inputs (N, T) and targets (N, T), the first two of what `validation_rows` gives.
    token_bytes: (V,) bytes that each id stands for. Targets of -1, and targets of 0 bytes (special tokens), count neither
    as nats nor as bytes. Rank r evaluates rows r, r + W, ...; the sums are exact over ranks and independent of
    `batch_size` but for rounding. Raises UserError when no byte is left to count.
    """
    inputs, targets = (np.asarray(half)[runtime.rank :: runtime.world_size].astype(np.int64) for half in rows)
    counted = targets >= 0
    counted[counted] = token_bytes[targets[counted]] > 0
    targets = np.where(counted, targets, -1)
    # One tensor for the one collective; float64 where the backend and device have it (mps has neither ranks nor float64).
    sums = torch.zeros(3, dtype=torch.float64, device=runtime.device if runtime.device.type == "cuda" else "cpu")
    sums[1] = float(token_bytes[targets[counted]].sum(dtype=np.int64))
    sums[2] = float(counted.sum())
    for first in range(0, len(inputs), batch_size):
        if not counted[first : first + batch_size].any():
            continue
        x, y = (torch.from_numpy(half[first : first + batch_size]).to(runtime.device) for half in (inputs, targets))
        sums[0] += model(x, y, reduction="none").to(sums.device).double().sum()
    nats, n_bytes, n_tokens = runtime.all_reduce_(sums).tolist()
    if not n_bytes:
        raise UserError("no byte to count in the evaluation rows; expected text after the first token of a document; try more --split-tokens or other --val-data")
    return BPB(nats / (math.log(2) * n_bytes), nats, int(n_bytes), int(n_tokens))
