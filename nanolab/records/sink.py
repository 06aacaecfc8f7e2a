"""Weights & Biases and trackio beside metrics.jsonl. They may fail at any time; training never stops for them.

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
from importlib import import_module
from pathlib import Path
from typing import Any

from nanolab.cli import UserError

MODES = ("off", "offline", "online")


def open_sinks(
    name: str, run_id: str, folder: Path, config: dict[str, Any], made: Sequence[dict[str, Any]], resumed: bool
) -> "list[MetricSink]":
    """The sinks that `config` asks for, of a run on this rank. made: metrics.jsonl up to there."""
    # the reference's name for a run without wandb
    mode = "off" if name == "dummy" else config.get("wandb", "off")
    sinks: list[MetricSink] = [WandbSink(mode, name, run_id, folder, config, made)]
    return sinks + ([TrackioSink(name, config, made, resumed)] if config.get("trackio") else [])


class MetricSink:
    """Sends metrics elsewhere until its first failure, which is reported in one line."""

    def __init__(self, package: str, raisers: set[str]):
        self.package, self._raisers = package, {package, *raisers}  # packages whose errors are failures of the sink
        self._run: Any = None
        self._has: set[int] = set()  # the steps that it had before this start

    @property
    def alive(self) -> bool:
        return self._run is not None

    def send(self, metrics: dict[str, Any]) -> None:
        """Pass on the metrics of `metrics["step"]`."""
        raise NotImplementedError

    def close(self, summary: dict[str, Any]) -> None:
        self._run.finish()

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        if self.alive and step not in self._has:
            known = {"step": step} | {k: v for k, v in metrics.items() if v is not None}
            self._try(lambda: self.send(known))

    def finish(self, summary: dict[str, Any]) -> None:
        """Close the run there; nothing is logged after it."""
        if self.alive:
            self._try(lambda: self.close(summary))
        self._run = None

    def _catch_up(self, has: set[int], made: Sequence[dict[str, Any]]) -> None:
        """Send what a kill took from it, and say how much. made: what it should have."""
        self._has = has
        lost = [row for row in made if row["step"] not in self._has]
        for row in lost:
            self.log(row["step"], row)
        print(
            f"{self.package} has {len(self._has):,} steps already: they are not sent again; {len(lost):,} that a kill"
            " took from it are"
        )

    def _try(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:  # there is no common base class for what is raised: where it comes from tells
            modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
            if not isinstance(error, (OSError, ImportError)) and not {m.split(".")[0] for m in modules} & self._raisers:
                raise
            self._run = None
            print(
                f"{self.package} failed and is off for the rest of this run ({type(error).__name__}: {error});"
                " metrics.jsonl has everything",
                file=sys.stderr,
            )
            return None


class TrackioSink(MetricSink):
    """Sends metrics to trackio, which keeps them on this machine, or where TRACKIO_SPACE_ID or TRACKIO_SERVER_URL say.
    Project: TRACKIO_PROJECT, default nanolab; group: as of wandb, which the lab sets.
    """

    def __init__(self, name: str, config: dict[str, Any], made: Sequence[dict[str, Any]], resumed: bool):
        super().__init__("trackio", {"gradio_client", "sqlite3", "huggingface_hub"})
        project = os.environ.get("TRACKIO_PROJECT", "nanolab")

        def begun() -> tuple[Any, set[int]]:
            trackio, stored = (import_module(part) for part in ("trackio", "trackio.sqlite_storage"))
            has = {row["step"] for row in stored.SQLiteStorage.get_logs(project, name)} if resumed else set()
            group, resume = os.environ.get("WANDB_RUN_GROUP"), "allow" if resumed else "never"
            return trackio.init(project, name=name, group=group, config=config, resume=resume, embed=False), has

        self._run, has = self._try(begun) or (None, set())
        if self.alive and resumed:
            self._catch_up(has, made)

    def send(self, metrics: dict[str, Any]) -> None:
        self._run.log({name: value for name, value in metrics.items() if name != "step"}, step=metrics["step"])


class WandbSink(MetricSink):
    """Sends metrics to wandb; does nothing when off."""

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
        super().__init__("wandb", {"google"})
        if mode not in MODES:
            raise UserError(f"--wandb is {mode!r}; expected one of {', '.join(MODES)}")
        logs = list(folder.glob(f"wandb/*run-*-{run_id}*/run-{run_id}.wandb"))
        if mode != "off":
            self._run = self._try(lambda: _init(mode, name, run_id, folder, config))
        if self.alive and logs:
            self._catch_up(self._try(lambda: {step for log in logs for step in logged_steps(log)}) or set(), made)

    def send(self, metrics: dict[str, Any]) -> None:
        self._run.log(metrics)  # without its own `step`, for which wandb holds a row back until the next

    def close(self, summary: dict[str, Any]) -> None:
        self._run.summary.update(summary)
        super().close(summary)


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
