"""The figures of a study, from its runs.jsonl: curves of validation and training, and differences. Needs matplotlib.

Each is a file that says under its axes what its lines and bands are. `themed` puts one into a page, where it takes the
page's colours."""

import re
import statistics
from html import escape
from pathlib import Path
from typing import Any

from nanolab.evals.curve import COLOURS, GREY, INK, PALE, Point, draw, drawing, saved
from nanolab.lab.results import Row
from nanolab.lab.study import stage_in

BAND = "line: mean over the seeds\nband: lowest to highest seed"
EARLY = 0.3  # share of a run that curves leave out
SIZE = (3.3, 3.0)  # inches of a figure without its names: legible on a phone without zooming
# verdict -> (sign, its colour in a figure and in a page); colour never stands alone
SIGNS = {
    "better": ("\u2713", "#009e73"),
    "worse": ("\u2717", "#d55e00"),
    "diverged": ("!", "#d55e00"),
    "equivalent": ("\u2248", "#0072b2"),
    "identical": ("=", "#0072b2"),
    "unresolved": ("?", GREY),
    "missing": ("\u2026", GREY),
}
# colours of a figure -> those of a page
PAGE = {INK: "--ink", GREY: "--soft", PALE: "--line", "#ffffff": "--sheet", "#000000": "--ink"}
PAGE |= {colour.lower(): f"--c{i}" for i, colour in enumerate(COLOURS) if colour != "#000000"}


def draw_curves(folder: Path, record: dict[str, Any], rows: list[Row]) -> dict[str, Path]:
    """Draw <folder>/curves.svg and training.svg: name -> file, of those with an arm that has two points or more.

    Raises UserError where matplotlib is missing."""
    drawn = {}
    for name, key, ylabel in (
        ("curves", "curve", stage_in(record["study"]).metric),
        ("training", "training", "training loss"),
    ):
        curves = {arm: points_of([row for row in rows if row["arm"] == arm], key) for arm in record["study"]["arms"]}
        curves = {arm: late(points) for arm, points in curves.items() if len(points) > 1}
        if curves:
            path, under = folder / f"{name}.svg", f"steps, without the first {100 * EARLY:.0f} %\n{BAND}"
            drawn[name] = draw(curves, path, ylabel=ylabel, title="", xlabel=under, size=SIZE)
    return drawn


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


def late(points: list[Point]) -> list[Point]:
    """The points but the first EARLY of a run, where losses fall so far that arms cannot be told apart; never less than
    two.
    """
    kept = [point for point in points if point[0] >= EARLY * points[-1][0]]
    return kept if len(kept) > 1 else points[-2:]


def points_of(rows: list[Row], key: str = "curve") -> list[Point]:
    """(step, mean, lowest, highest) over the runs of an arm, of the steps at which all were measured, but the first."""
    curves = [dict(row[key]) for row in rows if row.get(key)]
    steps = sorted(set.intersection(*map(set, curves)) - {0}) if curves else []
    values = [(step, [curve[step] for curve in curves]) for step in steps]
    return [(step, statistics.mean(found), min(found), max(found)) for step, found in values]


def draw_differences(document: dict[str, Any], values: dict[str, list[float]], path: Path) -> Path:
    """Draw the differences of the arms from the baseline, with their intervals, and return `path` (.svg).

    document: of verdict_of; values: arm -> its metric, seed by seed. Raises UserError where matplotlib is missing."""
    style, Figure = drawing()
    matters, lower = document["matters"], document["direction"] == "lower"
    arms = {arm: one for arm, one in document["arms"].items() if arm != document["baseline"]}
    base = values[document["baseline"]]
    seeds = {arm: [x - b for x, b in zip(values[arm], base) if x - b == x - b] for arm in arms}
    means = [one["effect"]["mean"] for one in arms.values() if one["effect"] and one["effect"]["mean"] is not None]
    span = max(
        [2 * matters, *(1.5 * abs(x) for x in means), *(1.15 * abs(x) for found in seeds.values() for x in found)]
    )
    with style:
        figure = Figure(figsize=(SIZE[0], 1.5 + 0.4 * len(arms)))
        axes = figure.add_subplot()
        axes.axvspan(-matters, matters, color=PALE, alpha=0.55, linewidth=0, zorder=0)
        axes.axvline(0, color=GREY, linewidth=1, zorder=1)
        for y, (arm, one) in enumerate(arms.items()):
            sign, colour = SIGNS[one["verdict"] or "missing"]
            row_of_arm(axes, y, one["effect"] or {}, seeds[arm], colour, span)
            axes.annotate(
                f"{sign} {one['verdict'] or 'missing'}",
                (1.02, y),
                xycoords=("axes fraction", "data"),
                color=INK,
                fontsize=9,
                va="center",
                annotation_clip=False,
            )
        axes.set_xlim(-span, span)
        axes.set_ylim(len(arms) - 0.5, -0.5)
        axes.set_yticks(range(len(arms)), list(arms), fontsize=9)
        axes.tick_params(axis="y", length=0)
        axes.locator_params(axis="x", nbins=4, symmetric=True)
        axes.tick_params(axis="x", labelsize=9)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.set_title(f"{'better' if lower else 'worse'} \u2190", fontsize=9, loc="left", color=GREY)
        axes.set_title(f"\u2192 {'worse' if lower else 'better'}", fontsize=9, loc="right", color=GREY)
        axes.set_xlabel(
            f"{document['metric']}: arm minus {document['baseline']}\n"
            "point and bar: mean and 95 % interval\n"
            "rings: single seeds; arrow: the bar goes on\n"
            f"shaded: within \u00b1{matters:g}, which does not matter",
            fontsize=9,
        )
        return saved(figure, path)


def row_of_arm(axes: Any, y: int, effect: dict[str, Any], seeds: list[float], colour: str, span: float) -> None:
    """One arm of the differences: rings of its seeds, its interval, its mean."""
    axes.plot(
        seeds, [y] * len(seeds), "o", markersize=5, markerfacecolor="none", markeredgecolor=GREY, linewidth=0, zorder=2
    )
    if effect.get("low") is not None:
        low, high = max(effect["low"], -span), min(effect["high"], span)
        axes.plot([low, high], [y, y], color=colour, linewidth=2.8, solid_capstyle="butt", zorder=3)
        for end, mark, cut in ((low, "<", effect["low"] < -span), (high, ">", effect["high"] > span)):
            axes.plot([end], [y], mark if cut else "|", color=colour, markersize=8, clip_on=False, zorder=3)
    if effect.get("mean") is not None:
        axes.plot([effect["mean"]], [y], "D", color=colour, markersize=4.5, zorder=4)


def themed(path: Path, label: str) -> Any:
    """The SVG of `path` as a part of a page: in the page's colours, with `label` for who cannot see it. Its texts come
    escaped from matplotlib; its ids that nothing refers to are left out, so that several fit on one page."""
    from markupsafe import Markup  # jinja2 then leaves it as it is

    svg = path.read_text(encoding="utf-8")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg ") :], flags=re.S)
    used = set(re.findall(r"#([\w-]+)[)\"]", svg))
    svg = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", svg)
    svg = re.sub(r"#[0-9a-f]{6}\b", lambda found: f"var({PAGE[found[0]]})" if found[0] in PAGE else found[0], svg)
    size = re.search(r'viewBox="0 0 ([\d.]+) [\d.]+"', svg)
    width = f"{float(size[1]) * 4 / 3:.0f}px" if size else "100%"
    head = rf'<svg role="img" aria-label="{escape(label)}" style="max-width:calc(1.25*{width})" \1>'
    return Markup(re.sub(r"<svg [^>]*?(viewBox=\"[^\"]*\")[^>]*>", head, svg, count=1))
