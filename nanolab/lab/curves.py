"""The validation curves of a study's arms, overlaid: <folder>/curves.svg, from its runs.jsonl. Needs matplotlib."""

import statistics
from pathlib import Path

from nanolab.evals.curve import Point, draw
from nanolab.lab.results import Row, read_results
from nanolab.lab.study import STAGES


def draw_curves(folder: Path) -> Path | None:
    """Draw the arms that were measured at two steps or more after the first update; None where there is none.

    A line is the mean over an arm's seeds, its band goes from the lowest seed to the highest. Raises UserError where
    matplotlib is missing."""
    record, rows = read_results(folder)
    curves = {arm: points_of([row for row in rows if row["arm"] == arm]) for arm in record["study"]["arms"]}
    curves = {arm: points for arm, points in curves.items() if len(points) > 1}
    if not curves:
        return None
    return draw(
        curves,
        folder / "curves.svg",
        ylabel=f"{STAGES[record['study']['stage']].metric}; band: lowest to highest seed",
        title=record["study"]["question"],
        xlabel="steps",
    )


def training_saved(arm: list[Row], baseline: list[Row], lower: bool) -> float | None:
    """The share of its training after which an arm is where the baseline ends; negative where it ends behind, and the
    baseline is where the arm ends after all but this share. Read from mean curves, straight between measurements.

    These are curves of whole runs, whose rates fall towards the end: a run that was planned to end at the crossing
    would end better, so that the true share is larger in size. arm, baseline: rows of the same seeds. None with fewer
    than two measurements after the first update."""
    curves = [[(step, mean if lower else -mean) for step, mean, *_ in points_of(rows)] for rows in (arm, baseline)]
    if min(map(len, curves)) < 2:
        return None
    ahead, behind = sorted(curves, key=lambda curve: curve[-1][1])
    if ahead[-1][1] == behind[-1][1]:
        return 0.0
    target, (x, y) = behind[-1][1], ahead[0]
    for step, value in ahead:
        if value <= target:
            x = step if y <= target else x + (step - x) * (y - target) / (y - value)
            break
        x, y = step, value
    saved = 1 - x / ahead[-1][0]
    return saved if ahead is curves[0] else -saved


def points_of(rows: list[Row]) -> list[Point]:
    """(step, mean, lowest, highest) over the runs of an arm, of the steps at which all were measured, but the first."""
    curves = [dict(row["curve"]) for row in rows if "curve" in row]
    steps = sorted(set.intersection(*map(set, curves)) - {0}) if curves else []
    values = [(step, [curve[step] for curve in curves]) for step in steps]
    return [(step, statistics.mean(found), min(found), max(found)) for step, found in values]
