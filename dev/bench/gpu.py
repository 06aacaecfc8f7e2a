"""The pieces of dev/bench/gpu.sh, most telling first: what has never run on a GPU, then speed.

    python dev/bench/gpu.py --out FOLDER [--seconds 600] [--rehearse]

Each piece writes FOLDER/NAME.json as it ends and what it said to FOLDER/NAME.log. Called again it goes on: pieces that
this commit has done are left out, so what did not fit into --seconds is for the next call. --rehearse runs the same
commands on a CPU in toy sizes. The exit code is 1 if a piece failed, 3 if some are left."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from nanolab.files import write_text  # noqa: E402
from nanolab.records.environment import git_commit  # noqa: E402
from nanolab.records.models import read_metrics  # noqa: E402

ORDER = ("kernel", "recorded_steps", "feeding", "twice", "other_tests", "speed")


class Pieces:
    """out: the folder of the results. until: time.monotonic() at which the last command must have ended."""

    def __init__(self, out: Path, until: float, toy: bool):
        self.out, self.until, self.toy = out, until, toy
        self.device = "cpu" if toy else "cuda"
        self.depths = (1,) if toy else (4, 12)
        self.shape = (
            ["--max-seq-len", "64", "--device-batch-size", "2"]
            if toy
            else ["--max-seq-len", "2048", "--device-batch-size", os.environ.get("GPU_BATCH", "32")]
        )
        self.vocab_size = 512 if toy else 32768
        base = out / "base"
        self.env = (
            os.environ
            | {"NANOLAB_BASE_DIR": str(base), "PYTHONPATH": str(ROOT)}
            | ({} if toy else {"NANOLAB_DTYPE": "bfloat16"})
        )
        self.batch = ["--total-batch-size", 256] if toy else []
        self.runs, self.tokenizer = base / "runs", base / "tokenizer"

    def call(self, *command: Any) -> str:
        """What `python COMMAND` printed. Raises CalledProcessError, or TimeoutExpired at the end of the time."""
        command = [sys.executable, *map(str, command)]
        with open(self.log, "a") as log:
            log.write(f"$ {' '.join(command)}\n")
            log.flush()
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=self.env,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                timeout=max(1, self.until - time.monotonic()),
            )
            log.write(done.stdout)
        done.check_returncode()
        return done.stdout

    def tests(self, *arguments: str) -> dict[str, Any]:
        if self.toy:  # without a GPU they can only be found
            return {"found": self.call("-m", "pytest", "-m", "gpu", "--collect-only", *arguments).count("::")}
        report = self.out / "report.xml"
        try:
            self.call("-m", "pytest", "-m", "gpu", f"--junitxml={report}", "-n", "0", *arguments)
        except subprocess.CalledProcessError as error:
            if error.returncode != 1:  # 1: some failed
                raise
        found: dict[str, Any] = {"passed": 0, "skipped": 0, "failed": []}
        for case in ET.parse(report).iter("testcase"):
            if case.find("failure") is not None or case.find("error") is not None:
                found["failed"].append(f"{case.get('classname')}::{case.get('name')}")
            else:
                found["skipped" if case.find("skipped") is not None else "passed"] += 1
        return found

    def bench(self, what: str, *flags: Any) -> dict[str, Any]:
        return json.loads(
            self.call(
                "-m",
                "scripts.bench",
                what,
                "--json",
                "--device-type",
                self.device,
                "--vocab-size",
                self.vocab_size,
                *flags,
            ).splitlines()[-1]
        )

    def base_train(self, depth: int, steps: int, *flags: Any) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl of a fresh run on real text."""
        if not self.tokenizer.exists():
            self.call("-m", "scripts.data", "--data", "pydocs")
            self.call(
                "-m",
                "scripts.tok_train",
                "--data",
                "pydocs",
                "--vocab-size",
                self.vocab_size,
                "--max-chars",
                10**5 if self.toy else 2 * 10**7,
            )
        name = f"run-{time.time_ns()}"
        self.call(
            "-m",
            "scripts.base_train",
            "--run",
            name,
            "--data",
            "pydocs",
            "--depth",
            depth,
            "--num-iterations",
            steps,
            "--eval-every",
            -1,
            "--log-every",
            1,
            "--save-every",
            -1,
            "--device-type",
            self.device,
            *self.shape,
            *self.batch,
            *flags,
        )
        return [row for row in read_metrics(self.runs / name) if "train/loss" in row]

    # The pieces of ORDER.

    def kernel(self) -> dict[str, Any]:
        """FlashAttention 3: is it there, is it right, and if not, why."""
        code = (
            "import json; from nanolab.model.kernels import fa3; attend, why = fa3.probed('%s'); print(json"
            ".dumps({'fa3': attend is not None, 'why_not': why}))"
        )
        return json.loads(self.call("-c", code % self.device).splitlines()[-1])

    def recorded_steps(self) -> dict[str, Any]:
        """CUDA graphs of decode steps: every variant, several engines, growing caches."""
        return self.tests("tests/inference")

    def feeding(self) -> dict[str, Any]:
        """Steps on real text beside steps on synthetic tokens: what the loader and the loop cost."""
        depth, steps = self.depths[-1], 4 if self.toy else 40
        rows = self.base_train(depth, steps)
        bench = self.bench(
            "train",
            "--depth",
            depth,
            *self.shape,
            "--repeats",
            2,
            "--steps",
            2 if self.toy else 10,
            "--warmup",
            2 if self.toy else 10,
        )
        rates = [row["train/tok_per_sec"] for row in rows[len(rows) // 2 :]]
        return {
            "depth": depth,
            "tok_per_sec": statistics.median(rates),
            "n": len(rates),
            "bench_tok_per_sec": bench["results"]["tokens"]["median"],
            "rows": rows,
        }

    def twice(self) -> dict[str, Any]:
        """The same ten steps two times, plainly and with --deterministic."""
        found = {}
        for name, flags in (("plain", ()), ("deterministic", ("--deterministic",))):
            one, two = ([row["train/loss"] for row in self.base_train(self.depths[0], 10, *flags)] for _ in range(2))
            found[name] = {
                "equal": one == two,
                "largest_difference": max(abs(a - b) for a, b in zip(one, two, strict=True)),
                "losses": one,
            }
        return found

    def other_tests(self) -> dict[str, Any]:
        """The other tests marked gpu."""
        return self.tests("--ignore=tests/inference")

    def speed(self) -> dict[str, Any]:
        """scripts.bench train, infer and eval by depth."""
        few = ["--repeats", 2] if self.toy else ["--repeats", 5]
        found = {}
        for depth in self.depths:
            found[f"train-d{depth}"] = self.bench(
                "train",
                "--depth",
                depth,
                *self.shape,
                *few,
                "--steps",
                2 if self.toy else 10,
                "--warmup",
                2 if self.toy else 10,
            )
            tokens = (
                ["--prompt-tokens", 16, "--decode-tokens", 8, "--batch-sizes", "1,2", "--clients", 2]
                if self.toy
                else ["--prompt-tokens", 512, "--decode-tokens", 256]
            )
            found[f"infer-d{depth}"] = self.bench(
                "infer", "--depth", depth, "--max-seq-len", self.shape[1], *few, *tokens
            )
            found[f"eval-d{depth}"] = self.bench(
                "eval", "--depth", depth, "--max-seq-len", 2048, *few, "--max-per-task", 1 if self.toy else 20
            )
        return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    pieces, commit = Pieces(args.out.resolve(), time.monotonic() + args.seconds, args.rehearse), git_commit()
    failed, left = [], []
    for piece in ORDER:
        name, work = piece.replace("_", "-"), getattr(pieces, piece)
        path, pieces.log = args.out / f"{name}.json", args.out.resolve() / f"{name}.log"
        before = json.loads(path.read_text()) if path.exists() else {}
        if before.get("commit") == commit and "result" in before:
            print(f"{name}: done already")
            continue
        if time.monotonic() > pieces.until - 10:
            left.append(name)
            continue
        print(f"{name}: {work.__doc__}", flush=True)
        begun, record = time.monotonic(), {"piece": name, "commit": commit, "rehearsal": args.rehearse}
        try:
            record["result"] = work()
            if record["result"].get("failed"):
                failed.append(name)
        except subprocess.TimeoutExpired:
            left.append(name)
            record["error"] = "cut: the time was over"
        except Exception as error:  # the other pieces can still tell something
            failed.append(name)
            record["error"] = f"{type(error).__name__}: {error}"
        record["seconds"] = round(time.monotonic() - begun, 1)
        write_text(path, json.dumps(record, indent=1) + "\n")
        print(f"{name}: {record['seconds']} s, {record.get('error') or 'see'} {path}", flush=True)
    if failed:
        print(f"gpu.py: failed: {', '.join(failed)}; what they said is in {args.out}/NAME.log", file=sys.stderr)
    if left:
        print(f"gpu.py: no time was left for {', '.join(left)}; the same command goes on there", file=sys.stderr)
    return 1 if failed else 3 if left else 0


if __name__ == "__main__":
    sys.exit(main())
