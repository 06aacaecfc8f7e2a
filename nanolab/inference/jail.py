"""The inside of the sandbox: isolates itself and runs an untrusted program. sandbox.py starts it as a script.

Three processes, each forked from the one before:
  warden   waits, and at the end kills and reaps whatever is left
  keeper   trusted: reports how it ended; in a check it runs the checks and asks the program for values
  program  untrusted: forked before the keeper has read the checks and the nonce, so neither is anywhere in its memory
Imports nothing but the standard library: it runs under `python -I -S`.
"""

import builtins
import ctypes
import json
import linecache
import os
import resource
import signal
import struct
import sys
import time
import traceback
import types
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

LINUX = sys.platform == "linux"
libc = ctypes.CDLL(None, use_errno=True)
OUT_OF_MEMORY = 71  # exit code
OPEN_FILES, PROCESSES = 64, 64
ANSWER = 1 << 24  # characters of a value that the program may send


def call(function: Callable[..., int], *args: Any) -> int:
    """A C function that returns -1 and sets errno on failure; raises OSError then."""
    result = function(*(ctypes.c_long(a) if isinstance(a, int) else a for a in args))
    if result == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def prctl(option: int, value: int, pointer: Any = 0) -> None:
    call(libc.prctl, option, value, pointer, 0, 0)


def die_with_parent(alive: Callable[[], bool], number: int = signal.SIGKILL) -> None:
    """alive: whether the parent is there still; it may have gone before the kernel was told what that means."""
    if LINUX:
        prctl(1, number)  # PR_SET_PDEATHSIG
        if not alive():
            os._exit(1)


def held(fd: int) -> bool:
    """Whether somebody holds the other end of this pipe, of which nothing is ever read."""
    os.set_blocking(fd, False)
    with suppress(BlockingIOError):
        return bool(os.read(fd, 1))
    return True


# ------------------------------------------------------------------------------------------------------------ the walls


def limits(task: dict) -> None:
    """Of each process. Memory is address space, so that a program sees MemoryError instead of being killed."""
    seconds = int(task["timeout"]) + 2
    for name, soft, hard in (
        ("RLIMIT_CPU", seconds, seconds + 1),
        ("RLIMIT_FSIZE", task["disk_mib"] << 20, task["disk_mib"] << 20),
        ("RLIMIT_NOFILE", OPEN_FILES, OPEN_FILES),
        ("RLIMIT_CORE", 0, 0),
        *([("RLIMIT_AS", task["memory_mib"] << 20, task["memory_mib"] << 20)] if LINUX else []),  # macOS refuses it
    ):
        resource.setrlimit(getattr(resource, name), (soft, hard))


def namespaces(task: dict) -> None:
    """No network device, no process in sight but its own, a disk of its own in memory. Needs user namespaces."""
    uid, gid = os.geteuid(), os.getegid()
    call(libc.unshare, 0x10000000 | 0x40000000 | 0x20000000 | 0x08000000 | 0x00020000)  # user, net, pid, ipc, mount
    for name, text in ("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1"):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    # private: nothing that is mounted here is seen outside
    call(libc.mount, b"none", b"/", None, 1 << 14 | 1 << 18, None)
    options = f"size={task['disk_mib']}m,nr_inodes=1000,mode=700"
    # no suid, devices, execution
    call(libc.mount, b"tmpfs", task["folder"].encode(), b"tmpfs", 2 | 4 | 8, options.encode())
    os.chdir(task["folder"])
    resource.setrlimit(resource.RLIMIT_NPROC, (PROCESSES, PROCESSES))  # counted per namespace


FS = dict(
    EXECUTE=0,
    WRITE_FILE=1,
    READ_FILE=2,
    READ_DIR=3,
    MAKE_CHAR=6,
    MAKE_SOCK=9,
    MAKE_BLOCK=11,
    REFER=13,
    TRUNCATE=14,
    IOCTL_DEV=15,
)
FS_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}  # how many there are, by version; 16 from 5 on


def landlock(task: dict) -> None:
    """Reads the system's libraries, Python's own with what is installed beside them, and its own folder; writes the
    latter alone.

    https://docs.kernel.org/userspace-api/landlock.html
    """
    version = call(libc.syscall, 444, None, 0, 1)
    every = (1 << FS_RIGHTS.get(version, 16)) - 1
    tcp, scopes = 3 if version >= 4 else 0, 3 if version >= 6 else 0  # bind and connect; abstract sockets and signals
    ruleset = call(libc.syscall, 444, struct.pack("=QQQ", every, tcp, scopes), 24, 0)

    def allow(path: str, rights: int) -> None:
        with suppress(FileNotFoundError):
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            call(libc.syscall, 445, ruleset, 1, struct.pack("=Qi", rights & every, fd), 0)
            os.close(fd)

    def right(*names: str) -> int:
        return sum(1 << FS[name] for name in names)

    for path in (
        os.path.dirname(os.path.dirname(os.__file__)),
        "/lib",
        "/lib64",
        "/usr/lib",
        "/usr/lib64",
        "/usr/share/zoneinfo",
    ):
        allow(path, right("READ_FILE", "READ_DIR"))
    allow("/dev/urandom", right("READ_FILE"))
    allow("/dev/null", right("READ_FILE", "WRITE_FILE", "TRUNCATE"))
    allow(task["folder"], every & ~right("EXECUTE", "MAKE_CHAR", "MAKE_SOCK", "MAKE_BLOCK", "IOCTL_DEV"))
    call(libc.syscall, 446, ruleset, 0)
    os.close(ruleset)


X86, ARM = "x86_64", "aarch64"
ARCHITECTURES = {X86: 0xC000003E, ARM: 0xC00000B7}
# System calls that a program does without, as (x86-64, aarch64) numbers. Refused for good, by what they are for:
REFUSED = {
    "processes": (
        "fork:57: vfork:58: execve:59:221 execveat:322:281 setsid:112:157 setpgid:109:154 unshare:272:97 setns:308:268"
    ),
    "sockets": (
        "socket:41:198 connect:42:203 bind:49:200 listen:50:201 sendmsg:46:211 sendmmsg:307:269 io_uring_setup:425:425"
    ),
    "other processes": (
        "tkill:200:130 rt_sigqueueinfo:129:138 rt_tgsigqueueinfo:297:240 pidfd_open:434:434 pidfd_getfd:438:438"
        " pidfd_send_signal:424:424 ptrace:101:117 process_vm_readv:310:270 process_vm_writev:311:271"
        " process_madvise:440:440 kcmp:312:272 setpriority:141:140 sched_setaffinity:203:122 sched_setscheduler:144:119"
        " sched_setparam:142:118 sched_setattr:314:274 ioprio_set:251:30 migrate_pages:256:238 move_pages:279:239"
    ),
    # what Landlock leaves open on files that it does not let one write; truncate only before its version 3
    "file attributes": (
        "chmod:90: fchmod:91:52 fchmodat:268:53 chown:92: lchown:94: fchown:93:55 fchownat:260:54 utime:132:"
        " utimes:235: futimesat:261: utimensat:280:88 setxattr:188:5 lsetxattr:189:6 fsetxattr:190:7 removexattr:197:14"
        " lremovexattr:198:15 fremovexattr:199:16 truncate:76:45"
    ),
    "memory outside the limit": (
        "memfd_create:319:279 memfd_secret:447:447 shmget:29:194 semget:64:190 msgget:68:186 mq_open:240:180"
    ),
    "the kernel": (
        "bpf:321:280 perf_event_open:298:241 userfaultfd:323:282 add_key:248:217 request_key:249:218 keyctl:250:219 "
        "mount:165:40 open_tree:428:428 fsopen:430:430 fanotify_init:300:262"
    ),
}
FIRST_UNKNOWN = 452  # system calls younger than Linux 6.5 do not exist for the program; nor do those of x32
ALLOW, REFUSE, MISSING, KILL = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000  # EPERM, ENOSYS


def seccomp(task: dict) -> None:
    """One process, for ever: no other one can be started, called, watched or signalled; no sockets. Threads are fine.

    A filter of system calls in classic BPF. https://docs.kernel.org/userspace-api/seccomp_filter.html
    """
    machine = os.uname().machine
    if machine not in ARCHITECTURES:
        raise OSError(0, f"no table of system calls for {machine}")

    def number(name: str, x86: str, arm: str) -> int:
        return int((x86 if machine == X86 else arm) or -1)

    def jump(code: int, value: int, true: int, false: int) -> bytes:
        return struct.pack("=HBBI", code, true, false, value & 0xFFFFFFFF)

    def load(offset: int) -> bytes:
        return jump(0x20, offset, 0, 0)

    def give(verdict: int) -> bytes:
        return jump(0x06, verdict, 0, 0)

    def rule(entry: str, body: bytes) -> bytes:
        """`body` decides on this system call; for others it is skipped."""
        nr = number(*entry.split(":"))
        return jump(0x15, nr, 0, len(body) // 8) + body if nr >= 0 else b""

    def one_of(argument: int, values: list[int], then: int, otherwise: int) -> bytes:
        tests = b"".join(jump(0x15, v, len(values) - i, 0) for i, v in enumerate(values))
        return load(16 + 8 * argument) + tests + give(otherwise) + give(then)

    me = os.getpid()
    program = (
        load(4)
        + jump(0x15, ARCHITECTURES[machine], 1, 0)
        + give(KILL)
        + load(0)
        + jump(0x35, FIRST_UNKNOWN, 0, 1)
        + give(MISSING)
    )
    program += b"".join(rule(entry, give(REFUSE)) for group in REFUSED.values() for entry in group.split())
    program += rule("clone3:435:435", give(MISSING))  # its flags are out of a filter's reach; libc then uses clone
    program += rule("clone:56:220", load(16) + jump(0x45, 0x10000, 0, 1) + give(ALLOW) + give(REFUSE))  # CLONE_THREAD
    program += rule("kill:62:129", one_of(0, [me], ALLOW, REFUSE)) + rule(
        "tgkill:234:131", one_of(0, [me], ALLOW, REFUSE)
    )
    program += rule("prlimit64:302:261", one_of(0, [0, me], ALLOW, REFUSE))
    program += rule("fcntl:72:25", one_of(1, [8, 15], REFUSE, ALLOW))  # F_SETOWN, F_SETOWN_EX: signals by way of a file
    program += rule("ioctl:16:29", one_of(1, [0x8901, 0x8902], REFUSE, ALLOW))  # FIOSETOWN, SIOCSPGRP: the same
    # sendto with an address, both halves of the pointer; without one it is how send() works on a socket pair
    program += rule(
        "sendto:44:206", load(48) + jump(0x15, 0, 0, 2) + load(52) + jump(0x15, 0, 1, 0) + give(REFUSE) + give(ALLOW)
    )
    program += give(ALLOW)
    buffer = ctypes.create_string_buffer(program, len(program))

    class Filter(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]

    prctl(22, 2, ctypes.byref(Filter(len(program) // 8, ctypes.addressof(buffer))))  # PR_SET_SECCOMP


def drop_privileges() -> None:
    """No capability, none to gain, and nobody without them may look into this process."""
    prctl(38, 1)  # PR_SET_NO_NEW_PRIVS
    call(libc.capset, struct.pack("=Ii", 0x20080522, 0), bytes(24))
    prctl(4, 0)  # PR_SET_DUMPABLE


def build(wall: Callable[[dict], None], task: dict) -> str:
    """ "on", or why this wall does not stand."""
    if not LINUX:
        return f"needs Linux, this is {sys.platform}"
    if wall.__name__ not in task["layers"]:
        return "not asked for"
    try:
        wall(task)
    except OSError as error:
        return error.strerror or str(error)
    return "on"


def lacks(task: dict, isolation: dict[str, str]) -> bool:
    """Whether a wall is down without which the program must not run."""
    return any(isolation[name] != "on" for name in task["required"])


# -------------------------------------------------------------------------------------------------------- the processes


def warden(task: dict, job: int, report: int) -> None:
    limits(task)
    isolation = {"namespaces": build(namespaces, task)}
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # until there is somebody to end, and a way to
    die_with_parent(lambda: os.getppid() == task["parent"], signal.SIGTERM)  # set after the namespace, which clears it
    if LINUX:
        prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: orphans come to this process
    # whose other end stays open in this process alone: in a pid namespace the keeper sees no parent
    alive, kept = os.pipe()
    me, child = os.getpid(), os.fork()
    if child == 0:
        os.close(kept)
        keeper(task, job, report, isolation, alive)

    def stop(*_: Any) -> None:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)

    signal.signal(signal.SIGTERM, stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    os.close(job), os.close(report)
    os.waitpid(child, 0)  # of a pid namespace's first process: returns when all are gone
    with suppress(ChildProcessError, FileNotFoundError):  # no more children; a kernel that does not list them
        while LINUX:
            with open(f"/proc/{me}/task/{me}/children") as file:
                for pid in file.read().split():
                    os.kill(int(pid), signal.SIGKILL)
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                time.sleep(0.001)
    os.killpg(0, signal.SIGKILL)  # where orphans cannot be found, at least the group; and this process


def keeper(task: dict, job: int, report: int, isolation: dict[str, str], alive: int) -> None:
    die_with_parent(lambda: held(alive))
    os.close(alive)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    if LINUX:
        drop_privileges()
    isolation["landlock"] = build(landlock, task)
    questions, answers = os.pipe(), os.pipe()
    me, child = os.getpid(), os.fork()
    if child == 0:
        for fd in (job, report, questions[1], answers[0]):
            os.close(fd)
        die_with_parent(lambda: os.getppid() == me)
        isolation["seccomp"] = build(seccomp, task)
        if lacks(task, isolation):
            os._exit(1)
        program(task, questions[0], answers[1])  # leaves by SystemExit, as any script
    os.close(questions[0]), os.close(answers[1])
    isolation["seccomp"] = build(seccomp, task)
    os.write(report, json.dumps({"isolation": isolation}).encode() + b"\n")
    if lacks(task, isolation):
        os._exit(1)
    if task["check"]:
        result = check(json.loads(take(job)), questions[1], answers[0])
    else:
        result = {"exit": os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}
    os.write(report, json.dumps(result).encode() + b"\n")
    os._exit(0)


def program(task: dict, questions: int, answers: int) -> None:
    """Run the program; in a check, answer calls to its functions until the keeper goes away."""
    # a checked program's `if __name__ == "__main__"` block does not run
    name = "program" if task["check"] else "__main__"
    module = types.ModuleType(name)
    sys.modules[name], sys.argv = module, ["program.py"]
    ended = execute(task["program"], "program.py", module.__dict__)
    if ended is not None or not task["check"]:
        sys.exit(ended)
    with open(questions, "rb") as asked, open(answers, "wb") as told:
        for line in asked:
            function, args, kwargs = unpack(json.loads(line))
            try:
                if function not in module.__dict__:
                    raise NameError(f"the program does not define {function}")
                answer = {"value": pack(module.__dict__[function](*args, **kwargs))}
            except BaseException as error:
                answer = {"error": [type(error).__name__, str(error)[:1000]]}
            sys.stdout.flush()
            told.write(json.dumps(answer).encode() + b"\n")
            told.flush()
    sys.exit(0)


def execute(text: str, name: str, variables: dict[str, Any]) -> Any:
    """Run a program's text: None if it ran to its end, else what to exit with; an error is shown as Python does."""
    linecache.cache[name] = (len(text), None, text.splitlines(True), name)
    try:
        exec(compile(text, name, "exec"), variables)
    except MemoryError:
        sys.stderr.write("MemoryError\n")
        return OUT_OF_MEMORY
    except SystemExit as end:
        return end.code or 0
    except BaseException as error:
        error.__traceback__ = error.__traceback__ and error.__traceback__.tb_next
        traceback.print_exception(error)
        return 1
    return None


# ----------------------------------------------------------------------------------------------------------- the checks


def check(secret: dict, questions: int, answers: int) -> dict[str, Any]:
    """Run the checks in this process; every name that they neither define nor import is a function of the program's.

    What crosses the pipes are plain values, compared here: an object of the program's can equal nothing, and nothing of
    the program's can reach the checks. The nonce is told when the last check has been passed.
    """
    with open(questions, "wb") as ask, open(answers, "rb") as answer:
        variables: dict[str, Any] = {"__name__": "checks"}
        with suppress(SyntaxError, ValueError):  # execute() tells
            variables |= {
                name: remote(name, ask, answer) for name in names_in(compile(secret["checks"], "checks.py", "exec"))
            }
        ended = execute(secret["checks"], "checks.py", variables)
    sys.stdout.flush(), sys.stderr.flush()
    return {"exit": 0, "proof": secret["nonce"]} if ended is None else {"exit": ended}


def names_in(code: types.CodeType) -> Iterator[str]:
    """Every name, attributes too, that the code or a function in it looks up and Python does not have built in."""
    yield from (name for name in code.co_names if not hasattr(builtins, name))
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from names_in(inner)


def remote(name: str, ask: Any, answer: Any) -> Callable[..., Any]:
    """The program's function of this name: called with plain values, returns one, raises what the program raised."""

    def function(*args: Any, **kwargs: Any) -> Any:
        ask.write(json.dumps(pack([name, args, kwargs])).encode() + b"\n")
        ask.flush()
        line = answer.readline(ANSWER)
        if not line.endswith(b"\n"):
            raise RuntimeError(f"the program ended, or sent more than {ANSWER >> 20} MiB, where {name}() was called")
        told = json.loads(line)
        if "error" in told:
            raise raised(*told["error"])
        return unpack(told["value"])

    return function


def raised(name: str, text: str) -> Exception:
    """An exception of the program's: as itself if it is a built-in one; not one that would end the checks' loops
    quietly.
    """
    kind = getattr(builtins, name, None)
    if (
        isinstance(kind, type)
        and issubclass(kind, Exception)
        and not issubclass(kind, (StopIteration, StopAsyncIteration))
    ):
        return kind.__new__(kind, text)
    return RuntimeError(f"{name}: {text}")


class Strange:
    """Stands for a value of the program's that is not plain; equal to nothing."""

    def __init__(self, kind: str):
        self.kind = kind

    def __repr__(self) -> str:
        return f"<{self.kind}>"


def pack(value: Any) -> Any:
    """A plain value as JSON can hold it: numbers, text and None as such, the rest as {kind: content}."""
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if value is None:
        return None
    if isinstance(value, dict):
        return {"dict": [[pack(k), pack(v)] for k, v in value.items()]}
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [pack(v) for v in value]}
    if isinstance(value, (bytes, bytearray)):
        return {type(value).__name__: list(value)}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    return {"strange": type(value).__name__}


UNPACK: dict[str, Callable[[Any], Any]] = {
    "dict": lambda pairs: {unpack(k): unpack(v) for k, v in pairs},
    "list": lambda items: [unpack(v) for v in items],
    "tuple": lambda items: tuple(unpack(v) for v in items),
    "set": lambda items: {unpack(v) for v in items},
    "frozenset": lambda items: frozenset(unpack(v) for v in items),
    "bytes": bytes,
    "bytearray": bytearray,
    "complex": lambda parts: complex(*parts),
    "strange": Strange,
}


def unpack(value: Any) -> Any:
    if isinstance(value, dict):
        ((kind, content),) = value.items()
        return UNPACK[kind](content)
    return value


def take(fd: int) -> bytes:
    """The next block of the job: its length in eight bytes, and itself. Not a byte more is read: what follows is
    secret.
    """

    def exactly(count: int) -> bytes:
        data = b""
        while len(data) < count:
            data += os.read(fd, count - len(data))
        return data

    return exactly(int.from_bytes(exactly(8), "big"))


if __name__ == "__main__":
    warden(json.loads(take(int(sys.argv[1]))), int(sys.argv[1]), int(sys.argv[2]))
