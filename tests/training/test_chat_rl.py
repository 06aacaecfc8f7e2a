"""chat_rl from end to end: a model that calls the calculator, a real task, the records, resuming, and what people
mistype.
"""

import json
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from nanolab.cli import UserError, to_json
from nanolab.data.chat import render
from nanolab.data.tokenizer import Tokenizer
from nanolab.model import gpt
from nanolab.model.config import GPTConfig
from nanolab.model.gpt import GPT
from nanolab.records import checkpoint
from nanolab.records.models import load_model, read_metrics, runs_dir
from nanolab.runtime import Runtime
from nanolab.stages.config import BaseTrainConfig, RLConfig, SFTConfig
from scripts.chat_rl import run
from tasks import build

ALONE = Runtime(torch.device("cpu"), torch.float32)
CONFIG = GPTConfig(
    sequence_len=256, vocab_size=265, n_layer=1, n_head=1, n_embd=32, window_pattern="L", value_embeds=False
)
CFG = RLConfig(
    task="arithmetic@64",
    reward="correct=1,format=0.5,tool=-0.25:0.125",
    examples_per_step=2,
    num_samples=4,
    device_batch_size=4,
    max_new_tokens=24,
    num_iterations=4,
    eval_every=4,
    eval_examples=3,
    eval_samples=3,
    save_every=1,
    keep="all",
    device_type="cpu",
)


def changed(**flags) -> RLConfig:
    return RLConfig(**(to_json(CFG) | flags))


@pytest.fixture(scope="module")
def calling(tmp_path_factory) -> Path:
    """The run directory of a model that answers every sum with a call of the tool, as fine-tuning would have left
    it.
    """
    torch.manual_seed(0)
    tokenizer, model, task = Tokenizer.train(["ab"] * 2, 265), GPT(CONFIG), build("arithmetic@32", "train")
    model.init_weights(1)
    calls = [("2+3", "5"), ("9*9", "81")]
    replies = [
        [{"type": "python", "text": call}, {"type": "python_output", "text": value}, {"type": "text", "text": "So."}]
        for call, value in calls
    ]
    rows = [
        render(tokenizer, [task.example(i).messages[0], {"role": "assistant", "content": replies[i % 2]}])
        for i in range(32)
    ]
    T = max(len(r.ids) for r in rows)
    ids, mask = (torch.tensor([x + [0] * (T - len(x)) for x in column]) for column in zip(*rows))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(60):
        part = slice(step % 2 * 16, step % 2 * 16 + 16)
        loss = model(ids[part, :-1], torch.where(mask[part, 1:] > 0, ids[part, 1:], -1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("calling") / "toy-sft"
    origin = {
        "name": "toy@4",
        "pretraining": to_json(BaseTrainConfig()),
        "plan": {"recipe": "dial", "batch_scale": 0.1},
    }
    meta = {
        "run": "toy-sft",
        "kind": "sft",
        "origin": origin,
        "config": to_json(SFTConfig()),
        "plan": {},
        "loop": {"total_training_time": 1.0},
        "tokens": 100,
        "model_config": to_json(CONFIG),
        "tokenizer_hash": tokenizer.hash,
    }
    checkpoint.save(folder / "checkpoints", 60, weights=model.state_dict(), optimizer=None, meta=meta, runtime=ALONE)
    tokenizer.save(folder / "tokenizer")
    (folder / "result.json").write_text(json.dumps({"kind": "sft"}))
    return folder


@pytest.fixture(autouse=True)
def world(calling, base_dir, monkeypatch):
    monkeypatch.setenv("NANOLAB_DTYPE", "float32")
    shutil.copytree(calling, base_dir / "runs" / "toy-sft")


@pytest.mark.slow
def test_a_run_leaves_its_records(capsys):
    run(CFG)
    folder, said = runs_dir() / "toy-sft-rl", capsys.readouterr().out
    for part in (
        "from toy-sft@60",
        "arithmetic@64 train, 64 examples",
        "reinforce: mean advantages, token normaliser",
        "rl/reward",
        "eval/pass@1",
    ):
        assert part in said
    metrics = read_metrics(folder)
    assert [row["step"] for row in metrics] == [0, 1, 2, 3, 4]
    passes = ["eval/pass@1", "eval/pass@2", "eval/pass@3"]
    assert [sorted(k for k in row if k.startswith("eval/")) for row in metrics] == [passes, [], [], [], passes]
    assert {"rl/reward", "rl/part/correct", "rl/part/tool", "rl/mixed", "rl/clipped", "train/loss"} <= set(
        metrics[0]
    ) and "rl/kl" not in metrics[0]
    rows = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
    assert len(rows) == 4 * 2 * 4 and [row["step"] for row in rows[::8]] == [0, 1, 2, 3]
    good = [
        row
        for row in rows
        if row["reply"] == "<|python_start|>2+3<|python_end|><|output_start|>5<|output_end|>So.<|assistant_end|>"
    ]
    assert good, "the tool was called, and what it said was put in"
    for row in good:
        assert row["tokens"] == 5 + 4 and row["ended"] and row["parts"]["format"] == 1.0, (
            "nobody trains on what the tool said"
        )
        assert row["reward"] == row["parts"]["correct"] + 0.5 - 0.125 * row["parts"]["tool"]
    model, tokenizer, meta = load_model("toy-sft-rl", ALONE)
    assert (meta["kind"], meta["step"], meta["origin"]["name"], model.config) == ("rl", 4, "toy-sft@60", CONFIG)
    assert (folder / "checkpoints" / "step_000004" / "optim_rank0.safetensors").exists()
    assert json.loads((folder / "result.json").read_text())["kind"] == "rl"


@pytest.mark.slow
def test_activation_checkpointing_changes_no_bit(monkeypatch):
    again = Mock(wraps=gpt.checkpoint)
    monkeypatch.setattr(gpt, "checkpoint", again)
    files = []
    for on in (False, True):
        run(changed(run=f"recomputed-{on}", num_iterations=1, eval_every=-1, activation_checkpointing=on))
        assert again.called == on
        files.append(
            (runs_dir() / f"recomputed-{on}" / "checkpoints" / "step_000001" / "model.safetensors").read_bytes()
        )
    assert files[0] == files[1]


@pytest.mark.slow
def test_rates_are_those_of_pretraining(capsys):
    """Its flags, its factor of the batch, and --init-lr-frac of that, falling to zero."""
    run(changed(eval_every=-1, init_lr_frac=0.5, matrix_lr=0.5))
    assert [row["train/lrm"] for row in read_metrics(runs_dir() / "toy-sft-rl")] == [0.5, 0.375, 0.25, 0.125]
    meta = checkpoint.load_meta(runs_dir() / "toy-sft-rl" / "checkpoints" / "step_000004")
    assert meta["plan"]["batch_scale"] == 0.1 and meta["plan"]["recipe"] == "dial"


def test_resumed_it_goes_on_without_the_model_it_came_from_unless_that_is_needed(base_dir):
    def weights(name: str) -> dict:
        return checkpoint.load_weights(runs_dir() / name / "checkpoints" / "step_000004")

    def cut(name: str, step: int) -> None:
        shutil.copytree(runs_dir() / "whole", runs_dir() / name)
        (runs_dir() / name / "result.json").unlink()
        for later in range(step + 1, 5):
            shutil.rmtree(runs_dir() / name / "checkpoints" / f"step_{later:06d}")

    flags = dict(algorithm="grpo", updates_per_batch=2, eval_every=-1, reward="format=1", init_lr_frac=5.0)
    run(changed(run="whole", **flags))
    assert any(row["train/loss"] for row in read_metrics(runs_dir() / "whole"))
    cut("with", 3)
    run(changed(run="with", resume=True, **flags))
    assert all(torch.equal(value, weights("with")[name]) for name, value in weights("whole").items())
    run(changed(run="with", resume=True, **flags))  # finished: nothing to do
    cut("without", 3)
    shutil.rmtree(runs_dir() / "toy-sft")
    with pytest.raises(UserError, match="toy-sft"):
        run(changed(run="without", resume=True, **flags))  # the divergence is from it


@pytest.mark.parametrize(
    "flags,said",
    [
        (
            dict(reward="corect=1"),
            "--reward names 'corect'; this task gives correct, format, tool; did you mean correct?",
        ),
        (dict(task="aritmetic"), "did you mean arithmetic"),
        (dict(split="trian"), "did you mean train"),
        (dict(eval_split="tset"), "did you mean test"),
        (dict(tool="calculater"), "did you mean --tool calculator"),
        (dict(algorithm="ppo"), "'ppo' is unknown; expected one of reinforce, grpo, dr_grpo"),
        (dict(num_samples=1), "--num-samples is 1"),
        (dict(device_batch_size=3), "try --device-batch-size 2"),
        (dict(max_new_tokens=250), "not one of 64 prompts has at most 6 tokens"),
        (dict(model="tyo-sft"), "no model 'tyo-sft'"),
    ],
)
def test_mistakes_are_named_before_anything_is_trained(flags, said):
    with pytest.raises(UserError) as error:
        run(changed(**flags))
    assert said in str(error.value)
    assert not list(runs_dir().glob("*-rl/checkpoints/*")) and not list(runs_dir().glob("*-rl/rollouts.jsonl"))
    run(changed(num_iterations=1, eval_every=-1))  # and the name is still free


def test_plain_chat_has_no_reward(tmp_path):
    (tmp_path / "chat.jsonl").write_text(
        "".join(
            json.dumps([{"role": "user", "content": f"hello {i}"}, {"role": "assistant", "content": "hi"}]) + "\n"
            for i in range(20)
        )
    )
    with pytest.raises(UserError, match="plain chat and has no answers"):
        run(changed(task=f"jsonl={tmp_path / 'chat.jsonl'}", eval_every=-1))


def test_a_base_model_is_refused():
    path = runs_dir() / "toy-sft" / "checkpoints" / "step_000060"
    weights, meta = checkpoint.load_weights(path), checkpoint.load_meta(path)
    tokenizer = runs_dir() / "toy-sft" / "tokenizer"
    checkpoint.save(
        runs_dir() / "toy" / "checkpoints",
        4,
        weights=weights,
        optimizer=None,
        meta=meta | {"kind": "base"},
        runtime=ALONE,
    )
    shutil.copytree(tokenizer, runs_dir() / "toy" / "tokenizer")
    with pytest.raises(UserError, match="toy is a base model: .*python -m scripts.chat_sft --model toy"):
        run(changed(model="toy"))


@pytest.mark.fault("F8")
def test_a_dry_run_prints_the_plan_and_writes_nothing(base_dir, capsys):
    from nanolab.cli import parse

    before = sorted(p for p in base_dir.rglob("*") if p.name != "machine.json")
    flags = (
        "--model toy-sft --run dry --dry-run --task arithmetic@64 --examples-per-step 2 --num-samples 4"
        " --device-batch-size 4 --max-new-tokens 24".split()
    )
    assert run(parse(RLConfig, [*flags, "--warmup-steps", "99", "--eval-every", "-1", "--device-type", "cpu"])) == 0
    said = capsys.readouterr().out
    assert (
        "rollouts        2 prompts x 4 replies" in said
        and "horizon         32 steps" in said
        and said.endswith("dry run: nothing was trained\n")
    )
    assert "warm-up over 99 steps" in said and "warning" in said
    assert sorted(p for p in base_dir.rglob("*") if p.name != "machine.json") == before
    with pytest.raises(UserError, match="--reward names"):
        run(changed(dry_run=True, reward="corect=1"))


@pytest.mark.fault("F8")
@pytest.mark.parametrize("every", [-1, 2])
def test_rollouts_are_told_as_often_as_steps_are_logged(every, capsys):
    run(changed(run=f"told{every}", log_every=every, eval_every=-1))
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("rollout 0")]
    assert [int(line.split()[1]) for line in told] == ([] if every == -1 else [1, 3])


@pytest.mark.fault("F5")
def test_a_rate_that_the_models_recipe_does_not_read_is_refused():
    from nanolab.cli import parse

    for flag in ("--learning-rate", "--learning-rate=1"):
        line = [
            "--model",
            "toy-sft",
            "--run",
            "rate",
            "--task",
            "arithmetic@64",
            "--device-type",
            "cpu",
            flag,
            *(["1e-6"] if "=" not in flag else []),
        ]
        with pytest.raises(UserError) as error:
            run(parse(RLConfig, line))
        assert (error.value.code, error.value.values) == ("flag-not-read", {"flag": "learning_rate", "by": "dial"})
