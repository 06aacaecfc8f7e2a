"""The verdict of a study, from its runs.jsonl alone: a table, a JSON document, an exit code. Imports no torch.

Differences are paired by seed: both runs of a pair have the same initial weights where their shapes agree, and read the
same documents in the same order. nanolab/lab/stats.py has the statistics."""

import math
import statistics
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path
from typing import Any

from nanolab.cli import UserError
from nanolab.files import write_text
from nanolab.lab.results import KEPT, Row, number_at, read_results
from nanolab.lab.stats import LOOKS, Effect, verdicts
from nanolab.records.console import clock
from nanolab.tables import interval_text, markdown_table, text_table

EXIT = {"better": 0, "unresolved": 4, "missing": 4, "equivalent": 3, "identical": 3, "worse": 1, "diverged": 1}
COLUMNS = ["arm", "flags", "seeds", "mean", "difference", "interval", "verdict", "predicted", "to know", "time a run"]


def verdict_of(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """(the document, its lines for a terminal); writes table.md. Raises UserError where there is no result, and where
    runs of one table differ in what they share.
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
    write_text(folder / "table.md", "\n".join(page) + "\n")
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
    found = verdicts(values[study["baseline"]], arms, matters=study["matters"], lower_is_better=lower)
    return {one.arm: one for one in found if one.seeds}


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


def check_same_facts(rows: list[Row]) -> None:
    """Raise UserError where runs differ in the sources, machine or validation text."""
    for fact in KEPT:
        groups: dict[str, list[str]] = {}
        for row in rows:
            groups.setdefault(str(row[fact]), []).append(f"{row['arm']} seed {row['seed']}")
        if len(groups) > 1:
            shown = "; ".join(f"{value[:120]}: {', '.join(runs)}" for value, runs in groups.items())
            raise UserError(
                f"the runs differ in {fact} ({shown}); expected the same for all runs of a table; run the study again,"
                " which makes those that differ",
                "runs-differ",
                fact=fact,
                groups=list(groups.values()),
            )


def page_of(document: dict[str, Any], record: dict[str, Any], rows: list[Row], table: list[str]) -> list[str]:
    """The lines of table.md around its table."""
    machine, study = rows[0]["machine"], record["study"]
    effects = [one["effect"] for one in document["arms"].values() if one["effect"]]
    variance = ", ".join(dict.fromkeys(effect["variance"] for effect in effects if effect["n"]))
    lines = [
        f"# {document['question']}",
        "",
        (
            f"{document['metric']}, {document['direction']} is better, after training with equal {study['match']}: each"
            f" arm minus {document['baseline']}, paired by seed. A difference of {document['matters']:g} matters."
        ),
        "",
        *table,
        "",
        (
            f"Interval: of each arm by itself, 95 % at all looks (after {', '.join(map(str, LOOKS))} seeds) together;"
            f" verdicts allow for the number of arms too (Holm). Variance: {variance or 'not known yet'}."
        ),
    ]
    prediction = study["predict"] if isinstance(study["predict"], str) else ""
    lines += [f"Predicted before the first run: {prediction}"] if prediction else []
    same: dict[str, list[str]] = {}
    for row in rows:
        same.setdefault(row["key"], []).append(row["arm"])
    lines += [
        f"The same flags, and so the same runs: {arms}."
        for arms in dict.fromkeys(", ".join(arms) for arms in same.values() if len(arms) > 1)
    ]
    lines += [f"Missing: {', '.join(document['missing'])}."] if document["missing"] else []
    lines += [
        f"Failed: {arm} seed {seed}: {why}"
        for arm, one in document["arms"].items()
        for seed, why in one["failed"].items()
    ]
    lines += [
        f"Flags of all arms: `{' '.join(filter(None, [study['flags'], study['scales'].get(study['scale'], '')]))}`.",
        (
            f"{machine['device_name']}, {machine['dtype']}, {machine['threads']} threads a run, torch"
            f" {machine['torch']}; sources {rows[0]['sources'][:12]}; study {record['sha256'][:12]}, recorded"
            f" {record['recorded']}."
        ),
    ]
    return lines


def cells(arm: str, one: dict[str, Any], document: dict[str, Any]) -> list[str]:
    """A row of the table."""
    effect, flags = one["effect"], f"`{one['flags']}`" if one["flags"] else "-"
    mean, took = ("-" if x is None else f"{x:{form}}" for x, form in ((one["mean"], ".5f"), (one["seconds"], ".1f")))
    found = ["-", "-", "baseline" if arm == document["baseline"] else "missing"]
    needed, seeds = "-", str(len(document["seeds"])) if arm == document["baseline"] else "0"
    if effect:
        seeds = str(effect["n"]) + (f" of {effect['seeds']}" if effect["seeds"] != effect["n"] else "")
        difference = "-" if effect["mean"] is None else f"{effect['mean']:+.5f}"
        interval = None if effect["low"] is None else (effect["low"], effect["high"])
        found = [difference, interval_text(interval, "+.5f"), one["verdict"]]
        if effect["seeds_needed"]:
            pair = sum(document["arms"][name]["seconds"] or 0 for name in (arm, document["baseline"]))
            more = effect["seeds_needed"] - effect["seeds"]
            needed = f"{effect['seeds_needed']} seeds, {clock(more * pair).strip()} more"
    return [arm, flags, seeds, mean, *found, one["predicted"] or "-", needed, took + " s" * (took != "-")]
