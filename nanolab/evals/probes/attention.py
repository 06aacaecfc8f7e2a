"""What attention attends to: the mass on the first tokens, heads with a sink, row sums.

With p_ij the weight of query i on key j, as the model's softmax gives it (of softmax1 and its like a row sums to less
than 1), and a mean over rows of text and over the queries i >= k of a head that see key k:

    mass_k  = mean p_ik
    Sink_k  = share of all heads with mass_k > eps, eps = 0.3        Gu et al., arXiv 2410.10781, section 3.2
    row sum = mean over queries of sum_j p_ij

In a layer with a window a query far behind does not see key k and does not count. Rows have the training length and
begin with bos.

    {"first": mean over heads of the mass on the first token, of queries in the second half of the row alone; null where
              none sees it,
     "sink1": Sink_1, "sinks": [Sink_1, ..., Sink_4], "eps", "row_sum": mean over heads, "row_sum_min": least of a head,
     "heads": number of heads, "by_head": {"first", "mass1", "row_sum": a list of heads for each layer}, "tokens"}"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from nanolab.evals.probes import Result
from nanolab.evals.probes.common import Given, cut_rows, row_batches, text_stream
from nanolab.model.gpt import GPT
from nanolab.model.kernels.reference import eager
from nanolab.model.kernels.spec import AttnSpec, seen

EPS = 0.3
KEYS = 4  # first tokens whose mass is measured
CELLS = 1 << 24  # weights of one layer at once


class Tally:
    """Sums over rows of what the heads of one layer do, float64."""

    def __init__(self, n_head: int, n_keys: int, device: torch.device):
        H, K = n_head, n_keys
        # mass (H, K) on each of the first keys, that of late queries on the first one and row sums (H,); and of each of
        # these how many queries there are
        self.sums = torch.zeros(H * (K + 2) + K + 2, dtype=torch.float64, device=device)
        self.shape = H, K

    def add(self, q_BTHD: Tensor, k_BTGD: Tensor, rules: AttnSpec) -> None:
        B, T = q_BTHD.shape[:2]
        H, K = self.shape
        # attention to values that say where they are: on each of the first K keys its own channel is 1, the last
        # channel is 1 on every key, so that what comes out is the mass on the first K keys and the row sum
        marks_T = torch.eye(T, K + 1, device=q_BTHD.device).index_fill_(1, torch.tensor(K, device=q_BTHD.device), 1)
        wide_BTHD = q_BTHD.to(torch.promote_types(q_BTHD.dtype, torch.float32))
        y_BTHK = eager(wide_BTHD, k_BTGD, marks_T[None, :, None].expand(B, -1, k_BTGD.size(2), -1), rules)
        pos = torch.arange(T, device=q_BTHD.device)
        seen_BTK = seen(rules, pos[None], pos[:K]).expand(B, -1, -1)
        parts = [
            y_BTHK[..., :K].sum((0, 1)),
            y_BTHK[:, T // 2 :, :, 0].sum((0, 1)),
            y_BTHK[..., K].sum((0, 1)),
            seen_BTK.sum((0, 1)),
            seen_BTK[:, T // 2 :, 0].sum(),
            torch.tensor(B * T),
        ]
        self.sums += torch.cat([part.to(self.sums.device).double().flatten() for part in parts])

    def means(self, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(mass (H, K), mass of late queries on the first key (H,), row sums (H,)); "not a number" where none counts.
        sums: `self.sums`, of all ranks.
        """
        H, K = self.shape
        mass, late, row_sum, n_mass, n_late, n = sums.split([H * K, H, H, K, 1, 1])
        return mass.view(H, K) / n_mass, late / n_late, row_sum / n


@contextmanager
def watched(model: GPT, tallies: list[Tally]) -> Iterator[None]:
    """Every layer's weights are added to its tally. The layers' kernels, and so the pass itself, stay as they are."""
    cores: list[Any] = [block.attn.core for block in model.h]
    kernels = [core.kernel for core in cores]

    def watching(kernel: Any, tally: Tally) -> Any:
        def run(q_BTHD: Tensor, k_BTGD: Tensor, v_BTGE: Tensor, rules: AttnSpec) -> Tensor:
            tally.add(q_BTHD, k_BTGD, rules)
            return kernel(q_BTHD, k_BTGD, v_BTGE, rules)

        return run

    try:
        for core, kernel, tally in zip(cores, kernels, tallies):
            core.kernel = watching(kernel, tally)
        yield
    finally:
        for core, kernel in zip(cores, kernels):
            core.kernel = kernel


def measure_attention(given: Given) -> Result:
    """What the file's docstring says. Raises UserError where the text is shorter than one row."""
    model, runtime, T, H = given.model, given.runtime, given.seq_len, given.model.config.n_head
    device = runtime.device if runtime.device.type == "cuda" else torch.device("cpu")  # float64, which mps has not
    ids = text_stream(given)
    ids = ids[: len(ids) // T * T]
    tallies = [Tally(H, min(KEYS, T), device) for _ in model.h]
    nowhere = torch.zeros(0, dtype=torch.int64, device=runtime.device)
    with watched(model, tallies):
        for (x,) in row_batches(given, max(1, CELLS // (H * T * T)), cut_rows(ids, T, given.tokenizer.bos)[0]):
            if len(x):
                model.hidden(x, at=(nowhere, nowhere))
    mass, late, row_sum = (
        torch.stack(of_layers).cpu()
        for of_layers in zip(*(tally.means(runtime.all_reduce_(tally.sums)) for tally in tallies))
    )
    sinks = (mass > EPS).double().mean((0, 1)).tolist()
    return {
        "first": late.nanmean().item() if late.isfinite().any() else None,
        "sink1": sinks[0],
        "sinks": sinks,
        "eps": EPS,
        "row_sum": row_sum.mean().item(),
        "row_sum_min": row_sum.min().item(),
        "heads": len(tallies) * H,
        "by_head": {"first": shown(late), "mass1": shown(mass[..., 0]), "row_sum": shown(row_sum)},
        "tokens": len(ids),
    }


def shown(by_head: Tensor) -> list[list[float | None]]:
    """Layers of heads; None where no query counts."""
    return [[None if x != x else x for x in row] for row in by_head.tolist()]
