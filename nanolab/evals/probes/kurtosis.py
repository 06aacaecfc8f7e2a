"""How heavy the tails of weights and activations are: excess kurtosis, and the largest activation.

    kurtosis(x) = mean((x - mean x)^4) / mean((x - mean x)^2)^2 - 3        0 for normal values, biased as of scipy

Of weights: of all values of one matrix or table. Of activations: of all values, tokens times channels, that one layer
leaves in the residual stream ("stream"), or that its attention adds to it ("attention"), over rows of text of the
training length. The metric is that of Bondarenko et al., Quantizable Transformers, arXiv 2306.12929, and of the
comparisons of softmax1; large single activations: Sun et al., arXiv 2402.17762.

    {"weights": {"mean", "max": over matrices, "worst": the matrix with the largest, "by_matrix": {name: kurtosis},
                 "by_kind": {name without the layer: mean over layers}},
     "stream", "attention": {"mean", "max": over layers, "by_layer": [...], "largest": largest absolute value, of all
                 layers, "largest_by_layer": [...]}, "tokens"}"""

from collections import defaultdict
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from nanolab.evals.probes import Result
from nanolab.evals.probes.common import Given, cut_rows, row_batches, text_stream
from nanolab.runtime import Runtime


class Moments:
    """Sums of powers of values that come in parts, float64, and their largest absolute value."""

    def __init__(self, device: torch.device):
        self.sums, self.largest = torch.zeros(5, dtype=torch.float64, device=device), 0.0

    def add(self, x: Tensor) -> None:
        x = x.detach().to(self.sums.device).double()
        square = x * x
        powers = x.sum(), square.sum(), (square * x).sum(), (square * square).sum()
        self.sums += torch.stack((torch.full_like(powers[0], x.numel()), *powers))
        self.largest = max(self.largest, x.abs().max().item())

    def kurtosis(self, runtime: Runtime | None = None) -> float:
        """Of the values of all ranks, where they are given."""
        sums = runtime.all_reduce_(self.sums.clone()) if runtime else self.sums
        m1, m2, m3, m4 = (sums[1:] / sums[0]).tolist()
        variance = m2 - m1 * m1
        return (m4 - 4 * m1 * m3 + 6 * m1 * m1 * m2 - 3 * m1**4) / variance**2 - 3 if variance > 0 else 0.0


def measure_kurtosis(given: Given) -> Result:
    """What the file's docstring says. Raises UserError where the text is shorter than one row."""
    model, runtime, T = given.model, given.runtime, given.seq_len
    device = runtime.device if runtime.device.type == "cuda" else torch.device("cpu")  # float64, which mps has not
    seams = {"stream": list(model.h), "attention": [block.attn for block in model.h]}
    moments = {name: [Moments(device) for _ in modules] for name, modules in seams.items()}
    hooks = [
        module.register_forward_hook(lambda _, __, y, of=of: of.add(y))
        for name, modules in seams.items()
        for module, of in zip(modules, moments[name])
    ]
    ids = text_stream(given)
    ids = ids[: len(ids) // T * T]
    try:
        for (x,) in row_batches(given, given.batch_size, cut_rows(ids, T, given.tokenizer.bos)[0]):
            if len(x):
                model.hidden(x)
    finally:
        for hook in hooks:
            hook.remove()
    found: Result = {"weights": of_weights(model, device), "tokens": len(ids)}
    for name, of_layers in moments.items():
        by_layer = [of.kurtosis(runtime) for of in of_layers]
        largest = [max(runtime.gather_objects(of.largest)) for of in of_layers]
        found[name] = {"mean": fmean(by_layer), "max": max(by_layer), "by_layer": by_layer}
        found[name] |= {"largest": max(largest), "largest_by_layer": largest}
    return found


def of_weights(model: Any, device: torch.device) -> Result:
    """Of every parameter with two dimensions, by its name in a checkpoint."""
    by_matrix, by_kind = {}, defaultdict(list)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            moments = Moments(device)
            moments.add(p)
            by_matrix[name] = moments.kurtosis()
            kind = ".".join(part for part in name.split(".")[:-1] if part != "h" and not part.isdigit())
            by_kind[kind].append(by_matrix[name])
    worst = max(by_matrix, key=by_matrix.__getitem__)
    return {
        "mean": fmean(by_matrix.values()),
        "max": by_matrix[worst],
        "worst": worst,
        "by_matrix": by_matrix,
        "by_kind": {kind: fmean(values) for kind, values in by_kind.items()},
    }
