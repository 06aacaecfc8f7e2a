"""Commands that a report suggests. Imports no torch."""

import dataclasses
import os
import shlex
import sys
from typing import Any

from nanolab.cli import current_names, from_preset, not_read
from nanolab.model.config import ModelFlags
from nanolab.stages.config import BaseTrainConfig

MODEL = [f.name for f in dataclasses.fields(ModelFlags) if f.name != "preset"]
RECIPE = ["recipe", "device_batch_size", "total_batch_size", "learning_rate", "beta1", "beta2", "eps", "grad_clip"]
TEXT = ("data", "data_dir", "val_data", "num_shards")


def next_commands(name: str, kind: str, asked: dict[str, Any] | None, config: dict[str, Any]) -> list[tuple[str, str]]:
    """(what it does, command). asked: the model's chat evaluation. config: of the base run."""
    from nanolab.evals.card_tables import flags_of

    if kind != "base":
        return [
            ("Talk to it", command("chat_cli", model=name)),
            (
                "Ask it everything that there is data for",
                command("chat_eval", model=name, **(flags_of(asked["settings"]) if asked else {})),
            ),
            (
                "Fine-tune it on your own conversations",
                command("chat_sft", model=name, run=f"{name}-mine", tasks="jsonl=FILE:1,identity:1"),
            ),
        ]
    config = current_names(BaseTrainConfig, config)
    row = from_preset(BaseTrainConfig, config["preset"])
    same = {"preset": config["preset"]} if config["preset"] != "nanolab" else {}
    same |= {f: config[f] for f in MODEL + RECIPE if config[f] != getattr(row, f)}
    text = {f: config[f] for f in TEXT if config[f] != getattr(BaseTrainConfig, f)}
    missed = not_read(BaseTrainConfig, dataclasses.asdict(BaseTrainConfig()) | config)  # an older version recorded them
    same, text = ({f: value for f, value in flags.items() if f not in missed} for flags in (same, text))
    tokenizer = {"tokenizer": config["tokenizer"]} if config["tokenizer"] else {}
    return [
        ("Talk to it (it is a base model: it continues what you type)", command("chat_cli", model=name)),
        (
            "Train a deeper one for 20 minutes",
            command(
                "base_train",
                run=f"{name}-deeper",
                **text,
                **tokenizer,
                **same | {"depth": config["depth"] + 2},
                max_seconds=1200,
            ),
        ),
        (
            "Train on your own text for 5 minutes (the guide dev/guides/your-own-text.md goes through it)",
            command("base_train", run="mine", data_dir="FOLDER", **tokenizer, **same, max_seconds=300),
        ),
    ]


def command(script: str, **flags: Any) -> str:
    return " ".join(
        [
            python_here(),
            "-m",
            f"scripts.{script}",
            *(as_flag(name.replace("_", "-"), value) for name, value in flags.items()),
        ]
    )


def as_flag(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {shlex.quote(str(value))}"


def python_here() -> str:
    """How to call this interpreter from here."""
    here = os.path.relpath(sys.executable)
    return sys.executable if here.startswith("..") else here
