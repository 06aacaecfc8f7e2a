"""What every stage opens and closes: the machine, the run's directory, an end where the run has had one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nanolab import runtime as machines
from nanolab.records.models import read_json, recorded
from nanolab.records.run import Run
from nanolab.runtime import Runtime, print0
from nanolab.stages.config import RunFlags
from nanolab.training.fit import Every

Result = dict[str, Any]  # of a finished run, as result.json holds it; empty after a dry run


@contextmanager
def machine(cfg: RunFlags, name: str, runtime: Runtime | None = None) -> Iterator[Runtime]:
    """The device, compute dtype, ranks and seeds of run `name`: where it is resumed, those that it recorded.

    runtime: of a caller that has one and closes it itself. Raises UserError as `runtime.start` does.
    """
    if runtime is not None:
        yield runtime
        return
    before = recorded(name) if cfg.resume else {}
    started = machines.start(
        cfg.device_type or before.get("device", ""),
        "" if os.environ.get("NANOLAB_DTYPE") else before.get("dtype", ""),
        cfg.seed,
        cfg.threads or before.get("threads", 0),
        getattr(cfg, "deterministic", False),
    )
    try:
        yield started
    finally:
        started.close()


@contextmanager
def opened(cfg: RunFlags, name: str, runtime: Runtime, kind: str, **env: Any) -> Iterator[Run]:
    """The directory of run `name`, open for writing. Raises UserError as `Run.start` does."""
    run = Run.start(name, cfg, runtime, resume=cfg.resume, kind=kind, env=env)
    try:
        yield run
    finally:
        run.close()


def finished(run: Run) -> Result | None:
    """The result of a run that is finished, which is said; None of one that is not."""
    if not run.finished:
        return None
    path = run.dir / "result.json"
    print0(f"run {run.name} is finished already: {path}; nothing to do")
    return read_json(path)


def every_of(cfg: RunFlags) -> Every:
    return Every(log=cfg.log_every, save=cfg.save_every, keep=cfg.keep, grad_norm=cfg.log_grad_norm)


def print_plan(lines: list[str], dry_run: bool = False) -> Result:
    """The plan on the terminal; of a dry run this is all."""
    for line in lines:
        print0(line)
    if dry_run:
        print0("dry run: nothing was trained")
    return {}
