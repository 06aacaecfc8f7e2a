"""A signal in the midst of an evaluation: left within a batch, nothing of it recorded, made again by the run that goes
on.
"""

import importlib.util
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

from nanolab.inference.engine import Engine
from nanolab.inference.request import Request
from nanolab.model.config import GPTConfig
from nanolab.model.gpt import GPT
from nanolab.records import checkpoint
from nanolab.records.models import read_metrics, runs_dir
from nanolab.runtime import Runtime, base_dir
from nanolab.stages import pretrain as stage
from nanolab.stages.config import BaseTrainConfig, RLConfig, SFTConfig
from nanolab.training.signals import StopRequest
from scripts import chat_rl, chat_sft

spec = importlib.util.spec_from_file_location("nanolab_tests_pretrained", Path(__file__).with_name("pretrained.py"))
pretrained = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pretrained)
ALONE = Runtime(torch.device("cpu"), torch.float32)
B = dict(
    depth=2,
    aspect_ratio=32,
    head_dim=32,
    max_seq_len=64,
    device_batch_size=2,
    total_batch_size=512,
    num_iterations=5,
    warmup_steps=2,
    eval_tokens=1024,
    sample_every=-1,
    device_type="cpu",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOLAB_BASE_DIR", str(folder))
        patch.setenv("NANOLAB_DTYPE", "float32")
        pretrained.pretrain("plain", pretrained.write_text(folder / "text"), ALONE)
    (folder / "val").mkdir()
    (folder / "val" / "val.txt").write_text("a crow said that the cheese was sour. " * 400)
    return folder


@pytest.fixture
def plain(made, monkeypatch, base_dir):
    """A finished base run, and its text."""
    monkeypatch.setenv("NANOLAB_DTYPE", "float32")
    shutil.copytree(made, base_dir)


def base(name: str, rt: Runtime | None = None, resume: bool = False, **flags) -> None:
    cfg = BaseTrainConfig(
        **B
        | flags
        | {
            "run": name,
            "resume": resume,
            "data_dir": str(base_dir() / "text"),
            "val_data": str(base_dir() / "val"),
            "tokenizer": str(base_dir() / "runs" / "plain" / "tokenizer"),
        }
    )
    stage.pretrain(cfg, rt)


def at_call(patch, owner, name: str, nth: int, counts=lambda *args, **kwargs: True) -> list[int]:
    """At the nth call of the method SIGTERM comes. The list grows by one for each call."""
    calls, method = [], getattr(owner, name)

    def called(*args, **kwargs):
        if counts(*args, **kwargs):
            calls.append(1)
            if len(calls) == nth:
                os.kill(os.getpid(), signal.SIGTERM)
        return method(*args, **kwargs)

    patch.setattr(owner, name, called)
    return calls


def measuring(model, *args, reduction: str = "mean", **kwargs) -> bool:
    return reduction == "none"


def story(name: str) -> list[tuple]:
    return [
        tuple(
            row.get(key) for key in ("step", "train/loss", "val/bpb", "val/loss", "eval/pass@1", "chatcore/arithmetic")
        )
        for row in read_metrics(runs_dir() / name)
    ]


def interrupted(
    train, name: str, patch, owner, method: str, nth: int, step: int, counts=lambda *args, **kwargs: True
) -> None:
    """Train to the end once undisturbed; once with a signal in the midst of the evaluation at `step`, then resumed."""
    train("whole")
    with patch.context() as inside:
        calls = at_call(inside, owner, method, nth, counts)
        with pytest.raises(SystemExit) as left:
            train(name)
    assert left.value.code == 143 and len(calls) == nth, "what was under way at the signal was the last"
    assert [s for s, _ in checkpoint.steps(runs_dir() / name / "checkpoints")][-1] == step
    assert [row["step"] for row in read_metrics(runs_dir() / name)] == list(range(step)), (
        "nothing of this step is on record"
    )
    train(name, resume=True)
    assert story(name) == story("whole")


@pytest.mark.slow
@pytest.mark.fault("F17")
@pytest.mark.parametrize("step", [0, 2, 5])
def test_bits_per_byte_are_left_within_a_batch(plain, monkeypatch, step):
    """8 batches to an evaluation, at the steps 0, 2, 4 and 5."""
    nth = {0: 2, 2: 8 + 3, 5: 3 * 8 + 1}[step]
    interrupted(
        lambda name, resume=False: base(name, resume=resume, eval_every=2),
        "cut",
        monkeypatch,
        GPT,
        "forward",
        nth,
        step,
        measuring,
    )


@pytest.mark.slow
@pytest.mark.fault("F17")
def test_samples_are_left_within_a_token(plain, monkeypatch, capsys):
    interrupted(
        lambda name, resume=False: base(name, resume=resume, eval_every=-1, sample_every=3),
        "cut",
        monkeypatch,
        Engine,
        "step",
        4,
        3,
    )


@pytest.mark.slow
@pytest.mark.fault("F17")
def test_held_out_loss_of_fine_tuning_is_left_within_a_batch(plain, monkeypatch, base_dir):
    def train(name, resume=False):
        cfg = SFTConfig(
            model="plain",
            run=name,
            tasks="arithmetic@200",
            num_iterations=4,
            eval_every=2,
            eval_tokens=2048,
            device_batch_size=2,
            max_seq_len=64,
            eval_text=False,
            device_type="cpu",
            resume=resume,
        )
        chat_sft.run(cfg)

    interrupted(train, "cut", monkeypatch, GPT, "forward", 2, 0, measuring)


@pytest.mark.slow
@pytest.mark.fault("F17")
def test_questions_of_fine_tuning_are_left_within_a_token(plain, monkeypatch):
    def train(name, resume=False):
        cfg = SFTConfig(
            model="plain",
            run=name,
            tasks="arithmetic@200",
            num_iterations=2,
            eval_every=-1,
            chatcore_every=1,
            chatcore_tasks="arithmetic",
            chatcore_max_sample=3,
            device_batch_size=2,
            max_seq_len=64,
            eval_text=False,
            device_type="cpu",
            resume=resume,
        )
        chat_sft.run(cfg)

    interrupted(train, "cut", monkeypatch, Engine, "step", 3, 0)


@pytest.mark.slow
@pytest.mark.fault("F17")
def test_held_out_replies_of_reinforcement_are_left_within_a_token(plain, monkeypatch):
    chat_sft.run(
        SFTConfig(
            model="plain",
            run="talks",
            tasks="arithmetic@50",
            num_iterations=1,
            eval_every=-1,
            eval_text=False,
            device_batch_size=2,
            max_seq_len=64,
            device_type="cpu",
        )
    )

    def train(name, resume=False):
        cfg = RLConfig(
            model="talks",
            run=name,
            task="arithmetic@20",
            examples_per_step=2,
            num_samples=2,
            device_batch_size=2,
            max_new_tokens=8,
            num_iterations=2,
            eval_every=2,
            eval_examples=2,
            eval_samples=2,
            log_every=1,
            device_type="cpu",
            resume=resume,
        )
        chat_rl.run(cfg)

    interrupted(train, "cut", monkeypatch, Engine, "step", 3, 0)


def on_ranks(runtime, folder: str, resume: bool):
    """(exit code, batches measured). Rank 1 alone is asked, in its second batch of the evaluation at step 2."""
    os.environ["NANOLAB_BASE_DIR"] = folder
    with pytest.MonkeyPatch.context() as patch:
        calls = at_call(patch, GPT, "forward", 4 + 2 if runtime.rank == 1 and not resume else -1, measuring)
        try:
            base("ranks", runtime, resume, eval_every=2)
        except SystemExit as left:
            return left.code, len(calls)
        return 0, len(calls)


@pytest.mark.slow
@pytest.mark.fault("F17")
def test_ranks_leave_an_evaluation_together(plain, base_dir, run_ranks):
    assert run_ranks(on_ranks, 2, str(base_dir), False) == [(143, 6), (143, 6)]
    assert [s for s, _ in checkpoint.steps(runs_dir() / "ranks" / "checkpoints")] == [2]
    assert [code for code, _ in run_ranks(on_ranks, 2, str(base_dir), True)] == [0, 0]
    assert [row["step"] for row in read_metrics(runs_dir() / "ranks") if "val/bpb" in row] == [0, 2, 4, 5]


def replies(runtime, asked: int):
    """Whether an evaluation with unequal shares was left, on each rank."""
    from nanolab.data.tokenizer import Tokenizer
    from nanolab.evals.chat import evaluate_sampled
    from nanolab.runtime import Stopped
    from tasks import build

    tokenizer = Tokenizer.train(["ab"] * 2, 265)
    model = GPT(
        GPTConfig(
            sequence_len=128, vocab_size=265, n_layer=1, n_head=1, n_embd=32, window_pattern="L", value_embeds=False
        )
    ).eval()
    model.init_weights(0)
    found, engine = [], Engine(model, tokenizer, runtime)
    try:
        evaluate_sampled(
            engine,
            build("arithmetic@5", "test"),
            range(5),
            Request(max_tokens=4, temperature=0.0),
            batch_size=1,
            stop=lambda: runtime.rank == asked,
        )
        found.append("done")
    except Stopped:
        found.append("left")
    return found


@pytest.mark.slow
def test_unequal_shares_of_replies_are_left_on_every_rank(run_ranks):
    assert run_ranks(replies, 2, 1) == [["left"], ["left"]] and run_ranks(replies, 2, 7) == [["done"], ["done"]]


def test_a_hangup_that_was_ignored_stays_ignored():
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.number == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
