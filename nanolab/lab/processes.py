"""The runs of a study as processes: each is a fork of this one, so that a crash, a signal or a leak ends one run.

This process imports what training imports, once, and computes nothing: it has no threads and has not touched a GPU, so
that its forks may."""

import ctypes
import gc
import importlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path
from typing import Any

from nanolab.cli import UserError, to_json
from nanolab.lab.results import Row, number_at, training_curve
from nanolab.lab.study import STAGES, stage_of
from nanolab.records.console import clock
from nanolab.records.environment import git_commit
from nanolab.records.models import read_json, read_metrics, runs_dir
from nanolab.runtime import print0
from nanolab.stages.config import RunFlags
from nanolab.training.gradients import NonFinite
from nanolab.training.signals import NUMBERS, StopRequest

FORK = multiprocessing.get_context("fork")
STOPPED = {code for n in NUMBERS for code in (-n, 128 + n)}  # exit codes after a signal
REFUSED, DIVERGED = 3, 4  # exit codes of runs for which another try would end in the same way


@dataclass
class CommandLine:
    """A run that another checkout makes, by its own command line."""

    run: str
    argv: list[str]  # after `python`
    cwd: Path
    env: dict[str, str]


@dataclass
class Planned:
    """A run that a study asks for."""

    arm: str
    seed: int
    cfg: Any  # RunFlags, or a CommandLine; whole: the run's name, seed and threads included
    identity: dict[str, Any]  # what its key is made of
    tries: int = 0
    wandb: dict[str, str] = field(default_factory=dict)  # variables that wandb reads: the run's group and tags

    @property
    def key(self) -> str:
        return self.cfg.run

    @property
    def dir(self) -> Path:
        return runs_dir() / self.cfg.run

    def row(self, seconds: float) -> Row:
        """Its line, finished."""
        return row_of(self, seconds)


def in_child(work: Callable[..., Any], *args: Any) -> Any:
    """`work(*args)` in a fork of this process; its UserError is raised here."""
    ours, theirs = FORK.Pipe(duplex=False)
    child = FORK.Process(target=answer, args=(theirs, work, *args))
    child.start()
    theirs.close()
    try:
        found = ours.recv()
    except EOFError:
        found = SystemExit(1)  # it has said why
    child.join()
    if isinstance(found, BaseException):
        raise found
    return found


def answer(pipe: Any, work: Callable[..., Any], *args: Any) -> None:
    try:
        found = work(*args)
    except UserError as error:
        found = error
    pipe.send(found)


class Forks:
    """Where runs are made: in forks of this process."""

    def __init__(self, gpus: int = 0) -> None:
        self.gpus = gpus  # of the machine

    def start(self, run: Planned, slot: int) -> Any:
        child = FORK.Process(target=train, args=(run.cfg, run.dir / "log.txt", slot, self.gpus))
        child.start()
        return child

    def ended(self, children: list[Any]) -> list[Any]:
        """Those that have ended; waits up to a second for one."""
        sentinels = {child.sentinel: child for child in children}
        return [sentinels[sentinel] for sentinel in connection.wait(list(sentinels), timeout=1)]

    def code(self, child: Any) -> int | None:
        child.join()
        return child.exitcode

    def stop(self, children: list[Any]) -> None:
        """Have the runs that are on save and end."""
        for child in children:
            child.terminate()
        for child in children:
            child.join()


def make_runs(
    todo: list[Planned],
    jobs: int,
    gpus: int,
    metric: str,
    place: Any = None,
    go_on: Callable[[Planned], bool] = lambda run: True,
) -> Iterator[tuple[Planned, Row]]:
    """Make the runs and yield (run, its row) as they end. Raises SystemExit after a signal, when all are saved.

    place: slurm.Jobs; default: Forks. go_on: asked before each run; a no leaves it and all that follow."""
    place = place or Forks(gpus)
    waiting, running, took = list(todo), {}, []
    free = list(range(jobs))
    gc.collect()
    gc.freeze()  # else the first collection of each fork would copy every page of what is imported
    with StopRequest() as stop:
        try:
            while waiting or running:
                while waiting and free and not stop.asked():
                    if not go_on(waiting[0]):
                        waiting.clear()
                        break
                    run, slot = waiting.pop(0), free.pop(0)
                    run.tries += 1
                    os.environ.update(run.wandb)  # which the run inherits
                    running[place.start(run, slot)] = run, slot, time.monotonic()
                ended = place.ended(list(running))
                if any(place.code(child) in STOPPED for child in ended):
                    time.sleep(0.2)  # Ctrl-C is for the runs and for this process, in either order
                if stop.asked():
                    break
                show_progress({} if ended else running, len(todo) - len(waiting) - len(running), len(todo))
                for child in ended:
                    run, slot, began = running.pop(child)
                    code = place.code(child)
                    free.append(slot)
                    row = run.row(time.monotonic() - began) if code == 0 else failure_of(run, code)
                    if "failed" in row and run.tries < 2 and code not in (REFUSED, DIVERGED):
                        print0(
                            f"{run.arm} seed {run.seed} crashed ({row['failed']}); once more, from its last checkpoint"
                        )
                        waiting.insert(0, run)
                        continue
                    took += [row["seconds"]] if "result" in row else []
                    print0(finished_line(run, row, metric, took, len(waiting) + len(running), len(todo), jobs))
                    yield run, row
        finally:  # also where what asks for the runs gives up
            place.stop(list(running))
    if stop.asked():
        name = signal.Signals(stop.number).name
        print0(f"stopped by {name}; the runs that were on are saved. To go on, type the same command again")
        raise SystemExit(128 + stop.number)


def train(cfg: RunFlags | CommandLine, log: Path, slot: int, gpus: int) -> None:
    """One run, in a process of its own. Its output goes to `log`."""
    for number in NUMBERS:  # those of the lab's process are not for this one
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: it saves and ends when the lab is killed
    if gpus > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[slot % gpus]
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", buffering=1, encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if isinstance(cfg, CommandLine):
        os.chdir(cfg.cwd)
        os.execve(sys.executable, [sys.executable, *cfg.argv], cfg.env)
    sys.orig_argv = [sys.executable, "-m", f"scripts.{STAGES[stage_of(cfg)].script}", *flags_of_run(cfg)]
    try:
        function_of(stage_of(cfg))(cfg)
    except UserError as error:
        print(f"error [{error.code}]: {error}", flush=True)
        raise SystemExit(DIVERGED if isinstance(error, NonFinite) else REFUSED) from None


def function_of(stage: str) -> Callable[[RunFlags], Any]:
    """The function that makes a run of a stage."""
    return getattr(importlib.import_module(f"nanolab.stages.{stage}"), stage)


def flags_of_run(cfg: RunFlags) -> list[str]:
    """The flags that are not at their defaults, as they are typed."""
    words = []
    for name, value in to_json(cfg).items():
        if value != cfg.__dataclass_fields__[name].default:
            dashed = name.replace("_", "-")
            words += [f"--{'' if value else 'no-'}{dashed}"] if isinstance(value, bool) else [f"--{dashed}", str(value)]
    return words


def row_of(run: Planned, seconds: float = 0.0) -> Row:
    """The line of a finished run. seconds: of the whole process; where it was made before, training alone counts."""
    result = read_json(run.dir / "result.json")
    result.pop("run", None)
    metric, metrics = STAGES[stage_of(run.cfg)].metric, read_metrics(run.dir)
    curve = [[row["step"], row[metric]] for row in metrics if row.get(metric) is not None]
    return {
        "key": run.key,
        **run.identity,
        "commit": git_commit(),
        "seconds": round(seconds or result["total_training_time"], 3),
        "result": result,
        "curve": curve,
        "training": training_curve(metrics),
    }


def failure_of(run: Planned, code: int | None) -> Row:
    """The line of a run that did not end well."""
    log = run.dir / "log.txt"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.exists() else []
    died = (
        f"killed by {signal.Signals(-code).name}" if code and code < 0 else lines[-1] if lines else f"exit code {code}"
    )
    return {"key": run.key, **run.identity, "failed": died[:300], "diverged": code == DIVERGED}


def finished_line(run: Planned, row: Row, metric: str, took: list[float], left: int, n: int, jobs: int) -> str:
    mean = sum(took) / len(took) if took else None
    eta = f"left about {clock(mean * left / min(jobs, max(left, 1))).strip()}" if left and mean else ""
    if "failed" in row:
        return f"{n - left:3d}/{n} {run.arm} seed {run.seed} FAILED: {row['failed']} (log: {run.dir / 'log.txt'}) {eta}"
    value = number_at(row["result"], metric)
    shown = "no " + metric if value is None else f"{metric} {value:.5f}"
    return f"{n - left:3d}/{n} {run.arm} seed {run.seed}: {shown} in {row['seconds']:.1f} s {eta}".rstrip()


def show_progress(running: dict[Any, Any], done: int, n: int) -> None:
    """On a terminal, the steps of the runs that are on, in one line that the next one replaces."""
    if sys.stderr.isatty():
        steps = [f"{run.arm} seed {run.seed}: step {last_step(run.dir)}" for run, *_ in running.values()]
        line = f"{done}/{n} | {' | '.join(steps)}"[:78] if running else ""
        print(f"\033[K{line}", end="\r", file=sys.stderr, flush=True)


def last_step(run_dir: Path) -> int:
    rows = read_metrics(run_dir)
    return rows[-1]["step"] if rows else 0
