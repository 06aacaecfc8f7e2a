"""The card of a model: what each stage of its training brought and what it cost, from the records of its runs.

    chain(found) -> stages, the first one first -> card(stages): plain values, kept as card.json -> tables in Markdown

A stage is a run at the step that the next one started from; an evaluation counts if it is of that step. Chat tasks are
compared problem by problem with the stage before (score.paired), and only where both were asked with the same settings.
What a run measured while it trained is beside them."""

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanolab.cli import UserError, not_read
from nanolab.evals import bpb
from nanolab.evals.config import ChatEvalConfig
from nanolab.evals.record import chat_rows, of_step
from nanolab.evals.score import paired
from nanolab.records import checkpoint
from nanolab.records.models import ModelRef, read_json, read_metrics, runs_dir
from nanolab.tables import markdown_table

BPB = "bits per byte"
NATS = "nats per supervised token"
# what a run measures of its model while it trains, by how the names begin
LOGGED = ("train/loss", "val/", "eval/", "chatcore/", "rl/reward")
PERCENT = "share"  # the unit of what is shown in per cent; all other units are shown as they are
EXCHANGES, LONGEST = 8, 240  # shown in all; characters of a question or a reply


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
        """rollout.Work of a run of rl, up to this step."""
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
        for key, row, cell, outcomes in measured(stage, last.chat):
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


def measured(stage: Stage, wanted: dict[str, Any] | None):
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
        difference, (low, high) = bpb.paired(outcomes[before][1], outcomes[after][1])
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


def effects_table(found: dict[str, Any]) -> list[str]:
    """Metrics x stages: a value, and in brackets what the stage changed."""
    labels = [stage["label"] for stage in found["stages"]]
    with_baseline = any(row["baseline"] for row in found["metrics"])
    heads = [head(row) for row in found["metrics"]]
    rows = []
    for row, name in zip(found["metrics"], heads):
        if row["version"] and heads.count(name) > 1:
            name = f"{name}, version {row['version']} of the task"
        cells = [cell(row, row["stages"].get(label)) for label in labels]
        baseline = [shown(row["baseline"], row["unit"]) if row["baseline"] else "-"] if with_baseline else []
        rows.append([name, *baseline, *cells])
    return markdown_table(
        ["", *(["baseline"] if with_baseline else []), labels[0], *(f"after {label}" for label in labels[1:])], *rows
    )


def head(row: dict[str, Any]) -> str:
    """What a row is called: bits per byte (884 kB); arithmetic test (n = 200)."""
    if row["unit"] in (PERCENT, NATS):
        said = [NATS] * (row["unit"] == NATS) + [part for part in (row.get("measures"), row.get("asked")) if part]
        return f"{title(row['metric'])} (n = {row['n']:,}){''.join(f', {part}' for part in said)}"
    return f"{row['metric']} ({sized(row['n'])})" if row["n"] else row["metric"]


def title(spec: str) -> str:
    """A task as it was asked for, without a count or the folder of its file: arithmetic@1000:test -> arithmetic
    test.
    """
    spec = re.sub(r"@\d+(?=:|$)", "", re.sub(r"(?<==).*[/\\]", "", spec))
    name, split = re.fullmatch(
        r"(.*?)(?::([a-z]*))?" if "=" in spec else r"([^:]*):?(.*)", spec
    ).groups()  # a file's name may have colons
    return f"{name} {split or 'test'}"


def cell(row: dict[str, Any], at: dict[str, Any] | None) -> str:
    if at is None:
        return "-"
    value, change = shown(at["value"], row["unit"]), at.get("effect")
    if change is None:
        return value
    interval = (
        " [{}, {}]".format(*(shown(end, row["unit"], "+") for end in change["interval"])) if change["interval"] else ""
    )
    verdict = f" {change['verdict']}" if change["verdict"] else ""
    return f"{value} ({shown(change['difference'], row['unit'], '+')}{interval}){verdict}"


def shown(value: float, unit: str, sign: str = "") -> str:
    """A value; with a sign, a difference, which is without the per cent."""
    if unit != PERCENT:
        return f"{value:{sign}.4f}"
    return f"{100 * value + 0.0:{sign}.1f}" + ("" if sign else " %")


def calls(found: dict[str, Any]) -> str:
    """How often the last stage called a tool, by task; empty where it never did, or was not asked."""
    label = found["stages"][-1]["label"]
    shares = {
        title(row["metric"]): row["stages"][label]["called"]
        for row in found["metrics"]
        if "called" in row["stages"].get(label, {})
    }
    return ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares.items()) if any(shares.values()) else ""


def cost_table(found: dict[str, Any]) -> list[str]:
    """Stages x what they took, and in all."""
    stages, priced = found["stages"], found["stages"][0]["dollars"] is not None
    compiled = any(stage["compile_seconds"] for stage in stages)
    rows = [
        [
            stage["label"],
            f"{stage['run']}@{stage['step']}",
            f"{stage['step']:,}",
            amount(stage["tokens"], ",.0f"),
            f"{stage['seconds']:,.0f} s",
            *([f"{stage['compile_seconds']:,.0f} s"] if compiled else []),
            amount(stage["tokens_per_second"], ",.0f"),
            amount(stage["flops"], ".1e"),
            f"{stage['device_hours']:.3f}",
            *([f"{stage['dollars']:.2f}"] if priced else []),
        ]
        for stage in stages
    ]
    total = {
        key: sum(stage[key] or 0 for stage in stages)
        for key in ("seconds", "compile_seconds", "device_hours", "dollars")
    }
    compiling = [f"{total['compile_seconds']:,.0f} s"] if compiled else []
    dollars = [f"{total['dollars']:.2f}"] if priced else []
    rows.append(
        [
            "in all",
            "",
            "",
            "",
            f"{total['seconds']:,.0f} s",
            *compiling,
            "",
            "",
            f"{total['device_hours']:.3f}",
            *dollars,
        ]
    )
    heads = [
        "training",
        *(["compiling"] if compiled else []),
        "tokens/s",
        "FLOPs",
        "device-hours",
        *(["dollars"] if priced else []),
    ]
    return markdown_table(["stage", "model", "steps", "tokens", *heads], *rows)


def amount(value: float | None, form: str) -> str:
    return "not known" if value is None else f"{value:{form}}"


def exchanges(tasks: dict[str, dict[str, Any]]) -> list[str]:
    """The first replies to each task, right or wrong, at most EXCHANGES in all: two of each, or one where there are
    many tasks.
    """
    each = 2 if 2 * len(tasks) <= EXCHANGES else 1
    lines = []
    for spec, example in [
        (spec, example) for spec, task in tasks.items() for example in task.get("examples", [])[:each]
    ][:EXCHANGES]:
        mark = "right" if example["correct"] else f"wrong; expected: {one_line(example['reference'])}"
        lines += [
            f"> {one_line(example['question'])}",
            f"  {one_line(example['reply']) or '(nothing)'}",
            f"  -- {title(spec)}, {mark}",
            "",
        ]
    return lines[:-1]


def one_line(text: str) -> str:
    """Text on one line of a Markdown block: line ends as /, what is not printable as U+FFFD, cut where it is long."""
    flat = "".join(
        c if c.isprintable() else "\ufffd" for c in " / ".join(filter(None, map(str.strip, text.splitlines())))
    )
    return flat if len(flat) <= LONGEST else flat[: LONGEST - 3] + "..."


def missing(stages: list[Stage]) -> list[tuple[str, str, dict[str, Any]]]:
    """(why a stage has no figure, the script that would give it, its flags), for each kind of evaluation that the table
    lacks.
    """
    out, chat = [], stages[-1].chat
    asked = (
        [row.get("settings", chat["settings"]) for row in chat["tasks"].values()] or [chat["settings"]] if chat else []
    )
    for stage in stages:
        model = f"{stage.run}@{stage.step}"
        if stage.text is None:
            why = f"{model} has no bits per byte: {seen(stage.run_dir / 'eval_base.json')}"
            out.append(
                (
                    why,
                    "base_eval",
                    {"model": model, "modes": "bpb", **({} if stage is stages[0] else {"train_text": False})},
                )
            )
        if stage is stages[-1] and chat is None and stage.kind != "base":
            out.append(
                (f"{model} was asked nothing: {seen(stage.run_dir / 'eval_chat.json')}", "chat_eval", {"model": model})
            )
        for settings in [settings for i, settings in enumerate(asked) if settings not in asked[:i]]:
            specs = [spec for spec, row in chat["tasks"].items() if row.get("settings", chat["settings"]) == settings]
            if stage.chat is None or all(row["settings"] != settings for row in chat_rows(stage.chat)):
                then = stage.chat["settings"] if stage.chat else {}
                other = [
                    f"{name} {then[name]!r} instead of {value!r}"
                    for name, value in settings.items()
                    if then and then[name] != value
                ]
                why = f"{model} was not asked the same: {', '.join(other) or seen(stage.run_dir / 'eval_chat.json')}"
                out.append((why, "chat_eval", {"model": model, "tasks": ",".join(specs), **flags_of(settings)}))
    return out


def seen(path: Path) -> str:
    """Why an evaluation does not count."""
    if not path.exists():
        return f"there is no {path.name}"
    record = read_json(path)
    return f"{path.name} is of step {record['step']}" + (
        "" if "val" in record or "tasks" in record else " and holds other modes"
    )


def flags_of(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a chat evaluation that have to be typed."""
    default = {f.name: f.default for f in dataclasses.fields(ChatEvalConfig)}
    missed = not_read(ChatEvalConfig, default | settings)
    return {name: value for name, value in settings.items() if value != default[name] and name not in missed}


def sized(n: float) -> str:
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB" if n >= 1e6 else f"{n / 1e3:.0f} kB"
