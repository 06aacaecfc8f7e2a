"""Score over training, drawn: one line per run with its intervals, as PNG or SVG. Needs matplotlib, and none
of its global state.

Colours are Okabe and Ito's (Color Universal Design, 2008), which people with any colour vision tell apart; each line
also has a marker and a dash of its own, and its name stands beside its end, so that a grey copy can be read too."""

import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nanolab.cli import UserError
from nanolab.files import replacing

Point = tuple[float, float, float | None, float | None]  # x, score, low and high end of its interval

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS, DASHES = "osD^vPX*", ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
INK, GREY, PALE = "#222222", "#555555", "#dddddd"
SUFFIXES = (".png", ".svg")
WIDTH, HEIGHT, DPI = 6.4, 4.0, 150  # inches without the names at the right; higher where they need it
NAME_SIZE, NAME_LINE, NAME_CHARS = 9, 1.3, 34  # points of type, line height as a multiple of it, characters in a line
LOG_SPAN = 8  # x is logarithmic where half of the points lie below this part of the last


class Name(NamedTuple):
    """A name at the right, and the end of what it names."""

    text: str
    x: float | None  # None: the right end of the axes
    y: float
    colour: str


def draw(
    curves: dict[str, list[Point]],
    path: str | Path,
    *,
    ylabel: str,
    title: str,
    xlabel: str = "training tokens",
    references: Sequence[tuple[str, float]] = (),
    size: tuple[float, float] = (WIDTH, HEIGHT),
) -> Path:
    """Draw run name -> points into `path` (.png or .svg, replaced as a whole) and return it.

    Points may come in any order; one without an interval has None for its ends. references: (name, score) of horizontal
    lines. size: in inches, without the names. Raises UserError where matplotlib is missing, for another suffix, and
    where there is no point to draw."""
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise UserError(
            f"{path} ends in {path.suffix or 'no suffix'}; expected {' or '.join(SUFFIXES)}; name it"
            f" {path.with_suffix('.png')}"
        )
    curves = {name: sorted(points, key=lambda p: p[0]) for name, points in curves.items() if points}
    if not curves:
        raise UserError(
            f"no point to draw into {path}; expected at least one checkpoint with a score; evaluate one first"
        )
    style, Figure = drawing()
    with style:
        figure = Figure()
        axes = figure.add_subplot()
        names = [_run(axes, name, points, i, len(curves)) for i, (name, points) in enumerate(curves.items())]
        names += [Name(name, None, score, GREY) for name, score in references]
        for _, score in references:
            axes.axhline(score, color=GREY, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        _axes(axes, [x for points in curves.values() for x, *_ in points], title, xlabel, ylabel)
        _names(figure, axes, [name._replace(text=textwrap.fill(name.text, NAME_CHARS)) for name in names], *size)
        return saved(figure, path)


def saved(figure: Any, path: Path) -> Path:
    """Write a figure of `drawing` into `path`, which is replaced as a whole: the same figure gives the same bytes."""
    with replacing(path) as fresh:
        figure.savefig(fresh, dpi=DPI, bbox_inches="tight", metadata={"Date": None} if path.suffix == ".svg" else None)
    return path


def drawing() -> tuple[Any, Any]:
    """(a context with our style, whatever this machine's is; matplotlib's Figure). Raises UserError without
    matplotlib.
    """
    try:
        from matplotlib import style
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(
            f"{error.name}, which curves need, is missing; expected the extra plots; type: bash runs/setup.sh plots"
        ) from error
    ours = {"svg.fonttype": "none", "svg.hashsalt": "nanolab", "text.parse_math": False}
    return style.context(["default", ours]), Figure


def _run(axes: Any, name: str, points: list[Point], i: int, n: int) -> Name:
    """Draw run i of n: a line, and its intervals as a band (of a point alone: a bar)."""
    colour, marker, dash = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)], DASHES[i % len(DASHES)]
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    lows, highs = ([float("nan") if p[2] is None or p[3] is None else p[end] for p in points] for end in (2, 3))
    axes.plot(
        xs,
        ys,
        color=colour,
        linestyle=dash,
        linewidth=1.7,
        marker=marker,
        markersize=4.5 if len(xs) <= 30 else 0,
        zorder=3,
    )
    if len(points) == 1:
        axes.vlines(xs, lows, highs, color=colour, linewidth=1.4, zorder=2)
    else:
        axes.fill_between(xs, lows, highs, color=colour, alpha=0.25 / n, linewidth=0, zorder=2)
        for end in (lows, highs):
            axes.plot(xs, end, color=colour, linewidth=0.6, alpha=0.5, zorder=2)
    return Name(name, xs[-1], ys[-1], colour)


def _axes(axes: Any, xs: list[float], title: str, xlabel: str, ylabel: str) -> None:
    axes.set_title(textwrap.fill(title, 68), fontsize=11, loc="left")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=PALE, linewidth=0.7)
    axes.set_axisbelow(True)
    if min(xs) > 0 and max(xs) > LOG_SPAN * statistics.median(xs):
        axes.set_xscale("log")
    else:
        axes.set_xlim(min(0.0, min(xs)), (1.04 * max(xs)) or 1.0)
    axes.xaxis.set_major_formatter(lambda x, _: counted(x))


def counted(n: float) -> str:
    """A count as people write it: 1.5B, 20M, 4k, 12."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= size:
            return f"{n / size:.4g}{letter}"
    return f"{n:.4g}"


def _names(figure: Any, axes: Any, names: list[Name], width: float, height: float) -> None:
    """Write names at the right of the axes, each at the height of what it names or as near as others leave room."""
    lines = [1 + name.text.count("\n") for name in names]
    line = NAME_SIZE * NAME_LINE / 72  # inches
    figure.set_size_inches(width, max(height, line * sum(lines) + 1.0))
    figure.tight_layout()
    to_axes = axes.transData + axes.transAxes.inverted()
    right = axes.get_xlim()[1]
    heights = [float(to_axes.transform((right, name.y))[1]) for name in names]
    share = line / (axes.get_position().height * figure.get_figheight())
    for name, height in zip(names, spread(heights, [share * n for n in lines])):
        axes.annotate(
            name.text,
            (right if name.x is None else name.x, name.y),
            (1.03, height),
            xycoords="data",
            textcoords="axes fraction",
            color=INK,
            fontsize=NAME_SIZE,
            va="center",
            linespacing=1.1,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": name.colour,
                "linestyle": (0, (1, 1.5)),
                "linewidth": 1,
                "relpos": (0, 0.5),
                "shrinkA": 1,
                "shrinkB": 3,
            },
        )


def spread(wanted: Sequence[float], sizes: Sequence[float]) -> list[float]:
    """Centres of intervals of these sizes inside [0, 1], none overlapping, in the order of `wanted` and nearest to it
    in least squares.

    Less what lies below it, a centre must not fall: isotonic regression. Sizes of more than 1 in all begin at 0."""
    from scipy.optimize import isotonic_regression

    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    below = {i: sum(sizes[j] for j in order[:place]) + sizes[i] / 2 for place, i in enumerate(order)}
    shifts = isotonic_regression([wanted[i] - below[i] for i in order]).x.clip(0, max(0.0, 1 - sum(sizes)))
    placed = {i: float(shift) + below[i] for i, shift in zip(order, shifts)}
    return [placed[i] for i in range(len(wanted))]
