"""The ways to evaluate a base model: the one table of --modes. Imports no torch.

A result is a dict, JSON-ready. bpb's own is {"bpb", "interval", ...}; what base_eval keeps of it is in `fields`."""

from collections.abc import Callable
from typing import NamedTuple

from nanolab.evals.probes import PROBES, Result


class Mode(NamedTuple):
    fields: tuple[str, ...]  # of eval_base.json that hold what it found
    ylabel: Callable[[Result], str] | None = None  # what its score is called; None: it has none to draw over training
    score: Callable[[Result], float | None] = lambda r: r["value"]
    interval: Callable[[Result], tuple[float, float] | None] = lambda r: r["interval"]
    questions: bool = False  # asks questions of kind likelihood: the evaluation bundle's, or of --hellaswag
    probe: bool = False  # an entry of evals/probes


def _probe(name: str, score: str, ylabel: str) -> Mode:
    outer, _, inner = score.rpartition(".")
    return Mode((name,), lambda r: ylabel, lambda r: r.get(outer, r).get(inner), lambda r: None, probe=True)


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
    **{name: _probe(name, *row) for name, row in PROBES.items()},
}
