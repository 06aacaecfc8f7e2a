"""Run a function on several gloo ranks of this machine: `run_ranks` in the parent, `main` in each child process.

A child finds the function by the file that defines it, so that it does not matter how pytest imported that file.
"""

import importlib.util
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import warm

ROOT = Path(__file__).parents[1]


def run_ranks(fn: Callable, world_size: int, *args: Any, dtype: str = "float32", timeout: float = 300) -> list[Any]:
    """[fn(runtime, *args) of rank 0, of rank 1, ...]. fn is a top-level function; arguments and results are pickled.

    A rank that fails or runs past `timeout` seconds ends all, with its own error text in the AssertionError.
    """
    import torch.distributed as dist

    # The parent holds the store that the ranks meet at, on a port that the system picks, as torchrun does: no port is
    # chosen first and taken by somebody else before it is used.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder)
        (job / "job").write_bytes(pickle.dumps((fn.__code__.co_filename, fn.__name__, args, dtype)))
        env = os.environ | {
            "PYTHONPATH": str(ROOT),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
        }
        env |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
        ranks = []
        for r in range(world_size):
            with open(job / f"err{r}", "wb") as err:
                command = [warm.executable(), __file__, folder]
                ranks.append(
                    subprocess.Popen(command, env={**env, "RANK": str(r), "LOCAL_RANK": str(r)}, stderr=err, cwd=ROOT)
                )
        try:
            deadline = time.monotonic() + timeout
            while (
                any(p.poll() is None for p in ranks)
                and not any(p.poll() for p in ranks)
                and time.monotonic() < deadline
            ):
                time.sleep(0.02)
            codes = [p.poll() for p in ranks]  # before the others are ended: None is "still running"
        finally:
            for p in ranks:
                p.kill()
                p.wait()
        failed = [r for r, code in enumerate(codes) if code]
        texts = "\n".join(f"rank {r}, exit code {codes[r]}:\n{(job / f'err{r}').read_text()[-4000:]}" for r in failed)
        assert codes == [0] * world_size, texts or f"ranks ran past {timeout} s: exit codes {codes}"
        return [pickle.loads((job / f"result{r}").read_bytes()) for r in range(world_size)]


def main(folder: Path) -> None:
    from nanolab.runtime import start

    file, name, args, dtype = pickle.loads((folder / "job").read_bytes())
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    runtime = start(device_type="cpu", dtype=dtype)
    result = getattr(module, name)(runtime, *args)
    (folder / f"result{runtime.rank}").write_bytes(pickle.dumps(result))
    runtime.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
