"""Peak memory of reading data: python dev/bench/memory.py [--base CHECKOUT] [--only NAME,...] [--json FILE]

Each case is a fresh process, and its figure the peak resident memory that the kernel counted for it, in MiB; `imports`
is a process that only imports what the loader does. The text is made up: words drawn from a fixed seed. `rowgroup` is a
parquet file with 248 MB of text in one row group, `line` a .txt file of 1 GB without a line end, `row` a .jsonl file
whose one row is a document of 60 MB. `data` is `scripts.data`, `loader` the first 200 micro-batches of the 16 streams,
`train` `scripts.base_train` for ten steps of a small model; `few train` is the same on 5,000 short documents. With
--base the cases of `rowgroup` run in that checkout too. The last line is one JSON document."""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
LOADER = """
import sys
from nanolab.data.config import DataConfig
from nanolab.data.corpus import open_data
from nanolab.data.packing import PackedBatches
from nanolab.data.tokenizer import Tokenizer
if len(sys.argv) > 1:
    data, tokenizer = open_data(DataConfig(data_dir=sys.argv[1], val_data=sys.argv[2])), Tokenizer.load(sys.argv[3])
    batches = PackedBatches(data.train, tokenizer, seq_len=512, device_batch_size=8, rows_per_step=16)
    for _ in range(200):
        batches.next()
"""
SMALL = (
    "--depth 2 --aspect-ratio 32 --head-dim 32 --max-seq-len 512 --device-batch-size 8 --total-batch-size 8192"
    " --num-iterations 10 --eval-tokens 4096 --device-type cpu --sample-every -1"
)


def words(rng: random.Random, n: int) -> str:
    return " ".join(rng.choices(VOCABULARY, k=n))


_rng = random.Random(0)
VOCABULARY = ["".join(_rng.choices("etaoinshrdlucmfwyp", k=_rng.randint(1, 10))) for _ in range(20_000)]


def make(folder: Path) -> None:
    """Write the files. In a process of its own: what the kernel counts of a process begins with what its parent held
    when it forked.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng, texts, n_bytes = random.Random(1), [], 0
    while n_bytes < 248_000_000:
        texts.append(words(rng, rng.randint(50, 900)))
        n_bytes += len(texts[-1])
    pq.write_table(pa.table({"text": texts}), folder / "rowgroup.parquet", row_group_size=10**8, compression="zstd")
    with open(folder / "line.txt", "w") as file:
        n_bytes = 0
        while n_bytes < 1_000_000_000:
            n_bytes += file.write(words(rng, 100_000) + " ")
    (folder / "row.jsonl").write_text(json.dumps({"text": words(rng, 9_300_000)}) + "\n")
    (folder / "val.jsonl").write_text("".join(json.dumps({"text": words(rng, 300)}) + "\n" for _ in range(200)))
    (folder / "few.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:5000]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="a checkout to compare with")
    parser.add_argument("--only", default="", help="cases by name, comma-separated; default: all")
    parser.add_argument("--json", type=Path, help="write the last line to this file too")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        return make(args.make)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        subprocess.run([sys.executable, __file__, "--make", temporary], check=True)

        def peak(*command: str, checkout: Path = ROOT) -> tuple[float, float]:
            """(MiB, seconds) of one process of a checkout."""
            base_dir = folder / f"base-{len(list(folder.iterdir()))}"  # of its own: nothing is indexed yet
            base_dir.mkdir()
            env = os.environ | {
                "PYTHONPATH": str(checkout.resolve()),
                "NANOLAB_BASE_DIR": str(base_dir),
                "OMP_NUM_THREADS": "1",
            }
            start = time.perf_counter()
            process = subprocess.Popen([sys.executable, *command], cwd=checkout, env=env, stdout=subprocess.DEVNULL)
            _, status, usage = os.wait4(process.pid, 0)
            if code := os.waitstatus_to_exitcode(status):
                raise SystemExit(f"{' '.join(command)} ended with {code}")
            return round(usage.ru_maxrss / 1024, 1), round(time.perf_counter() - start, 1)

        tokenizer, val = str(folder / "tok"), str(folder / "val.jsonl")
        peak(
            "-m",
            "scripts.tok_train",
            "--data-dir",
            str(folder / "few.jsonl"),
            "--vocab-size",
            "4096",
            "--tokenizer",
            tokenizer,
        )
        cases = {"imports": ["-c", LOADER]}
        for name in ("rowgroup.parquet", "line.txt", "row.jsonl"):
            path, kind = str(folder / name), name.partition(".")[0]
            cases[f"{kind} data"] = ["-m", "scripts.data", "--data-dir", path, "--val-data", val]
            cases[f"{kind} loader"] = ["-c", LOADER, path, val, tokenizer]
            cases[f"{kind} train"] = [
                "-m",
                "scripts.base_train",
                "--run",
                kind,
                "--data-dir",
                path,
                "--val-data",
                val,
                "--tokenizer",
                tokenizer,
                *SMALL.split(),
            ]
        cases["few train"] = [
            "-m",
            "scripts.base_train",
            "--run",
            "few",
            "--data-dir",
            str(folder / "few.jsonl"),
            "--val-data",
            val,
            "--tokenizer",
            tokenizer,
            *SMALL.split(),
        ]
        found = []
        for checkout in [ROOT, args.base] if args.base else [ROOT]:
            command = ["git", "rev-parse", "--short=7", "HEAD"]
            commit = (
                subprocess.run(command, cwd=checkout, capture_output=True, text=True).stdout.strip()
                if checkout != ROOT
                else "here"
            )
            for name, command in cases.items():
                if (not args.only or name in args.only.split(",")) and (
                    checkout == ROOT or name.startswith(("imports", "rowgroup"))
                ):
                    mib, seconds = peak(*command, checkout=checkout)
                    found.append({"checkout": commit, "case": name, "peak_mib": mib, "seconds": seconds})
                    print(f"{commit} {name:<16} {mib:>9,.1f} MiB {seconds:>7.1f} s", flush=True)
    line = json.dumps(
        {"bench": "memory", "python": platform.python_version(), "processors": os.cpu_count(), "cases": found}
    )
    if args.json:
        args.json.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
