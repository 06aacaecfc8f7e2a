"""Generation beside the reference's: python dev/bench/infer_pairs.py --reference CHECKOUT --pairs 5 [--size d12] [flags
of both] > pairs.json

Each side is a fresh process, `scripts.bench infer` (batch 1 and the clients) and `reference_infer.py`, with the same
flags; the order turns round after every pair, so that a drift of the machine hits both sides alike. Both compute in
their default dtype: NANOLAB_DTYPE=float32 for nanolab and NANOCHAT_DTYPE=bfloat16 for the reference change that. A
ratio is nanolab's tokens/s over the reference's in the same pair, each the median of its process. The last line of
output is one JSON document."""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SIZES = {
    "d4": ["--depth", "4", "--vocab-size", "8192", "--max-seq-len", "512"],
    "d12": ["--depth", "12", "--vocab-size", "32768", "--max-seq-len", "2048"],
}
WHAT = ("decode_b1", "clients_total")


def run(command: list[str]) -> dict:
    done = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def median(document: dict, name: str) -> float:
    return document["results"][name]["median"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, required=True, help="a checkout of karpathy/nanochat")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--size", choices=SIZES, default="d4")
    args, flags = parser.parse_known_args()
    flags = [*SIZES[args.size], "--repeats", "3", *flags]
    sides = {
        "nanolab": ["-m", "scripts.bench", "infer", "--json", "--batch-sizes", "1", *flags],
        "reference": ["dev/bench/reference_infer.py", "--reference", str(args.reference.resolve()), *flags],
    }
    runs: dict[str, list[dict]] = {name: [] for name in sides}
    for i in range(args.pairs):
        for name in list(sides)[:: 1 if i % 2 == 0 else -1]:
            runs[name].append(run(sides[name]))
        seen = {what: [median(r[-1], what) for r in runs.values()] for what in WHAT}
        print(f"pair {i + 1} of {args.pairs}, {' and '.join(sides)}, tokens/s: {seen}", flush=True)
    ratios = {}
    for what in WHAT:
        ours, theirs = ([median(r, what) for r in runs[name]] for name in sides)
        each = [a / b for a, b in zip(ours, theirs)]
        ratios[what] = {
            "median": round(statistics.median(each), 3),
            "lowest": round(min(each), 3),
            "highest": round(max(each), 3),
            "each": each,
        }
        print(
            f"{what}: {ratios[what]['median']} times the reference, {ratios[what]['lowest']} to"
            f" {ratios[what]['highest']} in {len(each)} pairs"
        )
    slowest = [median(r, "slowest_over_median") for r in runs["nanolab"]]
    print(
        f"slowest client of nanolab over the median one: {statistics.median(slowest)}, {min(slowest)} to {max(slowest)}"
    )
    print(
        json.dumps({"size": args.size, "flags": flags, "ratios": ratios, "slowest_over_median": slowest, "runs": runs})
    )


if __name__ == "__main__":
    main()
