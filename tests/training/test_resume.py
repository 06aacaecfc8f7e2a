"""Runs that are killed or asked to stop, and go on as if nothing had been.

Run as a script this file forks trainings, kills or interrupts them, and tells what became of them.
"""

import functools
import hashlib
import importlib.util
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import warm

from nanolab.data.packing import PackedBatches
from nanolab.data.prefetch import Prefetch
from nanolab.data.tokenizer import Tokenizer
from nanolab.records import checkpoint
from nanolab.records.models import read_metrics, runs_dir
from nanolab.training.fit import Every, Hook, at_steps, fit

spec = importlib.util.spec_from_file_location("nanolab_tests_toy", Path(__file__).with_name("toy.py"))
toy = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toy)


class Fables:
    """Endless documents of very different lengths."""

    name, n_documents = "fables", 40

    def get(self, n: int) -> str:
        rng = random.Random(n % 40)
        return " ".join(
            rng.choice(["the", "fox", "saw", "a", "crow", "grapes", "and", "sour"])
            for _ in range(rng.choice([2, 5, 30]))
        )

    def where(self, n: int) -> str:
        return f"fable {n % 40}"


@functools.cache
def tokenizer() -> Tokenizer:
    """Trained once, before anything is forked: the trainer's thread pool does not survive a fork, and waits for
    ever.
    """
    return Tokenizer.train((Fables().get(n) for n in range(40)), 290)


def train(name: str, steps: int, each: Callable[[], object] = int, resume: bool = True, save: int = 3) -> None:
    """The real packer, prefetcher, model and optimizer; a loss with random noise in it."""
    run, model, optimizer, _ = toy.parts(name, resume=resume, save_every=save)
    model = toy.GPT(replace(toy.CONFIG, vocab_size=tokenizer().vocab_size))
    model.init_weights(7)
    optimizer = toy.MuonAdamW(toy.groups(model), toy.ALONE)
    packed = PackedBatches([(Fables(), 1.0)], tokenizer(), seq_len=8, device_batch_size=2, rows_per_step=4)
    batches = Prefetch(packed, toy.ALONE)

    def loss(model, batch):
        each()
        return toy.noisy_nats(model, batch)

    def evaluate(step):
        return {"val/bpb": float(model(torch.arange(8)[None]).std() + torch.rand(()))}

    plan, hooks = toy.ToyPlan(num_iterations=steps, grad_accum=2), [Hook(at_steps(2, first=True), evaluate)]
    fit(run, model, optimizer, batches, plan, loss, Every(save=save), hooks)
    batches.close()


def story(name: str) -> tuple:
    """Everything that has to be the same to the bit: losses, evaluations, final weights and optimizer."""
    rows = [(r["step"], r.get("train/loss"), r.get("val/bpb")) for r in read_metrics(runs_dir() / name)]
    last = checkpoint.newest_valid(runs_dir() / name / "checkpoints")
    assert last is not None
    return rows, [
        hashlib.sha256((last / f).read_bytes()).hexdigest() for f in ("model.safetensors", "optim_rank0.safetensors")
    ]


def kill_and_resume(kills: int, steps: int) -> None:
    """Fork the training and kill it some steps later, at a random moment, `kills` times; then let it end. Compare with
    a run left alone."""
    rng, at = random.Random(2), []
    train("whole", steps, resume=False)
    while len(at) < kills:
        ticks, tick = os.pipe()
        pid = os.fork()
        if pid == 0:
            train("killed", steps, each=lambda: os.write(tick, b"."))
            os._exit(0)
        os.close(tick)
        for _ in range(rng.randrange(1, 14)):  # micro-batches, two to a step; or the end
            os.read(ticks, 1)
        time.sleep(rng.uniform(0.0, 0.03))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(ticks)
        at.append(len(read_metrics(runs_dir() / "killed")))
    train("killed", steps)
    print(json.dumps({"at": at, "same": story("killed") == story("whole")}))


def signals() -> None:
    """Fork trainings that would last for ever, send each its signals in the fourth step, and tell what became of
    them.
    """
    stories = {}
    asked = {
        "SIGTERM": [signal.SIGTERM],
        "SIGINT": [signal.SIGINT],
        "SIGHUP": [signal.SIGHUP],
        "SIGUSR1": [signal.SIGUSR1],
        "SIGUSR2": [signal.SIGUSR2],
        "twice": [signal.SIGINT, signal.SIGINT],
    }
    for name, numbers in asked.items():
        ticks, tick = os.pipe()
        said = runs_dir().parent / f"{name}.txt"
        pid = os.fork()
        if pid == 0:
            sys.stdout = sys.stderr = open(said, "w", buffering=1)
            os.dup2(sys.stderr.fileno(), 2)
            n = iter(range(10**6))
            code = 0
            try:
                train(
                    name,
                    10**6,
                    each=lambda: (os.write(tick, b"."), time.sleep(60.0 if name == "twice" and next(n) == 6 else 0.01)),
                    save=10**6,
                )
            except SystemExit as leave:
                code = leave.code
            os._exit(code)
        os.close(tick)
        for _ in range(7):  # two micro-batches to a step
            os.read(ticks, 1)
        for number in numbers:
            time.sleep(0.2)
            os.kill(pid, number)
        began = time.monotonic()
        _, status = os.waitpid(pid, 0)
        steps = [step for step, _ in checkpoint.steps(runs_dir() / name / "checkpoints")]
        stories[name] = {
            "code": os.waitstatus_to_exitcode(status),
            "seconds": time.monotonic() - began,
            "steps": steps,
            "said": said.read_text(),
        }
        stories[name]["logged"] = len(read_metrics(runs_dir() / name))
    print(json.dumps(stories))


def script(*args: object) -> dict:
    """The JSON that this file, run as a script, prints last."""
    done = warm.python(__file__, *args, timeout=500)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("kills,steps", [(4, 24), pytest.param(25, 100, marks=pytest.mark.slow)])
def test_killed_at_any_moment_and_resumed_is_uninterrupted_to_the_bit(kills, steps):
    report = script("kill_and_resume", kills, steps)
    assert report["same"], report
    inside = [at for at in report["at"] if 0 < at < steps]
    assert len(inside) >= kills // 2 and max(inside) > 3, f"the kills hit nothing: {report}"


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOLAB_BASE_DIR", str(tmp_path_factory.mktemp("signals")))
        yield script("signals")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name,code",
    [
        ("SIGTERM", 143),
        ("SIGINT", 130),
        *(
            pytest.param(name, code, marks=pytest.mark.fault("F17"))
            for name, code in (("SIGHUP", 129), ("SIGUSR1", 138), ("SIGUSR2", 140))
        ),
    ],
)
def test_a_signal_saves_and_leaves(stories, name, code):
    story = stories[name]
    assert story["code"] == code, story["said"]
    (step,) = story["steps"]
    assert f"stopped by {name}; step {step} is saved. To go on, type: " in story["said"]
    assert story["said"].rstrip().endswith(f"{Path(__file__).name} signals --resume")
    assert story["said"].count("finishing this step") == 1
    assert 4 <= step == story["logged"] < 10**6, "whole steps were made, and all of them logged"


def test_a_second_ctrl_c_leaves_at_once(stories):
    story = stories["twice"]
    assert story["code"] == -signal.SIGINT and story["seconds"] < 50 and story["steps"] == [], (
        "in the middle of a step of a minute"
    )
    assert story["said"].count("finishing this step") == 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    tokenizer()
    {"kill_and_resume": kill_and_resume, "signals": signals}[sys.argv[1]](*map(int, sys.argv[2:]))
