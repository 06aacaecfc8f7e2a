"""How often the lab's verdicts are wrong, in simulated studies: python dev/lab_rates.py [--studies 10000]

Writes dev/results/lab/rates.md; takes about two minutes. tests/lab/test_stats.py holds the rates that are promised."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from nanolab.lab.stats import LOOKS, decide, judge, minimum_detectable

LEVEL = 0.05
HEAD = """# How often the lab's verdicts are wrong

Written by `python dev/lab_rates.py`: {studies:,} simulated studies per figure, looks after {looks} seeds, level .05,
differences in sd, standard deviations of a paired difference. Two standard errors of 5 % are {error:.1f} points.

- wrong: no arm has an effect, and one or more are called better or worse at a look or more
- holds: the intervals of all looks hold the true difference; for one arm, the noisy one further down
- equivalent: all arms differ by `matters` (2 sd), and one or more are called equivalent at a look or more
- power, seeds: one arm is better by 2 sd, the others have no effect: how often it is called so, after how many seeds

"""


def studies(n: int, arms: int, effects: Any = 0.0, seed: int = 0, noise: Any = 1.0, tails: float = 0) -> np.ndarray:
    """(n, arms + 1, seeds): baseline, then arms. noise: of each row; where all have 1, paired differences have sd 1;
    tails: degrees of freedom of Student's noise, 0 for normal. Seeds differ by 5 sd, which pairing removes."""
    rng = np.random.default_rng((seed, arms))
    shape = (n, arms + 1, max(LOOKS))
    e = rng.standard_t(tails, shape) * np.sqrt(1 - 2 / tails) if tails else rng.standard_normal(shape)
    e *= np.broadcast_to(noise, arms + 1)[:, None] / np.sqrt(2)
    return e + 5 * rng.standard_normal((n, 1, shape[2])) + np.r_[0, np.broadcast_to(effects, arms)][:, None]


def looks(values: np.ndarray, matters: float, variance: str, prior=None, stop: bool = False):
    """(verdicts, means, half widths of intervals), each (looks, studies, arms). stop: an arm that is settled gets no
    more seeds."""
    out, settled, before = [], np.zeros((len(values), values.shape[1] - 1), bool), {}
    for n in LOOKS:
        seen = np.where(np.insert(settled, 0, False, axis=1)[..., None], np.nan, values)
        found = judge(seen, n, matters, LOOKS, LEVEL, variance, prior)
        found = {name: np.where(settled, before.get(name, x), x) for name, x in found.items()}
        before = {name: x.copy() for name, x in found.items()}
        called = decide(found, LEVEL, lower_is_better=True)
        settled = settled | (called != "unresolved") if stop else settled
        out.append((called, found["mean"], found["half"]))
    return [np.stack(x) for x in zip(*out)]


def rates(
    n: int, arms: int, variance: str = "pooled", prior_df: int = 0, stop: bool = False, **made
) -> dict[str, float]:
    """The figures of one row. prior_df: degrees of freedom of a noise study made beside each study."""
    prior = None
    if prior_df:
        sd = np.sqrt(np.random.default_rng(arms).chisquare(prior_df, (n, 1)) / prior_df)
        prior = (sd, float(prior_df))
    called, mean, half = looks(studies(n, arms, **made), 2.0, variance, prior, stop)
    found = {
        "wrong": np.isin(called, ("better", "worse")).any((0, 2)).mean(),
        "holds": (np.abs(mean) <= half)[..., 0].all(0).mean(),
    }
    called, *_ = looks(studies(n, arms, 2.0, seed=1, **made), 2.0, variance, prior, stop)
    found["equivalent"] = (called == "equivalent").any((0, 2)).mean()
    called, *_ = looks(studies(n, arms, np.r_[np.zeros(arms - 1), -2], seed=2, **made), 2.0, variance, prior, stop)
    better = called[:, :, -1] == "better"
    after = np.select(list(better), LOOKS, max(LOOKS))
    return found | {"power": better.any(0).mean(), "seeds": after.mean()}


def power_at(n: int, arms: int, variance: str, seeds: int) -> float:
    """Of one arm among `arms` whose effect is the least that this look is said to see with power .8."""
    effect = np.r_[np.zeros(arms - 1), -minimum_detectable(seeds, arms=arms, variance=variance)]
    called, *_ = looks(studies(n, arms, effect, seed=3), 2.0, variance)
    return (called[LOOKS.index(seeds), :, -1] == "better").mean()


def table(head: list[str], rows: list[list]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def row(found: dict[str, float]) -> list[str]:
    return [f"{100 * found[x]:.1f} %" for x in ("wrong", "holds", "equivalent", "power")] + [f"{found['seeds']:.1f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=10_000)
    n = parser.parse_args().studies
    head = ["wrong", "holds", "equivalent", "power", "seeds"]
    rules = {
        "pooled": {},
        "own": {"variance": "own"},
        "own, moderated by a noise study of 10 seeds": {"variance": "own", "prior_df": 9},
        "pooled, moderated by the same": {"prior_df": 9},
        "pooled, settled arms get no more seeds": {"stop": True},
    }
    text = HEAD.format(studies=n, looks=", ".join(map(str, LOOKS)), error=200 * np.sqrt(0.05 * 0.95 / n))
    text += table(
        ["variance", "arms", *head],
        [[name, arms, *row(rates(n, arms, **rule))] for name, rule in rules.items() for arms in (1, 4, 7)],
    )
    cases = {
        "one arm is twice as noisy": lambda arms: {"noise": np.r_[1, 2, np.ones(arms - 1)]},
        "one arm is four times as noisy": lambda arms: {"noise": np.r_[1, 4, np.ones(arms - 1)]},
        "the baseline is twice as noisy": lambda arms: {"noise": np.r_[2, np.ones(arms)]},
        "Student's noise with 5 degrees of freedom": lambda arms: {"tails": 5},
    }
    text += "\nWhere the assumptions fail (all rows equally noisy, normal noise), 4 and 7 arms:\n\n"
    text += table(
        ["noise", "variance", "arms", *head],
        [
            [name, variance, arms, *row(rates(n, arms, variance, **made(arms)))]
            for name, made in cases.items()
            for variance in ("pooled", "own")
            for arms in (4, 7)
        ],
    )
    text += (
        "\nPower at the effect that `minimum_detectable` names for .8, of one arm among others without an effect:\n\n"
    )
    text += table(
        ["variance", "arms", *(f"{seeds} seeds" for seeds in LOOKS)],
        [
            [variance, arms, *(f"{100 * power_at(n, arms, variance, seeds):.1f} %" for seeds in LOOKS)]
            for variance in ("pooled", "own")
            for arms in (1, 4, 7)
        ],
    )
    path = Path(__file__).parent / "results" / "lab" / "rates.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
