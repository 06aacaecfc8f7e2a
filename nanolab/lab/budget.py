"""The time that a comparison may take: --budget 20m. Imports no torch."""

import math
import re
import statistics
import time
from collections.abc import Sequence
from typing import Any

from nanolab.cli import UserError
from nanolab.lab.study import LEAST_SEEDS
from nanolab.records.console import clock


def read_budget(text: str) -> float:
    """ "20m" or "1h30m" in seconds; infinity for none. Raises UserError."""
    found = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?", text)
    seconds = sum(float(n or 0) * unit for n, unit in zip(found.groups(), (3600, 60, 1))) if found else 0.0
    if text and not seconds:
        raise UserError(
            f"--budget {text}; expected hours, minutes and seconds, above zero; try --budget 20m, or 1h30m",
            "budget",
            budget=text,
        )
    return seconds or math.inf


class Budget:
    """What runs may take together, and what they are known to take each. A pair: the runs of one seed.

    seconds: in all, from now on. expected: of one run, None where no plan says. todo: the runs, each with arm and seed.
    """

    def __init__(self, seconds: float, expected: float | None, todo: Sequence[Any], seeds: int) -> None:
        self.seconds, self.expected, self.todo, self.seeds = seconds, expected, todo, seeds
        self.took: dict[str, list[float]] = {}  # by arm
        self.began, self.begun, self.measured = time.monotonic(), set[int](), False

    def note(self, arm: str, seconds: float) -> None:
        self.took.setdefault(arm, []).append(seconds)

    def pair(self, seed: int) -> float:
        """Seconds that the runs of a seed will take, by the runs of their arms, of the other arm, or by the plan; not a
        number where nothing is known."""
        every = [seconds for found in self.took.values() for seconds in found] or [self.expected or math.nan]
        return sum(statistics.median(self.took.get(run.arm, every)) for run in self.todo if run.seed == seed)

    @property
    def left(self) -> list[int]:
        """The seeds that are not begun."""
        return list(dict.fromkeys(run.seed for run in self.todo if run.seed not in self.begun))

    def fits(self) -> str:
        """How many of all seeds there will be in time, in words."""
        rest, n = self.seconds - (time.monotonic() - self.began), self.seeds - len(self.left)
        for seed in self.left:
            rest -= self.pair(seed)
            n += rest >= 0
        if math.isnan(rest):
            return "how many seeds fit is not known before the first pair"
        return f"{n} of {self.seeds} seeds fit" + (f"; a verdict takes {LEAST_SEEDS}" if n < LEAST_SEEDS else "")

    def allows(self, run: Any) -> bool:
        """Whether the pair of this run has begun, or may begin; a no is printed."""
        if run.seed in self.begun:
            return True
        if self.took and not self.measured and self.begun and self.seconds < math.inf:
            print(f"budget          by the first pair, {self.fits()}", flush=True)
        self.measured |= bool(self.took)
        needs = self.pair(run.seed)
        if time.monotonic() - self.began + needs > self.seconds:
            print(
                f"budget          {clock(self.seconds).strip()} would be exceeded by the next pair, of about"
                f" {clock(needs).strip()}: not begun are the seeds {', '.join(map(str, self.left))}; the same command"
                " goes on with them",
                flush=True,
            )
            return False
        self.begun.add(run.seed)
        return True
