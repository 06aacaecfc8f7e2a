"""What later stages of fine-tuning unlearned: each metric at the start, after each stage, at its best."""

from collections.abc import Sequence
from typing import Any, NamedTuple


class Forgotten(NamedTuple):
    """What became of one metric over the stages."""

    metric: str
    after: list[float | None]  # at the start, then after each stage; None where it was not measured
    best: float
    final: float

    @property
    def lost(self) -> float:
        """How much worse the end is than the best, in the metric's units; never negative."""
        return abs(self.best - self.final)


def forgetting(rows: Sequence[dict[str, Any]], ends: Sequence[int]) -> list[Forgotten]:
    """rows: a run's metrics; ends: steps done at the end of each stage. Losses and bits are better low, all else
    high.
    """
    evaluated = {row["step"]: row for row in rows}
    names = dict.fromkeys(name for row in rows for name in row if name.startswith(("val/", "eval/", "chatcore")))
    out = []
    for name in names:
        values = [row[name] for row in rows if row.get(name) is not None]
        final = evaluated.get(ends[-1], {}).get(name)
        if final is not None:
            low = name.startswith(("val/loss", "val/bpb"))
            out.append(
                Forgotten(
                    name,
                    [evaluated.get(step, {}).get(name) for step in (0, *ends)],
                    min(values) if low else max(values),
                    final,
                )
            )
    return out


def forgetting_table(found: Sequence[Forgotten], stages: Sequence[str]) -> list[str]:
    """Lines of a Markdown table: a metric per row, its value at the start and after each stage, the best, and what was
    lost.
    """
    cell = lambda value: "-" if value is None else f"{value:.4f}"  # noqa: E731
    head = ["metric", "start", *(f"after {name}" for name in stages), "best", "lost"]
    body = [[one.metric, *map(cell, (*one.after, one.best, one.lost))] for one in found]
    return ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *body]]
