"""Python processes that begin with torch and our packages already imported: forks of one server per test process.

For tests that need a process of its own (ranks, exit codes, kills) and not its start: `import torch` and what comes
with it take three seconds each time. What a test says about imports, or about how a script starts, needs a real start.
"""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["torch.distributed", "nanolab.stages.rl", "nanolab.evals.suite", "nanolab.interop.export"]
)


def start(function: Callable, args: tuple, out: Path, err: Path, env: Mapping[str, str], cwd: Path) -> BaseProcess:
    """A running process of function(*args), which can be pickled, with its output in two files."""
    process = SERVER.Process(target=_child, args=(function, args, out, err, dict(env), cwd))
    process.start()
    return process


def _child(function: Callable, args: tuple, out: Path, err: Path, env: dict[str, str], cwd: Path) -> None:
    for path, number in ((out, 1), (err, 2)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    try:
        function(*args)
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves by os._exit


def _run(argv: list[str]) -> None:
    if argv[0] == "-m":
        sys.argv = argv[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = argv
        sys.path.insert(0, str(Path(argv[0]).parent))
        runpy.run_path(argv[0], run_name="__main__")


def python(
    *argv: Any, env: Mapping[str, str] | None = None, cwd: Path = ROOT, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """What `python FILE ...` or `python -m MODULE ...` does: its exit code and its output as text."""
    words = [str(word) for word in argv]
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        out.touch(), err.touch()
        process = start(_run, (words,), out, err, os.environ if env is None else env, cwd)
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(words, timeout, out.read_text(), err.read_text())
        return subprocess.CompletedProcess(words, process.exitcode, out.read_text(), err.read_text())
