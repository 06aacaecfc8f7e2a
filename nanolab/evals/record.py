"""What evaluations left of a model, eval_chat.json and eval_base.json: merged so that no measurement is lost, and read
by step.

The file holds the newest measurement of each task (mode) of one step; "earlier" holds the others: of other steps or
weights, and of the same task with other settings. A measurement replaces only an equal one: same step, task, split,
version, number of problems and settings."""

from pathlib import Path
from typing import Any

from nanolab.evals.modes import MODES
from nanolab.records.models import read_json

Record = dict[str, Any]
# of a chat evaluation: once in the file, and in each row of "earlier"
SHARED = ("model", "step", "device", "dtype", "settings")


def chat_rows(record: Record) -> list[Record]:
    """Every measurement of an eval_chat.json, the newest of each task first, each with its `spec`, `step` and
    `settings`.
    """
    shared = {key: record[key] for key in SHARED if key in record}
    return [{**shared, "spec": spec, **row} for spec, row in record.get("tasks", {}).items()] + record.get(
        "earlier", []
    )


def merge_chat(old: Record, new: Record) -> Record:
    """`new` and what `old` holds beside it. The tasks of both are together where they are of one step, whatever their
    settings.
    """
    rows: dict[tuple, Record] = {}
    for row in chat_rows(new) + chat_rows(old):
        measured = (
            row["spec"],
            row.get("model"),
            row["step"],
            row["split"],
            row["version"],
            row["n"],
            repr(sorted(row["settings"].items())),
        )
        rows.setdefault(measured, row)
    return of_rows(
        new, list(rows.values()), [*old.get("tasks", {}), *new["tasks"]], old if old.get("step") == new["step"] else {}
    )


def of_rows(record: Record, rows: list[Record], order: list[str], old: Record) -> Record:
    """An eval_chat.json of the step of `record` from all measurements, the newest first."""
    mine = [row for row in rows if (row["step"], row.get("model")) == (record["step"], record.get("model"))]
    newest = {row["spec"]: row for row in reversed(mine)}
    specs = [spec for spec in dict.fromkeys([*order, *newest]) if spec in newest]
    tasks = {
        spec: {key: value for key, value in newest[spec].items() if key not in ("spec", "model", "step")}
        for spec in specs
    }
    missing = {
        name: why for name, why in {**old.get("missing", {}), **record.get("missing", {})}.items() if name not in tasks
    }
    earlier = [row for row in rows if newest.get(row["spec"]) is not row]
    return {**record, "tasks": tasks, "missing": missing, **({"earlier": earlier} if earlier else {})}


def merge_base(old: Record, new: Record) -> Record:
    """`new` and what `old` holds beside it: modes of the same weights together, each in its newest settings."""
    about = {key: new[key] for key in ("model", "step", "weights")}
    records = [{key: value for key, value in old.items() if key != "earlier"}, *old.get("earlier", [])] if old else []
    same = next((record for record in records if about.items() <= record.items()), {})

    def again(record: Record) -> bool:
        """Whether `new` holds all that this record does, measured the same way."""
        return about.items() <= record.items() and all(
            _settings(record, mode) == _settings(new, mode) for mode in _modes(record)
        )

    earlier = [record for record in records if record is not same and not again(record)]
    merged = dict(same)
    for mode in _modes(new):
        if _settings(same, mode) and _settings(same, mode) != _settings(new, mode):
            kept = {key: same[key] for key in MODES[mode].fields if key in same}
            earlier.insert(0, {key: same[key] for key in (*about, "device", "dtype", "hf") if key in same} | kept)
            merged = {key: value for key, value in merged.items() if key not in MODES[mode].fields}
    return {**merged, **new, **({"earlier": earlier} if earlier else {})}


def _modes(record: Record) -> list[str]:
    return [name for name, mode in MODES.items() if mode.fields[-1] in record or name in record]


def _settings(record: Record, mode: str) -> Any:
    """All that shapes what a mode found, beside the weights; None where it found nothing, or has no settings."""
    return record[mode].get("settings") if isinstance(record.get(mode), dict) else None


def of_step(path: Path, step: int) -> Record | None:
    """An evaluation, if there is one of this step."""
    record = read_json(path) if path.exists() else {"step": None}
    if record["step"] == step:
        return record
    earlier = [row for row in record.get("earlier", []) if row["step"] == step]
    if not earlier or "spec" not in earlier[0]:
        return earlier[0] if earlier else None
    return {"chatcore": None, **of_rows({key: earlier[0][key] for key in SHARED if key in earlier[0]}, earlier, [], {})}
