"""Runs that are killed or asked to stop, and go on as if nothing had been.

Run as a script this file is the training process, or the one that forks, kills and restarts it.
"""

import hashlib
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nanolab.data.loader import Prefetch
from nanolab.data.packing import PackedBatches
from nanolab.data.tokenizer import Tokenizer
from nanolab.training import checkpoint
from nanolab.training.loop import Every, fit
from nanolab.training.run import read_metrics, runs_dir

spec = importlib.util.spec_from_file_location("nanolab_tests_toy", Path(__file__).with_name("toy.py"))
toy = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toy)


class Fables:
    """Endless documents of very different lengths."""

    name, n_documents = "fables", 40

    def get(self, n: int) -> str:
        rng = random.Random(n % 40)
        return " ".join(rng.choice(["the", "fox", "saw", "a", "crow", "grapes", "and", "sour"]) for _ in range(rng.choice([2, 5, 30])))

    def where(self, n: int) -> str:
        return f"fable {n % 40}"


def train(name: str, steps: int, each: Callable[[], object] = int, resume: bool = True, save: int = 3) -> None:
    """The real packer, prefetcher, model and optimizer; a loss with random noise in it."""
    tokenizer = Tokenizer.train((Fables().get(n) for n in range(40)), 290)
    run, model, optimizer, _ = toy.parts(name, resume=resume, save_every=save)
    model = toy.GPT(toy.replace(toy.CONFIG, vocab_size=tokenizer.vocab_size))
    model.init_weights(7)
    optimizer = toy.MuonAdamW(model.param_groups(**toy.RATES), toy.ALONE)
    packed = PackedBatches([(Fables(), 1.0)], tokenizer, seq_len=8, device_batch_size=2, rows_per_step=4)
    batches = Prefetch(packed, toy.ALONE)

    def loss(model, batch):
        each()
        return toy.noisy_nats(model, batch)

    every = Every(eval=2, save=save, evaluate=lambda: {"val/bpb": float(model(torch.arange(8)[None]).std() + torch.rand(()))})
    fit(run, model, optimizer, batches, toy.ToyPlan(num_iterations=steps, grad_accum=2), loss, every)
    batches.close()


def story(name: str) -> tuple:
    """Everything that has to be the same to the bit: losses, evaluations, final weights and optimizer."""
    rows = [(r["step"], r.get("train/loss"), r.get("val/bpb")) for r in read_metrics(runs_dir() / name)]
    last = checkpoint.newest_valid(runs_dir() / name / "checkpoints")
    assert last is not None
    return rows, [hashlib.sha256((last / f).read_bytes()).hexdigest() for f in ("model.safetensors", "optim_rank0.safetensors")]


def kill_and_resume(kills: int, steps: int) -> None:
    """Fork the training and kill it some steps later, at a random moment, `kills` times; then let it end. Compare with a
    run left alone."""
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


def script(*args: object, **kwargs) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, __file__, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)


@pytest.mark.parametrize("kills,steps", [(4, 24), pytest.param(25, 100, marks=pytest.mark.slow)])
def test_killed_at_any_moment_and_resumed_is_uninterrupted_to_the_bit(kills, steps):
    process = script("kill_and_resume", kills, steps)
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    report = json.loads(out.splitlines()[-1])
    assert report["same"], report
    inside = [at for at in report["at"] if 0 < at < steps]
    assert len(inside) >= kills // 2 and max(inside) > 3, f"the kills hit nothing: {report}"


def wait_for_step(process: subprocess.Popen, step: int) -> None:
    for line in process.stdout:
        if line.startswith(f"step {step:05d}/"):
            return
    raise AssertionError(process.communicate())


@pytest.mark.parametrize("number,code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_leaves(number, code):
    process = script("train", "asked", 1000, 0.02)
    wait_for_step(process, 3)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == code, err
    saved = checkpoint.newest_valid(runs_dir() / "asked" / "checkpoints")
    step = checkpoint.load_meta(saved)["step"]
    assert f"stopped by {number.name}; step {step} is saved. To go on, type: " in out and f"asked 1000 0.02 --resume\n" in out
    assert step % 1000 and step >= 4 and len(read_metrics(runs_dir() / "asked")) == step, "stopped after a whole step, long before the end"
    assert err.count("finishing this step") == 1


def test_a_second_ctrl_c_leaves_at_once():
    process = script("train", "asked", 1000, 20.0)
    deadline = time.monotonic() + 60
    while not (runs_dir() / "asked" / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1.0)  # into the first step, which takes 20 seconds
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode in (-signal.SIGINT, 130)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "train":
        name, steps, pause = sys.argv[2:5]
        train(name, int(steps), lambda: time.sleep(float(pause)), resume="--resume" in sys.argv, save=10**6)
    else:
        kill_and_resume(int(sys.argv[2]), int(sys.argv[3]))
