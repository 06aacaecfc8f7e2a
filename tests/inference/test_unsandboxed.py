"""Where a wall is missing, code of a model's does not run; and however a run ends or fails to begin, nothing of it is
left.

What is missing is missing in a copy of the jail whose system calls the kernel refuses: it finds out as it would on an
old kernel."""

import errno
import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from nanolab.cli import UserError, to_json
from nanolab.data.tokenizer import Tokenizer
from nanolab.evals.config import ChatEvalConfig
from nanolab.inference import sandbox
from nanolab.inference.config import ChatConfig
from nanolab.lab import evaluate_chat
from nanolab.model.config import GPTConfig
from nanolab.model.gpt import GPT
from nanolab.records import checkpoint
from nanolab.runtime import Runtime
from nanolab.serving.config import ServeConfig
from nanolab.stages.config import RLConfig, SFTConfig
from scripts import chat_cli, chat_eval, chat_rl, chat_sft, chat_web

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="these protections are Linux's")
JAIL = sandbox.JAIL.read_text()
MISSING = {  # what is changed in the jail -> the layers that it then lacks
    "no landlock": (r"libc\.syscall, 444\b", "libc.syscall, 99999", {"landlock"}),
    "no seccomp": (r"\bprctl\(22,", "prctl(9999,", {"seccomp"}),
    "another system": (r'sys\.platform == "linux"', "False", {"landlock", "seccomp"}),
}


@pytest.fixture
def change(tmp_path, monkeypatch):
    """A function (pattern, replacement, ...) that puts a changed copy of the jail in its place."""

    def put(*changes: str) -> None:
        text = JAIL
        for pattern, new in zip(changes[::2], changes[1::2]):
            text, n = re.subn(pattern, new, text)
            assert n, pattern
        path = tmp_path / "jail.py"
        path.write_text(text)
        monkeypatch.setattr(sandbox, "JAIL", path)

    return put


def running(marker: Path) -> int:
    """Processes that belong to a sandbox whose folders are under `marker`; zombies are left out."""
    n = 0
    for path in Path("/proc").glob("[0-9]*"):
        try:
            n += (
                str(marker).encode() in (path / "environ").read_bytes()
                and (path / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
            )
        except OSError:
            pass
    return n


def descriptors() -> list[str]:
    """Those of this process, without the one that lists them."""
    return sorted(set(os.listdir("/proc/self/fd")) - {str(max(map(int, os.listdir("/proc/self/fd"))) + 1)})


@pytest.fixture
def folders(tmp_path, monkeypatch) -> Path:
    """Where the sandbox has its folders. At the end none is there, and no process of it."""
    where = tmp_path / "folders"
    where.mkdir()
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(where))
    yield where
    assert list(where.iterdir()) == []
    deadline = time.monotonic() + 5  # a killed process may still be on its way out
    while running(where) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert running(where) == 0


# --- walls that are missing -------------------------------------------------------------------------------------------


@pytest.mark.fault("outer D9")
@pytest.mark.parametrize("what", list(MISSING))
def test_without_a_wall_the_program_does_not_run(folders, change, what, tmp_path):
    *changes, layers = MISSING[what]
    change(*changes)
    for run in (
        lambda code: sandbox.run_python(code, timeout=30),
        lambda code: sandbox.check_program(code, "assert f()", timeout=30),
    ):
        with pytest.raises(UserError) as error:
            run(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\nprint('ran')\ndef f(): return True")
        assert (error.value.code, set(error.value.values["missing"])) == ("no-sandbox", layers)
    assert not (tmp_path / "ran").exists()
    asked = [name for name in sandbox.LAYERS if name not in layers]
    # who asks for the others alone gets them
    assert sandbox.run_python("print('ran')", layers=asked, timeout=30).stdout == "ran\n"


ADD = {
    "task_id": "HumanEval/0",
    "prompt": 'def add(a, b):\n    """a + b"""\n',
    "entry_point": "add",
    "canonical_solution": "    return a + b\n",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tuple[Path, str]:
    """A base directory with the runs "talks" and "base", of random weights; and a folder with one problem of
    HumanEval.
    """
    base = tmp_path_factory.mktemp("world")
    tokenizer = Tokenizer.train(["plain words and plain words only " * 20], 275)
    for name, kind in (("base", "base"), ("talks", "sft")):
        model = GPT(GPTConfig(sequence_len=256, vocab_size=tokenizer.vocab_size, n_layer=1, n_head=1, n_embd=32))
        model.init_weights(0)
        meta = {"model_config": to_json(model.config), "tokenizer_hash": tokenizer.hash, "kind": kind}
        runtime = Runtime(torch.device("cpu"), torch.float32)
        checkpoint.save(
            base / "runs" / name / "checkpoints",
            1,
            weights=dict(model.state_dict()),
            optimizer=None,
            meta=meta,
            runtime=runtime,
        )
        tokenizer.save(base / "runs" / name / "tokenizer")
        (base / "runs" / name / "result.json").write_text(f'{{"kind": "{kind}"}}')
    (base / "data" / "humaneval").mkdir(parents=True)
    (base / "data" / "humaneval" / "HumanEval.jsonl").write_text(json.dumps(ADD))
    return base, str(base / "data")


def commands(data: str) -> dict:
    cpu = {"device_type": "cpu"}
    return {
        "chat_web": (chat_web.run, ServeConfig, {"model": "talks", "tool": "python", "port": 0, **cpu}),
        "chat_cli": (
            chat_cli.run,
            ChatConfig,
            {"model": "talks", "tool": "python", "prompt": "x", "max_tokens": 1, **cpu},
        ),
        "chat_eval": (
            chat_eval.run,
            ChatEvalConfig,
            {"model": "talks", "tasks": "humaneval", "data": data, "max_tokens": 1, **cpu},
        ),
        "chat_rl": (
            chat_rl.run,
            RLConfig,
            {
                "model": "talks",
                "task": "humaneval",
                "split": "test",
                "data": data,
                "eval_every": -1,
                "dry_run": True,
                **cpu,
            },
        ),
        "chat_sft": (
            chat_sft.run,
            SFTConfig,
            {"model": "base", "chatcore_every": 1, "chatcore_tasks": "humaneval", "data": data, "dry_run": True, **cpu},
        ),
    }


@pytest.mark.fault("outer D9")
@pytest.mark.parametrize("name", ["chat_web", "chat_cli", "chat_eval", "chat_rl", "chat_sft"])
def test_a_command_that_runs_code_of_a_models_is_refused_at_its_start(world, change, monkeypatch, name):
    monkeypatch.setenv("NANOLAB_BASE_DIR", str(world[0]))
    change(*MISSING["no landlock"][:2])
    command, config, flags = commands(world[1])[name]
    with pytest.raises(UserError) as error:
        command(config(**flags))
    assert error.value.code == "no-sandbox" and error.value.values["missing"] == {"landlock": os.strerror(errno.ENOSYS)}
    assert "--allow-unsandboxed" in str(error.value)


@pytest.mark.fault("outer D9")
@pytest.mark.parametrize("name", ["chat_cli", "chat_eval"])
def test_the_state_of_the_sandbox_is_one_line_at_the_start(world, change, monkeypatch, capsys, name):
    monkeypatch.setenv("NANOLAB_BASE_DIR", str(world[0]))
    monkeypatch.setattr(sandbox, "required", (), raising=False)  # put back afterwards
    command, config, flags = commands(world[1])[name]
    stands = sandbox.run_python("", timeout=30).isolation

    def line() -> str:
        told = capsys.readouterr()
        (found,) = [line for line in (told.out + told.err).splitlines() if line.startswith("sandbox: ")]
        return found

    if stands["landlock"] == stands["seccomp"] == "on":
        command(config(**flags))
        assert re.findall(r"(?<![a-z])(no )?(landlock|seccomp)", line()) == [("", "landlock"), ("", "seccomp")]
    change(*MISSING["no seccomp"][:2])
    command(config(**flags, allow_unsandboxed=True))
    said = line()
    assert "no seccomp (" in said and "--allow-unsandboxed" in said


def test_a_calculator_needs_no_sandbox_and_reads_no_flag_about_it(world, change, monkeypatch, capsys):
    monkeypatch.setenv("NANOLAB_BASE_DIR", str(world[0]))
    change(*MISSING["another system"][:2])
    flags = {"model": "talks", "prompt": "x", "max_tokens": 1, "device_type": "cpu"}
    assert chat_cli.run(ChatConfig(**flags)) == 0
    assert "sandbox" not in capsys.readouterr().err
    with pytest.raises(UserError) as error:
        chat_cli.run(ChatConfig(**flags, allow_unsandboxed=True))
    assert (error.value.code, error.value.values["flag"]) == ("flag-not-read", "allow_unsandboxed")


def test_an_evaluation_of_all_tasks_leaves_those_out_that_would_run_code(world, change, monkeypatch, capsys):
    monkeypatch.setenv("NANOLAB_BASE_DIR", str(world[0]))
    change(*MISSING["no landlock"][:2])
    tasks = {
        name: evaluate_chat.open_tasks(ChatEvalConfig(tasks=name, data=world[1]))[0][name]
        for name in ("humaneval", "arithmetic")
    }
    kept, missing, said = evaluate_chat.with_walls(ChatEvalConfig(), tasks, {})
    assert (
        list(kept) == ["arithmetic"]
        and list(missing) == ["humaneval"]
        and "landlock" in missing["humaneval"]
        and said == []
    )


# --- runs that cannot begin, or are broken off ------------------------------------------------------------------------


def fails(*_: object, **__: object) -> None:
    raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))


@pytest.mark.fault("outer D4")
@pytest.mark.parametrize("what", ["process", "second pipe", "selector"])
def test_a_run_that_cannot_begin_leaves_no_descriptor(folders, monkeypatch, what):
    sandbox.run_python("")
    before = descriptors()
    if what == "process":
        monkeypatch.setattr(sandbox.subprocess, "Popen", fails)
    elif what == "selector":
        monkeypatch.setattr(sandbox.selectors, "DefaultSelector", fails)
    else:
        pipe, calls = os.pipe, []
        monkeypatch.setattr(sandbox.os, "pipe", lambda: pipe() if calls.append(1) or len(calls) % 2 else fails())
    for _ in range(5):
        with pytest.raises(OSError):
            sandbox.run_python("while True: pass")
    monkeypatch.undo()
    assert descriptors() == before


@pytest.mark.fault("outer D4")
def test_ctrl_c_ends_the_jail_and_closes_its_pipes(folders):
    sandbox.run_python("")
    before, ended = descriptors(), threading.Event()

    def press() -> None:
        while running(folders) < 3:
            time.sleep(0.01)
        while not ended.is_set():  # again where Python lost it: in a finalizer it ignores what is raised
            os.kill(os.getpid(), signal.SIGINT)
            ended.wait(15)

    threading.Thread(target=press, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        sandbox.run_python("while True: pass", timeout=60)
    ended.set()
    assert (descriptors(), running(folders)) == (before, 0)


@pytest.mark.fault("outer D18")
def test_a_jail_whose_parent_has_gone_while_it_started_runs_nothing(folders, monkeypatch):
    """The kernel is told of the parent after the start: here another one is there by then."""
    monkeypatch.setattr(sandbox.os, "getpid", lambda: 1)
    outcome = sandbox.run_python("print('ran')", timeout=30)
    assert (outcome.stdout, outcome.isolation) == ("", {})


# before the keeper has told the kernel of its parent
WINDOW = (r"(?m)^def keeper\((.*)\) -> None:$", r"def keeper(\1) -> None:\n    time.sleep(0.5)")
HANDLER = r"(?m)^    signal\.signal\(signal\.SIGTERM, stop\)$"


@pytest.mark.fault("outer D18")
@pytest.mark.parametrize("layers", [("landlock", "seccomp"), sandbox.LAYERS])
def test_an_end_that_comes_while_the_jail_starts_ends_all_of_it(folders, change, layers):
    """SIGTERM between the fork of the keeper and the handler that would end it: the warden gives it to itself, at that
    place.
    """
    change(
        *WINDOW,
        HANDLER,
        r"    os.kill(os.getpid(), signal.SIGTERM)\n    time.sleep(0.1)\n    signal.signal(signal.SIGTERM, stop)",
    )
    outcome = sandbox.run_python("import time\nprint('ran', flush=True)\ntime.sleep(60)", timeout=20, layers=layers)
    assert (outcome.stdout, outcome.status) == ("", "error")


@pytest.mark.fault("outer D18")
@pytest.mark.parametrize("layers", [("landlock", "seccomp"), sandbox.LAYERS])
def test_a_keeper_whose_warden_was_killed_while_it_started_goes_too(folders, change, layers):
    change(*WINDOW, HANDLER, "    os.kill(os.getpid(), signal.SIGKILL)")
    outcome = sandbox.run_python("import time\nprint('ran', flush=True)\ntime.sleep(60)", timeout=20, layers=layers)
    assert (outcome.stdout, outcome.status) == ("", "error")
