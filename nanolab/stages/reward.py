"""--reward: which of the values that a task gives a reply count, and how much."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from nanolab.cli import UserError, nearest


class RewardPart(NamedTuple):
    """One summand of the reward: weight times the task's value of that name, at most `cap` in size."""

    name: str
    weight: float
    cap: float = math.inf

    def of(self, values: dict[str, float]) -> float:
        return max(-self.cap, min(self.cap, self.weight * values[self.name]))


def reward_parts(text: str, known: Sequence[str]) -> list[RewardPart]:
    """ "correct=1,format=0.1:0.3" -> parts: name=weight or name=weight:cap. known: the names that the task gives values
    for.
    """
    parts = []
    for item in text.split(","):
        name, _, numbers = item.strip().partition("=")
        weight, colon, cap = numbers.partition(":")
        try:
            part = RewardPart(name.strip(), float(weight), float(cap) if colon else math.inf)
        except ValueError:
            raise UserError(
                f"--reward has {item.strip()!r}; expected NAME=WEIGHT or NAME=WEIGHT:CAP; try --reward {known[0]}=1"
            ) from None
        if part.name not in known:
            raise UserError(
                f"--reward names {part.name!r}; this task gives {', '.join(known)}{nearest(part.name, list(known))}"
            )
        if part.name in [p.name for p in parts]:
            raise UserError(f"--reward names {part.name!r} twice; expected each part once; add the weights")
        if not math.isfinite(part.weight) or not part.weight or not part.cap > 0:
            raise UserError(
                f"--reward has {item.strip()!r}; expected a weight other than 0 and a cap above 0; try --reward"
                f" {part.name}=1"
            )
        parts.append(part)
    return parts
