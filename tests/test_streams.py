"""Commands whose output is not read to its end, or goes where not every character can."""

import importlib.util
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanolab.cli import main, parse
from nanolab.evals.config import BaseEvalConfig
from nanolab.inference.config import ChatConfig
from nanolab.runtime import Runtime
from scripts import base_eval, chat_cli

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path.stem for path in (ROOT / "scripts").glob("*.py") if path.stem != "__init__")
SAMPLE = ["--modes", "sample", "--device-type", "cpu"]
TRAIN = (
    "--run new --depth 2 --aspect-ratio 32 --head-dim 32 --max-seq-len 64 --device-batch-size 8 --total-batch-size 512"
    " --num-iterations 2 --eval-every -1 --sample-every 1 --device-type cpu"
).split()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base directory with the run "young", which writes any byte."""
    spec = importlib.util.spec_from_file_location(
        "nanolab_tests_pretrained", ROOT / "tests" / "training" / "pretrained.py"
    )
    pretrained = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pretrained)
    folder = tmp_path_factory.mktemp("streams")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOLAB_BASE_DIR", str(folder))
        pretrained.pretrain(
            "young", pretrained.write_text(folder / "texts"), Runtime(torch.device("cpu"), torch.float32)
        )
    return folder


def written(world, encoding: str, command, capsys, monkeypatch) -> str:
    """What a command writes to a stdout of that encoding, by `main`, as its script calls it."""
    out = io.BytesIO()
    monkeypatch.setenv("NANOLAB_BASE_DIR", str(world))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding=encoding, write_through=True))
    with pytest.raises(SystemExit) as leaving:
        main(command)
    assert leaving.value.code == 0, capsys.readouterr().err
    return out.getvalue().decode(encoding)


@pytest.mark.slow
@pytest.mark.fault("F18")
@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_text_of_a_young_model_goes_to_any_stdout(world, encoding, capsys, monkeypatch):
    shown = written(
        world,
        encoding,
        lambda: base_eval.run(parse(BaseEvalConfig, ["--model", "young", *SAMPLE])),
        capsys,
        monkeypatch,
    )
    assert "Monday, Tuesday, Wednesday, ..." in shown and "?" in shown
    shown = written(
        world,
        encoding,
        lambda: chat_cli.run(parse(ChatConfig, ["--model", "young", "-p", "a fox", "--device-type", "cpu"])),
        capsys,
        monkeypatch,
    )
    assert "?" in shown


@pytest.mark.fault("F18")
@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_samples_of_a_training_go_to_any_stdout(world, encoding, capsys, monkeypatch):
    data = ["--data-dir", str(world / "texts"), "--tokenizer", str(world / "runs" / "young" / "tokenizer")]
    done = subprocess.run(
        [sys.executable, "-m", "scripts.base_train", *data, *TRAIN, "--run", encoding],
        cwd=ROOT,
        capture_output=True,
        timeout=120,
        env=os.environ | {"NANOLAB_BASE_DIR": str(world), "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding},
    )
    assert done.returncode == 0, done.stderr.decode()
    assert "Monday, Tuesday, Wednesday, ..." in done.stdout.decode(encoding)


def unread(world, name: str, *flags: str) -> subprocess.Popen:
    """The script with a stdout that nobody reads."""
    read, write = os.pipe()
    os.close(read)
    try:
        return subprocess.Popen(
            [sys.executable, "-m", f"scripts.{name}", *flags],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=write,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"NANOLAB_BASE_DIR": str(world), "PYTHONPATH": str(ROOT)},
        )
    finally:
        os.close(write)


def ends_quietly(process: subprocess.Popen, codes: tuple[int, ...] = (141,)) -> None:
    _, said = process.communicate(timeout=120)
    said = [line for line in said.splitlines() if "traceback" in line.lower() or "error" in line.lower()]
    assert process.returncode in codes and said == [], (process.args, process.returncode, said)


@pytest.mark.fault("S16")
@pytest.mark.slow
def test_help_that_nobody_reads(tmp_path):
    for first in range(0, len(SCRIPTS), 3):
        for process in [unread(tmp_path, name, "--help") for name in SCRIPTS[first : first + 3]]:
            # the harness's parser takes no notice
            ends_quietly(process, (0, 141) if "scripts.lm_eval" in process.args else (141,))


@pytest.mark.fault("S16")
@pytest.mark.slow
@pytest.mark.parametrize(
    "name,flags",
    [
        ("base_train", ["--dry-run", *TRAIN]),
        ("inspect", ["--depth", "2"]),
        ("chat_cli", ["--model", "young", "-p", "a fox", "--device-type", "cpu"]),
        ("base_eval", ["--model", "young", *SAMPLE]),
    ],
)
def test_output_that_nobody_reads(world, name, flags):
    ends_quietly(unread(world, name, *flags))


@pytest.mark.fault("S16")
def test_a_closed_stdout_ends_quietly_and_another_pipe_is_a_bug(capfd):
    code = "from nanolab.cli import main; import sys; main(lambda: print('x' * 9))"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, cwd=ROOT, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")

    def other():
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        main(other)
