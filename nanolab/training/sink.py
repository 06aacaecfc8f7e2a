"""Weights & Biases beside metrics.jsonl. It may fail at any time; training never stops for it."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanolab.config import UserError

MODES = ("off", "offline", "online")


class WandbSink:
    """Sends metrics to wandb until its first failure, which is reported in one line; does nothing when off."""

    def __init__(self, mode: str, name: str, run_id: str, folder: Path, config: dict[str, Any]):
        """run_id: the same one after a resume, so that curves go on. Project: WANDB_PROJECT, default nanolab."""
        if mode not in MODES:
            raise UserError(f"--wandb is {mode!r}; expected one of {', '.join(MODES)}")
        self._run: Any = None
        if mode != "off":
            self._run = self._try(lambda: _init(mode, name, run_id, folder, config))

    @property
    def alive(self) -> bool:
        return self._run is not None

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        if self.alive:
            self._try(lambda: self._run.log(metrics, step=step))

    def finish(self, summary: dict[str, Any]) -> None:
        """Close the wandb run; nothing is logged after it."""
        if self.alive:
            self._try(lambda: (self._run.summary.update(summary), self._run.finish()))
        self._run = None

    def _try(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:  # wandb has no common base class for what it raises: tell them by where they come from
            if not isinstance(error, (OSError, ImportError)) and type(error).__module__.split(".")[0] not in ("wandb", "requests"):
                raise
            self._run = None
            print(f"wandb failed and is off for the rest of this run ({type(error).__name__}: {error}); metrics.jsonl has everything", file=sys.stderr)
            return None


def _init(mode: str, name: str, run_id: str, folder: Path, config: dict[str, Any]) -> Any:
    import wandb

    settings = wandb.Settings(init_timeout=30, console="off", silent=True)
    project = os.environ.get("WANDB_PROJECT", "nanolab")
    return wandb.init(
        mode=mode, project=project, name=name, id=run_id, resume="allow", dir=str(folder), config=config, settings=settings
    )  # fmt: skip
