"""Probes: what may be measured of a trained model beside its loss. Their table. Imports no torch.

The probe NAME is `measure_NAME(given)` of nanolab/evals/probes/NAME.py, which is imported when it is asked for. Each is
a value of base_train --probes and of base_eval --modes."""

from dataclasses import dataclass
from typing import Annotated, Any

from nanolab.cli import CountOrAuto, OneOf

Result = dict[str, Any]  # of a probe or another evaluation, JSON-ready

# name -> (what of its result a curve over training shows; A.B is B inside A, what that is)
PROBES = {
    "lengths": ("x2", "bits per byte on rows twice as long as in training"),
    "attention": ("sink1", "share of heads with a sink on the first token"),
    "kurtosis": ("stream.max", "largest excess kurtosis of a layer's residual stream"),
    "perplexity": ("ppl", "perplexity of validation text"),
    "passkey": ("x1.exact", "pass keys retrieved at the training length"),
    "gold": ("bpb", "bits per byte of gold answers"),
}


@dataclass(frozen=True)
class ProbeFlags:
    """What is measured of a finished model beside its loss."""

    # what to measure of the finished model beside its loss, joined by commas: lengths | attention | kurtosis |
    # perplexity | passkey | gold (nanolab/evals/probes)
    probes: Annotated[str, OneOf(tuple(PROBES), many=True)] = ""
    probe_tokens: CountOrAuto = -1  # validation tokens of each probe at most; -1: 1048576 on a GPU, 8192 on a CPU
