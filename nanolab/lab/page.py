"""The page of a study: <folder>/index.html and its figures, from runs.jsonl alone, the same bytes each time.

One file without scripts that loads nothing. What studies, runs and models say reaches it through jinja2's escaping."""

import functools
import math
from itertools import combinations
from pathlib import Path
from typing import Any

from nanolab.cli import UserError
from nanolab.files import write_text
from nanolab.lab.curves import SIGNS, draw_curves, draw_differences, themed
from nanolab.lab.results import Row, number_at, public, read_results
from nanolab.lab.verdict import COLUMNS, cells, page_of, paired_values, verdict_of

TITLES = {
    "curves": ("Validation while training", "measured on the way"),
    "training": ("Training loss", "a point is the mean since the point before"),
}


def write_page(folder: Path, to: Path | None = None) -> tuple[dict[str, Any], list[str]]:
    """Write index.html, its SVG figures and table.md into `to`, by default `folder`, and return what verdict_of does.

    Raises UserError where the study has no results, or its runs make no table."""
    document, lines = verdict_of(folder, to)
    record, rows = read_results(folder)
    figures, missing = figures_of(document, record, rows, to or folder)
    if missing:
        print(f"figures: none: {missing}")
    page = filled("study.html", **view(document, record, rows), **figures, no_figures=missing)
    write_text((to or folder) / "index.html", page)
    return document, lines


def figures_of(document: dict[str, Any], record: dict[str, Any], rows: list[Row], folder: Path) -> tuple[dict, str]:
    """(the figures, drawn into `folder`, as parts of the page; why there are none)."""
    try:
        seeds, values = paired_values(record, rows)
        drawn = draw_curves(folder, record, rows)
        path = draw_differences(document, values, folder / "differences.svg") if seeds else None
    except UserError as error:
        return {"curves": [], "differences": None}, str(error)
    curves = [(*TITLES[name], themed(file, TITLES[name][0])) for name, file in drawn.items()]
    return {"curves": curves, "differences": path and themed(path, "Differences from the baseline")}, ""


def view(document: dict[str, Any], record: dict[str, Any], rows: list[Row]) -> dict[str, Any]:
    """What study.html shows, but for the figures."""
    arms, baseline = document["arms"], document["baseline"]
    table = {arm: [public(cell.strip("`")) for cell in cells(arm, one, document)] for arm, one in arms.items()}
    said = {arm: dict(zip(COLUMNS, row)) for arm, row in table.items()}
    lines = page_of(document, record, rows, [])
    *notes, machine = [public(line.replace("`", "")) for line in lines[lines.index("") + 3 :] if line]
    found = {(row["arm"], row["seed"]): row for row in rows}
    return {
        **{name: document[name] for name in ("question", "scale", "metric", "direction", "seeds", "baseline")},
        "predict": record["study"]["predict"] if isinstance(record["study"]["predict"], str) else "",
        "answer": verdict_sentence(document),
        "arms": [card_of(arm, one, said[arm]) for arm, one in arms.items() if arm != baseline],
        "published": published_beside(document, record),
        "needed": [[arm, row["to know"]] for arm, row in said.items() if row["to know"] != "-"],
        "head": COLUMNS,
        "table": list(table.values()),
        "notes": notes,
        "names": list(arms),
        "by_seed": [
            [seed, *(seed_text(found.get((arm, seed)), document["metric"]) for arm in arms)] for seed in record["seeds"]
        ],
        "machine": machine,
    }


def verdict_sentence(document: dict[str, Any]) -> str:
    """The verdicts in a sentence."""
    groups: dict[str, list[str]] = {}
    for arm, one in document["arms"].items():
        if arm != document["baseline"]:
            groups.setdefault(one["verdict"] or "missing", []).append(arm)
    than = {"better": " than {}", "worse": " than {}", "equivalent": " to {}", "identical": " to {}"}
    parts = []
    for verdict, names in sorted(groups.items(), key=lambda group: list(SIGNS).index(group[0])):
        verb = "" if verdict == "diverged" else "is " if len(names) == 1 else "are "
        parts.append(f"{listed(names)} {verb}{verdict}{than.get(verdict, '').format(document['baseline'])}")
    return "; ".join(parts) + "."


def listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def card_of(arm: str, one: dict[str, Any], said: dict[str, str]) -> dict[str, Any]:
    """An arm as its card shows it. said: its row of the table."""
    effect, verdict = one["effect"] or {}, one["verdict"] or "missing"
    predicted = one["predicted"]
    settled = verdict not in ("unresolved", "missing")
    came = "open" if not settled else "as predicted" if verdict == predicted else "not as predicted"
    facts = [("predicted", f"{predicted}: {came}" if predicted else "nothing"), ("found", verdict)]
    facts += [("seeds", effect["seeds"])] if effect else []
    facts += [(name, said[name]) for name in ("training saved", "to know") if said.get(name, "-") != "-"]
    return {
        "name": arm,
        "flags": public(one["flags"]),
        "verdict": verdict,
        "sign": SIGNS[verdict][0],
        "difference": said["difference"],
        "interval": said["interval"],
        "facts": facts,
    }


def published_beside(document: dict[str, Any], record: dict[str, Any]) -> dict[str, Any] | None:
    """The published figures beside ours: order, gaps from the baseline (where it has none, from the first arm that
    does), and how far both agree.
    """
    arms, lower = document["arms"], document["direction"] == "lower"
    theirs = {arm: value for arm, value in (record.get("published") or {}).items() if arm in arms}
    if not theirs:
        return None
    beside = document["baseline"] if document["baseline"] in theirs else next(iter(theirs))
    ours = {arm: arms[arm]["mean"] for arm in theirs if arms[arm]["mean"] is not None}
    ranks = [
        {arm: i + 1 for i, arm in enumerate(sorted(found, key=lambda arm: found[arm], reverse=not lower))}
        for found in (theirs, ours)
    ]
    pairs = [(a, b) for a, b in combinations(ours, 2) if theirs[a] != theirs[b]]
    agree = sum((theirs[a] - theirs[b]) * (ours[a] - ours[b]) > 0 for a, b in pairs)
    rows = [
        [
            arm,
            f"{ranks[0][arm]}",
            f"{theirs[arm]:g}",
            f"{theirs[arm] - theirs[beside]:+.4g}",
            f"{ranks[1].get(arm, '-')}",
            f"{ours[arm]:.5f}" if arm in ours else "-",
            f"{ours[arm] - ours[beside]:+.5f}" if arm in ours and beside in ours else "-",
            arms[arm]["verdict"] or ("baseline" if arm == document["baseline"] else "missing"),
        ]
        for arm in sorted(theirs, key=lambda arm: ranks[0][arm])
    ]
    return {
        "head": ["arm", "published order", "published", "gap", "our order", "ours", "gap", "our verdict"],
        "rows": rows,
        "said": f"{agree} of {len(pairs)} pairs of arms come in the published order.",
        "source": public(record.get("published_source") or "no source given"),
        "beside": beside,
    }


def seed_text(row: Row | None, metric: str) -> str:
    """A run's metric, or why there is none."""
    if row is None or "result" not in row:
        return "not run" if row is None else "diverged" if row["diverged"] else "failed"
    value = number_at(row["result"], metric)
    return "none" if value is None or not math.isfinite(value) else f"{value:.5f}"


@functools.cache
def templates() -> Any:
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).with_name("page"))
    return jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)


def filled(template: str, **values: Any) -> str:
    """A template of nanolab/lab/page/, filled; all values but figures are escaped."""
    return templates().get_template(template).render(values)
