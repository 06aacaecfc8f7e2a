"""Python processes that begin with torch imported already: forks of one server.

For tests that need a process of its own (ranks, exit codes, kills, the commands of a page) and not its start: `import
torch` and what comes with it take three seconds each time. What a test says about imports, or about how a script
starts, needs a real start.

The server listens on a socket. A client (this file, as a script) hands it its descriptors, arguments, environment and
folder, waits for the exit code and leaves with it; when the client is killed, so is the process. Whatever else than
`-m MODULE`, `-c TEXT` and FILE.py a client is asked to run, it runs as the real Python. Imports only the standard
library.
"""

import atexit
import functools
import gc
import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OURS = ("nanolab", "scripts", "tasks")
# the last four: what a training imports on its way
PRELOADED = (
    "torch.distributed",
    "nanolab.stages.rl",
    "nanolab.lab.suite",
    "nanolab.interop.export",
    "torch.fx.experimental.symbolic_shapes",
    "pyarrow.parquet",
    "pandas",
    "tyro",
)
# and what pytest's workers import beside it: for their tests, or on their way
WORKERS = (
    *PRELOADED,
    "torch._dynamo",
    "torch._meta_registrations",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "fastapi.testclient",
    "openai",
    "matplotlib.pyplot",
    "scipy.stats",
)
WHERE = "NANOLAB_TESTS_WARM"  # the server's socket
BEGUN = time.time()
SHARED = "NANOLAB_TESTS_PYTHON"  # the program of a server that the workers of one pytest share


def python(
    *argv: Any, env: Mapping[str, str] | None = None, cwd: Path = ROOT, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """What `python FILE ...` or `python -m MODULE ...` does: its exit code and its output as text."""
    command = [str(executable()), *map(str, argv)]
    return subprocess.run(command, env=env, cwd=cwd, timeout=timeout, capture_output=True, text=True)


@functools.cache
def executable(*modules: str, root: Path = ROOT) -> Path:
    """A program `python` whose processes are forks of a server, which lives as long as this process.

    The server has imported `modules`, PRELOADED where none are given, and nothing of ours otherwise. It may still be at
    it: a process that is asked for meanwhile begins afterwards. root: a copy of this tree, whose modules are meant."""
    if not modules and root == ROOT and SHARED in os.environ:
        return Path(os.environ[SHARED])
    folder = Path(tempfile.mkdtemp(prefix="nanolab-warm-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    server = subprocess.Popen(
        [
            sys.executable if root == ROOT else executable(),  # which has torch
            str(root / Path(__file__).relative_to(ROOT)),
            str(folder / "socket"),
            *(modules or PRELOADED),
        ],
        stdin=subprocess.PIPE,  # its end is this process's end
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(root)},
        cwd=root,
    )
    assert server.stdout.readline() == b"ready\n"
    script = folder / "python"
    script.write_text(
        f'#!/bin/sh\nexec env {WHERE}="{folder}/socket" "{sys.executable}" -S -s "{__file__}" client "$@"\n'
    )
    script.chmod(0o755)
    return script


def client(where: str, argv: list[str]) -> None:
    argv = argv[argv[:1] == ["-u"] :]
    if not argv or not (argv[0] in ("-m", "-c") or argv[0].endswith(".py")):
        os.execv(sys.executable, [sys.executable, *argv])
    env = {name: value for name, value in os.environ.items() if name != WHERE}
    message = json.dumps([argv, env, os.getcwd()]).encode("utf-8", "surrogateescape")
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(where)
        socket.send_fds(server, [len(message).to_bytes(8, "big")], [0, 1, 2])
        server.sendall(message)
        code = int(server.recv(16) or b"-9")
    if code < 0:
        with suppress(OSError):  # of SIGKILL
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def serve(where: str, modules: list[str]) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(where)
        listening.listen(64)
        print("ready", flush=True)
        threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
        gc.disable()
        for name in modules:
            with suppress(ImportError):  # what is not installed everywhere
                __import__(name)
        if runtime := sys.modules.get("nanolab.runtime"):  # as in conftest.py
            runtime._measure_gflops = functools.cache(runtime._measure_gflops)
            runtime._measure_gflops()
        gc.enable()
        gc.freeze()  # else each fork looks through what is imported, and copies its pages
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the guards
        while True:
            connection, _ = listening.accept()
            if os.fork() == 0:
                listening.close()
                guard(connection)
            connection.close()


def guard(connection: socket.socket) -> None:
    """Fork the process, tell the client its exit code; kill it when the client goes away."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    head, descriptors, _, _ = socket.recv_fds(connection, 8, 3)
    with connection.makefile("rb") as file:
        argv, env, cwd = json.loads(file.read(int.from_bytes(head, "big")))
    child = os.fork()
    if child == 0:
        connection.close()
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
            os.close(descriptor)
        os._exit(run(argv, env, cwd))
    for descriptor in descriptors:
        os.close(descriptor)

    def gone() -> None:
        with suppress(OSError):
            if not connection.recv(1):
                os.kill(child, signal.SIGKILL)

    threading.Thread(target=gone, daemon=True).start()
    _, status = os.waitpid(child, 0)
    with suppress(BrokenPipeError):
        connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def changed() -> bool:
    """Whether a file of ours that is imported was written since the server began."""
    files = [module.__file__ for name, module in sys.modules.items() if name.split(".")[0] in OURS and module.__file__]
    return any(not os.path.exists(file) or os.stat(file).st_mtime > BEGUN for file in files)


def run(argv: list[str], env: dict[str, str], cwd: str) -> int:
    """As `python *argv` would: the exit code."""
    os.chdir(cwd)
    sys.orig_argv = [sys.executable, *argv]
    os.environ.clear()
    os.environ.update(env)
    sys.stdin, sys.stdout, sys.stderr = (open(n, mode, closefd=False) for n, mode in ((0, "r"), (1, "w"), (2, "w")))
    path = [Path(entry).resolve() for entry in env.get("PYTHONPATH", "").split(os.pathsep) if entry]
    if path and path[0] != ROOT or changed():  # another tree's modules, or others by now
        for name in [name for name in sys.modules if name.split(".")[0] in OURS]:
            del sys.modules[name]
    sys.path[:0] = [cwd if argv[0] in ("-m", "-c") else str(Path(argv[0]).resolve().parent), *map(str, path)]
    code = 0
    try:
        if argv[0] == "-m":
            sys.argv = argv[1:]
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        elif argv[0] == "-c":
            sys.argv = ["-c", *argv[2:]]
            exec(compile(argv[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = argv
            runpy.run_path(os.path.abspath(argv[0]), run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if code and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush(), sys.stderr.flush()
    return code


if __name__ == "__main__":
    if sys.argv[1] == "client":
        client(os.environ[WHERE], sys.argv[2:])
    else:
        serve(sys.argv[1], sys.argv[2:])
