"""The machine: device, compute dtype, ranks, seeds, threads, peaks, paths.

One `Runtime` is made per process by `start`. With one rank every collective is a no-op, so callers are written once.
"""

import ctypes
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from nanolab.cli import UserError
from nanolab.files import write_text
from nanolab.terminal import harmless, is_main_process

T = TypeVar("T")
Stop = Callable[[], bool]  # whether this rank was asked to stop


class Stopped(Exception):
    """An evaluation was ended before it had a result; raised on every rank."""


# of cuBLAS, with which it gives the same numbers each time (its documentation, "Results reproducibility")
WORKSPACES = (":4096:8", ":16:8")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Dense bf16 FLOP/s and memory bytes/s by words of the lower-cased device name; the first row that matches counts.
# Sources: vendors' data sheets.
PEAKS: list[tuple[str, float, float | None]] = [
    ("gb200", 2500e12, 8.0e12),
    ("grace blackwell", 2500e12, 8.0e12),
    ("b200", 2250e12, 8.0e12),
    ("b100", 1800e12, 8.0e12),
    ("h200 nvl", 836e12, 4.8e12),
    ("h200", 989e12, 4.8e12),
    ("h100 nvl", 835e12, 3.9e12),
    ("h100 pcie", 756e12, 2.0e12),
    ("h100", 989e12, 3.35e12),
    ("h800 nvl", 989e12, 3.9e12),
    ("h800", 756e12, 2.0e12),
    ("a100", 312e12, 2.0e12),
    ("a800", 312e12, 2.0e12),
    ("a40", 149.7e12, 0.696e12),
    ("a30", 165e12, 0.933e12),
    ("l40s", 362e12, 0.864e12),
    ("l4", 121e12, 0.3e12),
    ("mi355x", 2500e12, 8.0e12),
    ("mi325x", 1307.4e12, 6.0e12),
    ("mi300x", 1307.4e12, 5.3e12),
    ("mi300a", 980.6e12, 5.3e12),
    ("mi250x", 383e12, 3.28e12),
    ("mi250", 362.1e12, 3.28e12),
    ("5090", 209.5e12, 1.79e12),
    ("4090", 165.2e12, 1.01e12),
    ("3090", 71e12, 0.936e12),
]


@dataclass(frozen=True)
class Runtime:
    """What one process knows of the machine. `dtype` is the compute dtype; master weights are always fp32."""

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    backend: str = "none"  # nccl | gloo | none
    threads: int = 1
    group: Any = None  # the process group of `gather_objects`; None: that of everything else

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else cpu_name()

    def all_reduce_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` over ranks in place and return it."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """True on every rank if `flag` is true on one."""
        if self.world_size == 1:
            return flag
        return self.all_reduce_(torch.tensor(float(flag), device=self.device)).item() > 0

    def check_stop(self, asked: bool) -> None:
        """Raise Stopped on every rank if `asked` is true on one. A collective call."""
        if self.any(asked):
            raise Stopped

    def broadcast_object(self, obj: T) -> T:
        """Rank 0's `obj` on every rank."""
        if self.world_size == 1:
            return obj
        box = [obj]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather_objects(self, obj: T) -> list[T]:
        """Every rank's `obj`, in rank order, on every rank."""
        if self.world_size == 1:
            return [obj]
        out: list[Any] = [None] * self.world_size
        dist.all_gather_object(out, obj, self.group)
        return out

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def synchronize(self) -> None:
        """Wait for the device, so that a clock read next is true."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def peak_memory_mib(self) -> float:
        """Peak memory of this process: the device's on CUDA, resident size elsewhere. MiB."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        status = Path("/proc/self/status")
        if status.exists():  # ru_maxrss would begin at the size of the process that started this one
            return (
                next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
                / 2**10
            )
        import resource

        # bytes on macOS, KiB elsewhere
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)

    def close(self) -> None:
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def base_dir() -> Path:
    """Where everything is kept: NANOLAB_BASE_DIR, or ~/.cache/nanolab. Not created here."""
    return Path(os.environ.get("NANOLAB_BASE_DIR") or Path.home() / ".cache" / "nanolab").expanduser()


def out_of_memory(error: BaseException) -> bool:
    """Whether the device or the machine had too little memory: torch.OutOfMemoryError is a RuntimeError; CPU and MPS
    have no class of their own.
    """
    text = str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError)
        and any(t in text for t in ("out of memory", "can't allocate memory", "alloc_failed"))
    )


def free_bytes(device: torch.device) -> int:
    """Memory that is free on the device, or of the machine for a CPU; 0 where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), 0)


def print0(*args: Any, **kwargs: Any) -> None:
    """Print on rank 0 only, texts without control characters: some are a model's, or a file's."""
    if is_main_process():
        print(*(harmless(arg) if isinstance(arg, str) else arg for arg in args), **kwargs, flush=True)


def start(
    device_type: str = "", dtype: str = "", seed: int = 42, threads: int = 0, deterministic: bool = False
) -> Runtime:
    """Choose device, dtype and threads, join the ranks of torchrun if there are any, seed everything.

    dtype: "" chooses by hardware (NANOLAB_DTYPE overrides). threads: 0 keeps torch's own choice. deterministic: see
    `only_deterministic`. Raises UserError for a device that is not there or an unknown dtype."""
    only_deterministic(deterministic)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    kind = device_kind(device_type, world)
    device = torch.device("cuda", local_rank) if kind == "cuda" else torch.device(kind)
    if threads:
        torch.set_num_threads(threads)
    backend = "none" if world == 1 else "nccl" if kind == "cuda" else "gloo"
    if kind == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    else:
        keep_freed_memory()
    if world > 1:
        dist.init_process_group(
            backend,
            store=meeting_place(rank, world),
            rank=rank,
            world_size=world,
            device_id=device if kind == "cuda" else None,
        )
    torch.manual_seed(seed)
    rt = Runtime(device, torch.float32, rank, local_rank, world, backend, torch.get_num_threads())
    name = dtype or os.environ.get("NANOLAB_DTYPE", "")
    name = name or rt.broadcast_object(choose_dtype(device) if rank == 0 else "")
    check_dtype(name, kind)
    return Runtime(device, DTYPES[name], rank, local_rank, world, backend, torch.get_num_threads())


def meeting_place(rank: int, world: int) -> dist.Store:
    """The store through which the ranks find one another: in each attempt of torchrun --max-restarts another part of
    it.

    torchrun keeps one store, and the addresses that a killed attempt left there can hang the next one. Restarts are
    counted on each machine by itself, so that those of several machines only agree on the whole store."""
    store, _, _ = next(rendezvous("env://", rank, world))
    alone = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    return dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store) if alone else store


def only_deterministic(on: bool) -> None:
    """Let torch take only algorithms that give the same numbers each time, or let it choose again. Call before CUDA
    starts.

    Without it GPUs add by atomics where a table's gradients are summed and in attention's backward pass, in another
    order each time. With it these are sorted or serialised, Inductor tunes no kernel by its speed, and an operation
    that has no such algorithm is an error."""
    if not on and not torch.are_deterministic_algorithms_enabled():
        return  # torch imports its compiler to turn it on or off
    if on:
        workspace = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", WORKSPACES[0])
        if workspace not in WORKSPACES:
            raise UserError(
                f"CUBLAS_WORKSPACE_CONFIG is {workspace}, with which matrix products on GPUs may differ each time;"
                f" --deterministic expects {' or '.join(WORKSPACES)}; type: unset CUBLAS_WORKSPACE_CONFIG",
                "workspace-not-deterministic",
                workspace=workspace,
            )
    torch.use_deterministic_algorithms(on)
    torch.utils.deterministic.fill_uninitialized_memory = not on  # it costs time, and nothing here reads such memory


def devices() -> list[str]:
    """The kinds of device that torch sees, the best first."""
    return [*["cuda"] * torch.cuda.is_available(), *["mps"] * torch.backends.mps.is_available(), "cpu"]


def device_kind(device_type: str = "", ranks: int = 1) -> str:
    """cuda, mps or cpu: `device_type`, or the best there is. Raises UserError for one that is not there, or not for
    several ranks.
    """
    there = devices()
    kind = device_type or there[0]
    if kind not in ("cuda", "mps", "cpu"):
        raise UserError(
            f"device type {kind!r} is unknown; expected cuda, mps or cpu; try --device-type cpu",
            "device-unknown",
            device_type=kind,
        )
    if kind not in there:
        raise UserError(
            f"--device-type {kind} was asked for, but torch {torch.__version__} sees no such device; try"
            " --device-type cpu",
            "device-not-there",
            device_type=kind,
            there=there,
        )
    if kind == "mps" and ranks > 1:
        raise UserError(
            f"{ranks} ranks on mps: there is one device and no backend for it; try --device-type cpu",
            "ranks-on-mps",
            ranks=ranks,
        )
    return kind


def check_dtype(name: str, kind: str) -> None:
    """Raise UserError for a compute dtype that is unknown, or that this kind of device is not for."""
    if name not in DTYPES:
        raise UserError(
            f"compute dtype {name!r} is unknown; expected one of {', '.join(DTYPES)}; try NANOLAB_DTYPE=float32"
        )
    if name == "float16" and kind != "cuda":
        raise UserError(
            "compute dtype float16 needs a GPU (its loss scaling is only worth it there); try NANOLAB_DTYPE=float32"
        )


def choose_dtype(device: torch.device) -> str:
    """bf16 on GPUs that have it (fp16 on older ones), on CPUs that compute it natively and measurably faster; else
    fp32.
    """
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"
    if device.type == "mps":
        return "float32"
    rates = cpu_gflops()
    return "bfloat16" if rates.get("bfloat16", 0.0) > 1.2 * rates["float32"] else "float32"


def cpu_gflops() -> dict[str, float]:
    """Measured matrix-multiply GFLOP/s of this CPU by dtype, at the shapes of a small model; cached in the base
    directory.
    """
    path = base_dir() / "machine.json"
    key = f"{cpu_name()} torch {torch.__version__} threads {torch.get_num_threads()}"
    known = json.loads(path.read_text()) if path.exists() else {}
    if key not in known:
        known[key] = _measure_gflops()
        write_text(path, json.dumps(known, indent=1))
    return known[key]


def _measure_gflops() -> dict[str, float]:
    m, k, n = 2048, 256, 1024
    best: dict[str, float] = {}
    for _ in range(5):  # alternating, best of five: a busy neighbour slows both
        for name in ("float32", "bfloat16"):
            if name == "bfloat16" and not native_cpu_bf16():
                continue
            a, b = torch.ones(m, k, dtype=DTYPES[name]), torch.ones(k, n, dtype=DTYPES[name])
            a @ b
            t = time.perf_counter()
            for _ in range(4):
                a @ b
            best[name] = max(best.get(name, 0.0), 4 * 2 * m * k * n / (time.perf_counter() - t) / 1e9)
    return {name: round(rate, 1) for name, rate in best.items()}


def native_cpu_bf16() -> bool:
    """Whether the processor itself multiplies bf16 (emulated bf16 is slow and not worth a probe)."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", "bf16 ", " bf16")) or (
        sys.platform == "darwin" and platform.machine() == "arm64"
    )


def cpu_name() -> str:
    """The processor's own name, for records."""
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def keep_freed_memory() -> None:
    """Tell glibc to keep large freed blocks: otherwise every big temporary is unmapped and page-faulted in again.

    A training step on a CPU is 25-30 % faster for it. No effect where the C library is not glibc.
    """
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # musl and others have no mallopt
        return
    for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 64 << 20)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
        mallopt(option, value)


def compiled(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """What training and its evaluations call: `model` itself, on GPUs compiled at its first call with rows of one
    shape.
    """
    return torch.compile(model, dynamic=False) if device.type == "cuda" else model


def device_peaks(name: str) -> tuple[float | None, float | None]:
    """(bf16 FLOP/s, memory bytes/s) of a device by its name; None where unknown."""
    for key, flops, bandwidth in PEAKS:
        if re.search(rf"\b{key}\b", name.lower()):  # whole words: an L40 is no L4, a laptop's A1000 no A100
            return flops, bandwidth
    return None, None
