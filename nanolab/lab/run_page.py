"""The page of one run in the site: its figure, facts, loss spikes, report and samples, from the records in its folder.

Hosts, paths and commands are left out; all texts are escaped by the template."""

import math
import re
import statistics
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanolab.cli import UserError
from nanolab.evals.card_tables import amount, cell, cropped, head, title
from nanolab.evals.curve import COLOURS, GREY, INK, PALE, counted, drawing, saved
from nanolab.files import write_text
from nanolab.lab.curves import themed
from nanolab.lab.page import filled
from nanolab.lab.results import Row, public
from nanolab.records.console import clock
from nanolab.records.models import read_json, read_metrics
from nanolab.terminal import harmless

POINTS = 300  # of a line in the figure
SPIKE, WINDOW, LEAST = 7.0, 1000, 20  # standard deviations; steps that they are of, at most and at least
MOST = 12  # samples, and spikes, on a page
PANELS = {  # heading -> metrics, as patterns; a panel is drawn where one has been recorded
    "loss, nats per token": r"train/loss",
    "validation": r"val/\w+",
    "learning rates, as a multiple of each group's": r"train/lrm",
    "reward": r"rl/reward",
    "gradient norm": r"train/grad_norm",
    "norms of layers": r".*norm.*\d+.*",
}
COLUMNS = ("kind", "state", "steps", "loss", "bits per byte", "spikes", "device-hours", "cost", "begun")


def run_facts(folder: Path, price: float) -> dict[str, Any]:
    """What the index and the page say of a run. price: of a device-hour, 0: not known. Raises UserError for a record
    that is damaged.
    """
    env, metrics = read_json(folder / "env.json"), read_metrics(folder)
    result = read_json(folder / "result.json") if (folder / "result.json").exists() else {}
    last = metrics[-1] if metrics else {}
    newest = {name: value for row in metrics for name, value in row.items() if value is not None} | {
        name: value for name, value in result.items() if value is not None
    }
    seconds = result.get("total_training_time", last.get("total_training_time", 0.0))
    hours = seconds * env.get("world_size", 1) / 3600
    return {
        "name": folder.name,
        "kind": env.get("kind", "base"),
        "state": "finished" if result else "not finished",
        "step": result.get("step", last.get("step", 0)),
        "loss": newest.get("train/loss"),
        "bpb": newest.get("val/bpb"),
        "tokens": result.get("tokens"),
        "spikes": spikes_of([(row["step"], row["train/loss"]) for row in metrics if row.get("train/loss") is not None]),
        "seconds": seconds,
        "hours": hours,
        "dollars": hours * price if price else None,
        "begun": str(env.get("started", ""))[:10],
        "env": env,
        "metrics": metrics,
        "probes": result.get("probes", {}),
    }


def run_cells(facts: dict[str, Any]) -> list[str]:
    """A run's row under COLUMNS."""
    loss, bpb = ("-" if facts[name] is None else f"{facts[name]:.4f}" for name in ("loss", "bpb"))
    step, spikes, hours = f"{facts['step']:,}", f"{len(facts['spikes']):,}", f"{facts['hours']:.3f}"
    return [facts["kind"], facts["state"], step, loss, bpb, spikes, hours, money(facts["dollars"]), facts["begun"]]


def money(dollars: float | None) -> str:
    return "-" if dollars is None else "under $0.01" if 0 < dollars < 0.01 else f"${dollars:,.2f}"


def spikes_of(losses: list[tuple[int, float]]) -> list[tuple[int, float, float]]:
    """(step, loss, standard deviations above the mean) of each loss at least SPIKE of them above the mean of up to
    WINDOW steps before, once there are LEAST: the spike score of OLMo 2 (arXiv:2501.00656), upwards.
    """
    found, before = [], deque(maxlen=WINDOW)
    total = squares = 0.0
    for step, loss in losses:
        n = len(before)
        if n >= LEAST:
            mean = total / n
            sd = math.sqrt(max(0.0, squares / n - mean * mean))
            if sd > 1e-9 * abs(mean) and loss - mean >= SPIKE * sd:
                found.append((step, loss, (loss - mean) / sd))
        if n == WINDOW:
            total, squares = total - before[0], squares - before[0] ** 2
        before.append(loss)
        total, squares = total + loss, squares + loss**2
    return found


def draw_run(metrics: list[Row], spikes: list[tuple[int, float, float]], path: Path) -> Path | None:
    """Draw what a run has recorded, a panel for each of PANELS, over its steps; None where there is nothing."""
    names = list(
        dict.fromkeys(name for row in metrics for name, value in row.items() if isinstance(value, (int, float)))
    )
    panels = {said: [name for name in names if re.fullmatch(pattern, name)] for said, pattern in PANELS.items()}
    series = {name: [(row["step"], row[name]) for row in metrics if row.get(name) is not None] for name in names}
    panels = {said: [name for name in found if len(series[name]) > 1] for said, found in panels.items()}
    panels = {said: found for said, found in panels.items() if found}
    if not panels:
        return None
    style, Figure = drawing()
    with style:
        figure = Figure(figsize=(4.2, 1.0 + 1.55 * len(panels)))
        for axes, (said, found) in zip(figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0], panels.items()):
            for i, name in enumerate(found):
                points = binned(series[name])
                colour = COLOURS[i % len(COLOURS)]
                steps, means, lows, highs = zip(*points)
                axes.plot(steps, means, color=colour, linewidth=1.4, zorder=3)
                axes.fill_between(steps, lows, highs, color=colour, alpha=0.25, linewidth=0, zorder=2)
                if 1 < len(found) <= len(COLOURS):
                    axes.annotate(
                        name,
                        (steps[-1], means[-1]),
                        (4, 0),
                        textcoords="offset points",
                        fontsize=8,
                        color=INK,
                        va="center",
                        annotation_clip=False,
                    )
            if "train/loss" in found and spikes:
                axes.plot(
                    *zip(*[(step, loss) for step, loss, _ in spikes]), "v", color=COLOURS[1], markersize=5, zorder=4
                )
            axes.set_title(said, fontsize=9, loc="left", color=GREY)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", color=PALE, linewidth=0.7)
            axes.tick_params(labelsize=8)
            axes.xaxis.set_major_formatter(lambda x, _: counted(x))
        axes.set_xlabel("steps", fontsize=9)
        figure.tight_layout()
        return saved(figure, path)


def binned(points: list[tuple[int, float]]) -> list[tuple[int, float, float, float]]:
    """(step, mean, lowest, highest) of at most POINTS groups of neighbours."""
    size = -(-len(points) // POINTS)
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    values = [(part[-1][0], [value for _, value in part]) for part in parts]
    return [(step, statistics.mean(found), min(found), max(found)) for step, found in values]


def write_run_page(folder: Path, facts: dict[str, Any], price: float, path: Path) -> None:
    """Write the page of the run in `folder` to `path`, with its figure beside it. Raises UserError for a damaged
    record.
    """
    env, why = facts["env"], ""
    try:
        drawn = draw_run(facts["metrics"], facts["spikes"], path.with_suffix(".svg"))
    except UserError as error:
        drawn, why = None, str(error)
    card = read_json(folder / "card.json") if (folder / "card.json").exists() else None
    config = read_json(folder / "config.json")
    shown = {
        "kind": facts["kind"],
        "steps": f"{facts['step']:,}",
        "tokens": amount(facts["tokens"], ",.0f"),
        "training": clock(facts["seconds"]).strip(),
        "device-hours": f"{facts['hours']:.3f}",
        "cost": money(facts["dollars"])
        + (f" at ${price:g} an hour of one device" if price else ": no price was given"),
        "machine": f"{env.get('world_size', 1)} x {env.get('device_name', 'not known')}, {env.get('dtype', '')}",
        "threads": env.get("threads", "not known"),
        "torch": env.get("torch", "not known"),
        "commit": str(env.get("commit") or "not known")[:12],
        "begun": facts["begun"],
        "started again": len(env.get("resumes", [])),
    }
    loss = "" if facts["loss"] is None else f", training loss {facts['loss']:.4f}"
    bpb = "" if facts["bpb"] is None else f", {facts['bpb']:.4f} bits per byte of held-out text"
    values = {
        "name": facts["name"],
        "said": f"{facts['state'].capitalize()} at step {facts['step']:,}{loss}{bpb}.",
        "facts": [(name, public(str(value))) for name, value in shown.items()],
        "figure": drawn and themed(drawn, f"What {facts['name']} measured while training"),
        "under": "line: mean of neighbouring steps, band: lowest to highest; triangles: loss spikes",
        "no_figures": why,
        "spikes": [(f"{step:,}", f"{loss:.4f}", f"{sds:.1f}") for step, loss, sds in facts["spikes"][:MOST]],
        "spikes_mean": f"{len(facts['spikes'])}, of which the first {MOST} are shown: losses at least {SPIKE:g}"
        f" standard deviations above the mean of up to {WINDOW:,} steps before.",
        "probes": list(probe_rows(facts["probes"])),
        "report": card and report_tables(card, price),
        "samples": [(public(about), sample_text(text)) for about, text in samples_of(folder)],
        "flags": [(name, public(str(value))) for name, value in config.items()],
    }
    write_text(path, filled("run.html", **values))


def probe_rows(found: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """(name, value) of everything that probes have measured; a list, as of layers, in one row."""
    if isinstance(found, dict):
        for key, value in found.items():
            yield from probe_rows(value, f"{name}, {key}" if name else key)
    else:
        values = found if isinstance(found, list) else [found]
        yield name, ", ".join(f"{x:.4g}" if isinstance(x, (int, float)) else public(str(x)) for x in values)


def report_tables(card: dict[str, Any], price: float) -> dict[str, Any]:
    """The tables of a model's card."""
    labels = [stage["label"] for stage in card["stages"]]
    rows = [
        [
            head(row),
            "-" if row["baseline"] is None else f"{row['baseline']:.3g}",
            *(cell(row, row["stages"].get(label)) for label in labels),
        ]
        for row in card["metrics"]
    ]
    costs = [
        [
            stage["label"],
            f"{stage['run']}@{stage['step']}",
            amount(stage["tokens"], ",.0f"),
            clock(stage["seconds"]).strip(),
            amount(stage["flops"], ".1e"),
            f"{stage['device_hours']:.3f}",
            money(stage["device_hours"] * price if price else None),
        ]
        for stage in card["stages"]
    ]
    return {
        "head": ["", "by guessing", *labels],
        "rows": rows,
        "cost_head": ["stage", "model", "tokens", "training", "FLOPs", "device-hours", "cost"],
        "costs": costs,
    }


def samples_of(folder: Path) -> list[tuple[str, str]]:
    """(what it is, text) of what the model wrote in its evaluations, MOST at most."""
    found = []
    if (path := folder / "eval_chat.json").exists():
        for spec, task in read_json(path).get("tasks", {}).items():
            for one in task.get("examples", [])[:2]:
                mark = "right" if one["correct"] else f"wrong; expected {cropped(one['reference'])}"
                found.append((f"{title(spec)}, {mark}", f"> {one['question']}\n{one['reply'] or '(nothing)'}"))
    if (path := folder / "eval_base.json").exists():
        for one in read_json(path).get("samples", []):
            found.append(("continued, the likeliest token each time", f"{one['prompt']} ... {one['text']}"))
    return found[:MOST]


def sample_text(text: str, most: int = 600) -> str:
    """A sample as a page shows it: no control characters, and not too long."""
    text = harmless(text)
    return text if len(text) <= most else text[:most] + " ..."
