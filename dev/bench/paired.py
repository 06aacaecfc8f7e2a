"""Compare speed in alternating pairs: python dev/bench/paired.py [--what WHAT] --pairs 8 'NAME[@CHECKOUT]: FLAGS'
'NAME[@CHECKOUT]: FLAGS' ...

Each arm is a fresh process in its checkout (default: this one), by --what:

    train    `scripts.bench train FLAGS`, milliseconds of a step
    data     `scripts.bench data FLAGS`, microseconds of the whole loader for one token
    decode   `scripts.bench infer FLAGS`, microseconds for one token of one row
    clients  the same, microseconds for one token of several clients together
    start    `scripts.base_train FLAGS --run NEW`, milliseconds from the start of the process to the first step's line;
             it is ended then

The order turns round after every pair, so that a drift of the machine hits both sides alike. The first arm is the base;
a ratio is an arm's time over the base's in the same pair, of the fastest sample of each process: other work on the
machine only ever adds time. The interval is a bootstrap of the median. The last line of output is one JSON document
with every sample."""

import argparse
import json
import os
import random
import re
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


UNITS = {
    "train": "ms a step",
    "data": "us a token",
    "decode": "us a token",
    "clients": "us a token",
    "start": "ms to the first step",
}
# of scripts.bench
RESULTS = {
    "train": ("train", "step"),
    "data": ("data", "loader"),
    "decode": ("infer", "decode_b1"),
    "clients": ("infer", "clients_total"),
}


def run(what: str, checkout: Path, flags: str) -> list[float]:
    """Every sample of one process, in the unit of UNITS."""
    env = os.environ | {"PYTHONPATH": str(checkout)}
    if what == "start":
        return [start(checkout, flags, env)]
    bench, name = RESULTS[what]
    command = [sys.executable, "-m", "scripts.bench", bench, "--json", *shlex.split(flags)]
    results = json.loads(
        subprocess.run(
            command, cwd=checkout, env=env, stdout=subprocess.PIPE, text=True, check=True
        ).stdout.splitlines()[-1]
    )["results"]
    return results[name]["samples"] if what == "train" else [1e6 / rate for rate in results[name]["samples"]]


def start(checkout: Path, flags: str, env: dict[str, str]) -> float:
    """Milliseconds from the start of the process to the line of its first step."""
    command = [sys.executable, "-m", "scripts.base_train", "--run", f"start-{time.time_ns()}", *shlex.split(flags)]
    begun = time.perf_counter()
    with subprocess.Popen(
        command,
        cwd=checkout,
        env=env | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        for line in process.stdout:
            if line.startswith("step 00000/"):
                taken = 1000 * (time.perf_counter() - begun)
                process.kill()
                return taken
    raise SystemExit(f"{shlex.join(command)} ended without a step")


def interval(ratios: list[float], draws: int = 10_000) -> tuple[float, float]:
    """95 % of the bootstrapped medians."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(draws))
    return medians[int(0.025 * draws)], medians[int(0.975 * draws)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=UNITS, default="train")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("arms", nargs="+", help="NAME[@CHECKOUT]: FLAGS")
    args = parser.parse_args()
    arms = {}
    for arm in args.arms:
        match = re.fullmatch(r"([\w-]+)(?:@([^:]+))?:\s*(.*)", arm)
        if not match:
            parser.error(f"arm {arm!r} is not NAME: FLAGS; try 'softmax1: --softmax softmax1'")
        arms[match[1]] = (Path(match[2] or ROOT).resolve(), match[3])
    samples: dict[str, list[list[float]]] = {name: [] for name in arms}
    for i in range(args.pairs):
        for name in list(arms)[:: 1 if i % 2 == 0 else -1]:
            samples[name].append(run(args.what, *arms[name]))
        print(
            f"pair {i + 1} of {args.pairs}: "
            + ", ".join(f"{name} {min(s[-1]):.4g} {UNITS[args.what]}" for name, s in samples.items()),
            flush=True,
        )
    base, *others = arms
    ratios = {}
    for name in others:
        each = [min(s) / min(b) for s, b in zip(samples[name], samples[base])]
        low, high = interval(each)
        ratios[name] = {"median": statistics.median(each), "low": low, "high": high, "each": each}
        print(f"{name} / {base}: {ratios[name]['median']:.4f} [{low:.4f}, {high:.4f}] from {len(each)} pairs")
    print(
        json.dumps(
            {
                "arms": {name: flags for name, (_, flags) in arms.items()},
                "base": base,
                "unit": UNITS[args.what],
                "samples": samples,
                "ratios": ratios,
            }
        )
    )


if __name__ == "__main__":
    main()
