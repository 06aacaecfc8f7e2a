"""The verdict of a study, from its runs.jsonl alone: a table, a JSON document, an exit code. Imports no torch.

Differences are paired by seed: both runs of a pair have the same initial weights where their shapes agree, and read the
same documents in the same order. nanolab/lab/stats.py has the statistics."""

import math
import re
import statistics
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path
from typing import Any

from nanolab.cli import UserError
from nanolab.files import write_text
from nanolab.lab.curves import training_saved
from nanolab.lab.results import KEPT, OF_AN_ARM, Row, check_metric, number_at, prior_of, public, read_results
from nanolab.lab.stats import LOOKS, Effect, verdicts
from nanolab.lab.study import COSTS, stage_in
from nanolab.records.console import clock
from nanolab.tables import interval_text, markdown_table, text_table

EXIT = {"better": 0, "unresolved": 4, "missing": 4, "equivalent": 3, "identical": 3, "worse": 1, "diverged": 1}
COLUMNS = ["arm", "flags", "seeds", "mean", "difference", "interval", "training saved", "verdict", "predicted"]
COLUMNS += ["to know", "time a run"]


def verdict_of(folder: Path, to: Path | None = None) -> tuple[dict[str, Any], list[str]]:
    """(the document, its lines for a terminal); writes table.md, into `to` if that is given. Raises UserError
    where there is no result, and where runs of one table differ in what they share.
    """
    record, rows = read_results(folder)
    if not rows:
        raise UserError(
            f"{folder} has no results; expected runs of the study; make them: python -m scripts.lab run STUDY.toml",
            "no-results",
            folder=str(folder),
        )
    check_same_facts(rows)
    study = record["study"]
    check_metric(study["metric"], [row["result"] for row in rows if "result" in row])
    seeds, values = paired_values(record, rows)
    effects = effects_of(study, values)
    arms = {
        arm: {
            "flags": flags,
            "mean": mean_of(values[arm]),
            "seconds": middle([row["seconds"] for row in rows if row["arm"] == arm and "result" in row]),
            "verdict": effects[arm].verdict if arm in effects else None,
            "predicted": study["predict"].get(arm) if isinstance(study["predict"], dict) else None,
            "effect": asdict(effects[arm]) if arm in effects else None,
            "saved": saved_by(effects[arm], seeds, study, rows) if arm in effects else None,
            "failed": {row["seed"]: row["failed"] for row in rows if row["arm"] == arm and "failed" in row},
        }
        for arm, flags in study["arms"].items()
    }
    there = {(row["arm"], row["seed"]) for row in rows if "result" in row or row["diverged"]}
    document = {name: study[name] for name in ("question", "metric", "direction", "baseline", "matters", "scale")}
    document |= {"seeds": seeds, "study_sha256": record["sha256"], "arms": arms}
    document["missing"] = [f"{arm} seed {seed}" for seed in record["seeds"] for arm in arms if (arm, seed) not in there]
    body = [cells(arm, one, document) for arm, one in arms.items()]
    page = page_of(document, record, rows, markdown_table(COLUMNS, *body))
    write_text((to or folder) / "table.md", public("\n".join(page)) + "\n")
    plain = text_table(dict.fromkeys(COLUMNS, "left"), [[cell.strip("`") for cell in row] for row in body])
    return document, page_of(document, record, rows, plain)


def paired_values(record: dict[str, Any], rows: list[Row]) -> tuple[list[int], dict[str, list[float]]]:
    """(the seeds that the baseline has run, in the study's order; arm -> its values at the first of these, up to one
    that it has not run). A run that diverged is "not a number".
    """
    study, found = record["study"], {}
    for row in rows:
        value = number_at(row["result"], study["metric"]) if "result" in row else math.nan if row["diverged"] else None
        if value is not None:
            found[row["arm"], row["seed"]] = value
    seeds = [seed for seed in record["seeds"] if (study["baseline"], seed) in found]
    values = {arm: [*takewhile(lambda x: x is not None, (found.get((arm, s)) for s in seeds))] for arm in study["arms"]}
    return seeds, values


def effects_of(study: dict[str, Any], values: dict[str, list[float]]) -> dict[str, Effect]:
    """Arm -> its effect, of those that have run. All arms of the study count in the family, run or not."""
    arms = {arm: found for arm, found in values.items() if arm != study["baseline"]}
    lower = study["direction"] == "lower"
    plan = {"matters": study["matters"], "lower_is_better": lower, "prior": prior_of(study)}
    found = verdicts(values[study["baseline"]], arms, **plan)
    return {one.arm: one for one in found if one.seeds}


def saved_by(effect: Effect, seeds: list[int], study: dict[str, Any], rows: list[Row]) -> float | None:
    """The share of training that an arm saves on the seeds that both have run; None where the curves are of another
    metric, or a run diverged.
    """
    judged = set(seeds[: effect.seeds])
    arm, baseline = (
        [row for row in rows if row["arm"] == name and row["seed"] in judged]
        for name in (effect.arm, study["baseline"])
    )
    if study["metric"] != stage_in(study).metric or not all("curve" in row for row in arm + baseline):
        return None
    return training_saved(arm, baseline, study["direction"] == "lower")


def mean_of(values: list[float]) -> float | None:
    mean = statistics.mean(values) if values else math.nan
    return mean if math.isfinite(mean) else None


def middle(seconds: list[float]) -> float | None:
    return round(statistics.median(seconds), 3) if seconds else None


def exit_code(document: dict[str, Any]) -> int:
    """0 some arm is better; else 4 some arm is unresolved or missing; else 3 some arm is equivalent or identical; else
    1: all are worse.
    """
    found = {one["verdict"] or "missing" for arm, one in document["arms"].items() if arm != document["baseline"]}
    return next(code for name, code in EXIT.items() if name in found)


def by_value(fact: str, runs: list[tuple[str, Row]]) -> dict[str, list[str]]:
    """The values of a fact -> the names of the runs that have it."""
    groups: dict[str, list[str]] = {}
    for name, row in runs:
        groups.setdefault(str(row.get(fact)), []).append(name)
    return groups


def check_same_facts(rows: list[Row]) -> None:
    """Raise UserError where runs differ in the sources, machine or validation text, or those of one arm in what they
    are trained on.
    """
    named = [(f"{row['arm']} seed {row['seed']}", row) for row in rows]
    arms = dict.fromkeys(row["arm"] for row in rows)
    asked = [(fact, named) for fact in KEPT]
    asked += [(fact, [one for one in named if one[1]["arm"] == arm]) for fact in OF_AN_ARM for arm in arms]
    for fact, runs in asked:
        groups = by_value(fact, runs)
        if len(groups) > 1:
            shown = "; ".join(f"{value[:120]}: {', '.join(names)}" for value, names in groups.items())
            raise UserError(
                f"the runs differ in {fact} ({shown}); expected the same for all runs of"
                f" {'a table' if runs is named else 'an arm'}; run the study again, which makes those that differ",
                "runs-differ",
                fact=fact,
                groups=list(groups.values()),
            )


def what_differs(rows: list[Row]) -> list[str]:
    """A line for each fact in which arms differ."""
    lines = []
    for fact in OF_AN_ARM:
        groups = by_value(fact, [(row["arm"], row) for row in rows])
        if len(groups) > 1:
            names = " / ".join(", ".join(dict.fromkeys(arms)) for arms in groups.values())
            lines.append(f"The arms differ in {fact}: {names}.")
    return lines


def lengths_text(record: dict[str, Any]) -> list[str]:
    """How long the arms of a study of equal FLOPs or time are trained."""
    if not (lengths := record.get("lengths")):
        return []
    match = record["study"]["match"]
    unit, by = ("FLOPs", "") if match == "flops" else ("s", ", by step times that short runs of all arms in turn took")
    each = [f"{arm} {one['steps']:,} = {one['steps'] * one[COSTS[match]]:.4g} {unit}" for arm, one in lengths.items()]
    return [f"Steps of each arm, as long as the baseline to half a step: {', '.join(each)}{by}."]


def page_of(document: dict[str, Any], record: dict[str, Any], rows: list[Row], table: list[str]) -> list[str]:
    """The lines of table.md around its table."""
    machine, study = rows[0]["machine"], record["study"]
    commits = ", ".join(
        dict.fromkeys(re.sub(r"(?<=^.{12})\w+", "", row["commit"]) for row in rows if row.get("commit"))
    )
    effects = [one["effect"] for one in document["arms"].values() if one["effect"]]
    variance = ", ".join(dict.fromkeys(effect["variance"] for effect in effects if effect["n"]))
    if prior := prior_of(study):
        variance += f"; the noise study's sd of a paired difference is {prior[0]:g}, {prior[1]:g} degrees of freedom"
    lines = [
        f"# {document['question']}",
        "",
        (
            f"{document['metric']}, {document['direction']} is better, after training with equal {study['match']}: each"
            f" arm minus {document['baseline']}, paired by seed, on one validation set. A difference of"
            f" {document['matters']:g} matters."
        ),
        "",
        *table,
        "",
        (
            f"Interval: of each arm by itself, 95 % at all looks (after {', '.join(map(str, LOOKS))} seeds) together;"
            f" verdicts allow for the number of arms too (Holm). Variance: {variance or 'not known yet'}."
        ),
    ]
    if any(one["saved"] is not None for one in document["arms"].values()):
        lines.append(
            "Training saved: the share of its training that the arm does not need to be where the baseline ends; where"
            " it is negative, that the baseline does not need to be where the arm ends. Read from the mean curves,"
            " straight between measurements. Rates fall towards the end of a run, so that one planned to end at the"
            " crossing would save more: the share is a bound, and has no interval."
        )
    prediction = study["predict"] if isinstance(study["predict"], str) else ""
    lines += [f"Predicted before the first run: {prediction}"] if prediction else []
    same: dict[str, list[str]] = {}
    for row in rows:
        same.setdefault(row["key"], []).append(row["arm"])
    lines += [
        f"The same flags, and so the same runs: {arms}."
        for arms in dict.fromkeys(", ".join(arms) for arms in same.values() if len(arms) > 1)
    ]
    lines += lengths_text(record)
    if rates := record.get("rates"):
        lines.append(
            f"Rates of each arm: {', '.join(f'{arm} {rate}' for arm, rate in rates.items())}; chosen of"
            f" {study['sweep']} on other seeds ({', '.join(map(str, study['sweep_seeds']))}), with as many"
            " runs for each arm."
        )
    lines += what_differs(rows)
    lines += [f"Missing: {', '.join(document['missing'])}."] if document["missing"] else []
    without = [row["arm"] for row in rows if "result" in row and number_at(row["result"], document["metric"]) is None]
    lines += [f"No {document['metric']} in runs of {', '.join(dict.fromkeys(without))}."] if without else []
    lines += [
        f"Failed: {arm} seed {seed}: {why}"
        for arm, one in document["arms"].items()
        for seed, why in one["failed"].items()
    ]
    lines += [
        f"Flags of all arms: `{' '.join(filter(None, [study['flags'], study['scales'].get(study['scale'], '')]))}`.",
        (
            f"{machine['device_name']}, {machine['dtype']}, {machine['threads']} threads a run, torch"
            f" {machine['torch']}; commit {commits or 'not known'}; sources {rows[0]['sources'][:12]}; study"
            f" {record['sha256'][:12]}, recorded {record['recorded']}."
        ),
    ]
    return lines


def cells(arm: str, one: dict[str, Any], document: dict[str, Any]) -> list[str]:
    """A row of the table."""
    effect, flags = one["effect"], f"`{one['flags']}`" if one["flags"] else "-"
    mean, took = ("-" if x is None else f"{x:{form}}" for x, form in ((one["mean"], ".5f"), (one["seconds"], ".1f")))
    found = ["-", "-", "-", "baseline" if arm == document["baseline"] else "missing"]
    needed, seeds = "-", str(len(document["seeds"])) if arm == document["baseline"] else "0"
    if effect:
        seeds = str(effect["n"]) + (f" of {effect['seeds']}" if effect["seeds"] != effect["n"] else "")
        difference = "-" if effect["mean"] is None else f"{effect['mean']:+.5f}"
        interval = None if effect["low"] is None else (effect["low"], effect["high"])
        saved = "-" if one["saved"] is None else f"{100 * one['saved']:+.0f} %"
        found = [difference, interval_text(interval, "+.5f"), saved, one["verdict"]]
        if effect["seeds_needed"]:
            pair = sum(document["arms"][name]["seconds"] or 0 for name in (arm, document["baseline"]))
            more = effect["seeds_needed"] - effect["seeds"]
            needed = f"{effect['seeds_needed']} seeds, {clock(more * pair).strip()} more"
    return [arm, flags, seeds, mean, *found, one["predicted"] or "-", needed, took + " s" * (took != "-")]
