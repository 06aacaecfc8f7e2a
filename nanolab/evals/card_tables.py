"""The numbers of a card as people read them: tables in markdown, exchanges, and what is not measured yet."""

import dataclasses
import re
from pathlib import Path
from typing import Any

from nanolab.cli import not_read
from nanolab.evals.card import NATS, PERCENT, Stage
from nanolab.evals.config import ChatEvalConfig
from nanolab.evals.record import chat_rows
from nanolab.records.models import read_json
from nanolab.tables import markdown_table

EXCHANGES, LONGEST = 8, 240  # shown in all; characters of a question or a reply


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
        baseline = [number_text(row["baseline"], row["unit"]) if row["baseline"] else "-"] if with_baseline else []
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
    value, change = number_text(at["value"], row["unit"]), at.get("effect")
    if change is None:
        return value
    interval = (
        " [{}, {}]".format(*(number_text(end, row["unit"], "+") for end in change["interval"]))
        if change["interval"]
        else ""
    )
    verdict = f" {change['verdict']}" if change["verdict"] else ""
    return f"{value} ({number_text(change['difference'], row['unit'], '+')}{interval}){verdict}"


def number_text(value: float, unit: str, sign: str = "") -> str:
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
        mark = "right" if example["correct"] else f"wrong; expected: {cropped(example['reference'])}"
        lines += [
            f"> {cropped(example['question'])}",
            f"  {cropped(example['reply']) or '(nothing)'}",
            f"  -- {title(spec)}, {mark}",
            "",
        ]
    return lines[:-1]


def cropped(text: str) -> str:
    """Text on one line of a Markdown block: line ends as /, what is not printable as U+FFFD, cut where it is long."""
    flat = "".join(
        c if c.isprintable() else "\ufffd" for c in " / ".join(filter(None, map(str.strip, text.splitlines())))
    )
    return flat if len(flat) <= LONGEST else flat[: LONGEST - 3] + "..."


def unmeasured(stages: list[Stage]) -> list[tuple[str, str, dict[str, Any]]]:
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
            why = f"{model} has no bits per byte: {why_not_counted(stage.run_dir / 'eval_base.json')}"
            out.append(
                (
                    why,
                    "base_eval",
                    {"model": model, "modes": "bpb", **({} if stage is stages[0] else {"train_text": False})},
                )
            )
        if stage is stages[-1] and chat is None and stage.kind != "base":
            out.append(
                (
                    f"{model} was asked nothing: {why_not_counted(stage.run_dir / 'eval_chat.json')}",
                    "chat_eval",
                    {"model": model},
                )
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
                reason = ", ".join(other) or why_not_counted(stage.run_dir / "eval_chat.json")
                why = f"{model} was not asked the same: {reason}"
                out.append((why, "chat_eval", {"model": model, "tasks": ",".join(specs), **flags_of(settings)}))
    return out


def why_not_counted(path: Path) -> str:
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
