"""Attacks on the sandbox: none passes, none does harm. Then what honest programs may do.

Each attack says which layer holds it off. It is run with everything on and, where a layer is claimed to be enough by
itself, with that layer alone; a layer that this kernel does not give is skipped with the kernel's reason.
"""

import json
import os
import socket
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nanolab.inference import sandbox
from nanolab.inference.sandbox import LAYERS, check_program, run_python

HUMANEVAL = Path(__file__).parents[3] / "shared/data/eval/humaneval/HumanEval.jsonl"
LINUX = pytest.mark.skipif(
    sys.platform != "linux", reason="these protections are Linux's; elsewhere the module's docstring says what is open"
)
ISOLATION = run_python("").isolation
HERE = {name for name, why in ISOLATION.items() if why == "on"}


def need(*layers: str) -> list[str]:
    for name in layers:
        if name not in HERE:
            pytest.skip(f"no {name} here: {ISOLATION.get(name)}")
    return list(layers)


def code(text: str, **values) -> str:
    """Dedented, with NAME replaced by repr(value)."""
    text = textwrap.dedent(text)
    for name, value in values.items():
        text = text.replace(name, repr(value))
    return text


def alive(marker: str) -> list[int]:
    """Processes whose environment or command line holds the marker, zombies left out."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if marker.encode() in (path / "environ").read_bytes() + (path / "cmdline").read_bytes():
                if (path / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                    found.append(int(path.name))
        except OSError:
            pass
    return found


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path, monkeypatch):
    """After every test: no folder of the sandbox's, and no process that was started in one."""
    folders = tmp_path / "folders"
    folders.mkdir()
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(folders))
    yield
    assert list(folders.iterdir()) == []
    if sys.platform == "linux":
        assert alive(str(folders)) == []


# ------------------------------------------------------------------------------------------- passing without being
# right

CHECKS = "assert add(2, 3) == 5\nassert add(-1, 1) == 0\n"

TRICKS = {
    "sys.exit at the top": "import sys\nsys.exit(0)",
    "os._exit at the top": "import os\nos._exit(0)",
    "raise SystemExit": "raise SystemExit",
    "quit()": "raise SystemExit(0)\n",
    "sys.exit in the call": "import sys\ndef add(a, b): sys.exit(0)",
    "os._exit in the call": "import os\ndef add(a, b): os._exit(0)",
    "SystemExit with a lying code": (
        "class Zero(int):\n  def __eq__(self, o): return True\ndef add(a, b): raise SystemExit(Zero())"
    ),
    "StopIteration": "def add(a, b): raise StopIteration",
    "KeyboardInterrupt": "def add(a, b): raise KeyboardInterrupt",
    "GeneratorExit": "def add(a, b): raise GeneratorExit",
    "atexit": "import atexit, os\natexit.register(lambda: os._exit(0))\ndef add(a, b): return 0",
    "equal to everything": (
        "class Yes:\n  def __eq__(self, o): return True\n  def __ne__(self, o): return False\ndef add(a, b): return"
        " Yes()"
    ),
    "an int equal to everything": (
        "class Yes(int):\n  def __eq__(self, o): return True\n  __hash__ = int.__hash__\ndef add(a, b): return Yes(7)"
    ),
    "a list equal to everything": "class Yes(list):\n  def __eq__(self, o): return True\ndef add(a, b): return Yes()",
    "patched builtins": (
        "import builtins\nbuiltins.AssertionError = type('Quiet', (BaseException,), {})\nbuiltins.__build_class__ ="
        " builtins.exec = builtins.compile = builtins.isinstance = lambda *a, **k: True\ndef add(a, b): return 0"
    ),
    "patched json": (
        "import json\njson.dumps = lambda *a, **k: '5'\njson.loads = lambda *a, **k: 5\ndef add(a, b): return 0"
    ),
    "patched int": (
        "import builtins\nclass I(int):\n  def __eq__(s, o): return True\nbuiltins.int = I\ndef add(a, b): return I(1)"
    ),
    "a trace that rewrites": (
        "import sys\ndef t(frame, event, arg):\n  frame.f_locals.clear()\n  return t\nsys.settrace(t)\ndef add(a, b):"
        " return 0"
    ),
    "a profile hook that exits": "import sys, os\nsys.setprofile(lambda *a: os._exit(0))\ndef add(a, b): return 0",
    "an exit code by signal": "import os, signal\ndef add(a, b): os.kill(os.getpid(), signal.SIGTERM)",
    "a crash": "import ctypes\ndef add(a, b): ctypes.string_at(0)",
    "defines the checks": "def check(*a): return True\nassertEqual = check\ndef add(a, b): return 0",
    "closes every descriptor": "import os\nos.closerange(0, 60)\ndef add(a, b): return 0",
    "a passing verdict on every descriptor": (
        'import os\nfor fd in range(3, 64):\n  try: os.write(fd, b\'{"isolation": {}}\\n{"exit": 0, "proof":'
        ' ""}\\n{"value": 5}\\n\')\n  except OSError: pass\ndef add(a, b): return 0'
    ),
    "answers sent ahead": (
        "import os\nfor fd in range(3, 64):\n  try: os.write(fd, b'{\"value\": true}\\n' * 9)\n  except OSError:"
        " pass\ndef add(a, b): return 0"
    ),
    "an answer that cannot be read": (
        "import os\ndef add(a, b):\n  for fd in range(3, 64):\n    try: os.write(fd, b'[' * 100000 + b'\\n')\n   "
        " except OSError: pass\n  os._exit(0)"
    ),
    "an answer without an end": (
        "import os\ndef add(a, b):\n  for fd in range(3, 64):\n    try:\n      while True: os.write(fd, b'x' * 65536)\n"
        "    except OSError: pass"
    ),
    "an evil tag in an answer": (
        'import os\ndef add(a, b):\n  for fd in range(3, 64):\n    try: os.write(fd, b\'{"value": {"__import__":'
        ' ["os"]}}\\n\')\n    except OSError: pass\n  return 0'
    ),
    "a value that nests for ever": "x = []\nx.append(x)\ndef add(a, b): return x",
    "forges an error of any name": "class exit(Exception): pass\ndef add(a, b): raise exit('0')",
    "does not define it": "def sum_of(a, b): return a + b",
    "does not parse": "def add(a, b) return a + b",
    "a null byte": "def add(a, b): return a + b\n\0",
    "prints the verdict": "print('ok')\ndef add(a, b): print('{\"exit\": 0}'); return 0",
}


@pytest.mark.parametrize("program", TRICKS.values(), ids=TRICKS)
def test_a_trick_does_not_pass(program):
    outcome = check_program(program, CHECKS, timeout=3)
    assert not outcome.passed and outcome.status in ("error", "timeout", "memory", "output")


def test_the_right_program_passes_and_a_wrong_one_does_not():
    """The check of the tests above: it is their trick that fails, nothing else."""
    assert check_program("def add(a, b): return a + b", CHECKS).passed
    wrong = check_program("def add(a, b): return a * b", CHECKS)
    assert wrong.status == "error" and "AssertionError" in wrong.stderr and "add(2, 3)" in wrong.stderr


def test_an_exception_of_the_programs_does_not_end_a_loop_of_the_checks():
    assert not check_program(
        "def add(a, b): raise StopIteration", "for got in map(add, [2], [3]): assert got == 5"
    ).passed


def test_a_program_that_exits_or_closes_its_output_does_not_pass_even_if_it_is_right():
    assert check_program("import sys\ndef add(a, b): return a + b\nsys.stdout.close()", CHECKS).status == "error"
    assert check_program("import sys\ndef add(a, b): return a + b\nsys.exit()", CHECKS).status == "error"


@pytest.mark.parametrize(
    "checks",
    [
        "import sys\nsys.exit(0)\nassert add(1, 1) == 3",
        "raise SystemExit",
        "assert all(map(add, [1], [1])) and False",
        "add(",
        "import os\nos._exit(0)",
    ],
)
def test_checks_that_do_not_reach_their_end_prove_nothing(checks):
    assert check_program("def add(a, b): return a + b", checks).status == "error"


def test_neither_nonce_nor_checks_are_in_the_programs_memory_frames_or_descriptors():
    """The program searches its frames, everything the garbage collector knows, all its writable memory and its
    descriptors.
    """
    program = code("""
        import gc, os, re, sys
        KEPT
        found = []
        def look(text):
            if re.search("SECRET[_]MARK", text): found.append(text[:200])  # a pattern that does not find itself
        def add(a, b):
            frame = sys._getframe()
            while frame:
                for space in (frame.f_locals, frame.f_globals):
                    for value in list(space.values()): look(repr(value)[:100000])
                frame = frame.f_back
            for thing in gc.get_objects():
                if isinstance(thing, (dict, list, tuple)) and thing is not found:
                    for value in thing.values() if isinstance(thing, dict) else thing:
                        if isinstance(value, (str, bytes)): look(str(value))
            for fd in range(3, 64):
                try:
                    os.set_blocking(fd, False)
                    look(repr(os.read(fd, 10**6)))
                except OSError: pass
            try:
                with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb") as memory:
                    for line in maps:
                        if "rw" in line and "vv" not in line:
                            lo, hi = (int(x, 16) for x in line.split()[0].split("-"))
                            memory.seek(lo)
                            look(repr(memory.read(min(hi - lo, 1 << 24))))
            except OSError: pass
            return len(found)
    """)
    checks = "mark = 'SECRET_MARK and the nonce beside it'\nassert add(1, 2) == 0"
    for layers in (LAYERS, ()):
        assert check_program(program.replace("KEPT", ""), checks, timeout=10, memory_mib=512, layers=layers).passed, (
            layers
        )
    # it would be found
    assert (
        check_program(program.replace("KEPT", "kept = 'SECRET' + '_MARK'"), checks, timeout=10, memory_mib=512).status
        == "error"
    )


@LINUX
@pytest.mark.parametrize("layers", [LAYERS, ("landlock",), ("seccomp",), ("namespaces",), ()], ids="+".join)
def test_the_program_cannot_reach_into_the_process_that_checks_it(layers):
    """By ptrace, by process_vm_readv, by /proc/<pid>/mem, environ and fd: not with any layer, not without one."""
    need(*layers)
    program = code("""
        import ctypes, os
        libc = ctypes.CDLL(None, use_errno=True)
        def add(a, b):
            parent, reached = os.getppid(), 0
            reached += libc.ptrace(16, parent, 0, 0) == 0
            local, buffer = (ctypes.c_void_p * 2)(), ctypes.create_string_buffer(64)
            local[0], local[1] = ctypes.addressof(buffer), 64
            remote = (ctypes.c_void_p * 2)(id(libc), 64)
            reached += libc.process_vm_readv(parent, local, 1, remote, 1, 0) > 0
            for name in ("mem", "environ", "fd/3", "fd/4", "fd/5", "maps"):
                try:
                    open(f"/proc/{parent}/{name}", "rb")
                    reached += 1
                except OSError: pass
            return reached
    """)
    assert check_program(program, "assert add(1, 2) == 0", layers=layers).passed


# ---------------------------------------------------------------------------------------------------- processes and
# time


def stays_dead(tmp_path: Path, program: str, **settings) -> sandbox.Outcome:
    """Run a program that touches BEAT for ever from wherever it hides; nothing touches it afterwards."""
    beat = tmp_path / "beat"
    outcome = run_python(code(program, BEAT=str(beat)), **settings)
    seen = beat.stat().st_mtime_ns if beat.exists() else 0
    time.sleep(0.15)
    assert (beat.stat().st_mtime_ns if beat.exists() else 0) == seen
    return outcome


HIDE = """
import os, sys, time, signal
def beat():
    for n in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT): signal.signal(n, signal.SIG_IGN)
    while True:
        try:
            with open(BEAT, 'a') as f: f.write('x')
            os.utime(BEAT)
        except OSError: pass
        time.sleep(0.01)
"""
HIDERS = {
    "a child": "if os.fork() == 0: beat()\ntime.sleep(0.1)",
    "a double fork": "if os.fork() == 0:\n  if os.fork() == 0: beat()\n  os._exit(0)\nos.wait()\ntime.sleep(0.1)",
    "a daemon": (
        "if os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0:\n    os.closerange(0, 64)\n    beat()\n "
        " os._exit(0)\nos.wait()\ntime.sleep(0.1)"
    ),
    "a daemon that forgets its parent": (
        "import ctypes\nif os.fork() == 0:\n  ctypes.CDLL(None).prctl(1, 0)\n  os.setsid()\n "
        " beat()\ntime.sleep(0.1)\nos._exit(0)"
    ),
    "a subprocess": (
        "import subprocess\nsubprocess.Popen(['/bin/sh', '-c', 'trap \"\" TERM; while true; do echo x >> $0; sleep"
        " 0.01; done', BEAT], start_new_session=True)\ntime.sleep(0.1)"
    ),
    "posix_spawn": (
        "os.posix_spawn('/bin/sh', ['sh', '-c', 'while true; do echo x >> $0; sleep 0.01; done', BEAT], {},"
        " setsid=True)\ntime.sleep(0.1)"
    ),
    "multiprocessing": (
        "import multiprocessing as m\nm.get_context('fork').Process(target=beat,"
        " daemon=False).start()\ntime.sleep(0.1)\nos._exit(0)"
    ),
}


@pytest.mark.slow
@LINUX
@pytest.mark.parametrize("layers", [LAYERS, ("namespaces",), ()], ids="+".join)
@pytest.mark.parametrize("hider", HIDERS.values(), ids=HIDERS)
def test_no_process_outlives_the_run(tmp_path, hider, layers):
    """With a process namespace, and without any layer too: orphans come to the warden, which ends them."""
    need(*layers)
    outcome = stays_dead(tmp_path, HIDE + hider, layers=layers, timeout=2)
    if "seccomp" in layers:
        assert outcome.status == "error" and "Operation not permitted" in outcome.stderr
        assert not (tmp_path / "beat").exists()
    else:
        assert (tmp_path / "beat").exists()  # the attack works: what it started did run


@LINUX
def test_seccomp_lets_no_process_be_started():
    need("seccomp")
    program = code("""
        import ctypes, os, subprocess
        libc = ctypes.CDLL(None, use_errno=True)
        ways = [
            os.fork, os.forkpty, os.setsid, lambda: os.setpgid(0, 0), lambda: os.execv("/bin/true", ["true"]),
            lambda: os.system("true") and 1 / 0, lambda: os.posix_spawn("/bin/true", ["true"], {}),
            lambda: subprocess.run(["/bin/true"]), lambda: os.popen("true"),
        ]
        for n, way in enumerate(ways):
            try:
                way()
            except (OSError, ZeroDivisionError):
                continue
            print("started", n)
        for number in (56, 57, 58, 435):  # clone, fork, vfork, clone3
            if libc.syscall(number, 17, 0, 0, 0, 0) >= 0: print("syscall", number)
        print("x32", libc.syscall(0x40000000 + 57) >= 0)
    """)
    if os.uname().machine != "x86_64":
        program = program.replace("(56, 57, 58, 435)", "(220, 435)")
    outcome = run_python(program, layers=["seccomp"])
    assert (outcome.stdout, outcome.status) == ("x32 False\n", "ok")


@LINUX
def test_a_fork_bomb_is_held(tmp_path):
    need("seccomp")
    outcome = run_python("import os\nwhile True:\n  try: os.fork()\n  except BlockingIOError: pass", timeout=2)
    assert outcome.status == "error" and "PermissionError" in outcome.stderr


@LINUX
def test_a_fork_bomb_without_seccomp_is_held_by_the_namespace():
    need("namespaces")
    if os.geteuid() == 0:
        pytest.skip("Linux does not count root's processes; seccomp is what holds root's")
    outcome = run_python(
        "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass", timeout=1, layers=["namespaces"]
    )
    assert outcome.status == "timeout"


TIME = {
    "a loop": "while True: pass",
    "sleep": "import time\ntime.sleep(1000)",
    "a loop in C": "x = 7 ** 10 ** 9",
    "a long regular expression": "import re\nre.match('(a+)+$', 'a' * 40 + 'b')",
    "deaf to signals": (
        "import signal\nfor n in range(1, 65):\n  try: signal.signal(n, signal.SIG_IGN)\n  except (OSError,"
        " ValueError): pass\nwhile True: pass"
    ),
    "a handler that goes on": (
        "import signal, time\nsignal.signal(signal.SIGTERM, lambda *a: time.sleep(99))\ntime.sleep(99)"
    ),
    "threads": (
        "import threading\nfor _ in range(4): threading.Thread(target=lambda: [None for _ in iter(int, 1)]).start()"
    ),
    "a thread at exit": "import threading, time\nthreading.Thread(target=time.sleep, args=(99,)).start()",
    "a lock": "import threading\nl = threading.Lock()\nl.acquire()\nl.acquire()",
    "except: again": "while True:\n  try:\n    while True: pass\n  except BaseException: pass",
    "atexit that stays": "import atexit, time\natexit.register(time.sleep, 99)",
    "stopped": "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\nwhile True: pass",
    "reads on": "import os\nr, w = os.pipe()\nos.read(r, 1)",
}


@pytest.mark.slow
@pytest.mark.parametrize("program", TIME.values(), ids=TIME)
def test_time_runs_out(program):
    """All of them would stay a minute and a half or for ever."""
    began = time.monotonic()
    outcome = run_python(program, timeout=0.4)
    assert outcome.status == "timeout" and time.monotonic() - began < 60, "a guard, no measurement"


def test_time_runs_out_in_a_check_and_in_the_checks():
    assert check_program("def add(a, b):\n  while True: pass", CHECKS, timeout=0.4).status == "timeout"
    assert check_program("while True: pass", CHECKS, timeout=0.4).status == "timeout"
    assert check_program("def add(a, b): return 0", "while True: add(1, 2)", timeout=0.4).status == "timeout"


@LINUX
@pytest.mark.parametrize("layers", [LAYERS, ("seccomp",), ("namespaces",)], ids="+".join)
def test_other_processes_cannot_be_signalled(layers):
    need(*layers)
    victim = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
    try:
        program = code(
            """
            import fcntl, os, signal, socket
            for pid in (VICTIM, -VICTIM, PARENT, os.getppid(), 0, -1, 1):
                try: os.kill(pid, signal.SIGKILL)
                except OSError: continue
                print("killed", pid)
            r, w = os.pipe()
            a, b = socket.socketpair()
            for fd in (r, a.fileno()):  # a signal of one's choice by way of a file's owner
                try:
                    fcntl.fcntl(fd, fcntl.F_SETOWN, VICTIM)
                    fcntl.fcntl(fd, 10, signal.SIGKILL)
                    fcntl.fcntl(fd, fcntl.F_SETFL, os.O_ASYNC)
                except OSError: pass
            os.write(w, b"x"), b.send(b"x")
        """,
            VICTIM=victim.pid,
            PARENT=os.getpid(),
        )
        outcome = run_python(program, layers=layers)
        time.sleep(0.05)
        assert victim.poll() is None
        if "seccomp" in layers:
            assert (outcome.stdout, outcome.status) == ("", "ok")
    finally:
        victim.kill()
        victim.wait()


def test_killing_its_parents_is_no_pass():
    program = (
        "import os, signal\ndef add(a, b):\n  for pid in (os.getppid(), 0, -1):\n    try: os.kill(pid, 9)\n    except"
        " OSError: pass\n  return 0"
    )
    layers = LAYERS if "namespaces" in HERE else ("seccomp",)
    assert check_program(program, CHECKS, layers=layers).status == "error"
    if "namespaces" in HERE:
        assert check_program(program, CHECKS, layers=("namespaces",)).status == "error"


@LINUX
def test_the_run_ends_with_the_process_that_asked_for_it(tmp_path):
    """Killed outright, it leaves nothing behind that runs; only the empty folder."""
    asker = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r})\nfrom nanolab.inference.sandbox import"
        " run_python\nprint(1, flush=True)\nrun_python('while True: pass', timeout=60)"
    )
    marker = tmp_path / "marked"
    marker.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", asker], stdout=subprocess.PIPE, env=os.environ | {"TMPDIR": str(marker)}
    )
    process.stdout.readline()
    deadline = time.monotonic() + 10
    while len(alive(str(marker))) < 4 and time.monotonic() < deadline:  # the asker, and the sandbox's three
        time.sleep(0.02)
    assert len(alive(str(marker))) == 4
    process.kill()
    process.wait()
    while alive(str(marker)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert alive(str(marker)) == []


# ------------------------------------------------------------------------------------------------------ memory and
# output

MEMORY = {
    "a string": "x = 'x' * 10**10",
    "a list": "x = []\nwhile True: x.append(' ' * 10**6)",
    "a number": "x = 1 << 10**10",
    "mapped": "import mmap\nx = [mmap.mmap(-1, 1 << 26) for _ in range(100)]",
    "shared": "import mmap\nx = [mmap.mmap(-1, 1 << 26, flags=mmap.MAP_SHARED) for _ in range(100)]",
    "repeated": "x = list(range(10))\nwhile True: x = x * 10",
}


@LINUX
@pytest.mark.parametrize("program", MEMORY.values(), ids=MEMORY)
def test_memory_runs_out(program):
    outcome = run_python(program, timeout=10)
    assert outcome.status == "memory" or "Cannot allocate memory" in outcome.stderr


@LINUX
def test_memory_runs_out_in_a_check_or_is_caught_and_given_back():
    assert check_program("def add(a, b): return 'x' * 10**10", CHECKS).status == "memory"
    assert run_python("try: x = 'x' * 10**10\nexcept MemoryError: print('caught')").stdout == "caught\n"
    assert run_python("x = 'x' * 10**8\nprint(len(x))").stdout == "100000000\n"
    assert run_python("x = 'x' * 10**8\nprint(len(x))", memory_mib=100).status == "memory"


@LINUX
def test_memory_outside_the_limit_is_out_of_reach():
    need("seccomp")
    outcome = run_python(
        "import ctypes, os\ntry: os.memfd_create('x')\nexcept PermissionError:"
        " print('no')\nprint(ctypes.CDLL(None).shmget(0, 4096, 0o1600))",
        layers=["seccomp"],
    )
    assert outcome.stdout == "no\n-1\n"


def test_endless_recursion_is_an_error():
    outcome = run_python("def f(): f()\nf()")
    assert outcome.status == "error" and "RecursionError" in outcome.stderr
    assert run_python(
        "import sys\nsys.setrecursionlimit(10**9)\nclass A:\n  def __getattr__(self, n): return getattr(self, n)\nA().x"
    ).status in ("error", "memory")


@pytest.mark.parametrize(
    "program",
    [
        "while True: print('x' * 1000)",
        "import sys\nwhile True: sys.stderr.write('y' * 999)",
        "import os\nwhile True: os.write(1, bytes(65536))",
        "raise Exception('z' * 10**6)",
    ],
    ids=["stdout", "stderr", "bytes", "an error"],
)
def test_output_is_cut_and_ends_the_program(program):
    """Endless but for the last: who waited for the time to run out would wait here."""
    outcome = run_python(program, timeout=600, output_bytes=10_000)
    assert outcome.status == "output"
    assert max(len(outcome.stdout), len(outcome.stderr)) == 10_000


def test_output_at_the_cap_is_fine_and_one_byte_more_is_not():
    assert run_python("print('x' * 99)", output_bytes=100).status == "ok"
    assert run_python("print('x' * 100)", output_bytes=100).status == "output"


# ------------------------------------------------------------------------------------------------------ files and
# secrets


@LINUX
@pytest.mark.parametrize("layers", [LAYERS, ("landlock",)], ids="+".join)
def test_nothing_outside_its_folder_can_be_written(tmp_path, layers):
    need(*layers)
    target, folder = tmp_path / "target.txt", tmp_path / "folder"
    target.write_text("as it was")
    folder.mkdir()
    before = target.stat()
    program = code(
        """
        import os, shutil
        def attempt(way):
            try: way()
            except (OSError, shutil.Error): return
            print("done:", way.__code__.co_firstlineno - 3)
        os.symlink(TARGET, "link")
        ways = [
            lambda: open(TARGET, "w"), lambda: open(TARGET, "a"), lambda: open(TARGET, "r+"), lambda: open("link", "w"),
            lambda: os.remove(TARGET), lambda: os.rename(TARGET, "mine"), lambda: os.link(TARGET, "hard"),
            lambda: open(FOLDER + "/new", "w"),
            lambda: os.mkdir(FOLDER + "/new"), lambda: os.rmdir(FOLDER), lambda: os.symlink("x", FOLDER + "/s"),
            lambda: os.mkfifo(FOLDER + "/f"),
            lambda: os.truncate(TARGET, 0), lambda: os.replace("link", TARGET), lambda: shutil.rmtree(FOLDER),
            lambda: open("/dev/shm/nanolab", "w"),
            lambda: open("/tmp/nanolab", "w"), lambda: open(os.path.expanduser("~root/.x"), "w"),
            lambda: open("../x", "w"), lambda: os.mknod(FOLDER + "/n"),
        ]
        for way in ways: attempt(way)
        print("end")
    """,
        TARGET=str(target),
        FOLDER=str(folder),
    )
    outcome = run_python(program, layers=layers)
    assert (outcome.stdout, outcome.status) == ("end\n", "ok")
    assert target.read_text() == "as it was" and list(folder.iterdir()) == []
    assert (target.stat().st_nlink, target.stat().st_mtime_ns) == (1, before.st_mtime_ns)


@LINUX
def test_the_attributes_of_other_files_stay(tmp_path):
    """Landlock leaves chmod, chown, utime and extended attributes open; seccomp does not."""
    need("seccomp")
    target = tmp_path / "target.txt"
    target.write_text("x")
    target.chmod(0o640)
    before = target.stat()
    program = code(
        """
        import os
        for way in (lambda: os.chmod(TARGET, 0o777), lambda: os.utime(TARGET, (1, 1)),
                    lambda: os.setxattr(TARGET, "user.x", b"1"), lambda: os.chown(TARGET, os.getuid(), os.getgid())):
            try: way()
            except PermissionError: print("refused")
    """,
        TARGET=str(target),
    )
    assert run_python(program, layers=["seccomp"]).stdout == "refused\n" * 4
    after = target.stat()
    assert (after.st_mode, after.st_mtime_ns, after.st_ctime_ns) == (
        before.st_mode,
        before.st_mtime_ns,
        before.st_ctime_ns,
    )


@LINUX
@pytest.mark.parametrize("layers", [LAYERS, ("landlock",)], ids="+".join)
def test_nothing_of_the_users_can_be_read(tmp_path, monkeypatch, layers):
    need(*layers)
    secret = tmp_path / "secret.txt"
    secret.write_text("top secret")
    program = code(
        """
        import os, glob
        os.symlink(SECRET, "link")
        for path in (SECRET, "link", "/etc/passwd", "/etc/hostname", "/proc/self/environ", f"/proc/{PARENT}/environ",
                     f"/proc/{PARENT}/cmdline", f"/proc/{os.getppid()}/environ", PROJECT + "/pyproject.toml"):
            try: print("read", path, open(path).read(9))
            except OSError: pass
        for path in ("/", "/home", "/root", "/etc", "/tmp", "/proc", PROJECT, os.path.dirname(SECRET)):
            try: print("listed", path, os.listdir(path))
            except OSError: pass
        print(glob.glob("/home/*"), glob.glob("/root/.*"))
    """,
        SECRET=str(secret),
        PARENT=os.getpid(),
        PROJECT=str(Path(__file__).parents[2]),
    )
    outcome = run_python(program, layers=layers)
    assert (outcome.stdout, outcome.status) == ("[] []\n", "ok")


def test_the_environment_is_scrubbed(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    outcome = run_python(
        "import json, os, sys\nprint(json.dumps(dict(os.environ)))\nprint(json.dumps(sys.path + sys.argv))"
    )
    environment, others = outcome.stdout.splitlines()
    assert set(json.loads(environment)) <= {
        "PATH",
        "HOME",
        "TMPDIR",
        "LANG",
        "MALLOC_ARENA_MAX",
        "LD_LIBRARY_PATH",
        "LC_CTYPE",
    }
    assert "secret" not in outcome.stdout and "/somewhere" not in outcome.stdout and "nanolab/inference" not in others


def test_the_project_and_installed_packages_cannot_be_imported():
    for name in ("nanolab", "torch", "numpy", "jail"):
        outcome = run_python(f"import {name}")
        assert outcome.status == "error" and "ModuleNotFoundError" in outcome.stderr


@LINUX
def test_huge_files_do_not_fill_the_disk():
    outcome = run_python("with open('big', 'wb') as f:\n  for _ in range(100): f.write(bytes(1 << 20))")
    assert outcome.status == "error" and "OSError" in outcome.stderr
    assert run_python("with open('fits', 'wb') as f: f.write(bytes(10 << 20))").status == "ok"


@LINUX
def test_many_files_do_not_fill_the_disk():
    need("namespaces")
    outcome = run_python("for n in range(100):\n  with open(str(n), 'wb') as f: f.write(bytes(1 << 20))")
    assert outcome.status == "error" and "No space left" in outcome.stderr
    assert "No space left" in run_python("for n in range(10**5): open(str(n), 'w').close()").stderr


@pytest.mark.parametrize(
    "program",
    [
        "import os\nos.rmdir(os.getcwd())",
        "import os\nos.mkdir('a', 0)\nos.mkdir('b')\nopen('b/c', 'w').close()\nos.mkdir('d', 0o300)",
        (
            "import os\nos.symlink(OUTSIDE, 'a')\nos.symlink(OUTSIDE + '/file', 'b')\nos.symlink('..',"
            " 'up')\nos.mkdir('d', 0)"
        ),
        "import os\nfor _ in range(1200):\n  os.mkdir('d')\n  os.chdir('d')",
        "import os, shutil\nshutil.rmtree(os.getcwd(), ignore_errors=True)\nprint(1)",
    ],
    ids=["removes its folder", "folders that cannot be read", "links to everywhere", "deep", "removes all it can"],
)
@pytest.mark.parametrize("layers", [LAYERS, ()], ids="+".join)
def test_its_folder_is_gone_afterwards_whatever_is_in_it(program, layers, tmp_path):
    """The fixture looks; what links point to is still there."""
    (tmp_path / "file").write_text("kept")
    run_python(program.replace("OUTSIDE", repr(str(tmp_path))), layers=layers)
    assert (tmp_path / "file").read_text() == "kept"


# ---------------------------------------------------------------------------------------------------------------
# network

NETWORK = code("""
    import socket
    reached = []
    def attempt(name, way):
        try: way()
        except OSError: return
        reached.append(name)
    attempt("tcp", lambda: socket.create_connection(("127.0.0.1", TCP_PORT), timeout=1))
    attempt("udp", lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", UDP_PORT)))
    attempt("dns", lambda: socket.getaddrinfo("example.com", 80))
    attempt("listen", lambda: socket.create_server(("127.0.0.1", 0)))
    attempt("outside", lambda: socket.create_connection(("1.1.1.1", 53), timeout=1))
    attempt("ipv6", lambda: socket.create_connection(("::1", TCP_PORT), timeout=1))
    attempt("raw", lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1))
    attempt("netlink", lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0))
    attempt("unix", lambda: socket.socket(socket.AF_UNIX).connect(SOCKET_PATH))
    attempt("abstract", lambda: socket.socket(socket.AF_UNIX).connect(ABSTRACT_NAME))
    def pair():
        a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        a.sendto(b"x", GRAM_PATH)
    attempt("a pair's datagram", pair)
    import json
    print(json.dumps(reached))
""")


@LINUX
@pytest.mark.parametrize(
    "layers, open_",
    [
        (LAYERS, []),
        (("seccomp",), []),
        (
            ("namespaces",),
            ["listen", "raw", "netlink", "unix", "a pair's datagram"],
        ),  # a network of its own; sockets that are files are files
    ],
    ids=["all", "seccomp", "namespaces"],
)
def test_no_network(tmp_path, layers, open_):
    need(*layers)
    received = []
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
        socket.socket(socket.AF_UNIX) as unix,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as gram,
        socket.socket(socket.AF_UNIX) as abstract,
    ):
        udp.bind(("127.0.0.1", 0))
        unix.bind(str(tmp_path / "u")), gram.bind(str(tmp_path / "g")), abstract.bind(f"\0nanolab{os.getpid()}")
        unix.listen(), abstract.listen()
        values = {
            "GRAM_PATH": str(tmp_path / "g"),
            "SOCKET_PATH": str(tmp_path / "u"),
            "ABSTRACT_NAME": f"\0nanolab{os.getpid()}",
            "TCP_PORT": tcp.getsockname()[1],
            "UDP_PORT": udp.getsockname()[1],
        }
        outcome = run_python(code(NETWORK, **values), layers=layers)
        for listener in (tcp, udp):
            listener.settimeout(0.05)
            try:
                received.append(listener.accept() if listener is tcp else listener.recv(9))
            except TimeoutError:
                pass
    assert received == []
    reached = json.loads(outcome.stdout)
    assert not set(reached) - set(open_), reached
    assert not {"tcp", "udp", "dns", "outside", "ipv6", "abstract"} & set(reached)


# ------------------------------------------------------------------------------------------------------- honest
# programs


def test_a_program_prints_reads_and_ends():
    outcome = run_python(
        "import sys\nname = input()\nprint(f'hello {name} ✓')\nprint(len(sys.stdin.read()), file=sys.stderr)",
        stdin="Zoë\n" + "x" * 200_000,
    )
    assert outcome[:3] == ("hello Zoë ✓\n", "200000\n", "ok")
    assert set(outcome.isolation) == set(LAYERS)


@pytest.mark.parametrize(
    "program, status, text",
    [
        ("", "ok", ""),
        ("import sys; sys.exit()", "ok", ""),
        ("import sys; sys.exit('no')", "error", "no"),
        ("exit_code = 1\nraise SystemExit(2)", "error", ""),
        ("1/0", "error", 'File "program.py", line 1, in <module>'),
        ("x = (", "error", "SyntaxError"),
        ("def f(:\n", "error", "SyntaxError"),
        ("assert 1 == 2, 'sums'", "error", "AssertionError: sums"),
        ("import os\nos.abort()", "error", ""),
        ("input()", "error", "EOFError"),
    ],
)
def test_how_it_ended(program, status, text):
    outcome = run_python(program)
    assert outcome.status == status and text in outcome.stderr and "jail" not in outcome.stderr


def test_the_standard_library_works():
    program = """
import asyncio, collections, dataclasses, datetime, decimal, hashlib, heapq, itertools, json, math, pickle, random
import re, sqlite3, statistics, tempfile, threading, zoneinfo
from concurrent.futures import ThreadPoolExecutor
@dataclasses.dataclass
class Point: x: int
assert pickle.loads(pickle.dumps(Point(3))) == Point(3)
async def main():
    await asyncio.sleep(0.01)
    return sum(await asyncio.gather(*(asyncio.sleep(0, n) for n in range(4))))
assert asyncio.run(main()) == 6
assert list(ThreadPoolExecutor(4).map(abs, [-1, 2])) == [1, 2]
with tempfile.NamedTemporaryFile("w+") as f:
    f.write("x"); f.seek(0)
    assert f.read() == "x"
with open("a.txt", "w") as f: f.write("text")
assert open("a.txt").read() == "text" and random.random() < 1
assert sqlite3.connect("data.db").execute("select 1 + 1").fetchone() == (2,)
assert hashlib.sha256(b"").hexdigest().startswith("e3b0")
if __name__ == "__main__": print("ok")
"""
    assert run_python(program)[:3] == ("ok\n", "", "ok")


PLAIN = """None True 0 -7 10**5000 1.5 float('inf') 'text_é\\ud800' b'\\xff' bytearray(b'x')
[1,[2]] (1,(2,)) {1:(2,),'a':[None]} {1,2} frozenset({3}) 1+2j
[] (1,) () {} set() '' [True]""".split()


def test_plain_values_cross_as_they_are():
    """Each way, with their types; tuples are not lists, 1 is not True."""
    checks = "".join(
        f"value, got = {value}, same({value})\nassert got == value and type(got) is type(value) and repr(got) =="
        " repr(value)\n"
        for value in PLAIN
    )
    outcome = check_program(
        "def same(x): return x", checks + "assert same(float('nan')) != same(float('nan')) and same(x=3) == 3"
    )
    assert outcome.passed, outcome.stderr


def test_subclasses_cross_as_what_they_are_based_on_and_objects_as_nothing_equal():
    program = (
        "import collections, enum\nclass E(enum.IntEnum): A = 3\nP = collections.namedtuple('P', 'x y')\ndef f(n):"
        " return [collections.Counter('aab'), collections.OrderedDict(a=1), P(1, 2), E.A, range(3), (x for x in 'a'),"
        " object()][n]"
    )
    checks = (
        "assert f(0) == {'a': 2, 'b': 1} and f(1) == {'a': 1} and f(2) == (1, 2) and f(3) == 3\nfor n in (4, 5, 6):"
        " assert f(n) != f(n)\nassert 'range' in repr(f(4))"
    )
    outcome = check_program(program, checks)
    assert outcome.passed, outcome.stderr


def test_exceptions_cross_by_name():
    program = (
        "class Own(ValueError): pass\ndef f(kind):\n  raise {'v': ValueError('bad'), 'k': KeyError('k'), 'o':"
        " Own('mine'), 'u': UnicodeDecodeError('utf-8', b'', 0, 1, 'x')}[kind]"
    )
    checks = """
for kind, error in ('v', ValueError), ('k', KeyError), ('o', RuntimeError), ('u', UnicodeDecodeError):
    try: f(kind)
    except error: pass
    else: assert False
"""
    outcome = check_program(program, checks)
    assert outcome.passed, outcome.stderr


def test_checks_have_helpers_and_imports_of_their_own_and_call_several_functions():
    program = (
        "print('loading')\ndef encode(s): return s[::-1]\ndef decode(s): return s[::-1]\nabs = len\nif __name__ =="
        " '__main__': 1 / 0"
    )
    checks = (
        "import math\ndef near(a, b): return abs(a - b) < 1e-9\ndef check(candidate):\n    for s in 'ab', 'xyz': assert"
        " decode(candidate(s)) == s\n    assert near(math.sqrt(4), 2)\ncheck(encode)"
    )
    outcome = check_program(program, checks)
    assert outcome.passed, outcome.stderr
    assert outcome.stdout == "loading\n"


def test_the_program_cannot_replace_what_the_checks_define_or_python_has():
    assert not check_program(
        "def near(a, b): return True\ndef abs(x): return 0\ndef f(): return 9",
        "def near(a, b): return abs(a - b) < 1e-9\nassert near(f(), 3)",
    ).passed


def test_many_at_once_from_many_threads():
    before = threading.active_count()
    with ThreadPoolExecutor(8) as pool:
        outcomes = list(
            pool.map(
                lambda n: check_program(f"def f(x): return x + {n}", f"assert f(1) == {n + 1 if n % 2 else n}"),
                range(16),
            )
        )
    assert [o.passed for o in outcomes] == [bool(n % 2) for n in range(16)]
    assert threading.active_count() == before


def test_no_descriptor_is_left_open():
    if not Path("/proc/self/fd").exists():
        pytest.skip("counts them in /proc")
    run_python("")
    before = len(os.listdir("/proc/self/fd"))
    for program in ("", "1/0", "import os\nos.closerange(0, 60)"):
        run_python(program, stdin="x")
    run_python("while True: pass", timeout=0.2)
    check_program("import os\nos._exit(0)", "x" * 10**6)
    assert len(os.listdir("/proc/self/fd")) == before


@LINUX
@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_that_is_missing_is_the_kernels_choice(layer):
    """Not a mistake of ours, which would skip half of this file: Invalid argument, Bad address and the like."""
    known = (
        "on",
        "Operation not permitted",
        "Permission denied",
        "Function not implemented",
        "Operation not supported",
        "No space left on device",
    )
    assert ISOLATION[layer] in known or "no table of system calls" in ISOLATION[layer]


def test_a_layer_that_was_not_asked_for_says_so():
    isolation = run_python("", layers=()).isolation
    assert set(isolation) == set(LAYERS) and set(isolation.values()) <= {
        "not asked for",
        f"needs Linux, this is {sys.platform}",
    }


@pytest.mark.slow
@pytest.mark.skipif(not HUMANEVAL.exists(), reason="needs HumanEval beside the repository")
def test_every_reference_solution_of_humaneval_passes_and_no_empty_one_does():
    rows = [json.loads(line) for line in HUMANEVAL.read_text().splitlines()]

    def passes(row: dict, solution: str) -> bool:
        return check_program(
            row["prompt"] + solution, f"{row['test']}\n\ncheck({row['entry_point']})\n", timeout=20
        ).passed

    assert [row["task_id"] for row in rows if not passes(row, row["canonical_solution"])] == []
    assert [row["task_id"] for row in rows if passes(row, "    pass\n")] == []
