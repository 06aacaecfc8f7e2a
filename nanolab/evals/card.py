"""The card of a model: what each stage of its training brought and what it cost, from the records of its runs.

    chain(found) -> stages, the first one first -> card(stages): plain values, kept as card.json -> tables in Markdown

A stage is a run at the step that the next one started from; an evaluation counts if it is of that step. Chat tasks are
compared problem by problem with the stage before (score.paired), and only where both were asked with the same settings.
What a run measured while it trained is beside them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanolab.cli import UserError
from nanolab.evals import bpb
from nanolab.evals.record import chat_rows, of_step
from nanolab.evals.score import paired
from nanolab.records import checkpoint
from nanolab.records.models import ModelRef, read_json, read_metrics, runs_dir

BPB = "bits per byte"
NATS = "nats per supervised token"
# what a run measures of its model while it trains, by how the names begin
LOGGED = ("train/loss", "val/", "eval/", "chatcore/", "rl/reward")
PERCENT = "share"  # the unit of what is shown in per cent; all other units are shown as they are


@dataclass(frozen=True)
class Stage:
    """One run of the chain, at one step."""

    label: str  # base, sft, rl; a second one of a kind: sft2
    run: str
    step: int
    run_dir: Path
    meta: dict[str, Any]  # of the checkpoint
    text: dict[str, Any] | None  # eval_base.json of this step
    chat: dict[str, Any] | None  # eval_chat.json of this step

    @property
    def kind(self) -> str:
        return self.meta["kind"]

    @property
    def seconds(self) -> float:
        return self.meta["loop"]["total_training_time"]

    @property
    def compile_seconds(self) -> float:
        return self.meta["loop"].get("compile_seconds", 0.0)  # of older runs they are in `seconds`

    @property
    def device_hours(self) -> float:
        return self.seconds * self.meta["env"]["world_size"] / 3600

    @property
    def tokens(self) -> int | None:
        """Trained on. Runs of rl from before they counted: in the replies that were drawn, those in its record; None
        where there is no such record.
        """
        return (
            self.meta["tokens"]
            if self.kind != "rl" or self.work
            else drawn_tokens(self.run_dir / "rollouts.jsonl", self.step)
        )

    @property
    def flops(self) -> int | None:
        """Of rl, those of training and of drawing the replies; None for runs from before they counted."""
        if self.kind != "rl":
            return self.meta["plan"]["flops_per_token"] * self.meta["tokens"]
        return self.work["training_flops"] + self.work["generating_flops"] if self.work else None

    @property
    def work(self) -> dict[str, int] | None:
        """work.Work of a run of rl, up to this step."""
        return self.meta.get("batches", {}).get("work")

    @property
    def logged(self) -> dict[str, tuple[int, float]]:
        """name -> (step, value): what the run measured last while it trained, up to this step; of a finished run with
        the smoothed loss of its result.
        """
        rows, result = read_metrics(self.run_dir), self.run_dir / "result.json"
        if result.exists() and (found := read_json(result)).get("step") == self.step:
            rows.append(found)
        return {
            name: (row["step"], value)
            for row in rows
            if row["step"] <= self.step
            for name, value in row.items()
            if name.startswith(LOGGED) and value is not None
        }


def drawn_tokens(path: Path, step: int) -> int | None:
    """Tokens of the replies that a run drew before `step`."""
    if not path.exists():
        return None
    with open(path) as file:
        return sum(row["tokens"] for row in map(json.loads, file) if row["step"] < step)


def chain(found: ModelRef) -> list[Stage]:
    """The stages that led to a model. Raises UserError where the checkpoint that one started from is not there any
    more.
    """
    refs, name, step = [], found.name, found.step
    while name:
        saved = dict(checkpoint.steps(runs_dir() / name / "checkpoints"))
        if step not in saved:
            raise UserError(
                f"{name}@{step}, which {refs[0][0]} started from, is not in {runs_dir()}; expected its checkpoint,"
                " which holds its record; put it back"
            )
        meta = checkpoint.load_meta(saved[step])
        refs.insert(0, (name, step, meta))
        name, _, at = meta.get("origin", {"name": ""})["name"].partition("@")
        step = int(at or 0)
    stages: list[Stage] = []
    for name, step, meta in refs:
        folder, nth = runs_dir() / name, 1 + sum(stage.kind == meta["kind"] for stage in stages)
        text, chat = (of_step(folder / file, step) for file in ("eval_base.json", "eval_chat.json"))
        stages.append(
            Stage(
                meta["kind"] + (str(nth) if nth > 1 else ""),
                name,
                step,
                folder,
                meta,
                text if text and "val" in text else None,
                chat,
            )
        )
    return stages


def card(stages: list[Stage], price_per_hour: float = 0.0) -> dict[str, Any]:
    """{"model", "step", "seed", "stages": [...], "metrics": [...], "compressors": {...}}: all numbers of the page, as
    JSON.

    A metric: {"metric", "unit", "n", "version", "baseline", "measures", "asked", "stages": {label: {"value",
    "interval", "called", "effect"}}}, where the effect {"on", "difference", "interval", "verdict"} is against the stage
    before, if that was measured as well. Where the same problems, or the same rows of text, are not on record for both
    there is no interval and no verdict, but a "reason". price_per_hour: of one device."""
    last = stages[-1]
    rows: dict[tuple, dict[str, Any]] = {}
    for stage in stages:
        for key, row, cell, outcomes in results_of(stage, last.chat):
            metric = rows.setdefault(key, {**row, "stages": {}, "outcomes": {}})
            metric["stages"][stage.label], metric["outcomes"][stage.label] = cell, outcomes
    for row in rows.values():
        outcomes = row.pop("outcomes")
        for before, after in zip(stages, stages[1:]):
            if {before.label, after.label} <= set(row["stages"]):
                row["stages"][after.label]["effect"] = effect(row, before.label, after.label, outcomes)
    text = next((stage.text for stage in reversed(stages) if stage.text), {})
    return {
        "model": last.run,
        "step": last.step,
        "seed": stages[0].meta["config"]["seed"],
        "stages": [cost(stage, price_per_hour) for stage in stages],
        "metrics": list(rows.values()),
        "compressors": text.get("compressors", {}),
        "compressor_bytes": text.get("compressor_bytes"),
    }


def results_of(stage: Stage, wanted: dict[str, Any] | None):
    """(key, the metric's facts, the stage's cell, outcomes or None) of all that is comparable: equal keys are the same
    measurement.

    wanted: a chat evaluation; only what was asked with its settings, or those of its earlier measurements, counts.
    """
    if stage.text:
        val = stage.text["val"]
        row = {"metric": BPB, "unit": BPB, "n": val["bytes"], "version": None, "baseline": None}
        rows = val.get("rows")
        yield (
            (BPB, stage.text["data"], val["bytes"]),
            row,
            {"value": val["bpb"], "interval": val.get("interval")},
            rows and (stage.text["bpb"]["settings"]["text"], rows),
        )
    if not stage.chat or not wanted:
        return
    known = [row["settings"] for row in chat_rows(wanted)] or [wanted["settings"]]
    for task in chat_rows(stage.chat):
        if task["settings"] not in known or task["step"] != stage.step:
            continue
        key = (task["spec"], task["split"], task["version"], task["n"], repr(sorted(task["settings"].items())))
        row = {
            "metric": task["spec"],
            "n": task["n"],
            "version": task["version"],
            "measures": task.get("measures", ""),
            "asked": differences(task["settings"], wanted["settings"]),
        }
        if "loss" in task:
            yield (
                key,
                row | {"unit": NATS, "baseline": None},
                {"value": task["loss"], "interval": task["interval"]},
                None,
            )
        else:
            cell = {"value": task["accuracy"], "interval": task["interval"], "called": task["called"]}
            yield key, row | {"unit": PERCENT, "baseline": task["baseline"]}, cell, task["outcomes"]
            if found := task.get("strict"):
                facts = {
                    "metric": f"{task['spec']} strict",
                    "unit": PERCENT,
                    "baseline": task["baseline"],
                    "measures": "strict extract: the number after ####",
                }
                yield (
                    (*key, "strict"),
                    row | facts,
                    cell | {"value": found["accuracy"], "interval": found["interval"]},
                    found["outcomes"],
                )
    if (score := stage.chat["chatcore"]) and stage.chat["settings"] == wanted["settings"]:
        row = {"metric": score["label"], "unit": "score", "n": None, "version": None, "baseline": None}
        yield (score["label"], *score["lacks"]), row, {"value": score["value"], "interval": score["interval"]}, None


def differences(settings: dict[str, Any], others: dict[str, Any]) -> str:
    """How a task was asked where that is not as the others were; empty where it is."""
    return ", ".join(f"{name} {value!r}" for name, value in settings.items() if others.get(name, value) != value)


def effect(row: dict[str, Any], before: str, after: str, outcomes: dict[str, Any]) -> dict[str, Any]:
    """What a stage changed in one metric."""
    if reason := not_paired(row, outcomes[before], outcomes[after]):
        difference = row["stages"][after]["value"] - row["stages"][before]["value"]
        return {"on": before, "difference": difference, "interval": None, "verdict": None, "reason": reason}
    if row["unit"] == BPB:  # lower is better
        difference, (low, high) = bpb.paired_bpb(outcomes[before][1], outcomes[after][1])
        return {
            "on": before,
            "difference": difference,
            "interval": [low, high],
            "verdict": "better" if high < 0 else "worse" if low > 0 else "unresolved",
        }
    difference, (low, high) = paired(outcomes[before], outcomes[after])
    return {
        "on": before,
        "difference": difference,
        "interval": [low, high],
        "verdict": "better" if low > 0 else "worse" if high < 0 else "unresolved",
    }


def not_paired(row: dict[str, Any], before: Any, after: Any) -> str:
    """Why two stages cannot be compared piece by piece; empty where they can."""
    if row["unit"] not in (BPB, PERCENT):
        return "a mean over tasks" if row["unit"] == "score" else "of each conversation no loss is on record"
    if before is None or after is None:
        return "of the rows of text no figures are on record; measure both stages again"
    if row["unit"] == PERCENT:
        return ""
    (text, rows), (other, others) = before, after
    if text != other or [n for _, n in rows] != [n for _, n in others]:
        return "measured on other rows of text"
    return "" if sum(n > 0 for _, n in rows) > 1 else "a single row of text"


def cost(stage: Stage, price_per_hour: float) -> dict[str, Any]:
    tokens = stage.tokens
    return {
        "label": stage.label,
        "run": stage.run,
        "step": stage.step,
        "kind": stage.kind,
        "seed": stage.meta["config"]["seed"],
        "tokens": tokens,
        "seconds": stage.seconds,
        "compile_seconds": stage.compile_seconds,
        "tokens_per_second": tokens / stage.seconds if tokens is not None and stage.seconds else None,
        "flops": stage.flops,
        "device_hours": stage.device_hours,
        "dollars": stage.device_hours * price_per_hour if price_per_hour else None,
    }
