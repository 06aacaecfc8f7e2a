"""Score over training: the checkpoints of runs, evaluated one after another, each result kept on record as it comes.

The record is eval_checkpoints.jsonl in the run directory. A result is known by the sha256 of the weights, the mode, and everything else
that shapes it: what is on record is not made again, and a command that was stopped goes on when it is typed again.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from nanolab.config import UserError
from nanolab.runtime import Runtime, print0
from nanolab.training import checkpoint
from nanolab.training.checkpoint import CheckpointError
from nanolab.training.models import WEIGHTS_ONLY, ModelRef

RECORD = "eval_checkpoints.jsonl"
T = TypeVar("T")


class Mode(NamedTuple):
    settings: Callable[[ModelRef], dict[str, Any]]  # all that shapes a result beside the weights, JSON-ready; may raise UserError
    measure: Callable[[Any], dict[str, Any]]  # result, JSON-ready, of what `load` gave; may raise UserError; called on every rank
    score: Callable[[dict[str, Any]], tuple[float, float | None, float | None]]  # (score, ends of its interval) of a result
    ylabel: Callable[[dict[str, Any]], str]  # what the score is called


class Point(NamedTuple):
    run: str
    step: int
    tokens: int  # trained on so far
    result: dict[str, Any]


def follow(runs: Sequence[ModelRef], modes: dict[str, Mode], load: Callable[[ModelRef], T], runtime: Runtime) -> tuple[dict[str, list[Point]], list[str]]:
    """({mode: results of every whole checkpoint of every run, the oldest first}, what could not be had and why). On every rank.

    A result with something in its "failed" counts, and is not kept on record.
    """
    points: dict[str, list[Point]] = {mode: [] for mode in modes}
    failed: list[str] = []
    for run in runs:
        record = Record(run.run_dir)
        for step, path in checkpoint.steps(run.run_dir / "checkpoints"):
            ref, loaded = ModelRef(run.name, run.run_dir, path, step), None
            try:
                checkpoint.verify(path, WEIGHTS_ONLY)
            except CheckpointError as error:
                failed.append(str(error))
                continue
            for name, mode in modes.items():
                try:
                    settings = mode.settings(ref)
                    result = runtime.broadcast_object(record.find(path, name, settings))
                    if result is None:
                        print0(f"{run.name}@{step}: {name}")
                        loaded = loaded or load(ref)
                        result = mode.measure(loaded)
                        if runtime.is_main and not result.get("failed"):
                            record.add(step, path, name, settings, result)
                except UserError as error:
                    failed.append(f"{run.name}@{step}: {name}: {error}")
                    continue
                failed += [f"{run.name}@{step}: {label}: {why}" for label, why in result.get("failed", {}).items()]
                points[name].append(Point(run.name, step, checkpoint.load_meta(path)["tokens"], result))
    return points, failed


class Record:
    """The lines of eval_checkpoints.jsonl."""

    def __init__(self, run_dir: Path):
        self.path = run_dir / RECORD
        self._found: dict[str, dict[str, Any]] = {}
        for line in self.path.read_text(errors="replace").splitlines() if self.path.exists() else []:
            try:
                row = json.loads(line)
            except ValueError:  # torn by a crash
                continue
            self._found[json.dumps(row["of"])] = row["result"]

    def find(self, path: Path, mode: str, settings: dict[str, Any]) -> dict[str, Any] | None:
        return self._found.get(json.dumps(identity(path, mode, settings)))

    def add(self, step: int, path: Path, mode: str, settings: dict[str, Any], result: dict[str, Any]) -> None:
        of = identity(path, mode, settings)
        self._found[json.dumps(of)] = result
        torn = self.path.exists() and not self.path.read_bytes().endswith(b"\n")
        with open(self.path, "a") as file:
            file.write(("\n" if torn else "") + json.dumps({"step": step, "of": of, "result": result}) + "\n")


def identity(path: Path, mode: str, settings: dict[str, Any]) -> list[Any]:
    """What a result of the checkpoint at `path` is known by."""
    weights = json.loads((path / "manifest.json").read_text())["files"]["model.safetensors"]["sha256"]
    return [weights, mode, dict(sorted(settings.items()))]


def picture(name: str, mode: Mode, points: Sequence[Point], folder: Path) -> list[str]:
    """Write curve_NAME.csv and .svg into `folder`; returns the lines of a table. Raises UserError where it cannot be drawn."""
    from nanolab.evals.curve import draw

    rows = [(p.run, p.step, p.tokens, *mode.score(p.result)) for p in points]
    label = " / ".join(sorted({mode.ylabel(p.result) for p in points}))
    lines = [f"{label}, over training", f"  {'run':<24}{'step':>8}{'tokens':>16}{'score':>10}  95 % interval"]
    for run, step, tokens, score, low, high in rows:
        lines += [f"  {run:<24}{step:>8,}{tokens:>16,}{score:>10.4f}  " + ("" if low is None else f"{low:.4f} to {high:.4f}")]
    folder.mkdir(parents=True, exist_ok=True)
    cells = [",".join("" if x is None else str(x) for x in row) for row in rows]
    checkpoint.write_text(folder / f"curve_{name}.csv", "\n".join(["run,step,tokens,score,low,high", *cells]) + "\n")
    curves: dict[str, list] = {}
    for run, _, tokens, score, low, high in rows:
        curves.setdefault(run, []).append((float(tokens), score, low, high))
    print0(*lines, sep="\n")
    draw(curves, folder / f"curve_{name}.svg", ylabel=label, title=f"{label} over training: {', '.join(curves)}", references=REFERENCES.get(label, ()))
    return lines


# CORE of GPT-2 by its published weights, as karpathy/nanochat reports them
REFERENCES = {"CORE": (("GPT-2 124M", 0.1139), ("GPT-2 1558M", 0.256525))}
