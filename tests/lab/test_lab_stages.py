"""Studies of fine-tuning and of reinforcement learning: real runs, found again, equal to those that the stage makes
when it is called by itself."""

import json
import os
from pathlib import Path

import pytest
import torch
import warm

from nanolab.cli import UserError
from nanolab.data.tokenizer import Tokenizer
from nanolab.lab import runner
from nanolab.lab.results import read_results
from nanolab.lab.study import read_study, study_of, to_toml
from nanolab.records.models import read_metrics, runs_dir
from nanolab.runtime import Runtime
from nanolab.stages.config import BaseTrainConfig, RLConfig, SFTConfig
from nanolab.stages.pretrain import pretrain
from nanolab.stages.rl import rl
from nanolab.stages.sft import sft

ALONE = Runtime(torch.device("cpu"), torch.float32)
SHAPE = {"depth": 1, "aspect_ratio": 32, "head_dim": 32, "max_seq_len": 128, "device_batch_size": 2, "lr_scale": 0.1}
SHAPE |= {"total_batch_size": 256, "num_iterations": 4, "eval_every": -1, "sample_every": -1, "log_every": -1}
TUNED = {"model": "b", "num_iterations": 3, "eval_tokens": 256, "eval_every": 3, "log_every": -1, "device_type": "cpu"}
DRAWN = {"model": "b-sft", "task": "arithmetic@16", "num_iterations": 2, "examples_per_step": 2, "num_samples": 2}
DRAWN |= {"device_batch_size": 4, "max_new_tokens": 8, "eval_every": 2, "eval_examples": 4, "eval_samples": 2}
DRAWN |= {"log_every": -1, "device_type": "cpu"}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A base directory with the base model b and b-sft, which was fine-tuned from it."""
    folder = tmp_path_factory.mktemp("stages")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOLAB_BASE_DIR", str(folder / "base"))
        patch.setenv("NANOLAB_DTYPE", "float32")
        (folder / "text").mkdir()
        for i in range(12):
            text = f"Document {i}. " + "The cat sat and looked at the mat, 3 + 4 = 7. " * (i + 1)
            (folder / "text" / f"{i:02d}.txt").write_text(text)
        texts = [path.read_text() for path in (folder / "text").iterdir()]
        Tokenizer.train(texts, 290).save(folder / "base" / "tokenizer")
        pretrain(BaseTrainConfig(run="b", data_dir=str(folder / "text"), **SHAPE), ALONE)
        sft(SFTConfig(run="b-sft", tasks="arithmetic@32", **TUNED), ALONE)
        yield folder


@pytest.fixture(autouse=True)
def of_the_file(home, monkeypatch):
    monkeypatch.setenv("NANOLAB_BASE_DIR", str(home / "base"))
    monkeypatch.setenv("NANOLAB_DTYPE", "float32")


def typed(flags: dict) -> str:
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in flags.items())


def study_file(home: Path, name: str, stage: str, flags: str, arms: dict[str, str], **changes) -> Path:
    values = {"question": "Which?", "baseline": "plain", "matters": 0.01, "results": name, "stage": stage}
    path = home / f"{name}.toml"
    path.write_text(to_toml(study_of(values | {"flags": flags, "arms": arms} | changes, name)))
    return path


def lab(*argv: object) -> dict:
    done = warm.python("-m", "scripts.lab", *argv, env=dict(os.environ))
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def made(home: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in (home / "base" / "runs").glob("lab-*/result.json")}


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "sft", "rl"])
def test_a_study_of_a_stage_makes_the_runs_that_the_stage_makes(home, stage):
    """Equal to those of a call, which measures the untrained weights too: the lab's pretraining does not."""
    pretraining = SHAPE | {"data_dir": home / "text", "eval_every": 4, "eval_tokens": 256, "num_iterations": 4}
    make, config, flags, slow = {
        "pretrain": (pretrain, BaseTrainConfig, pretraining, {"lr_scale": 0.01}),
        "sft": (sft, SFTConfig, TUNED | {"tasks": "arithmetic@32"}, {"init_lr_frac": 0.01}),
        "rl": (rl, RLConfig, DRAWN, {"init_lr_frac": 0.01}),
    }[stage]
    arms = {"plain": "", "same": "", "slow": typed(slow)}
    before = made(home)
    path = study_file(home, stage, stage, typed(flags), arms, match="steps")
    document = lab("run", path)
    metric = {"pretrain": "val/bpb", "sft": "val/loss", "rl": "eval/pass@1"}[stage]
    assert (document["metric"], document["arms"]["same"]["verdict"]) == (metric, "identical")
    runs = {name: at for name, at in made(home).items() if name not in before}
    assert len(runs) == 6

    _, rows = read_results(home / stage)
    [row] = [row for row in rows if (row["arm"], row["seed"]) == ("slow", 43)]
    flags = {name: str(value) if isinstance(value, Path) else value for name, value in (flags | slow).items()}
    alone = make(config(run=f"{stage}-alone", seed=43, threads=1, **flags))
    assert {name: row["result"][name] for name in (metric, "train/loss", "tokens")} == {
        name: alone[name] for name in (metric, "train/loss", "tokens")
    }
    if stage == "pretrain":  # a run may go on with the flag or without
        again = config(run="pretrain-alone", seed=43, threads=1, resume=True, eval_first=False, **flags)
        assert make(again)[metric] == alone[metric]
    steps = [row["step"] for row in read_metrics(runs_dir() / f"{stage}-alone") if metric in row]
    assert steps == [0, flags["num_iterations"]]
    assert [step for step, _ in row["curve"]] == steps[stage == "pretrain" :]
    assert row["curve"][-1][1] == alone[metric] and ("model" in row) == (stage != "pretrain")
    lab("run", path)
    assert {name: at for name, at in made(home).items() if name not in before} == runs


@pytest.mark.slow
def test_another_model_of_the_same_name_is_another_run(home):
    path = study_file(home, "model", "rl", typed(DRAWN), {"plain": "", "more": "--kl 0.1"})
    study = read_study(path)

    def keys() -> list[str]:
        preview = runner.preview_of(study.configs(""), 1, 1, study.metric)
        return [run.key for run in runner.plan_runs(study, study.configs(""), preview)]

    first = keys()
    assert keys() == first and len(set(first)) == 6
    [manifest] = (home / "base" / "runs" / "b-sft" / "checkpoints").glob("*/manifest.json")
    text = manifest.read_text()
    values = json.loads(text)
    values["files"]["optimizer_0.safetensors"] = {"bytes": 1, "sha256": "0" * 64}  # not read by find_model
    manifest.write_text(json.dumps(values))
    try:
        assert not set(first) & set(keys())
    finally:
        manifest.write_text(text)


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage,arms,fact",
    [
        ("sft", {"plain": "", "other": "--tasks arithmetic@16"}, "validation"),
        ("sft", {"plain": "", "longer": "--num-iterations 4"}, "tokens"),
        ("rl", {"plain": "", "other": "--eval-examples 2"}, "validation"),
        ("rl", {"plain": "", "wider": "--num-samples 4"}, "tokens"),
    ],
)
def test_arms_that_differ_in_what_is_held_equal_are_refused(home, stage, arms, fact):
    flags = typed(TUNED) + " --tasks arithmetic@32" if stage == "sft" else typed(DRAWN)
    study = read_study(study_file(home, "unequal", stage, flags, arms))
    with pytest.raises(UserError) as error:
        runner.check_equal(study, runner.preview_of(study.configs(""), 1, 1, study.metric).arms)
    assert (error.value.code, error.value.values["fact"]) == ("arms-unequal", fact)


@pytest.mark.slow
def test_a_model_that_cannot_answer_is_refused_before_the_first_run(home):
    study = read_study(study_file(home, "base", "rl", typed(DRAWN | {"model": "b"}), {"plain": "", "more": "--kl 0.1"}))
    with pytest.raises(UserError, match="base model"):
        runner.preview_of(study.configs(""), 1, 1, study.metric)
