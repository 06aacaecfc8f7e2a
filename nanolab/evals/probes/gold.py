"""Bits per byte of gold answers, and which tasks are coins at this size.

The tasks of an evaluation bundle (evals/core.py), asked as CORE asks them. Of each item the text with the true answer
counts, and of that the tokens that CORE scores:

    bpb = sum of nats of these tokens / (ln 2 * sum of their bytes)

It moves long before accuracy does, and ranks small models with less noise: Heineman et al., Signal and Noise, arXiv
2508.13144. A task is a coin where the 95 % interval of its accuracy (Wilson's) contains what guessing reaches: nothing
is to be learned from its accuracy here.

    {"bpb": mean over tasks, "coins": their labels,
     "tasks": {label: {"bpb", "bytes", "n", "accuracy", "interval", "baseline", "coin", "cut": items that were cut}},
     "missing": tasks of CORE that the bundle lacks, "failed": {label: why}, where some did}

The bundle is that of --eval-bundle, otherwise eval_bundle in the base directory; it is not downloaded here."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from nanolab.cli import UserError
from nanolab.evals import icl
from nanolab.evals.bundle import TaskSpec, open_bundle
from nanolab.evals.core import Core
from nanolab.evals.likelihood import GPTReader, judge_groups
from nanolab.evals.probes import Result
from nanolab.evals.probes.common import Given
from nanolab.evals.published import ensure_bundle
from nanolab.evals.score import wilson
from nanolab.runtime import base_dir, print0


def measure_gold(given: Given) -> Result:
    """What the file's docstring says. Raises UserError where there is no bundle, or nothing of it can be asked."""
    folder = Path(given.bundle).expanduser() if given.bundle else base_dir() / "eval_bundle"
    if not folder.is_dir():
        raise UserError(
            f"there is no evaluation bundle in {folder}; expected the tasks of CORE; name one with --eval-bundle, or"
            " leave the probe gold out",
            "bundle-missing",
            folder=str(folder),
        )
    core = Core(open_bundle(ensure_bundle(given.bundle)), given.tokenizer, given.runtime, given.max_per_task)
    reader, failed = GPTReader(given.model, given.runtime), dict(core.failed)
    tasks: dict[str, Result] = {}
    for label in core.items:
        try:
            tasks[label] = found = of_task(given, core, core.bundle.tasks[label], reader)
        except UserError as error:
            failed[label] = str(error)
            continue
        coin = "  a coin" if found["coin"] else ""
        print0(
            f"probe           gold: {label}: {found['bpb']:.4f} bits per byte, accuracy {found['accuracy']:.4f}{coin}"
        )
    if not tasks:
        raise UserError(f"no task of {folder} can be asked ({failed}); expected at least one; name another bundle")
    return {
        "bpb": fmean(found["bpb"] for found in tasks.values()),
        "coins": [label for label, found in tasks.items() if found["coin"]],
        "tasks": tasks,
        "missing": core.bundle.missing,
    } | ({"failed": failed} if failed else {})


def of_task(given: Given, core: Core, task: TaskSpec, reader: GPTReader) -> Result:
    right, token_bytes = icl.KINDS[task.kind].right, given.tokenizer.token_bytes()

    def judge(scores: Sequence[icl.Score], group: icl.ItemGroup) -> tuple[Any, ...]:
        gold = np.concatenate((group.prefix, group.tails[group.gold]))[group.starts[group.gold] :]
        n_bytes = int(token_bytes[gold].sum())
        return right(scores, group.gold), scores[group.gold].nats, n_bytes, any(score.cut for score in scores)

    found = judge_groups(reader, core.groups(task), given.runtime, judge, task.label, given.stop or (lambda: False))
    oks, nats, sizes, cuts = zip(*found)
    accuracy, n_bytes = sum(oks) / len(oks), sum(sizes)
    interval = wilson(accuracy, len(oks))
    return {
        "bpb": math.fsum(nats) / math.log(2) / n_bytes,
        "bytes": n_bytes,
        "n": len(oks),
        "accuracy": accuracy,
        "interval": interval,
        "baseline": task.baseline,
        "coin": interval.low <= task.baseline <= interval.high,
        "cut": sum(cuts),
    }
