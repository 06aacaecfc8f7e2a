"""Runs untrusted Python in an isolated process, and checks its results in a way that it cannot forge.

On Linux, none of these needs a privilege, each stands alone, and `Outcome.isolation` says which of them hold:
  landlock    files: it reads the system's libraries (/lib, /usr/lib, time zones), Python's own with all that is
  installed beside them,
              reads and writes its own empty folder, and nothing else (kernel 5.13)
  seccomp     one process and its threads: no other is started or signalled; no sockets, no file modes (x86-64, aarch64)
  namespaces  no network, no other process in sight, the folder is a small disk in memory (where users may make them)
Without landlock and seccomp nothing runs (REQUIRED), unless a person has said --allow-unsandboxed or the caller asks
for other layers. Everywhere: a fresh interpreter (-I -S), a scrubbed environment, limits of time, memory, file size and
output, and an end for every process that it started. Without landlock the program can read and write what its user can.
Without Linux it also has the network and memory without limit, and a process that leaves its group outlives it. Whether
a path exists, and its size, can always be found out by one who guesses it. Works from any thread, many at once. Imports
no torch."""

import json
import os
import secrets
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection
from contextlib import ExitStack
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

from nanolab.cli import UserError

LAYERS = ("landlock", "seccomp", "namespaces")
REQUIRED = ("landlock", "seccomp")
required: tuple[str, ...] = REQUIRED  # of this process; `walls` changes it where a person says so
PROBE_SECONDS = 60.0  # for the start of an empty program
JAIL = Path(__file__).with_name("jail.py")
DISK_MIB = 16  # largest file; with a namespace, all of them together
GRACE = 2.0  # seconds that the jail gets to end its processes
OUT_OF_MEMORY, TOO_MUCH_CPU = 71, (-9, -24)  # exits: jail.py's own, SIGKILL and SIGXCPU


class Outcome(NamedTuple):
    """status: "ok" (ran to its end; of a check: passed), "error", or the limit that ended it: "timeout", "memory",
    "output".
    """

    stdout: str
    stderr: str
    status: str
    isolation: dict[str, str]  # layer -> "on", or why it does not hold

    @property
    def passed(self) -> bool:
        return self.status == "ok"


def walls(cfg: Any, runs: bool) -> list[str]:
    """The line that a command prints before it runs code of a model's: which layers hold. Nothing where it `runs` none.

    cfg: with the flag allow_unsandboxed. Raises UserError where a layer of REQUIRED is missing and not given up by that
    flag."""
    global required
    if cfg.allow_unsandboxed and not runs:
        wanted = "expected --tool python or a task like humaneval beside it"
        raise UserError(
            f"--allow-unsandboxed was given, but nothing here runs code that a model writes; {wanted}; leave it out",
            "flag-not-read",
            flag="allow_unsandboxed",
        )
    required = () if cfg.allow_unsandboxed else REQUIRED
    if not runs:
        return []
    outcome = run_python("", timeout=PROBE_SECONDS)
    if not outcome.isolation:
        raise _no_sandbox(
            dict.fromkeys(REQUIRED, outcome.stderr.strip().rpartition("\n")[2] or f"it did not start, {outcome.status}")
        )
    missing = [name for name in REQUIRED if outcome.isolation[name] != "on"]
    layers = ", ".join(name if why == "on" else f"no {name} ({why})" for name, why in sorted(outcome.isolation.items()))
    return [f"sandbox: {layers}" + "; --allow-unsandboxed: code of the model's can do what you can" * bool(missing)]


def _no_sandbox(missing: dict[str, str]) -> UserError:
    seen = " and ".join(f"{name} does not hold here ({why})" for name, why in missing.items())
    expected = (
        "expected both around code that a model writes, which Linux has from 5.13 on (x86-64, aarch64; a container may"
        " forbid them)"
    )
    return UserError(
        f"{seen}; {expected}; run it there, or type --allow-unsandboxed where that code may do all that you can",
        "no-sandbox",
        missing=missing,
    )


def run_python(
    code: str,
    *,
    stdin: str = "",
    timeout: float = 5.0,
    memory_mib: int = 256,
    output_bytes: int = 65536,
    layers: Collection[str] = LAYERS,
) -> Outcome:
    """Run a program as a script; "ok" if it exits with 0. Only the standard library is there to import.

    timeout: seconds by the clock. memory_mib: address space, the interpreter's 30 or so included. output_bytes: of
    stdout and of stderr; one byte more ends the program. Raises UserError where a layer is asked for and REQUIRED, and
    does not hold; so does check_program."""
    return _run({"program": code, "check": False}, None, stdin, timeout, memory_mib, output_bytes, layers)


def check_program(
    program: str,
    checks: str,
    *,
    timeout: float = 5.0,
    memory_mib: int = 256,
    output_bytes: int = 65536,
    layers: Collection[str] = LAYERS,
) -> Outcome:
    """Run `checks` (code that raises where something is wrong) on the functions of `program`; `passed` if all of it
    ran.

    The two run in different processes. A name that the checks use and do not define is the program's function of that
    name: calling it sends the arguments over a pipe and gets the result back, both as plain values (None, numbers,
    text, bytes, lists, tuples, sets, dicts); anything else arrives as an object that equals nothing. So the program
    cannot patch what judges it, see the expected answers, or know the nonce that the checks' process hands over at
    their end: without it there is no pass. It cannot be given functions or objects, nor change an argument in place.
    Helpers that the checks rely on are theirs only if they define them. The program's `__name__` is not "__main__"."""
    nonce = secrets.token_hex(16)
    return _run(
        {"program": program, "check": True},
        {"checks": checks, "nonce": nonce},
        "",
        timeout,
        memory_mib,
        output_bytes,
        layers,
    )


def _run(
    task: dict[str, Any],
    secret: dict[str, str] | None,
    stdin: str,
    timeout: float,
    memory_mib: int,
    output_bytes: int,
    layers: Collection[str],
) -> Outcome:
    folder = tempfile.mkdtemp(prefix="nanolab-sandbox-")
    task |= {
        "folder": folder,
        "timeout": timeout,
        "memory_mib": memory_mib,
        "disk_mib": DISK_MIB,
        "layers": list(layers),
    }
    task |= {"required": [name for name in required if name in layers], "parent": os.getpid()}
    blocks = [json.dumps(part).encode() for part in (task, secret)]
    job = b"".join(len(block).to_bytes(8, "big") + block for block in blocks)
    try:
        with tempfile.TemporaryFile() as source:
            source.write(stdin.encode())
            source.seek(0)
            out, limit = _watch(folder, job, source, timeout, output_bytes)
    finally:
        _remove(folder)
    report: dict[str, Any] = {}
    for line in out["report"].splitlines():
        report |= json.loads(line)
    isolation = report.get("isolation", {})
    if missing := {name: isolation[name] for name in task["required"] if isolation.get(name, "on") != "on"}:
        raise _no_sandbox(missing)
    proven = secret is None or secrets.compare_digest(report.get("proof", ""), secret["nonce"])
    exit_code = report.get("exit")
    if limit:
        status = limit
    elif exit_code == 0 and proven:
        status = "ok"
    else:
        status = "memory" if exit_code == OUT_OF_MEMORY else "timeout" if exit_code in TOO_MUCH_CPU else "error"
    stdout, stderr = (out[name][:output_bytes].decode(errors="replace") for name in ("stdout", "stderr"))
    return Outcome(stdout, stderr, status, isolation)


def _watch(folder: str, job: bytes, stdin: Any, timeout: float, output_bytes: int) -> tuple[dict[str, bytes], str]:
    """Run the jail to its end: what its pipes gave, and the limit that it met or ""."""
    deadline = time.monotonic() + timeout
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": folder,
        "TMPDIR": folder,
        "LANG": "C.UTF-8",
        "MALLOC_ARENA_MAX": "1",
    }
    # where libpython may be
    environment |= {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    with ExitStack() as ends:  # whatever is raised, Ctrl-C too: the jail is ended, and every descriptor closed
        (job_out, job_in), (report_out, report_in) = _pipe(ends), _pipe(ends)
        command = [
            sys.executable,
            "-I",
            "-S",
            "-B",
            "-X",
            "utf8",
            "-X",
            "int_max_str_digits=0",
            str(JAIL),
            str(job_out.fileno()),
            str(report_in.fileno()),
        ]
        process = subprocess.Popen(
            command,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            env=environment,
            pass_fds=(job_out.fileno(), report_in.fileno()),
            start_new_session=True,
        )
        streams = {
            "stdout": ends.enter_context(process.stdout),
            "stderr": ends.enter_context(process.stderr),
            "report": report_out,
        }
        ends.callback(_end, process)
        job_out.close(), report_in.close()
        out, limit = dict.fromkeys(streams, b""), ""

        def read(name: str) -> bool:
            """Whether there may be more."""
            try:
                data = os.read(streams[name].fileno(), 65536)
            except BlockingIOError:
                return False
            out[name] += data
            return bool(data)

        selector = ends.enter_context(selectors.DefaultSelector())
        for name, stream in streams.items():
            os.set_blocking(stream.fileno(), False)
            selector.register(stream, selectors.EVENT_READ, name)
        os.set_blocking(job_in.fileno(), False)
        selector.register(job_in, selectors.EVENT_WRITE)
        while report_out in selector.get_map() and not limit:
            for key, _ in selector.select(max(0, deadline - time.monotonic())):
                if key.fileobj is job_in:
                    try:
                        job = job[os.write(job_in.fileno(), job) :]
                    except BrokenPipeError:
                        job = b""
                    if not job:
                        selector.unregister(job_in)
                        job_in.close()
                elif not read(key.data):
                    selector.unregister(key.fileobj)
            if max(len(out["stdout"]), len(out["stderr"])) > output_bytes:
                limit = "output"
            elif time.monotonic() >= deadline and report_out in selector.get_map():
                limit = "timeout"
        job_in.close()
        _end(process)
        for name in ("stdout", "stderr"):
            while len(out[name]) <= output_bytes and read(name):
                pass
    if not limit and max(len(out["stdout"]), len(out["stderr"])) > output_bytes:
        limit = "output"
    return out, limit


def _pipe(ends: ExitStack) -> tuple[FileIO, FileIO]:
    out, into = os.pipe()
    return ends.enter_context(FileIO(out, "rb")), ends.enter_context(FileIO(into, "wb"))


def _end(process: subprocess.Popen) -> None:
    """End the jail, which ends all that it has started; its group, should it not answer."""
    process.terminate()
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.wait()


def _remove(folder: str) -> None:
    """A program without its own disk may leave folders that cannot be listed, or nested deeper than Python's stack."""
    try:
        shutil.rmtree(folder)
    except (OSError, RecursionError):
        subprocess.run(["chmod", "-R", "u+rwx", folder], stderr=subprocess.DEVNULL)
        subprocess.run(["rm", "-rf", folder])
