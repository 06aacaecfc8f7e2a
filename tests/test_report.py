"""The parts of scripts/report.py that need no run; tests/evals/test_card.py and tests/test_runs.py hold whole reports
against the runs' records.
"""

import dataclasses
import shlex

from nanolab.cli import from_preset, parse
from nanolab.evals.card_tables import sized
from nanolab.evals.config import ChatEvalConfig
from nanolab.inference.config import ChatConfig
from nanolab.lab.next_commands import next_commands
from nanolab.lab.report import curve, readers
from nanolab.stages.config import BaseTrainConfig, SFTConfig
from nanolab.tables import markdown_table
from tasks import tasks_of


def test_the_curve_keeps_both_ends_and_is_evenly_spread():
    rows = [{"step": s, "val/bpb": 5 - s / 1000} for s in range(0, 1001, 20)]
    rows.insert(3, {"step": 50, "train/loss": 1.0})
    points = curve(rows, 6)
    assert [step for step, _ in points] == [0, 200, 400, 600, 800, 1000]
    assert curve(rows[:2]) == [(0, 5.0), (20, 4.98)]
    assert curve([]) == []


def test_readers_are_ranked():
    compressors = {"gzip -9": 3.0, "xz -9e": 2.4, "bz2 -9": 2.0}
    assert readers({"a": 2.1}, compressors) == [(2.0, "bz2 -9"), (2.1, "**a**"), (2.4, "xz -9e"), (3.0, "gzip -9")]
    assert [who for _, who in readers({"a": 2.1, "b": 2.2}, compressors)] == [
        "bz2 -9",
        "**a**",
        "**b**",
        "xz -9e",
        "gzip -9",
    ]


def test_the_next_commands_are_commands():
    """They parse, and the deeper run differs from this one in nothing that was not said."""
    now = BaseTrainConfig(
        depth=4,
        aspect_ratio=48,
        head_dim=64,
        total_batch_size=4096,
        data_dir="my texts",
        tokenizer="/t/x",
        max_seq_len=256,
    )
    (_, talk), (_, deeper), (_, own) = next_commands("small", "base", None, dataclasses.asdict(now))
    flags = [shlex.split(command)[3:] for command in (talk, deeper, own)]
    assert parse(ChatConfig, flags[0]).model == "small"
    assert parse(BaseTrainConfig, flags[1]) == dataclasses.replace(now, run="small-deeper", depth=6, max_seconds=1200)
    assert parse(BaseTrainConfig, flags[2]) == dataclasses.replace(now, run="mine", data_dir="FOLDER", max_seconds=300)


def test_the_next_commands_keep_preset_and_architecture():
    now = from_preset(
        BaseTrainConfig,
        "gpt2",
        depth=2,
        aspect_ratio=32,
        positions="rope",
        tied_head=False,
        smear=True,
        learning_rate=1e-3,
    )
    (_, _), (_, deeper), (_, own) = next_commands("small", "base", None, dataclasses.asdict(now))
    assert parse(BaseTrainConfig, shlex.split(deeper)[3:]) == dataclasses.replace(
        now, run="small-deeper", depth=4, max_seconds=1200, num_iterations=-1
    )
    assert parse(BaseTrainConfig, shlex.split(own)[3:]) == dataclasses.replace(
        now, run="mine", data_dir="FOLDER", max_seconds=300, num_iterations=-1
    )


def test_the_next_commands_of_a_chat_model_are_commands():
    settings = {"num_samples": 1, "max_tokens": 48, "max_problems": -1, "tool": "", "temperature": 0.0}
    commands = next_commands("small-rl", "rl", {"settings": settings}, dataclasses.asdict(BaseTrainConfig()))
    talk, more, own = [shlex.split(command)[3:] for _, command in commands]
    assert parse(ChatConfig, talk).model == "small-rl"
    assert parse(ChatEvalConfig, more) == ChatEvalConfig(model="small-rl", max_tokens=48, tool="")
    assert (parse(SFTConfig, own).model, tasks_of(parse(SFTConfig, own).tasks)) == (
        "small-rl",
        [("jsonl=FILE", 1), ("identity", 1)],
    )


def test_sizes_and_tables():
    assert [sized(n) for n in (999, 25_000, 2.5e6, 3.21e9)] == ["1 kB", "25 kB", "2.5 MB", "3.21 GB"]
    assert markdown_table(["a", "b"], ["1", "2"]) == ["| a | b |", "| --- | --- |", "| 1 | 2 |"]
