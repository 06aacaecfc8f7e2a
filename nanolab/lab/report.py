"""The report of a model, in markdown: what each stage of its training brought and cost, how good it is, where it is."""

import re
from pathlib import Path
from typing import Any

from nanolab.cli import as_json, check_bounds, from_json
from nanolab.evals.card import card, chain
from nanolab.evals.card_tables import calls, cost_table, effects_table, exchanges, sized, unmeasured
from nanolab.evals.config import ReportConfig
from nanolab.files import write_text
from nanolab.lab.next_commands import command, next_commands
from nanolab.model.accounting import n_params
from nanolab.model.config import GPTConfig, chosen
from nanolab.records.models import find_model, read_metrics
from nanolab.runtime import base_dir
from nanolab.tables import markdown_table

MEANS = {  # of metrics.jsonl
    "train/loss": ": nats per token, smoothed",
    "val/bpb": ": bits per byte of held-out text",
    "val/loss": ": nats per supervised token of held-out conversations",
}


DID = {
    "base": ("pretrained on", lambda c: c["data_dir"] or c["data"]),
    "sft": ("fine-tuned on", lambda c: c["stages"] or c["tasks"]),
    "rl": ("improved by its own replies to", lambda c: c["task"]),
}


def write_report(cfg: ReportConfig) -> str:
    """Write card.json and report.md into the run's directory, the report to `cfg.output` too, and return it.

    Raises UserError for a model that is not there, and for a place that cannot be written.
    """
    check_bounds(type(cfg), vars(cfg))
    found = find_model(cfg.model)
    stages = chain(found)
    numbers = card(stages, cfg.price_per_hour)
    text = "\n".join(report(found, stages, numbers))
    write_text(found.run_dir / "card.json", as_json(numbers, "card.json", indent=1) + "\n")
    for path in (found.run_dir / "report.md", Path(cfg.output)):
        write_text(path, text)
    return text


def report(found, stages: list, numbers: dict[str, Any]) -> list[str]:
    """The lines of report.md."""
    base, last = stages[0], stages[-1]
    return [
        f"# Report of the run {found.name}",
        "",
        *([*story(stages), *brought(stages, numbers), *says(last)] if len(stages) > 1 else []),
        *trained(stages),
        *(costs(stages, numbers) if len(stages) > 1 or numbers["stages"][0]["dollars"] is not None else []),
        *logged(stages),
        *read_text(stages, numbers),
        *where(found, stages),
        "## Three things to try next",
        "",
        *(
            line
            for say, command in next_commands(found.name, last.kind, last.chat, base.meta["config"])
            for line in (f"{say}:", "", "```bash", command, "```", "")
        ),
    ]


def story(stages: list) -> list[str]:
    """One sentence: what it is and how it came to be."""
    last, seconds = stages[-1].meta, sum(stage.seconds for stage in stages)
    did = [f"{verb} {names(of(stage.meta['config']))}" for stage in stages for verb, of in [DID[stage.kind]]]
    parameters = n_params(from_json(GPTConfig, last["model_config"]))["total"]
    took = f"{seconds / 3600:,.1f} hours" if seconds > 7200 else f"{seconds / 60:,.1f} minutes"
    return [
        (
            f"A chat model of {parameters:,} parameters: {', then '.join(did)}. {took} of training on"
            f" {hardware(last['env'])}."
        ),
        "",
    ]


def names(mixture: str) -> str:
    """A mixture without its weights."""
    return ", ".join(re.sub(r"(@\d+)?(:[\d.e+-]+)?$", "", part.strip()) for part in mixture.split(","))


def hardware(env: dict[str, Any]) -> str:
    return f"{env['world_size']} x {env['device_name']}"


def brought(stages: list, numbers: dict[str, Any]) -> list[str]:
    """Metrics x stages, how to read them, and what is not there."""
    lines = ["## What each stage brought", ""] + ([*effects_table(numbers), ""] if numbers["metrics"] else [])
    if any("effect" in at for row in numbers["metrics"] for at in row["stages"].values()):
        lines += [
            (
                "In brackets: the change from the stage before, on the same problems, in percentage points, with its 95"
                " % interval; *unresolved*: the"
            ),
            (
                "interval holds 0. Bits per byte are of the same held-out text, lower is better; their interval takes"
                " its rows as independent."
            ),
            "",
        ]
    if shares := calls(numbers):
        lines += [f"Replies of {stages[-1].run} that called a tool: {shares}.", ""]
    lines += how_to_measure(unmeasured(stages))
    return lines + ([""] if lines[-1] else [])


def how_to_measure(found: list[tuple[str, str, dict[str, Any]]]) -> list[str]:
    """What has not been measured, and how to do it."""
    return [f"- {why}. To measure it: `{command(script, **flags)}`" for why, script, flags in found]


def logged(stages: list) -> list[str]:
    """What the runs measured themselves while they trained: metrics and result of each, up to the step that counts."""
    found = [stage.logged for stage in stages]
    names = list(dict.fromkeys(name for values in found for name in values))
    if not names:
        return []

    def cell(stage, values: dict, name: str) -> str:
        step, value = values.get(name, (None, None))
        return (
            "-"
            if value is None
            else f"{value:.4f}" + ("" if step in (stage.step, stage.step - 1) else f" (step {step:,})")
        )

    rows = [
        [f"{name}{MEANS.get(name, '')}", *(cell(stage, values, name) for stage, values in zip(stages, found))]
        for name in names
    ]
    return [
        "## What training itself measured",
        "",
        "At its end, or where it looked last.",
        "",
        *markdown_table(["", *(stage.label for stage in stages)], *rows),
        "",
    ]


def says(last) -> list[str]:
    """The first replies to each task."""
    said = exchanges(last.chat["tasks"]) if last.chat else []
    return (
        ["## What it says", "", "The first questions of each task, as they come:", "", "```text", *said, "```", ""]
        if said
        else []
    )


def trained(stages: list) -> list[str]:
    """The model, its text and the machine; what the later stages learnt from."""
    base, later = stages[0], stages[1:]
    meta, metrics = base.meta, [read_metrics(stage.run_dir) for stage in stages]
    config, env, model = meta["config"], meta["env"], from_json(GPTConfig, meta["model_config"])
    memory = [row["mem/peak_mib"] for rows in metrics for row in rows if row.get("mem/peak_mib")]
    epochs = [row["train/epoch"] for row in metrics[0] if row.get("train/epoch") is not None]
    text = base.text and base.text.get("train", base.text["val"])
    amount = (
        f"{sized(meta['tokens'] * text['bytes'] / text['tokens'])} read ({meta['tokens']:,} tokens)"
        if text
        else f"{meta['tokens']:,} tokens"
    )
    imported = "imported" in env
    passes = f", which is {epochs[-1]:.2f} passes over it" if epochs else ""
    commits = dict.fromkeys(stage.meta["env"]["commit"] or "unknown" for stage in stages)
    machines = dict.fromkeys(
        f"{hardware(stage.meta['env'])}, {stage.meta['env']['dtype']}, torch {stage.meta['env']['torch']}"
        for stage in stages
    )
    return [
        "## What was trained",
        "",
        *markdown_table(
            ["", ""],
            [
                "model",
                (
                    f"{model.n_layer} layers, width {model.n_embd}, {model.n_head} heads, rows of {model.sequence_len}"
                    f" tokens, vocabulary {model.vocab_size:,}"
                ),
            ],
            ["architecture", ", ".join(chosen(model)) or "every default"],
            ["recipe", config["recipe"]],
            ["parameters", f"{n_params(model)['total']:,}"],
            (
                ["weights", "imported"]
                if imported
                else ["text", f"{config['data_dir'] or config['data']}; {amount}{passes}"]
            ),
            *(
                [
                    ["steps", f"{base.step:,} of {meta['plan']['total_batch_size']:,} tokens"],
                    [
                        "speed",
                        f"{meta['tokens'] / base.seconds:,.0f} tokens/s, {base.seconds:,.0f} s of training in all",
                    ],
                ]
                if not later and not imported
                else []  # "Time and cost" holds them where there are later stages
            ),
            *(
                [stage.label, f"{verb} `{of(stage.meta['config'])}`"]
                for stage in later
                for verb, of in [DID[stage.kind]]
            ),
            ["machine", "; ".join(machines)],
            ["peak memory", f"{max(memory):,.0f} MiB" if memory else "not recorded"],
            ["code", f"commit {', '.join(commits)}, Python {env['python']}"],
        ),
        "",
    ]


def costs(stages: list, numbers: dict[str, Any]) -> list[str]:
    """What each stage took, and what these figures leave out."""
    lines = [
        "## Time and cost",
        "",
        *cost_table(numbers),
        "",
        "Training alone: without loading, evaluations and saving.",
    ]
    for stage in stages:
        if stage.work:
            spent = (
                f"{stage.work['training_flops']:.1e} are of training, {stage.work['generating_flops']:.1e} of drawing"
                " the replies"
            )
            lines += [f"Tokens of {stage.label}: prompts and replies of each update. Of its FLOPs {spent}."]
    if any(stage.kind == "rl" and not stage.work for stage in stages):
        lines += [
            "Tokens of rl are those of the replies it drew; their drawing is in its time. Its FLOPs were not recorded."
        ]
    return [*lines, ""]


def read_text(stages: list, numbers: dict[str, Any]) -> list[str]:
    """Bits per byte of every stage beside compressors, and how pretraining came there."""
    newest = next((stage.text for stage in reversed(stages) if stage.text), None)
    points = [
        [f"{step:,}", f"{bpb:.4f}"] for step, bpb in curve(read_metrics(stages[0].run_dir)) if step <= stages[0].step
    ]
    on_the_way = [*markdown_table(["step", "bits per byte while training"], *points), ""] if points else []
    if newest is None and len(stages) == 1:
        return ["## How good it is", "", *on_the_way, *how_to_measure(unmeasured(stages)), ""]
    if newest is None:
        return []
    same = {
        stage.run: stage.text["val"]["bpb"]
        for stage in stages
        if stage.text and stage.text["val"]["bytes"] == newest["val"]["bytes"]
    }
    train = stages[0].text and stages[0].text.get("train")
    training = f"On text it was trained on: {train['bpb']:.4f}. " if train and len(stages) == 1 else ""
    n = newest.get("compressor_bytes") or newest["val"]["bytes"]
    part = "" if n == newest["val"]["bytes"] else f" Compressors read the first {sized(n)}."
    return [
        "## How good it is" if len(stages) == 1 else "## How well it still reads",
        "",
        f"Bits per byte on {sized(newest['val']['bytes'])} of text that was held out; lower is better.",
        "",
        *markdown_table(
            ["reader", "bits per byte"], *[[name, f"{bpb:.4f}"] for bpb, name in readers(same, numbers["compressors"])]
        ),
        "",
        f"{training}A compressor's figure holds everything needed to get the text back; the model's",
        f"leaves out its weights.{part}",
        "",
        *on_the_way,
        *continuations(newest),
    ]


def where(found, stages: list) -> list[str]:
    last = stages[-1]
    files = ", ".join(
        name
        for name in ("eval_base.json", "eval_chat.json", "card.json", "rollouts.jsonl")
        if name == "card.json" or (last.run_dir / name).exists()
    )
    return [
        "## Where everything is",
        "",
        *markdown_table(
            ["", ""],
            [
                "run",
                f"`{found.run_dir}`: config.json, env.json, metrics.jsonl (one line per step), result.json, {files}",
            ],
            *([f"{stage.label} run", f"`{stage.run_dir}`"] for stage in stages[:-1]),
            ["weights", f"`{found.checkpoint}`"],
            ["tokenizer", f"`{found.run_dir / 'tokenizer'}`"],
            ["corpora", f"`{base_dir() / 'corpora'}`"],
        ),
        "",
    ]


def readers(models: dict[str, float], compressors: dict[str, float]) -> list[tuple[float, str]]:
    """(bits per byte, reader) of models and compressors, best first."""
    return sorted(
        [*((bpb, f"**{name}**") for name, bpb in models.items()), *((bpb, who) for who, bpb in compressors.items())]
    )


def curve(metrics: list[dict[str, Any]], points: int = 8) -> list[tuple[int, float]]:
    """At most `points` evaluations, evenly spread, the last one always among them."""
    rows = [(row["step"], row["val/bpb"]) for row in metrics if row.get("val/bpb") is not None]
    return [rows[round(i * (len(rows) - 1) / (points - 1))] for i in range(points)] if len(rows) > points else rows


def continuations(measured: dict[str, Any], n: int = 3) -> list[str]:
    """A few greedy continuations, if the evaluation drew any."""
    lines = [f"- {sample['prompt']!r} -> {sample['text']!r}" for sample in measured.get("samples", [])[:n]]
    return ["It continues text like this, choosing the likeliest token each time:", "", *lines, ""] if lines else []
