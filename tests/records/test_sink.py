"""wandb beside a real training that is killed and resumed, read back by wandb's own reader."""

import ast
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import wandb
import warm

from nanolab.data.tokenizer import Tokenizer
from nanolab.lab.processes import Planned
from nanolab.lab.runner import wandb_names
from nanolab.records.sink import open_sinks
from nanolab.stages.config import BaseTrainConfig

ROOT = Path(__file__).parents[2]
SAVE, STEPS = 60, 600
TRAIN = (
    "--run killed --depth 1 --aspect-ratio 32 --head-dim 32 --max-seq-len 32 --device-batch-size 4 --total-batch-size"
    f" 128 --num-iterations {STEPS} --save-every {SAVE} --eval-every {SAVE} --eval-tokens 256 --keep all --device-type"
    " cpu --log-every 1 --wandb offline"
).split()


def begin(base: Path, *flags: str) -> subprocess.Popen:
    env = os.environ | {
        "NANOLAB_BASE_DIR": str(base),
        "PYTHONPATH": str(ROOT),
        "NANOLAB_DTYPE": "float32",
        "WANDB_ERROR_REPORTING": "false",
    }
    command = [
        warm.executable(),
        "-m",
        "scripts.base_train",
        "--data-dir",
        str(base / "texts"),
        "--tokenizer",
        str(base / "tokenizer"),
        *TRAIN,
        *flags,
    ]
    with open(base / "said.txt", "w") as said:
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=said, stderr=subprocess.STDOUT)


def rows_in(folder: Path) -> list[dict]:
    """The rows of one offline folder, each by wandb's own reader."""
    (log,) = folder.glob("run-*.wandb")
    done = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)],
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
    )
    return [found["history"]["item"] for found in map(json.loads, done.stdout.splitlines()) if "history" in found]


@pytest.mark.slow
@pytest.mark.fault("P2")
def test_every_step_is_in_wandb_once_and_in_order_after_a_kill_and_a_resume(base_dir):
    (base_dir / "texts").mkdir(parents=True)
    for i in range(40):
        (base_dir / "texts" / f"{i}.txt").write_text(
            f"Number {i} is a fox that saw the crow with the cheese, and said so. " * 3
        )
    Tokenizer.train(["a fox saw the crow with the cheese"] * 9, 280).save(base_dir / "tokenizer")
    run, killed = base_dir / "runs" / "killed", begin(base_dir)
    metrics = run / "metrics.jsonl"
    while killed.poll() is None and (not metrics.exists() or metrics.read_bytes().count(b"\n") < 2 * SAVE + SAVE // 2):
        time.sleep(0.02)
    lines = metrics.read_bytes().count(b"\n")
    made = time.monotonic()
    while killed.poll() is None and time.monotonic() < made + 1:
        # those older than a second at the kill
        lines = metrics.read_bytes().count(b"\n") if time.monotonic() < made + 0.02 else lines
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    time.sleep(1)  # wandb's own process ends
    (first,) = sorted(run.glob("wandb/offline-run-*"))
    before = [row.get("step") for row in rows_in(first)]
    assert before == list(range(len(before))) and len(before) >= lines, "at most a second is lost"
    (log,) = first.glob("run-*.wandb")
    # and steps that the checkpoint has, as when wandb writes late
    os.truncate(log, int(log.stat().st_size * min(0.5, 1.5 * SAVE / len(before))))
    before = [row.get("step") for row in rows_in(first)]
    assert before == list(range(len(before))) and 0 < len(before) < 2 * SAVE

    resumed = begin(base_dir, "--resume")
    code, said = resumed.wait(timeout=500), (base_dir / "said.txt").read_text()
    assert code == 0 and "wandb failed" not in said, said
    folders = sorted(run.glob("wandb/offline-run-*"))
    assert len(folders) == 2 and all(list(folder.glob("run-*.wandb")) for folder in folders), said
    rows = [row for folder in folders for row in rows_in(folder)]
    assert [row.get("step") for row in rows] == list(range(STEPS + 1)), "every step once, in order"
    for key in ("train/loss", "val/bpb"):
        want = {row["step"]: row[key] for row in map(json.loads, metrics.read_text().splitlines()) if key in row}
        assert {row["step"]: row[key] for row in rows if key in row} == want, "and as in metrics.jsonl"
    assert f"wandb has {len(before):,} steps already" in said


CORE = """
import sys, time
import wandb.sdk.lib.service.service_port_file as port_file, wandb.sdk.lib.service.service_process as process
from nanolab.records.sink import WandbSink
from pathlib import Path

folder, process.get_core_path = Path(sys.argv[1]), lambda: sys.argv[2]
port_file._MONOTONIC = lambda: 60 * time.monotonic()  # a second here is a minute of wandb's patience
sink = WandbSink("offline", "name", "abcd", folder, {})
sink.log(0, {"train/loss": 1.0})
sink.finish({})
"""


def with_core(folder: Path, first: str) -> subprocess.CompletedProcess:
    """A sink whose wandb-core is started by a shell that does `first`."""
    core = folder / "core.sh"
    core.write_text(f'#!/bin/sh\n{first}\nexec "{Path(wandb.__file__).parent}/bin/wandb-core" "$@"\n')
    core.chmod(0o755)
    env = os.environ | {"PYTHONPATH": str(ROOT), "WANDB_ERROR_REPORTING": "false"}
    return subprocess.run(
        [sys.executable, "-c", CORE, str(folder), str(core)],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.slow
def test_on_a_busy_machine_wandb_may_begin_late(tmp_path):
    """With wandb's own patience of 30 seconds the run's folder stayed without a log."""
    done = with_core(tmp_path, "sleep 1")
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    assert (
        done.returncode == 0 and "wandb failed" not in done.stderr and [row["step"] for row in rows_in(folder)] == [0]
    ), done.stderr


@pytest.mark.slow
def test_a_run_of_a_study_has_its_group_and_tags_in_wandb(tmp_path, monkeypatch):
    """As the variables that the lab sets before it starts a run say, unless the user has set them."""
    monkeypatch.delenv("WANDB_TAGS", raising=False)
    monkeypatch.setenv("WANDB_RUN_GROUP", "mine")
    runs = [Planned(arm, 42, BaseTrainConfig(run=name), {}) for arm, name in (("a,b", "x"), ("same", "x"), ("c", "y"))]
    names = wandb_names(runs[0], runs, "gate", "cpu")
    assert names == {"WANDB_TAGS": "a b,same,cpu"}
    monkeypatch.delenv("WANDB_RUN_GROUP")
    for name, value in wandb_names(runs[2], runs, "gate", "cpu").items():
        monkeypatch.setenv(name, value)
    done = with_core(tmp_path, "sleep 0")
    [log] = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert done.returncode == 0, done.stderr
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)]
    read = subprocess.run(command, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
    [run] = [found["run"] for found in map(json.loads, read.stdout.splitlines()) if "run" in found][:1]
    assert "gate" in run.values() and ["c", "cpu"] in run.values()


@pytest.mark.slow
def test_whatever_wandb_raises_is_one_line(tmp_path):
    """Also what is none of its own exceptions: an IndexError, of a port file that is still empty."""
    done = with_core(tmp_path, 'while [ "$1" != --port-filename ]; do set -- "$@" "$1"; shift; done; : > "$2"; sleep 3')
    assert (
        done.returncode == 0 and done.stderr.count("wandb failed and is off for the rest of this run (IndexError") == 1
    ), done.stderr


TRACKIO = """
import os, sys, time
from nanolab.records.sink import TrackioSink
rows = [{"step": step, "train/loss": step / 4, "none": None} for step in range(14)]
first = TrackioSink("toy", {"depth": 4}, [], False)
for row in rows[:10]:
    first.log(row["step"], row)
first.finish({})
second = TrackioSink("toy", {"depth": 4}, rows[:12], True)
for row in [rows[9], *rows[12:]]:  # a step that it has is not sent again
    second.log(row["step"], row)
second.finish({})
from trackio.sqlite_storage import SQLiteStorage
print([(row["step"], row["train/loss"], sorted(row)) for row in SQLiteStorage.get_logs("nanolab", "toy")])
"""


@pytest.mark.slow
def test_every_step_is_in_trackio_once_after_a_resume(tmp_path):
    """In the real package, where that is installed; it is in no extra of ours."""
    pytest.importorskip("trackio", reason="needs trackio (pip install trackio)")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "TRACKIO_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", TRACKIO], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "trackio has 10 steps already" in done.stdout and "; 2 that" in done.stdout
    [found] = [ast.literal_eval(line) for line in done.stdout.splitlines() if line.startswith("[(")]
    assert [row[:2] for row in found] == [(step, step / 4) for step in range(14)]
    assert not any("none" in names for *_, names in found)


def test_without_trackio_training_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "trackio", None)
    [_, sink] = open_sinks("toy", "abcd", tmp_path, {"trackio": True}, [], False)
    sink.log(0, {"train/loss": 1.0})
    sink.finish({})
    assert not sink.alive and capsys.readouterr().err.count("trackio failed and is off") == 1
