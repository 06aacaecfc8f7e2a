"""Runs as jobs, by submitit's executor of this machine: the same results as those of forks. What cannot be a job is
refused by name."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import warm

from nanolab.cli import UserError
from nanolab.data.tokenizer import Tokenizer
from nanolab.lab.processes import REFUSED
from nanolab.lab.results import read_results
from nanolab.lab.slurm import Jobs, attempt
from nanolab.lab.study import study_of, to_toml
from nanolab.stages.config import BaseTrainConfig

FLAGS = "--depth 1 --aspect-ratio 32 --head-dim 32 --max-seq-len 32 --device-batch-size 2 --total-batch-size 64"
FLAGS += " --num-iterations 2 --eval-tokens 128 --log-every -1 --threads 1"


@pytest.mark.parametrize(
    "asked,code",
    [
        ("cluster=local", "slurm-parameters"),  # without a limit submitit takes five minutes
        ("cluster=local,timeout_min", "slurm-parameters"),
        ("cluster=local,timeout_min=5,partitoin=gpu", "slurm-parameters"),
        ("cluster=nowhere,timeout_min=5", "slurm-parameters"),
        ("timeout_min=5", "slurm-parameters"),  # no srun here
    ],
)
def test_what_cannot_be_handed_in_is_refused(monkeypatch, asked, code):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError) as error:
        Jobs(asked)
    assert error.value.code == code


def test_without_submitit_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match="setup.sh slurm") as error:
        Jobs("timeout_min=5")
    assert error.value.code == "submitit-missing"


def test_a_node_of_another_kind_makes_no_run(tmp_path):
    log = tmp_path / "run" / "log.txt"
    cfg = BaseTrainConfig(run="lab-x", device_type="cpu")
    assert attempt(cfg, log, {"device": "cpu", "device_name": "another processor"}) == REFUSED
    [said] = log.read_text().splitlines()
    assert "[other-machine]" in said and "another processor" in said


@pytest.mark.slow
def test_jobs_make_the_runs_that_forks_make(tmp_path):
    (tmp_path / "text").mkdir()
    for i in range(12):
        (tmp_path / "text" / f"{i:02d}.txt").write_text(f"Document {i}. " + "The cat sat on the mat. " * (i + 1))
    texts = [path.read_text() for path in (tmp_path / "text").iterdir()]
    Tokenizer.train(texts, 280).save(tmp_path / "jobs" / "tokenizer")
    shutil.copytree(tmp_path / "jobs", tmp_path / "forks")

    def rows(how: str, *words: str) -> list[dict]:
        values = {"question": "?", "baseline": "a", "matters": 1, "arms": {"a": "", "b": ""}, "results": how}
        path = tmp_path / f"{how}.toml"
        path.write_text(to_toml(study_of(values | {"flags": f"--data-dir {tmp_path / 'text'} {FLAGS}"}, how)))
        env = os.environ | {"NANOLAB_BASE_DIR": str(tmp_path / how), "NANOLAB_DTYPE": "float32"}
        done = warm.python("-m", "scripts.lab", "run", path, *words, env=env)
        assert done.returncode == 0, done.stdout + done.stderr
        assert json.loads(done.stdout.splitlines()[-1])["missing"] == []
        return read_results(Path(tmp_path / how))[1]

    jobs, forks = rows("jobs", "--slurm", "cluster=local,timeout_min=5", "--jobs", "2"), rows("forks")
    assert len(jobs) == len(forks) == 6
    for job, fork in zip(jobs, forks):
        same = ("arm", "seed", "key", "sources", "machine", "curve")
        assert {name: job[name] for name in same} == {name: fork[name] for name in same}
        assert job["result"]["val/bpb"] == fork["result"]["val/bpb"]
    assert len(list((tmp_path / "jobs" / "lab" / "jobs").glob("*_submitted.pkl"))) == 4  # the plan, and three runs
