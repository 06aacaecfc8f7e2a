"""The validation curves of a study's arms, overlaid: <folder>/curves.svg, from its runs.jsonl. Needs matplotlib."""

import statistics
from pathlib import Path

from nanolab.evals.curve import Point, draw
from nanolab.lab.results import Row, read_results


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
        ylabel="bits per byte; band: lowest to highest seed",
        title=record["study"]["question"],
        xlabel="steps",
    )


def points_of(rows: list[Row]) -> list[Point]:
    """(step, mean, lowest, highest) over the runs of an arm, of the steps at which all were measured, but the first."""
    curves = [dict(row["curve"]) for row in rows if "curve" in row]
    steps = sorted(set.intersection(*map(set, curves)) - {0}) if curves else []
    values = [(step, [curve[step] for curve in curves]) for step in steps]
    return [(step, statistics.mean(found), min(found), max(found)) for step, found in values]
