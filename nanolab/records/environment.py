"""What a run ran on: versions, hardware, commit, command. Recorded in env.json and in every checkpoint."""

import os
import platform
import shlex
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy
import torch

import nanolab
from nanolab.model.config import GPTConfig
from nanolab.model.gpt import GPT
from nanolab.runtime import Runtime, cpu_name


def environment(runtime: Runtime) -> dict[str, Any]:
    """JSON-ready facts of this process and machine."""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join(sys.orig_argv),
        "commit": git_commit(),
        "nanolab": nanolab.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "platform": platform.platform(),
        "host": platform.node(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "device": runtime.device.type,
        "device_name": runtime.device_name,
        "dtype": runtime.dtype_name,
        "threads": runtime.threads,
        "world_size": runtime.world_size,
        "backend": runtime.backend,
    }


def kernel_text(names: list[str]) -> str:
    """The attention kernels of a model's layers: "banded", or "banded x 9, sdpa x 3" where they differ."""
    counts = Counter(names)
    return names[0] if len(counts) == 1 else ", ".join(f"{name} x {n}" for name, n in counts.items())


def attention_line(config: GPTConfig, dtype: torch.dtype, device_type: str, asked: str = "") -> str:
    """The line of a plan that names the kernel of every layer and, where a faster one is missing, why. asked:
    --attn-kernel.
    """
    with torch.device("meta"):
        return f"attention       {GPT(config, dtype, asked).kernel_line(device_type)}"


def git_commit() -> str | None:
    """Commit of the checkout that this package runs from, "+changes" if tracked files differ; None outside a
    checkout.
    """
    root = Path(nanolab.__file__).resolve().parents[1]

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *args], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None  # installed into somebody else's repository
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None
