"""Compare training speed in alternating pairs: python dev/bench/paired.py --pairs 8 'NAME[@CHECKOUT]: FLAGS' 'NAME[@CHECKOUT]: FLAGS' ...

Each arm is a fresh process of `scripts.bench train --json FLAGS` in its checkout (default: this one). The order turns round
after every pair, so that a drift of the machine hits both sides alike. The first arm is the base; a ratio is an arm's step
time over the base's in the same pair, of the fastest sample of each process: other work on the machine only ever adds
time. The interval is a bootstrap of the median. The last line of output is one JSON document with every sample.
"""

import argparse
import json
import os
import random
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(checkout: Path, flags: str) -> list[float]:
    """Milliseconds of one step: every sample of one process."""
    command = [sys.executable, "-m", "scripts.bench", "train", "--json", *shlex.split(flags)]
    done = subprocess.run(command, cwd=checkout, env=os.environ | {"PYTHONPATH": str(checkout)}, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])["results"]["step"]["samples"]


def interval(ratios: list[float], draws: int = 10_000) -> tuple[float, float]:
    """95 % of the bootstrapped medians."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(draws))
    return medians[int(0.025 * draws)], medians[int(0.975 * draws)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("arms", nargs="+", help="NAME[@CHECKOUT]: FLAGS")
    args = parser.parse_args()
    arms = {}
    for arm in args.arms:
        match = re.fullmatch(r"([\w-]+)(?:@([^:]+))?:\s*(.*)", arm)
        if not match:
            parser.error(f"arm {arm!r} is not NAME: FLAGS; try 'softmax1: --normaliser softmax1'")
        arms[match[1]] = (Path(match[2] or ROOT).resolve(), match[3])
    samples: dict[str, list[list[float]]] = {name: [] for name in arms}
    for i in range(args.pairs):
        for name in list(arms)[:: 1 if i % 2 == 0 else -1]:
            samples[name].append(run(*arms[name]))
        print(f"pair {i + 1} of {args.pairs}: " + ", ".join(f"{name} {min(s[-1]):.1f} ms" for name, s in samples.items()), flush=True)
    base, *others = arms
    ratios = {}
    for name in others:
        each = [min(s) / min(b) for s, b in zip(samples[name], samples[base])]
        low, high = interval(each)
        ratios[name] = {"median": statistics.median(each), "low": low, "high": high, "each": each}
        print(f"{name} / {base}: {ratios[name]['median']:.4f} [{low:.4f}, {high:.4f}] from {len(each)} pairs")
    print(json.dumps({"arms": {name: flags for name, (_, flags) in arms.items()}, "base": base, "step_ms": samples, "ratios": ratios}))


if __name__ == "__main__":
    main()
