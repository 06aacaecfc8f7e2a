"""Weights & Biases beside metrics.jsonl. It may fail at any time; training never stops for it.

wandb can take nothing back: a rewind needs its server, and a log that was synced is sent. A run that was killed after
its checkpoint makes steps again that wandb has already, so these are not sent a second time (they are equal: resuming
is exact). wandb writes its log twice a second, so a kill can also take steps from it that the checkpoint has: these are
sent from metrics.jsonl. Which ones it has is read in the logs that wandb itself keeps in the run directory, online too.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from nanolab.cli import UserError

MODES = ("off", "offline", "online")


class WandbSink:
    """Sends metrics to wandb until its first failure, which is reported in one line; does nothing when off."""

    def __init__(
        self,
        mode: str,
        name: str,
        run_id: str,
        folder: Path,
        config: dict[str, Any],
        made: Sequence[dict[str, Any]] = (),
    ):
        """run_id: the same one after a resume, so that curves go on. made: metrics.jsonl up to there. Project:
        WANDB_PROJECT, default nanolab.
        """
        if mode not in MODES:
            raise UserError(f"--wandb is {mode!r}; expected one of {', '.join(MODES)}")
        self._run: Any = None
        self._has: set[int] = set()  # the steps that wandb had before this start
        logs = list(folder.glob(f"wandb/*run-*-{run_id}*/run-{run_id}.wandb"))
        if mode != "off":
            self._run = self._try(lambda: _init(mode, name, run_id, folder, config))
        if self.alive and logs:
            self._has = self._try(lambda: {step for log in logs for step in logged_steps(log)}) or set()
            lost = [row for row in made if row["step"] not in self._has]
            for row in lost:
                self.log(row["step"], row)
            print(
                f"wandb has {len(self._has):,} steps already: they are not sent again; {len(lost):,} that a kill took"
                " from it are"
            )

    @property
    def alive(self) -> bool:
        return self._run is not None

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        if self.alive and step not in self._has:
            known = {"step": step} | {k: v for k, v in metrics.items() if v is not None}
            # without its own `step`, for which wandb holds a row back until the next
            self._try(lambda: self._run.log(known))

    def finish(self, summary: dict[str, Any]) -> None:
        """Close the wandb run; nothing is logged after it."""
        if self.alive:
            self._try(lambda: (self._run.summary.update(summary), self._run.finish()))
        self._run = None

    def _try(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except (
            Exception
        ) as error:  # wandb has no common base class for what it raises: tell them by where they come from
            modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
            if not isinstance(error, (OSError, ImportError)) and not {name.split(".")[0] for name in modules} & {
                "wandb",
                "google",
            }:
                raise
            self._run = None
            print(
                f"wandb failed and is off for the rest of this run ({type(error).__name__}: {error}); metrics.jsonl has"
                " everything",
                file=sys.stderr,
            )
            return None


def _init(mode: str, name: str, run_id: str, folder: Path, config: dict[str, Any]) -> Any:
    import wandb

    # Offline only a busy machine makes its own process late. How long to wait for that one, wandb reads here alone, not
    # in init's settings.
    os.environ.setdefault("WANDB_X_SERVICE_WAIT", "300")
    wait, lost = 30 if mode == "online" else 300, 0.5  # seconds; the second: what a kill may lose
    settings = wandb.Settings(init_timeout=wait, console="off", silent=True, x_transaction_log_flush_interval=lost)
    project = os.environ.get("WANDB_PROJECT", "nanolab")
    run = wandb.init(
        mode=mode,
        project=project,
        name=name,
        id=run_id,
        resume="allow",
        dir=str(folder),
        config=config,
        settings=settings,
    )
    run.define_metric("step", hidden=True)
    run.define_metric("*", step_metric="step")  # the x axis: wandb's own counts rows
    return run


def logged_steps(log: Path) -> Iterator[int]:
    """The steps in a .wandb file: LevelDB's log format (7 bytes, then blocks of 32 KiB) with a protobuf per record. A
    torn end is left out.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = log.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := -at % 32768) < 7 and left:  # too little for the header of a part: zeros
            at += left
            continue
        end, kind = at + 7 + int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        if end > len(data) or not kind:
            return
        whole, at = whole + data[at + 7 : end], end
        if kind in (1, 4):  # whole, or the last part
            items, whole = Record.FromString(whole).history.item, b""
            yield from (int(json.loads(item.value_json)) for item in items if "step" in (item.key, *item.nested_key))
