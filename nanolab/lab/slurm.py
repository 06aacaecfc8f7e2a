"""Runs of a study as jobs of a SLURM cluster, through submitit: lab run STUDY.toml --slurm partition=gpu,timeout_min=9.

The lab itself stays where it was typed and waits, so that it may be interrupted and typed again there. The base
directory has to be one that the nodes see too. `cluster=local` takes processes of this machine for jobs."""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from nanolab import runtime
from nanolab.cli import UserError
from nanolab.lab.processes import REFUSED, Planned, train
from nanolab.lab.study import ROOT
from nanolab.records.environment import environment
from nanolab.runtime import base_dir, print0
from nanolab.stages.config import RunFlags

COMMON = ("timeout_min", "mem_gb", "nodes", "cpus_per_task", "gpus_per_node", "tasks_per_node", "name")  # submitit's
TRY = "try --slurm partition=NAME,timeout_min=60,cpus_per_task=2"


class Jobs:
    """Where runs are made, as processes.Forks is. asked: parameters of submitit joined by commas; those that it does
    not share among clusters are SLURM's own (partition, constraint, ...).

    Raises UserError where submitit or SLURM is missing, and for what they do not take."""

    def __init__(self, asked: str) -> None:
        try:
            import submitit
        except ImportError:
            raise UserError(
                "submitit, which hands jobs to SLURM, is missing; expected the extra slurm; type: bash runs/setup.sh"
                " slurm",
                "submitit-missing",
            ) from None
        words = [word.strip().partition("=") for word in asked.split(",") if word.strip()]
        given = {name: int(value) if value.isdecimal() else value for name, _, value in words}
        cluster = given.pop("cluster", "slurm")
        if "timeout_min" not in given or not all(equals and value for _, equals, value in words):
            raise UserError(
                f"--slurm {asked}; expected NAME=VALUE joined by commas, timeout_min (minutes of a job) among them;"
                f" {TRY}",
                "slurm-parameters",
                slurm=asked,
            )
        try:
            self.executor = submitit.AutoExecutor(base_dir() / "lab" / "jobs", cluster=cluster)
            self.executor.update_parameters(**{n if n in COMMON else f"slurm_{n}": v for n, v in given.items()})
        except (RuntimeError, ValueError, NameError, AssertionError) as error:
            raise UserError(
                f"--slurm {asked} cannot be used: {error}; expected parameters of sbatch, typed where SLURM is; {TRY}",
                "slurm-parameters",
                slurm=asked,
            ) from None
        path = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(path))  # jobs begin with this environment

    def call(self, work: Callable[..., Any], *args: Any) -> Any:
        """`work(*args)` in a job; its UserError is raised here."""
        print0("waiting         for a job that finds out what the runs need")
        found = self.executor.submit(kept, work, *args).result()
        if isinstance(found, UserError):
            raise found
        return found

    def start(self, run: Planned, slot: int) -> Any:
        return self.executor.submit(attempt, run.cfg, run.dir / "log.txt", run.identity["machine"])

    def ended(self, jobs: list[Any]) -> list[Any]:
        """Those that have ended; waits for a second where there are none."""
        found = [job for job in jobs if job.done()]
        if not found:
            time.sleep(1)
        return found

    def code(self, job: Any) -> int:
        """As a process's exit code."""
        import submitit

        with suppress(submitit.core.utils.UncompletedJobError, submitit.core.utils.FailedJobError):
            return job.result()
        return 1

    def stop(self, jobs: list[Any]) -> None:
        """Cancel the jobs, which save and end."""
        for job in jobs:
            job.cancel(check=False)
        while not all(job.done() for job in jobs):
            time.sleep(0.1)


def kept(work: Callable[..., Any], *args: Any) -> Any:
    try:
        return work(*args)
    except UserError as error:
        return error


def attempt(cfg: RunFlags, log: Path, machine: dict[str, Any]) -> int:
    """One run as a job: its exit code. A machine of another kind than the study's makes none."""
    rt = runtime.start(cfg.device_type, "", cfg.seed, cfg.threads)
    here = environment(rt)
    if other := {name: here[name] for name, value in machine.items() if here[name] != value}:
        expected = {name: machine[name] for name in other}
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(
            f"error [other-machine]: the node has {other}; expected {expected}; add constraint= to --slurm\n"
        )
        return REFUSED
    try:
        train(cfg, log, 0, 0)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    return 0
