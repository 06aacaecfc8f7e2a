"""The card of a chain of three hand-written runs: every number on it can be computed by hand."""

import dataclasses
import importlib.util
import json
import math
import re
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
import warm

from nanolab.cli import UserError, to_json
from nanolab.evals.card import card, chain
from nanolab.evals.card_tables import cost_table, cropped, effects_table, exchanges, title, unmeasured
from nanolab.evals.config import ReportConfig
from nanolab.model.config import GPTConfig
from nanolab.records import checkpoint
from nanolab.records.models import find_model
from nanolab.runtime import Runtime
from nanolab.stages.config import BaseTrainConfig
from scripts.report import run

RUNTIME = Runtime(torch.device("cpu"), torch.float32)
SETTINGS = {
    "data": "",
    "num_samples": 1,
    "temperature": 0.0,
    "top_k": 50,
    "max_tokens": 48,
    "tool": "calculator",
    "max_problems": 20,
    "seed": 42,
}
MODEL = to_json(GPTConfig(sequence_len=64, vocab_size=320, n_layer=1, n_head=2, n_embd=32))
RIGHT, WRONG, HALF = [1.0] * 20, [0.0] * 20, [1.0] * 10 + [0.0] * 10
COMPRESSORS = {"gzip -9": 2.5, "xz -9e": 2.0}
SEEDS = Path(__file__).parents[2] / "dev" / "seeds.py"


def task(spec: str, outcomes: list[float], called: float = 0.0, baseline: float = 0.0) -> dict:
    name, _, split = spec.partition(":")
    example = {
        "index": 0,
        "question": f"{name}?",
        "reply": f"[calculator: 1+{name} = 2] two",
        "reference": "2",
        "correct": bool(outcomes[0]),
    }
    return {
        "task": name,
        "split": split or "test",
        "version": 1,
        "n": len(outcomes),
        "k": 1,
        "accuracy": sum(outcomes) / len(outcomes),
        "interval": [0.0, 1.0],
        "baseline": baseline,
        "called": called,
        "outcomes": outcomes,
        "examples": [example, {**example, "question": f"{name} again?"}, example],
    }


class Runs:
    """A base directory with runs b (base, 10 steps), b-sft (5) and b-rl (3)."""

    def __init__(self, folder: Path):
        self.folder = folder / "runs"
        common = {"model_config": MODEL, "tokenizer_hash": "x"}
        env = {
            "device_name": "a chip",
            "dtype": "bfloat16",
            "torch": "2.0",
            "python": "3.11",
            "commit": "abc",
            "world_size": 1,
        }
        self.add(
            "b",
            10,
            {
                **common,
                "kind": "base",
                "config": to_json(BaseTrainConfig(data_dir="books", seed=7)),
                "env": {**env, "world_size": 2},
            },
            36.0,
            36000,
        )
        tuned = {
            "kind": "sft",
            "config": {"seed": 1, "stages": "", "tasks": "sums@9:2,names:1"},
            "env": env,
            "origin": {"name": "b@10"},
        }
        improved = {
            "kind": "rl",
            "config": {"seed": 2, "task": "sums"},
            "env": {**env, "commit": "def"},
            "origin": {"name": "b-sft@5"},
        }
        self.add("b-sft", 5, {**common, **tuned}, 18.0, 7200)
        self.add("b-rl", 3, {**common, **improved}, 72.0, 9999)
        # the last one is not of this checkpoint
        rows = [{"step": 0, "tokens": 5}, {"step": 1, "tokens": 7}, {"step": 3, "tokens": 100}]
        (self.folder / "b-rl" / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for name, bpb in (("b", 1.5), ("b-sft", 1.75), ("b-rl", 1.75)):
            self.reads(name, bpb)
        self.talks("b", {"sums@20:test": task("sums:test", WRONG), "names": task("names", WRONG, baseline=0.25)})
        self.talks(
            "b-sft", {"sums@20:test": task("sums:test", RIGHT, 1.0), "names": task("names", HALF, baseline=0.25)}
        )
        self.talks(
            "b-rl", {"sums@20:test": task("sums:test", WRONG, 0.5), "names": task("names", HALF[::-1], baseline=0.25)}
        )

    def add(self, name: str, step: int, meta: dict, seconds: float, tokens: int) -> None:
        meta |= {
            "loop": {"total_training_time": seconds},
            "tokens": tokens,
            "plan": {"flops_per_token": 10, "total_batch_size": tokens // step},
        }
        checkpoint.save(
            self.folder / name / "checkpoints",
            step,
            weights={"w": torch.ones(1)},
            optimizer=None,
            meta=meta,
            runtime=RUNTIME,
        )
        rows = [{"step": 0, "mem/peak_mib": 100.0 + step, "val/bpb": 4.0}, {"step": step, "val/bpb": 1.625}]
        (self.folder / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def step(self, name: str) -> int:
        return {"b": 10, "b-sft": 5, "b-rl": 3}[name]

    def reads(self, name: str, bpb: float, **changes) -> None:
        record = {
            "model": name,
            "step": self.step(name),
            "data": "books",
            "val": {"bpb": bpb, "bytes": 2000, "tokens": 500},
            "compressors": COMPRESSORS,
        }
        (self.folder / name / "eval_base.json").write_text(json.dumps(record | changes))

    def talks(self, name: str, tasks: dict, **changes) -> None:
        record = {"model": name, "step": self.step(name), "settings": SETTINGS, "tasks": tasks, "chatcore": None}
        (self.folder / name / "eval_chat.json").write_text(json.dumps(record | changes))

    def report(self, name: str, folder: Path, **flags) -> str:
        assert run(ReportConfig(model=name, output=str(folder / "out.md"), **flags)) == 0
        text = (folder / "out.md").read_text()
        assert text == (self.folder / name / "report.md").read_text()
        return text


@pytest.fixture
def runs(base_dir) -> Runs:
    return Runs(base_dir)


def test_the_chain_leads_back_to_the_base_run(runs):
    stages = chain(find_model("b-rl"))
    assert [(s.label, s.run, s.step, s.kind) for s in stages] == [
        ("base", "b", 10, "base"),
        ("sft", "b-sft", 5, "sft"),
        ("rl", "b-rl", 3, "rl"),
    ]
    assert [(s.tokens, s.flops, s.device_hours) for s in stages] == [
        (36000, 360000, 0.02),
        (7200, 72000, 0.005),
        (12, None, 0.02),
    ]


def test_the_page_holds_every_stage_its_effect_and_its_cost(runs, tmp_path, capsys):
    text = runs.report("b-rl", tmp_path, price_per_hour=10.0)
    assert text in capsys.readouterr().out
    lines = text.splitlines()
    for line in (
        "# Report of the run b-rl",
        "|  | baseline | base | after sft | after rl |",
        "| bits per byte (2 kB) | - | 1.5000 | 1.7500 (+0.2500) | 1.7500 (+0.0000) |",
        # 20 won of 20: 20/22 +- z sqrt((1 - (20/22)^2) / 22) = .9091 +- .1741, cut at 1; then all of them lost
        (
            "| sums test (n = 20) | - | 0.0 % | 100.0 % (+100.0 [+73.5, +100.0]) better | 0.0 % (-100.0 [-100.0,"
            " -73.5]) worse |"
        ),
        # 10 won: 11/22 - 1/22 +- z sqrt((12/22 - (10/22)^2) / 22) = .4545 +- .2432; then 10 won and 10 lost: 0 +- z
        # sqrt(1 / 22)
        (
            "| names test (n = 20) | 25.0 % | 0.0 % | 50.0 % (+50.0 [+21.1, +69.8]) better | 50.0 % (+0.0 [-41.8,"
            " +41.8]) unresolved |"
        ),
        "Replies of b-rl that called a tool: sums test 50.0 %, names test 0.0 %.",
        "| base | b@10 | 10 | 36,000 | 36 s | 1,000 | 3.6e+05 | 0.020 | 0.20 |",
        "| sft | b-sft@5 | 5 | 7,200 | 18 s | 400 | 7.2e+04 | 0.005 | 0.05 |",
        "| rl | b-rl@3 | 3 | 12 | 72 s | 0 | not known | 0.020 | 0.20 |",
        "| in all |  |  |  | 126 s |  |  | 0.045 | 0.45 |",
        "| text | books; 144 kB read (36,000 tokens) |",  # 2000 bytes in 500 tokens
        "| sft | fine-tuned on `sums@9:2,names:1` |",
        "| machine | 2 x a chip, bfloat16, torch 2.0; 1 x a chip, bfloat16, torch 2.0 |",
        "| peak memory | 110 MiB |",
        "| code | commit abc, def, Python 3.11 |",
        "> sums?",
        "  [calculator: 1+sums = 2] two",
        "  -- sums test, wrong; expected: 2",
        "  -- names test, wrong; expected: 2",
    ):
        assert line in lines, line
    assert (
        "pretrained on books, then fine-tuned on sums, names, then improved by its own replies to sums. 2.1 minutes of"
        " training" in text
    )
    assert [line for line in lines if line.startswith(("| **b", "| gzip", "| xz"))] == [
        "| **b** | 1.5000 |",
        "| **b-rl** | 1.7500 |",
        "| **b-sft** | 1.7500 |",
        "| xz -9e | 2.0000 |",
        "| gzip -9 | 2.5000 |",
    ]
    assert text.count("```bash") == 3 and "To measure it" not in text


@pytest.mark.fault("core D8")
def test_compiling_has_a_column_where_a_stage_was_compiled(runs):
    base, *others = chain(find_model("b-rl"))
    stages = [
        dataclasses.replace(base, meta=base.meta | {"loop": base.meta["loop"] | {"compile_seconds": 90.5}}),
        *others,
    ]
    assert cost_table(card(stages, 10.0)) == [
        "| stage | model | steps | tokens | training | compiling | tokens/s | FLOPs | device-hours | dollars |",
        "| " + " | ".join(["---"] * 10) + " |",
        "| base | b@10 | 10 | 36,000 | 36 s | 90 s | 1,000 | 3.6e+05 | 0.020 | 0.20 |",
        "| sft | b-sft@5 | 5 | 7,200 | 18 s | 0 s | 400 | 7.2e+04 | 0.005 | 0.05 |",
        "| rl | b-rl@3 | 3 | 12 | 72 s | 0 s | 0 | not known | 0.020 | 0.20 |",
        "| in all |  |  |  | 126 s | 90 s |  |  | 0.045 | 0.45 |",
    ]


def test_the_numbers_of_the_page_are_kept(runs, tmp_path):
    runs.report("b-sft", tmp_path)
    kept = json.loads((runs.folder / "b-sft" / "card.json").read_text())
    assert (kept["model"], kept["step"], kept["seed"], kept["compressors"]) == ("b-sft", 5, 7, COMPRESSORS)
    assert [stage["label"] for stage in kept["stages"]] == ["base", "sft"] and kept["stages"][0]["dollars"] is None
    bpb, sums, names = kept["metrics"]
    reason = bpb["stages"]["sft"]["effect"].pop("reason")
    assert (
        bpb["stages"]["sft"]["effect"] == {"on": "base", "difference": 0.25, "interval": None, "verdict": None}
        and "rows of text" in reason
    )
    change = sums["stages"]["sft"]["effect"]
    assert (sums["metric"], sums["n"], change["difference"], change["verdict"]) == ("sums@20:test", 20, 1.0, "better")
    assert change["interval"] == pytest.approx([0.7350, 1.0], abs=5e-5)
    assert (names["baseline"], names["stages"]["base"]["value"], names["stages"]["sft"]["value"]) == (0.25, 0.0, 0.5)


def test_what_an_earlier_stage_lacks_is_a_dash_and_is_named_with_the_command(runs, tmp_path):
    (runs.folder / "b" / "eval_chat.json").unlink()
    (runs.folder / "b" / "eval_base.json").write_text(json.dumps({"step": 4, "val": {}}))
    runs.talks("b-sft", {"names": task("names", HALF)}, settings={**SETTINGS, "max_tokens": 9})
    lines = runs.report("b-rl", tmp_path).splitlines()
    assert (
        "| sums test (n = 20) | - | - | - | 0.0 % |" in lines
        and "| bits per byte (2 kB) | - | - | 1.7500 | 1.7500 (+0.0000) |" in lines
    )
    said = [line for line in lines if "To measure it" in line]
    assert len(said) == 3
    assert (
        said[0].startswith("- b@10 has no bits per byte: eval_base.json is of step 4.")
        and "-m scripts.base_eval --model b@10 --modes bpb`" in said[0]
    )
    assert said[1].startswith("- b@10 was not asked the same: there is no eval_chat.json.")
    assert said[2].startswith("- b-sft@5 was not asked the same: max_tokens 9 instead of 48.")
    assert said[2].endswith(
        "-m scripts.chat_eval --model b-sft@5 --tasks sums@20:test,names --max-tokens 48 --max-problems 20`"
    )


def test_problems_or_texts_that_differ_are_not_compared(runs):
    runs.talks("b", {"names": task("names", WRONG[:5])})
    runs.reads("b", 1.5, data="other books")
    metrics = card(chain(find_model("b-sft")))["metrics"]
    assert [(row["metric"], row["n"], list(row["stages"])) for row in metrics] == [
        ("bits per byte", 2000, ["base"]),
        ("names", 5, ["base"]),
        ("bits per byte", 2000, ["sft"]),
        ("sums@20:test", 20, ["sft"]),
        ("names", 20, ["sft"]),
    ]
    assert not any("effect" in at for row in metrics for at in row["stages"].values())


def test_another_version_of_a_task_is_another_row(runs):
    runs.talks("b", {"names": task("names", WRONG) | {"version": 2}})
    runs.talks("b-sft", {"names": task("names", HALF)})
    assert effects_table(card(chain(find_model("b-sft"))))[3:] == [
        "| names test (n = 20), version 2 of the task | 0.0 % | - |",
        "| names test (n = 20), version 1 of the task | - | 50.0 % |",
    ]


def test_chatcore_is_a_row_without_a_verdict(runs):
    total = {"label": "ChatCORE-1 of 6", "value": 0.25, "interval": [0.2, 0.3], "lacks": ["mmlu"]}
    runs.talks("b", {}, chatcore=total)
    runs.talks("b-sft", {}, chatcore={**total, "value": 0.5})
    _, row = card(chain(find_model("b-sft")))["metrics"]
    assert row["metric"] == "ChatCORE-1 of 6"
    effect = {"on": "base", "difference": 0.25, "interval": None, "verdict": None, "reason": "a mean over tasks"}
    assert row["stages"]["sft"] == {"value": 0.5, "interval": [0.2, 0.3], "effect": effect}


@pytest.mark.fault("outer D17")
def test_bits_per_byte_have_an_interval_and_a_verdict(runs, tmp_path):
    """Of the same rows: by resampling them. Of other rows, or without: neither, and the reason."""
    rng = np.random.default_rng(3)
    sizes = rng.integers(50, 200, 300)
    nats = {"b": 1.1 * sizes + rng.normal(0, 12, 300)}
    # better by more than the noise of the differences, and less than that of the rows
    nats["b-sft"] = nats["b"] - 0.02 * sizes + rng.normal(0, 3, 300)
    nats["b-rl"] = nats["b-sft"] + rng.normal(0, 3, 300)

    def val(name: str) -> dict:
        value = nats[name].sum() / sizes.sum() / math.log(2)
        rows = [[float(x), int(n)] for x, n in zip(nats[name], sizes)]
        return {
            "bpb": value,
            "interval": [value - 0.1, value + 0.1],
            "bytes": int(sizes.sum()),
            "tokens": 500,
            "rows": rows,
        }

    def reads(name: str, found: dict, text: str = "t") -> None:
        record = {
            "model": name,
            "step": runs.step(name),
            "data": "books",
            "val": found,
            "bpb": {"settings": {"text": text, "tokens": 9, "dtype": "float32"}},
        }
        (runs.folder / name / "eval_base.json").write_text(json.dumps(record))

    for name in nats:
        reads(name, val(name))
    cells = card(chain(find_model("b-rl")))["metrics"][0]["stages"]
    assert cells["base"]["interval"] == pytest.approx([cells["base"]["value"] - 0.1, cells["base"]["value"] + 0.1])
    draws = rng.integers(0, 300, (4000, 300))
    for before, after, label, verdict in (("b", "b-sft", "sft", "better"), ("b-sft", "b-rl", "rl", "unresolved")):
        effect, d = cells[label]["effect"], nats[after] - nats[before]
        drawn = d[draws].sum(1) / sizes[draws].sum(1) / math.log(2)
        assert effect["verdict"] == verdict and effect["interval"] == pytest.approx(
            np.quantile(drawn, (0.025, 0.975)), abs=0.15 * np.ptp(effect["interval"])
        )
        assert effect["difference"] == pytest.approx(
            cells[label]["value"] - cells["base" if label == "sft" else "sft"]["value"]
        )
    other = val("b-sft")
    other["rows"][0][1], other["rows"][1][1] = other["rows"][0][1] + 1, other["rows"][1][1] - 1
    for found, text in ((other, "t"), (val("b-sft"), "u")):
        reads("b-sft", found, text)
        effect = card(chain(find_model("b-sft")))["metrics"][0]["stages"]["sft"]["effect"]
        assert (effect["interval"], effect["verdict"], effect["reason"]) == (
            None,
            None,
            "measured on other rows of text",
        )


@pytest.mark.fault("outer D17")
def test_eleven_seeds_and_more_have_intervals(tmp_path):
    """By the table of NIST/SEMATECH's handbook, 1.3.6.7.2, for n - 1 degrees of freedom."""
    spec = importlib.util.spec_from_file_location("nanolab_dev_seeds", SEEDS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for n, t in {2: 12.706, 3: 4.303, 5: 2.776, 10: 2.262, 11: 2.228, 12: 2.201, 31: 2.042, 101: 1.984}.items():
        values = [float(i) for i in range(n)]
        low, high = module.interval(values)
        assert (high - low) / 2 == pytest.approx(t * statistics.stdev(values) / math.sqrt(n), rel=3e-4)


@pytest.mark.fault("outer D16")
def test_the_strict_extract_is_a_row_of_its_own_and_older_files_have_none(runs):
    for name, strict in (("b", WRONG), ("b-sft", HALF)):
        row = task("gsm8k", RIGHT) | {
            "strict": {"accuracy": sum(strict) / 20, "interval": [0.0, 1.0], "outcomes": strict}
        }
        runs.talks(name, {"gsm8k": row, "sums": task("sums", RIGHT)})
    rows = {row["metric"]: row for row in card(chain(find_model("b-sft")))["metrics"]}
    assert set(rows) == {"bits per byte", "gsm8k", "gsm8k strict", "sums"}
    assert (
        rows["gsm8k strict"]["stages"]["sft"]["value"] == 0.5
        and rows["gsm8k strict"]["stages"]["sft"]["effect"]["verdict"] == "better"
    )
    assert (
        rows["gsm8k"]["stages"]["sft"]["value"] == 1.0
        and rows["gsm8k"]["stages"]["sft"]["effect"]["verdict"] == "unresolved"
    )


@pytest.mark.fault("N6")
@pytest.mark.parametrize(
    "file, content, said",
    [
        (
            "eval_chat.json",
            None,
            (
                "- b-rl@3 was asked nothing: there is no eval_chat.json. To measure it: .*scripts.chat_eval --model"
                " b-rl@3`"
            ),
        ),
        (
            "eval_chat.json",
            {"step": 2, "tasks": {}},
            (
                "- b-rl@3 was asked nothing: eval_chat.json is of step 2. To measure it: .*scripts.chat_eval --model"
                " b-rl@3`"
            ),
        ),
        (
            "eval_base.json",
            {"step": 2, "val": {}},
            (
                "- b-rl@3 has no bits per byte: eval_base.json is of step 2. To measure it: .*scripts.base_eval --model"
                " b-rl@3 "
            ),
        ),
    ],
)
def test_what_a_model_was_not_asked_is_said_and_the_rest_is_told(runs, tmp_path, file, content, said):
    path = runs.folder / "b-rl" / file
    path.unlink() if content is None else path.write_text(json.dumps(content))
    text = runs.report("b-rl", tmp_path)
    assert (
        re.search(said, text)
        and "| rl | b-rl@3 | 3 | 12 | 72 s |" in text
        and "| val/bpb: bits per byte of held-out text | 1.6250 | 1.6250 | 1.6250 |" in text
    )


@pytest.mark.fault("N6")
def test_without_any_evaluation_the_page_has_what_the_runs_recorded(runs, tmp_path):
    """metrics.jsonl and result.json, up to the step of the model: the last line is of a later one."""
    for name in ("b", "b-sft"):
        (runs.folder / name / "eval_base.json").unlink()
        (runs.folder / name / "eval_chat.json").unlink()
    with open(runs.folder / "b-sft" / "metrics.jsonl", "a") as file:
        file.write(
            "".join(
                json.dumps(row) + "\n"
                for row in (
                    {"step": 4, "train/loss": 2.5, "val/loss": 1.5},
                    {"step": 9, "val/loss": 7.5, "train/loss": 7.5},
                )
            )
        )
    (runs.folder / "b" / "result.json").write_text(
        json.dumps({"run": "b", "step": 10, "train/loss": 3.25, "val/bpb": 1.625})
    )
    text = runs.report("b-sft", tmp_path)
    for line in (
        "| train/loss: nats per token, smoothed | 3.2500 | 2.5000 |",
        "| val/bpb: bits per byte of held-out text | 1.6250 | 1.6250 |",
        "| val/loss: nats per supervised token of held-out conversations | - | 1.5000 |",
        "| base | b@10 | 10 | 36,000 | 36 s | 1,000 | 3.6e+05 | 0.020 |",
    ):
        assert line in text.splitlines(), line
    assert "7.5" not in text and text.count("To measure it") == 3
    text = runs.report("b", tmp_path)
    assert (
        "| 10 | 1.6250 |" in text
        and "| steps | 10 of 3,600 tokens |" in text
        and "| val/bpb: bits per byte of held-out text | 1.6250 |" in text
    )


@pytest.mark.fault("N2")
def test_the_page_shows_evaluations_of_several_settings_and_of_steps_that_were_not_the_last(runs, tmp_path):
    """sums was asked with 48 tokens, then names with 9; after that another step was evaluated, which is not the
    model's.
    """
    longer = {**task("sums:test", HALF), "settings": SETTINGS}
    short = {**task("names", RIGHT, baseline=0.25), "settings": {**SETTINGS, "max_tokens": 9}}
    other = {"spec": "sums@20:test", "model": "b-rl", "step": 2, **task("sums:test", RIGHT), "settings": SETTINGS}
    before = {"spec": "names", "model": "b-rl", "step": 3, **task("names", WRONG, baseline=0.25), "settings": SETTINGS}
    runs.talks(
        "b-rl",
        {"sums@20:test": longer, "names": short},
        settings={**SETTINGS, "max_tokens": 9},
        earlier=[before, other],
    )
    lines = runs.report("b-rl", tmp_path).splitlines()
    assert (
        "| names test (n = 20), max_tokens 48 | 25.0 % | 0.0 % | 50.0 % (+50.0 [+21.1, +69.8]) better | 0.0 % (-50.0"
        " [-69.8, -21.1]) worse |" in lines
    )
    assert "| names test (n = 20) | 25.0 % | - | - | 100.0 % |" in lines
    assert any(
        line.startswith("| sums test (n = 20), max_tokens 48 | - | 0.0 % | 100.0 % ") and "| 50.0 % (" in line
        for line in lines
    )
    rows = [
        {"spec": spec, "model": "b-rl", "step": 3, **row} for spec, row in (("sums@20:test", longer), ("names", short))
    ]
    runs.talks("b-rl", {"sums@20:test": {**task("sums:test", RIGHT), "settings": SETTINGS}}, step=2, earlier=rows)
    lines = runs.report("b-rl", tmp_path).splitlines()
    assert any(line.startswith("| sums test (n = 20)") and "| 50.0 % (" in line for line in lines) and any(
        line.startswith("| names test") for line in lines
    )


@pytest.mark.fault("N3", "N4")
def test_the_page_says_what_a_number_measures(runs, tmp_path):
    polite = {**task("smalltalk", RIGHT), "measures": "no tool called"}
    loss = {
        "task": "jsonl",
        "split": "test",
        "version": 2,
        "kind": "chat",
        "n": 10,
        "tokens": 99,
        "loss": 1.25,
        "interval": [1.0, 1.5],
        "too_long": 0,
        "cut": 0,
    }
    runs.talks("b-rl", {"smalltalk": polite, "jsonl=/home/me/a.jsonl": loss})
    lines = runs.report("b-rl", tmp_path).splitlines()
    assert "| smalltalk test (n = 20), no tool called | - | - | - | 100.0 % |" in lines
    assert "| jsonl=a.jsonl test (n = 10), nats per supervised token | - | - | - | 1.2500 |" in lines


def test_a_base_model_needs_bits_per_byte_alone(runs, tmp_path):
    text = runs.report("b", tmp_path)
    assert "What each stage brought" not in text and "Time and cost" not in text and "| **b** | 1.5000 |" in text
    runs.reads("b", 1.5, train={"bpb": 1.25, "bytes": 3000, "tokens": 500})
    text = runs.report("b", tmp_path, price_per_hour=1.0)
    assert (
        "On text it was trained on: 1.2500." in text
        and "books; 216 kB read (36,000 tokens)" in text
        and "| 0.020 | 0.02 |" in text
    )
    (runs.folder / "b" / "eval_base.json").write_text(json.dumps({"step": 10, "samples": []}))
    text = runs.report("b", tmp_path)
    assert "- b@10 has no bits per byte: eval_base.json is of step 10 and holds other modes. To measure it: " in text


def test_a_start_that_is_gone_is_named(runs):
    (runs.folder / "b" / "checkpoints" / "step_000010").rename(runs.folder / "b" / "checkpoints" / "step_000009")
    with pytest.raises(UserError, match="b@10, which b-sft started from, is not in"):
        run(ReportConfig(model="b-sft"))


def test_a_price_below_nothing_is_refused(runs):
    with pytest.raises(UserError, match="--price-per-hour is -1; expected at least 0"):
        run(ReportConfig(model="b", price_per_hour=-1.0))


def test_a_second_stage_of_a_kind_has_its_own_label(runs):
    meta = checkpoint.load_meta(runs.folder / "b-sft" / "checkpoints" / "step_000005")
    runs.add("more", 2, {**meta, "origin": {"name": "b-sft@5"}}, 1.0, 10)
    stages = chain(find_model("more"))
    assert [stage.label for stage in stages] == ["base", "sft", "sft2"]
    assert [script for _, script, _ in unmeasured(stages)] == ["base_eval", "chat_eval"]


def test_exchanges_are_the_first_ones_and_at_most_eight():
    tasks = {f"t{i}": task(f"t{i}", RIGHT) for i in range(10)}
    questions = [line for line in exchanges(tasks) if line.startswith("> ")]
    assert questions == [f"> t{i}?" for i in range(8)]
    two = [line for line in exchanges({"t0": tasks["t0"], "t1": tasks["t1"]}) if line.startswith("> ")]
    assert two == ["> t0?", "> t0 again?", "> t1?", "> t1 again?"]


def test_what_a_model_says_cannot_leave_its_line():
    assert cropped("a\n```\n\n b\x1b[31m") == "a / ``` / b\ufffd[31m"
    assert len(cropped("long " * 100)) == 240 and cropped("long " * 100).endswith("...")


@pytest.mark.parametrize(
    "spec, said",
    [
        ("sums@20:hard", "sums hard"),
        ("names", "names test"),
        ("jsonl=my.file@3", "jsonl=my.file test"),
        ("a@b:x", "a@b x"),
    ],
)
def test_titles(spec, said):
    assert title(spec) == said


def seeds(*arguments) -> tuple[int, list[str], str]:
    done = warm.python(SEEDS, *arguments)
    return done.returncode, done.stdout.splitlines(), done.stderr


@pytest.mark.slow
def test_cards_of_several_seeds_make_a_table(tmp_path):
    """Effects .2, .3, .4: .3 +- 4.303 x .1 / sqrt 3 = .3 +- .2484."""
    paths = []
    for seed, value in enumerate((0.5, 0.6, 0.7)):
        at = {
            "base": {"value": 0.3, "called": 0.0},
            "sft": {"value": value, "called": seed / 10, "effect": {"difference": value - 0.3}},
        }
        rows = [{"metric": "sums:test", "unit": "share", "n": 20, "stages": at}]
        rows += [
            {
                "metric": "bits per byte",
                "unit": "bits per byte",
                "n": 2000 + seed,
                "stages": {"sft": {"value": 1.5 + seed}},
            }
        ]
        stages = [{"label": "base"}, {"label": "sft"}]
        paths.append(tmp_path / f"{seed}.json")
        paths[-1].write_text(
            json.dumps({"model": "m", "seed": seed, "stages": stages, "metrics": rows, "compressors": COMPRESSORS})
        )
    code, lines, _ = seeds(
        *paths, "--goal", "sums:test>=0.6", "--goal", "sums:test called<=0.1", "--goal", "bits per byte<gzip -9"
    )
    assert code == 1
    assert lines[:4] == [
        "| 3 seeds: 0, 1, 2 | base | sft |",
        "| --- | --- | --- |",
        "| sums:test (%, n = 20) | 30.0 [30.0, 30.0] | 60.0 [50.0, 70.0]<br>+30.0 (+5.2 to +54.8) |",
        "| bits per byte | - | 2.5000 [1.5000, 3.5000] |",
    ]
    assert lines[-3:] == [
        "- sums:test>=0.6: seed 0 missed, seed 1 reached, seed 2 reached",
        "- sums:test called<=0.1: seed 0 reached, seed 1 reached, seed 2 missed",
        "- bits per byte<gzip -9: seed 0 reached, seed 1 missed, seed 2 missed",
    ]
    assert seeds(*paths, "--goal", "sums:test>0.49")[0] == 0
    code, _, error = seeds(paths[0], "--goal", "sms>=1")
    assert code == 1 and "m has no metric 'sms'; there are: sums:test, bits per byte" in error
