"""A hundred ideas without an effect, tried in two ways: python dev/null_ideas.py [--repeats 1000]

One after the other, each kept if its one run scores lower than the best so far; and as the arms of one study. Writes
dev/results/lab/null-ideas.svg, which the guide to studies shows, and null-ideas.json. Takes about a minute."""

import argparse
import json
from pathlib import Path

import numpy as np
from lab_rates import looks, studies

from nanolab.evals.curve import COLOURS, GREY, drawing, saved
from nanolab.lab.stats import LOOKS

IDEAS = 100
FOLDER = Path(__file__).parent / "results" / "lab"


def greedy(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(repeats, baseline and ideas) single runs -> (the best so far, in sd of a run, below the first; ideas kept)."""
    best = np.minimum.accumulate(values, axis=1)
    return values[:, :1] - best, (np.diff(best, axis=1) < 0).sum(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1000)
    n = parser.parse_args().repeats
    gain, kept = greedy(np.random.default_rng(0).standard_normal((n, IDEAS + 1)))
    called, mean, half = looks(studies(n, IDEAS), 2.0, "pooled")
    better = (called == "better").any(0)
    document = {
        "repeats": n,
        "ideas": IDEAS,
        "kept_if_lower": kept.mean(),
        "apparent_gain_sd": gain[:, -1].mean(),
        "called_better": better.sum(1).mean(),
        "studies_that_call_one_better": better.any(1).mean(),
    }
    styled, Figure = drawing()
    with styled:
        figure = Figure(figsize=(7.5, 3.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.step(range(IDEAS + 1), gain[0], where="post", color=COLOURS[1], lw=2)
        left.set(xlabel="ideas tried", ylabel="apparent gain, sd of a run", ylim=(-0.2, 4))
        left.set_title(f"keep what scores lower: {kept[0]} of {IDEAS} kept", loc="left")
        right.axhline(0, color=GREY, lw=1)
        right.errorbar(range(IDEAS), mean[-1, 0], half[-1, 0], fmt=".", ms=3, lw=0.8, color=COLOURS[0])
        right.set(xlabel="ideas, one study", ylabel="difference, sd of a paired one")
        right.set_title(f"lab, {LOOKS[-1]} seeds: {better[0].sum()} of {IDEAS} called better", loc="left")
        saved(figure, FOLDER / "null-ideas.svg")
    (FOLDER / "null-ideas.json").write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
