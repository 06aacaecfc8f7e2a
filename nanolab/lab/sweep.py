"""Rates of each arm, chosen before a study runs, so that no baseline is untuned: lab sweep STUDY.toml.

Every arm gets the same number of runs: each value of the study's `sweep`, with each of its `sweep_seeds`, which are no
seeds of the study. The value with the best mean is the arm's."""

import math
import statistics
from pathlib import Path
from typing import Any

from nanolab.cli import UserError
from nanolab.files import write_text
from nanolab.lab.results import number_at, read_results
from nanolab.lab.runner import run_study
from nanolab.lab.study import Study
from nanolab.runtime import print0
from nanolab.tables import markdown_table


def sweep_study(study: Study, folder: Path, scale: str, jobs: int, slurm: str) -> dict[str, Any]:
    """Make the runs that are not there, print the table, write it to <folder>/sweep/table.md; what was found."""
    if not study.sweep:
        raise UserError(
            'the study has nothing to sweep; expected a rate and its values; add sweep = "--lr-scale 0.25,0.5,1,2"',
            "sweep-missing",
        )
    flag, values = study.swept
    arms = {f"{arm} {value}": f"{flags} {flag} {value}" for arm, flags in study.arms.items() for value in values}
    changes = {"arms": arms, "baseline": f"{study.baseline} {values[0]}", "seeds": study.sweep_seeds, "sweep": ""}
    changes |= {"predict": "", "published": {}, "published_source": ""}
    place = folder / "sweep"
    grid = study.model_copy(update=changes)
    if read_results(place)[0].get("study", {}).get("arms", arms) != arms:
        print0("note            other arms or values than before: the table begins anew, finished runs are found again")
        (place / "runs.jsonl").unlink()
    run_study(grid, place, scale, jobs, slurm)
    found = best_rates(study, place)
    lines = sweep_lines(study, found)
    write_text(place / "table.md", "\n".join(lines) + "\n")
    print0("\n".join(["", *lines, "", f"table: {place / 'table.md'}"]))
    return found


def best_rates(study: Study, place: Path) -> dict[str, Any]:
    """What the runs of a sweep say: for each arm the mean of each value, the best, and whether it is at an edge."""
    (flag, values), rows = study.swept, read_results(place)[1]
    lower, arms, missing = study.direction == "lower", {}, []
    for arm in study.arms:
        means: dict[str, float] = {}
        for value in values:
            of_value = {row["seed"]: row for row in rows if row["arm"] == f"{arm} {value}"}
            missing += [f"{arm} {value} seed {seed}" for seed in study.sweep_seeds if not has_ended(of_value.get(seed))]
            got = [number_at(row.get("result", {}), study.metric) for row in of_value.values()]
            means[value] = math.nan if None in got or not got else statistics.mean(got)  # a run diverged, or is missing
        finite = {value: mean for value, mean in means.items() if math.isfinite(mean)}
        best = (min if lower else max)(finite, key=lambda value: finite[value]) if finite else None
        arms[arm] = {"means": means, "chosen": best, "edge": best in (values[0], values[-1])}
    return {"flag": flag, "values": values, "seeds": study.sweep_seeds, "arms": arms, "missing": missing}


def has_ended(row: dict[str, Any] | None) -> bool:
    return row is not None and ("result" in row or row["diverged"])


def sweep_lines(study: Study, found: dict[str, Any]) -> list[str]:
    """The lines of the table."""
    n, seeds = len(found["values"]), ", ".join(map(str, found["seeds"]))
    body = [
        [arm, *("-" if math.isnan(x) else f"{x:.5f}" for x in one["means"].values()), one["chosen"] or "-"]
        for arm, one in found["arms"].items()
    ]
    size = f"{n} values of {found['flag']} x {len(found['seeds'])} seeds"
    edges = [f"{arm} {one['chosen']}" for arm, one in found["arms"].items() if one["edge"]]
    return [
        f"{study.metric}, {study.direction} is better. Each arm has {size}"
        f" ({seeds}, none of them the study's) = {n * len(found['seeds'])} runs.",
        "",
        *markdown_table(["arm", *found["values"], "chosen"], *body),
        *([f"\nAt the edge of the grid, a better value may be beyond it: {', '.join(edges)}."] if edges else []),
        *([f"\nMissing: {', '.join(found['missing'])}."] if found["missing"] else []),
    ]


def rates_for(study: Study, folder: Path) -> dict[str, Any]:
    """What a study's record keeps of its sweep. Raises UserError where the sweep is not done."""
    found = best_rates(study, folder / "sweep")
    if found["missing"] or not all(one["chosen"] for one in found["arms"].values()):
        raise UserError(
            f"the study has a sweep of which {len(found['missing'])} runs are missing, or an arm whose runs all"
            " diverged; expected a rate for each arm; type lab sweep first, with the same file",
            "sweep-first",
            missing=found["missing"],
        )
    return {arm: f"{found['flag']} {one['chosen']}" for arm, one in found["arms"].items()}
