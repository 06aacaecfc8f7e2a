"""Write a short report of a run: python -m scripts.report [--model NAME]. Every number comes from the run's own records."""

import dataclasses
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from nanolab.config import BaseTrainConfig, ModelFlags, ReportConfig, UserError, chosen, from_preset, main, parse

MODEL = [f.name for f in dataclasses.fields(ModelFlags) if f.name != "preset"]
RECIPE = ["recipe", "device_batch_size", "total_batch_size", "learning_rate", "beta1", "beta2", "eps", "grad_clip"]
TEXT = ("data", "data_dir", "val_data", "num_shards")


def run(cfg: ReportConfig) -> int:
    from nanolab.training.checkpoint import load_meta, write_text
    from nanolab.training.models import find_model, read_json, read_metrics

    found = find_model(cfg.model, kind="base")
    if (kind := load_meta(found.checkpoint)["kind"]) != "base":
        raise UserError(f"run {found.name!r} is {kind}; expected a base run, which is all that the report tells of so far; type: {python()} -m scripts.chat_eval --model {found.name}")
    if not (found.run_dir / "eval_base.json").exists():
        raise UserError(f"run {found.name!r} has not been evaluated; expected {found.run_dir / 'eval_base.json'}; type: {python()} -m scripts.base_eval --model {found.name}")
    measured = read_json(found.run_dir / "eval_base.json")
    if "val" not in measured or measured["step"] != found.step:
        seen = f"step {measured['step']}" + ("" if "val" in measured else " without bits per byte")
        raise UserError(f"the evaluation of run {found.name!r} is of {seen}, the model is step {found.step}; type: {python()} -m scripts.base_eval --model {found.name}")
    text = "\n".join(report(found, load_meta(found.checkpoint), measured, read_metrics(found.run_dir)))
    for path in (found.run_dir / "report.md", Path(cfg.output)):
        try:
            write_text(path, text)
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}; expected a place for the report; try --output FILE") from None
    print(text)
    print(f"report: {Path(cfg.output).resolve()}")
    return 0


def report(found, meta: dict[str, Any], measured: dict[str, Any], metrics: list[dict[str, Any]]) -> list[str]:
    """The lines of report.md."""
    from nanolab.config import GPTConfig, from_json
    from nanolab.model.accounting import n_params
    from nanolab.runtime import base_dir

    config, env, model = meta["config"], meta["env"], from_json(GPTConfig, meta["model_config"])
    train, val, seconds = measured["train"], measured["val"], meta["loop"]["total_training_time"]
    read = meta["tokens"] * train["bytes"] / train["tokens"]
    memory = [row["mem/peak_mib"] for row in metrics if row.get("mem/peak_mib")]
    epochs = [row["train/epoch"] for row in metrics if row.get("train/epoch") is not None]
    return [
        f"# Report of the run {found.name}",
        "",
        "## What was trained",
        "",
        *table(
            ["", ""],
            ["model", f"{model.n_layer} layers, width {model.n_embd}, {model.n_head} heads, rows of {model.sequence_len} tokens, vocabulary {model.vocab_size:,}"],
            ["architecture", ", ".join(chosen(model)) or "every default"],
            ["recipe", config["recipe"]],
            ["parameters", f"{n_params(model)['total']:,}"],
            ["text", f"{config['data_dir'] or config['data']}; {sized(read)} read ({meta['tokens']:,} tokens), which is {epochs[-1]:.2f} passes over it" if epochs else sized(read)],
            ["steps", f"{found.step:,} of {meta['plan']['total_batch_size']:,} tokens"],
            ["speed", f"{meta['tokens'] / seconds:,.0f} tokens/s, {seconds:,.0f} s of training in all"],
            ["machine", f"{env['world_size']} x {env['device_name']}, {env['dtype']}, torch {env['torch']}"],
            ["peak memory", f"{max(memory):,.0f} MiB" if memory else "not recorded"],
            ["code", f"commit {env['commit'] or 'unknown'}, Python {env['python']}"],
        ),
        "",
        "## How good it is",
        "",
        f"Bits per byte on {sized(val['bytes'])} of text that was held out; lower is better.",
        "",
        *table(["reader", "bits per byte"], *[[name, f"{bpb:.4f}"] for bpb, name in readers(found.name, measured)]),
        "",
        f"On text it was trained on: {train['bpb']:.4f}. A compressor's figure holds everything needed to get the text back; the model's",
        "leaves out its weights.",
        "",
        *table(["step", "bits per byte while training"], *[[f"{step:,}", f"{bpb:.4f}"] for step, bpb in curve(metrics)]),
        "",
        *continuations(measured),
        "## Where everything lies",
        "",
        *table(
            ["", ""],
            ["run", f"`{found.run_dir}`: config.json, env.json, metrics.jsonl (one line per step), result.json, eval_base.json"],
            ["weights", f"`{found.checkpoint}`"],
            ["tokenizer", f"`{found.run_dir / 'tokenizer'}`"],
            ["corpora", f"`{base_dir() / 'corpora'}`"],
        ),
        "",
        "## Three things to try next",
        "",
        *(line for say, command in next_commands(found.name, config) for line in (f"{say}:", "", "```bash", command, "```", "")),
    ]


def readers(name: str, measured: dict[str, Any]) -> list[tuple[float, str]]:
    """(bits per byte, reader) of the model and the compressors, best first."""
    return sorted([(measured["val"]["bpb"], f"**{name}**"), *((bpb, who) for who, bpb in measured.get("compressors", {}).items())])


def curve(metrics: list[dict[str, Any]], points: int = 8) -> list[tuple[int, float]]:
    """At most `points` evaluations, evenly spread, the last one always among them."""
    rows = [(row["step"], row["val/bpb"]) for row in metrics if row.get("val/bpb") is not None]
    return [rows[round(i * (len(rows) - 1) / (points - 1))] for i in range(points)] if len(rows) > points else rows


def continuations(measured: dict[str, Any], n: int = 3) -> list[str]:
    """A few greedy continuations, if the evaluation drew any."""
    lines = [f"- {sample['prompt']!r} -> {sample['text']!r}" for sample in measured.get("samples", [])[:n]]
    return ["It continues text like this, choosing the likeliest token each time:", "", *lines, ""] if lines else []


def next_commands(name: str, config: dict[str, Any]) -> list[tuple[str, str]]:
    """(what it does, command): talk to it, a larger model, other text."""
    row = from_preset(BaseTrainConfig, config["preset"])
    same = {"preset": config["preset"]} if config["preset"] != "nanolab" else {}
    same |= {f: config[f] for f in MODEL + RECIPE if config[f] != getattr(row, f)}
    text = {f: config[f] for f in TEXT if config[f] != getattr(BaseTrainConfig, f)}
    tokenizer = {"tokenizer": config["tokenizer"]} if config["tokenizer"] else {}
    return [
        ("Talk to it (it is a base model: it continues what you type)", command("chat_cli", model=name)),
        ("Train a deeper one for 20 minutes", command("base_train", run=f"{name}-deeper", **text, **tokenizer, **same | {"depth": config["depth"] + 2}, max_seconds=1200)),
        (
            "Train on your own text for 5 minutes (the guide dev/guides/your-own-text.md goes through it)",
            command("base_train", run="mine", data_dir="FOLDER", **tokenizer, **same, max_seconds=300),
        ),
    ]


def command(script: str, **flags: Any) -> str:
    return " ".join([python(), "-m", f"scripts.{script}", *(typed(name.replace("_", "-"), value) for name, value in flags.items())])


def typed(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {shlex.quote(str(value))}"


def python() -> str:
    """How to call this interpreter from here."""
    here = os.path.relpath(sys.executable)
    return sys.executable if here.startswith("..") else here


def sized(n: float) -> str:
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB" if n >= 1e6 else f"{n / 1e3:.0f} kB"


def table(head: list[str], *rows: list[str]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]


if __name__ == "__main__":
    main(lambda: run(parse(ReportConfig)))
