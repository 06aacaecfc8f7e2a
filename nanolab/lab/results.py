"""What a study leaves: <folder>/runs.jsonl, from which every table and figure is made. Imports no torch.

Its first line is the study as it was before the first run, predictions included; each further line is one run: arm,
seed, what identifies it (KEPT), result, curves of validation and training. It names no host and no path, so that it can
be committed."""

import hashlib
import json
import re
import statistics
import time
from pathlib import Path
from typing import Any

from nanolab.cli import UserError, nearest
from nanolab.files import write_text
from nanolab.lab.study import Study
from nanolab.terminal import harmless

KEPT = ("sources", "machine", "validation")  # facts that all runs of one table share
# facts that the runs of an arm share; arms may differ, and the table says so
OF_AN_ARM = ("data", "tokenizer", "model")
MOST_POINTS = 50  # of a training curve
Row = dict[str, Any]
# a path that begins at the root, at home or on a drive, up to its last part
FOLDERS = re.compile(r"(?<![\w.~/\\<-])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\,=:'\"]+[/\\])*(?=[^\s/\\,=:'\"])")


def read_results(folder: Path) -> tuple[dict[str, Any], list[Row]]:
    """(the study's record, a row for each run); an empty record where nothing has been run. Raises UserError for a file
    that is damaged.
    """
    path = folder / "runs.jsonl"
    if not path.exists():
        return {}, []
    try:
        record, *rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if hash_of(record["study"]) != record["sha256"]:
            raise ValueError("its first line has been edited")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is damaged ({error}); expected the lines that scripts.lab run wrote; put the old file back, or"
            f" remove it, and the runs that are still there are found again: rm {path}",
            "results-damaged",
            path=str(path),
        ) from None
    return record, rows


def write_results(folder: Path, record: dict[str, Any], rows: list[Row]) -> None:
    """Replace the file in one step: seeds and arms in the study's order."""
    arms = list(record["study"]["arms"])
    rows = sorted(rows, key=lambda row: (record["seeds"].index(row["seed"]), arms.index(row["arm"])))
    write_text(folder / "runs.jsonl", "".join(json.dumps(line) + "\n" for line in [record, *rows]))


def hash_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def new_record(fixed: dict[str, Any], threads: int) -> dict[str, Any]:
    """The first line, but for the seeds. fixed: see `Study.fixed`; threads: of each run, kept for those to come."""
    return {
        "study": fixed,
        "sha256": hash_of(fixed),
        "recorded": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "threads": threads,
    }


def check_unedited(
    record: dict[str, Any], rows: list[Row], fixed: dict[str, Any], seeds: list[int], folder: Path
) -> None:
    """Raise UserError, with the names of the keys, where a study is not what was recorded before its first run. Seeds
    may be added, none may be left out.
    """
    then = record["study"] if record else fixed
    then = {name: field.default for name, field in Study.model_fields.items() if name in fixed} | then  # keys that came
    edited = [key for key in {**fixed, **then} if then.get(key) != fixed.get(key)]  # later are at their defaults
    edited += ["seeds"] if {row["seed"] for row in rows} - set(seeds) else []
    if edited:
        raise UserError(
            f"the study was edited after its first run: {', '.join(edited)} (recorded {record['recorded']}, sha256"
            f" {record['sha256'][:12]}); expected it as it was: a prediction counts only if it was there before the"
            " results. Put the old values back, or begin anew under another name or with another results folder"
            f" (now {folder})",
            "study-edited",
            keys=edited,
        )


def prior_of(study: dict[str, Any]) -> tuple[float, float] | None:
    """(sd, degrees of freedom) of the noise study that a record names."""
    noise = study.get("noise")
    return (noise["sd"], noise["df"]) if noise else None


def training_curve(metrics: list[Row]) -> list[list[float]]:
    """[steps done, mean training loss since the point before] of a run's metrics, at most MOST_POINTS of them."""
    losses = [(row["step"], row["train/loss"]) for row in metrics if row.get("train/loss") is not None]
    size = -(-len(losses) // MOST_POINTS) or 1
    parts = [losses[i : i + size] for i in range(0, len(losses), size)]
    return [[part[-1][0] + 1, round(statistics.mean(loss for _, loss in part), 5)] for part in parts]


def number_at(result: dict[str, Any], metric: str) -> float | None:
    """The metric of a result by its name, or by names inside one another joined by dots; None where there is none."""
    found: Any = result.get(metric)
    if found is None and "." in metric:
        found = result
        for part in metric.split("."):
            found = found.get(part) if isinstance(found, dict) else None
    return float(found) if isinstance(found, (int, float)) else None


def check_metric(metric: str, results: list[dict[str, Any]]) -> None:
    """Raise UserError where no run has the metric."""
    if results and all(number_at(result, metric) is None for result in results):
        names = [name for name in results[0] if number_at(results[0], name) is not None]
        raise UserError(
            f"no run has the metric {metric!r}{nearest(metric, names)}; expected one of {', '.join(names)}; correct"
            " `metric` of the study, or measure it by its `flags`",
            "metric-unknown",
            metric=metric,
        )


def public(text: str) -> str:
    """`text` without what belongs to a machine: paths are cut to their last part, control characters shown."""
    return FOLDERS.sub("", harmless(text))
