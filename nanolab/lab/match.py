"""Arms of equal FLOPs, or of equal training time: how many steps each gets, from the length of the baseline.

    steps = round(steps of the baseline x cost of its step / cost of the arm's)

so that totals differ by at most half a step of the arm. The cost of a step is its FLOPs, or its time, which short runs
of all arms in turn measure before the first run; the study's record keeps it."""

import os
import shutil
import statistics
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from nanolab.cli import UserError
from nanolab.lab.study import COSTS, Study
from nanolab.records.models import OF_STUDIES, read_metrics, runs_dir
from nanolab.runtime import print0
from nanolab.stages.config import BaseTrainConfig, RunFlags

ROUNDS, STEPS, COLD = 5, 12, 4  # of a calibration: runs of an arm, steps of each, steps of each that do not count
RATES = ("embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr", "lr_scale", "learning_rate", "weight_decay")
QUIET = {"eval_every": -1, "core_metric_every": -1, "sample_every": -1, "save_every": -1, "log_every": 1}
QUIET |= {"probes": "", "profile": False, "wandb": "off"}


def with_lengths(
    study: Study, configs: Mapping[str, Any], facts: dict[str, dict[str, Any]], step_seconds: Mapping[str, float]
) -> dict[str, Any]:
    """The configs with the steps that each arm gets, which `facts` of Preview are brought up to. Raises UserError where
    the baseline's length is no number of steps.
    """
    base, found = facts[study.baseline], {}
    if base["steps"] is None:
        raise UserError(
            f'the baseline is trained by the clock; expected a number of steps, from which match = "{study.match}"'
            " takes the others' length; give the study --num-iterations",
            "arms-unequal",
            fact=study.match,
            arms={study.baseline: None},
        )
    cost = {arm: one["step_flops"] if study.match == "flops" else step_seconds[arm] for arm, one in facts.items()}
    total = base["steps"] * cost[study.baseline]
    for arm, one in facts.items():
        steps, before = max(1, round(total / cost[arm])), one["steps"]
        found[arm] = replace(configs[arm], num_iterations=steps)
        one["steps"], one["tokens"] = steps, one["tokens"] // before * steps
        if one["seconds"] is not None:
            one["seconds"] *= steps / before
    return found


def lengths_of(study: Study, facts: dict[str, dict[str, Any]], step_seconds: Mapping[str, float]) -> dict[str, Any]:
    """What a study's record keeps of the lengths: arm -> steps, and the cost of a step."""
    costs = {arm: step_seconds.get(arm, one.get("step_flops")) for arm, one in facts.items()}
    return {arm: {"steps": one["steps"], COSTS[study.match]: costs[arm]} for arm, one in facts.items()}


def calibrate(
    configs: Mapping[str, RunFlags], threads: int, look: Callable[..., Any], measure: Callable[..., float] | None = None
) -> dict[str, float]:
    """Seconds of a step of each arm: the median over ROUNDS, in which the arms take turns, forwards and backwards. Arms
    that differ in rates alone are one. look: calls a function in a process of its own, as in_child does."""
    fields = BaseTrainConfig.__dataclass_fields__
    plain = {arm: replace(cfg, **{name: fields[name].default for name in RATES}) for arm, cfg in configs.items()}
    kinds = {repr(cfg): cfg for cfg in plain.values()}
    samples: dict[str, list[float]] = {kind: [] for kind in kinds}
    print0(f"calibration     {ROUNDS} runs of {STEPS} steps of each of {len(kinds)} arms, in turn")
    for i in range(ROUNDS):
        for kind in list(kinds)[:: -1 if i % 2 else 1]:
            samples[kind].append(look(measure or time_steps, kinds[kind], threads))
    found = {arm: statistics.median(samples[repr(cfg)]) for arm, cfg in plain.items()}
    for arm, seconds in found.items():
        seen = samples[repr(plain[arm])]
        print0(
            f"                {arm}: {1000 * seconds:.2f} ms a step ({1000 * min(seen):.2f} to {1000 * max(seen):.2f})"
        )
    return found


def time_steps(cfg: BaseTrainConfig, threads: int) -> float:
    """Median seconds of a training step in a short run, which leaves nothing. Called in a process of its own, whose
    output it drops.
    """
    from nanolab.stages.pretrain import pretrain

    name = f"{OF_STUDIES}calibration-{os.getpid()}"
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    try:
        pretrain(replace(cfg, run=name, num_iterations=STEPS, threads=threads, **QUIET))
        return statistics.median(row["train/dt"] for row in read_metrics(runs_dir() / name)[COLD:] if "train/dt" in row)
    finally:
        shutil.rmtree(runs_dir() / name, ignore_errors=True)
