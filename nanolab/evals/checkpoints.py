"""Score over training: the checkpoints of runs, evaluated one after another, each result kept on record as it comes.

The record is eval_checkpoints.jsonl in the run directory. A result is known by the sha256 of the weights, the mode, and
everything else that shapes it: what is on record is not made again, and a command that was stopped goes on when it is
typed again. Checkpoints that are not there any more, since a run that is still training keeps but a few, have their
results on record."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from safetensors import SafetensorError

from nanolab.cli import UserError, as_json
from nanolab.evals.modes import MODES, Result
from nanolab.files import write_text
from nanolab.records import checkpoint
from nanolab.records.models import WEIGHTS_ONLY, ModelRef
from nanolab.runtime import Runtime, print0
from nanolab.tables import interval_text, text_table

RECORD = "eval_checkpoints.jsonl"
T = TypeVar("T")


class Point(NamedTuple):
    run: str
    step: int
    tokens: int  # trained on so far
    result: dict[str, Any]


def follow(
    runs: Sequence[ModelRef],
    modes: Sequence[str],
    load: Callable[[ModelRef], T],
    settings: Callable[[str, ModelRef], Result],
    measure: Callable[[str, T], Result],
    runtime: Runtime,
) -> tuple[dict[str, list[Point]], list[str]]:
    """({mode: results of every whole checkpoint of every run, the oldest first}, what could not be had and why). On
    every rank.

    settings: all that shapes the result of a mode, beside the weights. measure: the result, of what `load` gave; called
    on every rank. Both are JSON-ready and may raise UserError. A result with something in its "failed" counts: what
    fails for a checkpoint does so again, until settings say something else. Results on record of checkpoints that are
    gone are among them where one that is there has the same settings."""
    points: dict[str, list[Point]] = {mode: [] for mode in modes}
    failed: list[str] = []
    for run in runs:
        record = Record(run.run_dir)
        found: dict[str, dict[int, Point]] = {mode: {} for mode in modes}
        there = runtime.broadcast_object(checkpoint.steps(run.run_dir / "checkpoints"))
        for step, path in there:
            ref, loaded = ModelRef(run.name, run.run_dir, path, step), None
            try:
                weights, tokens = runtime.broadcast_object(
                    on_all(runtime, lambda: verified(path) if runtime.is_main else None)
                )
            except UserError as error:
                failed.append(str(error))
                continue
            for name in modes:
                try:
                    of = [weights, name, dict(sorted(on_all(runtime, lambda: settings(name, ref)).items()))]
                    result, older = runtime.broadcast_object((record.find(of), record.like(name, of[2])))
                    gone = [row for row in older if row["step"] not in dict(there)]
                    found[name] = {
                        row["step"]: Point(run.name, row["step"], row["tokens"], row["result"]) for row in gone
                    } | found[name]
                    if result is None:
                        print0(f"{run.name}@{step}: {name}")
                        loaded = loaded or on_all(runtime, lambda: load(ref))
                        result = measure(name, loaded)
                        if runtime.is_main:
                            record.add({"step": step, "tokens": tokens, "of": of, "result": result})
                except UserError as error:
                    failed.append(f"{run.name}@{step}: {name}: {error}")
                    continue
                failed += [f"{run.name}@{step}: {label}: {why}" for label, why in result.get("failed", {}).items()]
                found[name][step] = Point(run.name, step, tokens, result)
        for name, of_step in found.items():
            points[name] += [of_step[step] for step in sorted(of_step)]
    return points, failed


def verified(path: Path) -> tuple[str, int]:
    """(sha256 of the weights, tokens trained on) of a whole checkpoint."""
    checkpoint.verify(path, WEIGHTS_ONLY)
    return weights_of(path), checkpoint.load_meta(path)["tokens"]


def weights_of(path: Path) -> str:
    """sha256 of the weights of the checkpoint at `path`, as its manifest has it."""
    return json.loads((path / "manifest.json").read_text())["files"]["model.safetensors"]["sha256"]


def on_all(runtime: Runtime, work: Callable[[], T]) -> T:
    """What reading a checkpoint gives, rank 0's None elsewhere. Raises UserError on every rank where one cannot;
    retention may remove it meanwhile.
    """
    result, why = None, ""
    try:
        result = work()
    except (OSError, SafetensorError, UserError) as error:
        why = str(error)
    parts = runtime.gather_objects(why)
    if why := next(filter(None, parts), ""):
        raise UserError(why)
    return result


class Record:
    """The lines of eval_checkpoints.jsonl."""

    def __init__(self, run_dir: Path):
        self.path, self.rows = run_dir / RECORD, []
        for line in self.path.read_text(errors="replace").splitlines() if self.path.exists() else []:
            try:
                row = json.loads(line)
            except ValueError:  # torn by a crash
                continue
            self.rows.append(row)

    def find(self, of: list[Any]) -> dict[str, Any] | None:
        """The last result of these [weights, mode, settings]."""
        return next((row["result"] for row in reversed(self.rows) if row["of"] == of), None)

    def like(self, mode: str, settings: dict[str, Any]) -> list[dict[str, Any]]:
        """The lines of any weights."""
        return [row for row in self.rows if row["of"][1:] == [mode, settings] and "tokens" in row]

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        torn = self.path.exists() and not self.path.read_bytes().endswith(b"\n")
        with open(self.path, "a") as file:
            file.write(("\n" if torn else "") + as_json(row, RECORD) + "\n")


def picture(name: str, points: Sequence[Point], folder: Path) -> list[str]:
    """Write curve_NAME.csv and .svg into `folder`; returns the lines of a table. Points without a score are left out;
    no other: nothing is written.

    Raises UserError where it cannot be drawn.
    """
    from nanolab.evals.curve import draw

    mode = MODES[name]
    points = [p for p in points if mode.score(p.result) is not None]
    if not points:
        print0(f"{name}: no checkpoint has a score; nothing to draw")
        return []
    rows = [(p.run, p.step, p.tokens, mode.score(p.result), *(mode.interval(p.result) or (None, None))) for p in points]
    label = " / ".join(sorted({mode.ylabel(p.result) for p in points}))
    cells = [
        [run, f"{step:,}", f"{tokens:,}", f"{score:.4f}", interval_text(None if low is None else (low, high))]
        for run, step, tokens, score, low, high in rows
    ]
    columns = {"run": "left", "step": "right", "tokens": "right", "score": "right", "95 % interval": "left"}
    lines = [f"{label}, over training", *text_table(columns, cells)]
    folder.mkdir(parents=True, exist_ok=True)
    cells = [",".join("" if x is None else str(x) for x in row) for row in rows]
    write_text(folder / f"curve_{name}.csv", "\n".join(["run,step,tokens,score,low,high", *cells]) + "\n")
    curves: dict[str, list] = {}
    for run, _, tokens, score, low, high in rows:
        curves.setdefault(run, []).append((float(tokens), score, low, high))
    print0(*lines, sep="\n")
    draw(
        curves,
        folder / f"curve_{name}.svg",
        ylabel=label,
        title=f"{label} over training: {', '.join(curves)}",
        references=REFERENCES.get(label, ()),
    )
    return lines


# CORE of GPT-2 by its published weights, as karpathy/nanochat reports them
REFERENCES = {"CORE": (("GPT-2 124M", 0.1139), ("GPT-2 1558M", 0.256525))}
