"""wandb beside a real training that is killed and resumed, read back by wandb's own reader."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanolab.data.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
SAVE, STEPS = 150, 1500
TRAIN = (
    f"--run killed --depth 1 --aspect-ratio 32 --head-dim 32 --max-seq-len 32 --device-batch-size 4 --total-batch-size 128 --num-iterations {STEPS} "
    f"--save-every {SAVE} --eval-every {SAVE} --eval-tokens 256 --keep all --device-type cpu --log-every 1 --wandb offline"
).split()  # fmt: skip


def begin(base: Path, *flags: str) -> subprocess.Popen:
    env = os.environ | {"NANOLAB_BASE_DIR": str(base), "PYTHONPATH": str(ROOT), "NANOLAB_DTYPE": "float32", "WANDB_ERROR_REPORTING": "false"}
    command = [sys.executable, "-m", "scripts.base_train", "--data-dir", str(base / "texts"), "--tokenizer", str(base / "tokenizer"), *TRAIN, *flags]
    with open(base / "said.txt", "w") as said:
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=said, stderr=subprocess.STDOUT)


def rows_in(folder: Path) -> list[dict]:
    """The rows of one offline folder, each by wandb's own reader."""
    (log,) = folder.glob("run-*.wandb")
    done = subprocess.run([sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)], capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    return [found["history"]["item"] for found in map(json.loads, done.stdout.splitlines()) if "history" in found]


@pytest.mark.slow
@pytest.mark.fault("P2")
def test_every_step_is_in_wandb_once_and_in_order_after_a_kill_and_a_resume(base_dir):
    (base_dir / "texts").mkdir(parents=True)
    for i in range(40):
        (base_dir / "texts" / f"{i}.txt").write_text(f"Number {i} is a fox that saw the crow with the cheese, and said so. " * 3)
    Tokenizer.train(["a fox saw the crow with the cheese"] * 9, 280).save(base_dir / "tokenizer")
    run, killed = base_dir / "runs" / "killed", begin(base_dir)
    metrics = run / "metrics.jsonl"
    while killed.poll() is None and (not metrics.exists() or metrics.read_bytes().count(b"\n") < 2 * SAVE + SAVE // 2):
        time.sleep(0.02)
    lines = metrics.read_bytes().count(b"\n")
    made = time.monotonic()
    while killed.poll() is None and time.monotonic() < made + 1:
        lines = metrics.read_bytes().count(b"\n") if time.monotonic() < made + 0.02 else lines  # those older than a second at the kill
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    time.sleep(1)  # wandb's own process ends
    (first,) = sorted(run.glob("wandb/offline-run-*"))
    before = [row.get("step") for row in rows_in(first)]
    assert before == list(range(len(before))) and len(before) >= lines, "at most a second is lost"

    resumed = begin(base_dir, "--resume")
    code, said = resumed.wait(timeout=120), (base_dir / "said.txt").read_text()
    assert code == 0, said
    folders = sorted(run.glob("wandb/offline-run-*"))
    rows = [row for folder in folders for row in rows_in(folder)]
    assert len(folders) == 2 and [row.get("step") for row in rows] == list(range(STEPS + 1)), "every step once, in order"
    for key in ("train/loss", "val/bpb"):
        want = {row["step"]: row[key] for row in map(json.loads, metrics.read_text().splitlines()) if key in row}
        assert {row["step"]: row[key] for row in rows if key in row} == want, "and as in metrics.jsonl"
    assert f"wandb has the steps up to {before[-1]} already" in said
