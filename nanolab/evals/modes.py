"""The ways to evaluate a base model: the one table of --modes. Imports no torch.

A result is a dict, JSON-ready. bpb's own is {"bpb", "interval", ...}; what base_eval keeps of it is in `fields`."""

from collections.abc import Callable
from typing import Any, NamedTuple

Result = dict[str, Any]


class Mode(NamedTuple):
    fields: tuple[str, ...]  # of eval_base.json that hold what it found
    ylabel: Callable[[Result], str] | None = None  # what its score is called; None: it has none to draw over training
    score: Callable[[Result], float | None] = lambda r: r["value"]
    interval: Callable[[Result], tuple[float, float] | None] = lambda r: r["interval"]
    questions: bool = False  # asks questions of kind likelihood: the evaluation bundle's, or of --hellaswag
    probe: str = ""  # the module whose `measure` finds it, of what base_train --probes may name as well


def _probe(name: str, score: str, ylabel: str) -> Mode:
    """A probe (evals/probes/). score: what of its result a curve over training shows; A.B is B inside A."""
    outer, _, inner = score.rpartition(".")
    module = f"nanolab.evals.probes.{name}"
    return Mode((name,), lambda r: ylabel, lambda r: r.get(outer, r).get(inner), lambda r: None, probe=module)


MODES = {
    "bpb": Mode(
        ("data", "bpb", "train", "val", "domains", "compressors", "compressor_bytes"),
        lambda r: "bits per byte of validation text",
        lambda r: r["bpb"],
    ),
    "sample": Mode(("samples", "unconditioned")),
    "core": Mode(("core",), lambda r: r["label"], questions=True),
    "hellaswag": Mode(
        ("hellaswag",),
        lambda r: "HellaSwag, loss per token",
        lambda r: r["per_token"]["accuracy"],
        lambda r: r["per_token"]["interval"],
        questions=True,
    ),
    "lambada": Mode(("lambada",), lambda r: "LAMBADA accuracy", lambda r: r["accuracy"], questions=True),
    "lengths": _probe("lengths", "x2", "bits per byte on rows twice as long as in training"),
    "attention": _probe("attention", "sink1", "share of heads with a sink on the first token"),
    "kurtosis": _probe("kurtosis", "stream.max", "largest excess kurtosis of a layer's residual stream"),
    "perplexity": _probe("perplexity", "ppl", "perplexity of validation text"),
    "passkey": _probe("passkey", "x1.exact", "pass keys retrieved at the training length"),
    "gold": _probe("gold", "bpb", "bits per byte of gold answers"),
}
PROBES = tuple(name for name, mode in MODES.items() if mode.probe)
