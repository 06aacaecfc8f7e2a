"""A rank killed under torchrun --max-restarts: python dev/restarts.py [--tries 12] [--only toy|toy-plain|product]
writes dev/results/restarts.json.

torchrun keeps one store over its restarts. What a killed attempt left there can hang the next one in
init_process_group. Three cases of two gloo ranks on this machine, each tried so many times:

  toy-plain   torch.distributed alone: rank 1 kills itself in the first attempt, the second one has to end
  toy         the same in the attempt's own part of the store, by nanolab.runtime.meeting_place
  product     scripts.base_train --resume: rank 1 is killed after the first checkpoint, the run has to go on from one
              and finish

A try passes if torchrun ends with 0 within the limit. The last line of stdout is one JSON document.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIMIT = {"toy-plain": 60, "toy": 60, "product": 150}  # seconds for a try
STEPS = 60
TRAIN = (
    "--run killed --depth 2 --aspect-ratio 32 --head-dim 32 --max-seq-len 64 --device-batch-size 4 --total-batch-size"
    f" 512 --num-iterations {STEPS} --save-every 10 --keep all --eval-every -1 --sample-every -1 --device-type cpu"
    " --resume"
).split()


def toy(own_part: bool) -> None:
    """One rank."""
    import torch
    import torch.distributed as dist

    from nanolab.runtime import meeting_place

    rank, world, first = (
        int(os.environ["RANK"]),
        int(os.environ["WORLD_SIZE"]),
        os.environ["TORCHELASTIC_RESTART_COUNT"] == "0",
    )
    if rank == 0 and not first:
        time.sleep(1)  # the other one is at the store before it, as it may happen
    if own_part:
        dist.init_process_group("gloo", store=meeting_place(rank, world), rank=rank, world_size=world)
    else:
        dist.init_process_group("gloo")
    dist.all_reduce(torch.ones(1))
    if rank == 1 and first:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(1))
    dist.destroy_process_group()


def prepare(base: Path) -> list[str]:
    """A folder of text and a tokenizer; the flags that name them."""
    import random

    from nanolab.data.tokenizer import Tokenizer

    rng, words = (
        random.Random(0),
        "the a fox crow grapes cheese saw took sour sweet and said that it was not hers".split(),
    )
    (base / "texts").mkdir(parents=True)
    for i in range(60):
        (base / "texts" / f"{i}.txt").write_text(" ".join(rng.choices(words, k=40)) + ".")
    Tokenizer.train((path.read_text() for path in sorted((base / "texts").glob("*"))), 300).save(base / "tokenizer")
    return ["--data-dir", str(base / "texts"), "--tokenizer", str(base / "tokenizer")]


def torchrun(*command: str, **environment: str) -> subprocess.Popen:
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"} | environment
    elastic = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "--max-restarts",
        "3",
        *command,
    ]
    return subprocess.Popen(
        elastic, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def rank_pid(launcher: int, rank: int) -> int:
    """The process of a rank under torchrun."""
    for pid in map(int, Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()):
        if f"\0RANK={rank}\0" in Path(f"/proc/{pid}/environ").read_text():
            return pid
    raise ProcessLookupError(f"rank {rank} is not there")


def ended(process: subprocess.Popen, limit: float) -> tuple[int | None, str]:
    """(exit code, or None past the limit; what it said); then nothing of it runs any more."""
    try:
        said, _ = process.communicate(timeout=limit)
        return process.returncode, said
    except subprocess.TimeoutExpired:
        return None, ""
    finally:
        for pid in [process.pid, *descendants(process.pid)]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        process.wait()


def descendants(pid: int) -> list[int]:
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []
    return children + [below for child in children for below in descendants(child)]


def product(limit: float) -> dict:
    """One try of the real command."""
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        process = torchrun("-m", "scripts.base_train", "--", *prepare(base), *TRAIN, NANOLAB_BASE_DIR=folder)
        began, run = time.monotonic(), base / "runs" / "killed"
        while (
            not list((run / "checkpoints").glob("step_*/meta.json"))
            and process.poll() is None
            and time.monotonic() - began < limit
        ):
            time.sleep(0.01)
        killed = process.poll() is None and not (run / "result.json").exists()
        if killed:
            os.kill(rank_pid(process.pid, 1), signal.SIGKILL)
        code, said = ended(process, limit - (time.monotonic() - began))
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] if code == 0 else []
        whole = [row["step"] for row in rows if "train/loss" in row] == list(range(STEPS))
        return {
            "passed": killed and code == 0 and "resumed at step" in said and whole,
            "code": code,
            "said": said,
            "seconds": time.monotonic() - began,
        }


def attempt(case: str, limit: float) -> dict:
    if case == "product":
        return product(limit)
    began = time.monotonic()
    code, said = ended(torchrun(__file__, "--rank", case), limit)
    return {"passed": code == 0, "code": code, "said": said, "seconds": time.monotonic() - began}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=12)
    parser.add_argument("--only", choices=LIMIT, help="one case; nothing is written then")
    parser.add_argument("--rank", choices=("toy-plain", "toy"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.rank:
        toy(asked.rank == "toy")
        return 0
    import torch

    found = {"torch": torch.__version__, "ranks": 2, "tries": asked.tries}
    for case, limit in LIMIT.items():
        if asked.only in (None, case):
            tries = []
            for i in range(asked.tries):
                tries.append(attempt(case, limit))
                print(
                    f"{case} {i + 1}:"
                    f" {'ended' if tries[-1]['passed'] else 'HUNG' if tries[-1]['code'] is None else 'FAILED'} after"
                    f" {tries[-1]['seconds']:.0f} s",
                    flush=True,
                )
                if tries[-1]["code"]:
                    print(tries[-1]["said"][-3000:], flush=True)
            found[case] = {
                "passed": sum(t["passed"] for t in tries),
                "hung": sum(t["code"] is None for t in tries),
                "limit_seconds": limit,
            }
    if not asked.only:
        (ROOT / "dev" / "results" / "restarts.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))
    return 0 if all(found[case]["passed"] == asked.tries for case in ("toy", "product") if case in found) else 1


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
