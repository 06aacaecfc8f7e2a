"""The drawing of score over training: what is in the file, read back from the SVG's own coordinates and the PNG's own
header.
"""

import math
import re
import struct
import sys
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanolab.cli import UserError
from nanolab.evals.curve import COLOURS, DASHES, MARKERS, counted, draw, spread

pytest.importorskip("matplotlib", reason="needs the extra plots")

RUN = [(1e6, 0.25, 0.22, 0.28), (2e6, 0.31, 0.28, 0.34), (4e6, 0.30, None, None), (8e6, 0.35, 0.30, 0.47)]
LABELS = {"ylabel": "accuracy", "title": "a title"}


@pytest.fixture(autouse=True)
def no_global_state(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # an import of it fails


def coordinates(text: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", text)]


def lines(svg: str, colour: str, width: str) -> list[list[tuple[float, float]]]:
    """Vertices of the paths with this stroke."""
    found = (path.attrib for path in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}path"))
    return [
        coordinates(p["d"])
        for p in found
        if f"stroke: {colour.lower()};" in p.get("style", "") and f"stroke-width: {width}" in p.get("style", "")
    ]


def texts(svg: str) -> list[str]:
    return [e.text for e in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def is_affine(values: list[float], drawn: list[float]) -> bool:
    """Whether `drawn` is a straight function of `values`, judged by the first and last one."""
    slope = (drawn[-1] - drawn[0]) / (values[-1] - values[0])
    return all(math.isclose(drawn[0] + slope * (v - values[0]), d, abs_tol=1e-3) for v, d in zip(values, drawn))


def test_points_stand_where_their_numbers_say_in_any_order(tmp_path):
    svg = draw({"long": RUN[::-1]}, tmp_path / "new" / "a.svg", **LABELS).read_text()
    (line,) = lines(svg, COLOURS[0], "1.7")
    assert is_affine([p[0] for p in RUN], [x for x, _ in line])
    assert is_affine([p[1] for p in RUN], [y for _, y in line])
    assert line[0][1] > line[1][1]  # up is better
    assert {"long", "training tokens", "accuracy", "a title", "0", "4M"} <= set(texts(svg))


def test_intervals_have_their_ends_and_gaps_and_are_inside_the_picture(tmp_path):
    svg = draw({"long": RUN}, tmp_path / "a.svg", **LABELS).read_text()
    (line,) = lines(svg, COLOURS[0], "1.7")

    def height(score):
        return line[0][1] + (score - RUN[0][1]) * (line[1][1] - line[0][1]) / (RUN[1][1] - RUN[0][1])

    for end, edge in zip((2, 3), lines(svg, COLOURS[0], "0.6")):
        assert [y for _, y in edge] == pytest.approx([height(p[end]) for p in RUN if p[end] is not None], abs=1e-3)
    frame = coordinates(re.search(r'id="patch_2".*?d="(.*?)"', svg, re.S)[1])
    assert min(y for _, y in frame) <= height(0.47) and height(0.22) <= max(y for _, y in frame)


def test_a_point_alone_has_a_bar(tmp_path):
    svg = draw({"one": RUN[:1]}, tmp_path / "a.svg", **LABELS).read_text()
    ((foot, head),) = lines(svg, COLOURS[0], "1.4")
    assert foot[0] == pytest.approx(head[0]) and foot[1] > head[1] + 50


@pytest.mark.parametrize(
    ("xs", "scale"),
    [([1e6 * 3**i for i in range(6)], math.log), ([1e6 * (i + 1) for i in range(60)], float), ([0, 1e6, 1e9], float)],
)
def test_x_is_logarithmic_where_most_points_would_crowd_at_the_left(tmp_path, xs, scale):
    svg = draw({"r": [(x, 0.3, None, None) for x in xs]}, tmp_path / "a.svg", **LABELS).read_text()
    (line,) = lines(svg, COLOURS[0], "1.7")
    assert is_affine([scale(x) for x in (xs[0], xs[-1])], [x for x, _ in (line[0], line[-1])])
    assert len(line) < 3 or is_affine([scale(x) for x in xs], [x for x, _ in line])


def test_every_run_and_reference_is_named_and_unlike_the_others(tmp_path):
    names = [f"run-{i}" for i in range(8)]
    svg = draw(
        {n: [(x, y + i / 99, None, None) for x, y, *_ in RUN] for i, n in enumerate(names)},
        tmp_path / "a.svg",
        references=[("chance & <cost> $5$", 0.25)],
        **LABELS,
    )
    assert {*names, "chance & <cost> $5$"} <= set(texts(svg.read_text()))
    looks = {(COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)], DASHES[i % len(DASHES)]) for i in range(56)}
    assert len(looks) == 56


@pytest.mark.slow
def test_long_names_leave_the_axes_their_width_and_many_make_the_picture_higher(tmp_path):
    def size(name, curves):
        data = draw(curves, tmp_path / name, **LABELS).read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        return struct.unpack(">II", data[16:24])

    width, height = size("short.png", {"a": RUN})
    longer, same = size("long.png", {"a-run-name " * 9: RUN})
    assert abs(same - height) < 20 and width + 50 < longer < 1.6 * width
    assert size("many.png", {f"run {i}": RUN for i in range(40)})[1] > 1.5 * height


def test_the_same_numbers_make_the_same_file_and_others_a_new_one_in_its_place(tmp_path):
    first = draw({"a": RUN}, tmp_path / "a.svg", **LABELS).read_bytes()
    (tmp_path / "old.svg").hardlink_to(tmp_path / "a.svg")
    assert draw({"a": RUN}, tmp_path / "a.svg", **LABELS).read_bytes() == first
    assert draw({"b": RUN}, tmp_path / "a.svg", **LABELS).read_bytes() != first
    assert (tmp_path / "old.svg").read_bytes() == first  # replaced, never written over
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.svg", "old.svg"]


def test_what_cannot_be_drawn_is_named(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"expected .png or .svg; name it .*a.png"):
        draw({"a": RUN}, tmp_path / "a.gif", **LABELS)
    for curves in ({}, {"a": []}):
        with pytest.raises(UserError, match="no point to draw"):
            draw(curves, tmp_path / "a.png", **LABELS)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="bash runs/setup.sh plots"):
        draw({"a": RUN}, tmp_path / "a.png", **LABELS)


@pytest.mark.parametrize(
    ("n", "text"), [(0, "0"), (12, "12"), (999, "999"), (4000, "4k"), (2.5e6, "2.5M"), (1.2e9, "1.2B"), (3e12, "3T")]
)
def test_counts_are_written_as_people_do(n, text):
    assert counted(n) == text


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-4, 24), st.integers(1, 6)), min_size=1, max_size=3))
def test_names_are_moved_as_little_as_the_others_allow(names):
    """Against the best of all places on a grid of twentieths, where any best place of such numbers is at least near a
    grid point.
    """
    wanted, sizes = [w / 20 for w, _ in names], [s / 20 for _, s in names]
    got = spread(wanted, sizes)
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    for a, b in zip(order, order[1:]):
        assert got[b] - got[a] >= (sizes[a] + sizes[b]) / 2 - 1e-9
    assert all(s / 2 - 1e-9 <= y <= 1 - s / 2 + 1e-9 for y, s in zip(got, sizes))

    def best(place: int, floor: float) -> float:
        if place == len(order):
            return 0.0
        i = order[place]
        starts = [k / 40 for k in range(41) if floor - 1e-9 <= k / 40 <= 1 - sizes[i] + 1e-9]
        return min(
            ((s + sizes[i] / 2 - wanted[i]) ** 2 + best(place + 1, s + sizes[i]) for s in starts), default=math.inf
        )

    cost = sum((y - w) ** 2 for y, w in zip(got, wanted))
    assert cost <= best(0, 0.0) + 1e-9
