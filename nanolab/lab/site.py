"""A static site of everything there is: studies first, then models with a report, then runs. No page has a script or
loads anything; a page is made again only where what it is made of has changed.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from nanolab.cli import UserError, check_bounds
from nanolab.evals.card_tables import cell, head
from nanolab.evals.config import ReportConfig
from nanolab.files import write_text
from nanolab.lab.curves import SIGNS
from nanolab.lab.page import filled, write_page
from nanolab.lab.results import public, read_results
from nanolab.lab.run_page import COLUMNS, money, run_cells, run_facts, write_run_page
from nanolab.lab.study import ROOT
from nanolab.records.models import OF_STUDIES, read_json, runs_dir

EVERY = 5.0  # seconds between looks of --watch
OURS = '<meta name="generator" content="nanolab">'  # in every page of ours
RECORDS = ("config.json", "env.json", "metrics.jsonl", "result.json", "card.json", "eval_base.json", "eval_chat.json")


class Made(NamedTuple):
    """A page that was made: of which files, as they were; what the index says of it."""

    of: tuple[tuple[str, int, int], ...]
    entry: dict[str, Any]
    error: str = ""


def write_site(cfg: ReportConfig) -> None:
    """Write the site into the folder `cfg.site`, with --watch again and again until Ctrl-C. Raises UserError for a
    folder with pages of somebody else.
    """
    check_bounds(type(cfg), vars(cfg))
    folder, made = Path(cfg.site), {}
    index = folder / "index.html"
    if index.exists() and OURS not in index.read_text(encoding="utf-8", errors="replace"):
        raise UserError(
            f"{index} is not a page of nanolab; expected an empty folder, or a site that this command made; name"
            " another --site",
            "site-of-others",
            path=str(index),
        )
    try:
        while True:
            changed = make_pages(cfg, folder, made)
            if changed or not cfg.watch:
                print(f"{time.strftime('%H:%M:%S')}  {changed} pages made of {len(made) + 1}: {index}", flush=True)
            if not cfg.watch:
                return
            time.sleep(EVERY)
    except KeyboardInterrupt:
        if not cfg.watch:
            raise
        print(f"stopped watching; the site is whole: {index}")


def make_pages(cfg: ReportConfig, folder: Path, made: dict[str, Made]) -> int:
    """Make the pages whose records have changed since they were made, and the index; how many."""
    studies = Path(cfg.studies) if cfg.studies else ROOT / "dev" / "results"
    changed = 0
    there: set[str] = set()
    for path in sorted(studies.rglob("runs.jsonl")):
        name = "-".join(path.parent.relative_to(studies).parts) or studies.resolve().name
        href = f"studies/{name}/index.html"
        there.add(href)
        changed += renew(made, href, [path], lambda: study_entry(path.parent, name, folder / href, cfg.price_per_hour))
    every = sorted(runs_dir().glob("*/config.json"))
    for path in (path for path in every if not path.parent.name.startswith(OF_STUDIES)):
        run, href = path.parent, f"runs/{path.parent.name}.html"
        there.add(href)
        files = [file for name in RECORDS if (file := run / name).exists()]
        changed += renew(made, href, files, lambda: run_entry(run, folder / href, cfg.price_per_hour))
    gone = set(made) - there
    for href in gone:
        del made[href]
        (folder / href).unlink(missing_ok=True)
        print(f"left out: {href}, whose records are gone")
    if changed or gone or not (folder / "index.html").exists():
        of_studies = sum(path.parent.name.startswith(OF_STUDIES) for path in every)
        write_text(folder / "index.html", filled("site.html", **index_values(made, of_studies, cfg.price_per_hour)))
        changed += 1
    return changed


def renew(made: dict[str, Made], href: str, files: list[Path], make: Callable[[], dict[str, Any]]) -> int:
    """Make a page, if its files are not as they were when it was made: 1 where it was made. What is wrong with its
    records is said, and shown in the index.
    """
    of = tuple((str(file), (stat := file.stat()).st_mtime_ns, stat.st_size) for file in files)
    if href in made and made[href].of == of:
        return 0
    try:
        made[href] = Made(of, make() | {"href": href})
    except (UserError, KeyError, TypeError, ValueError) as error:
        why = str(error) if isinstance(error, UserError) else f"a record of another version: {error!r}"
        made[href] = Made(of, {}, public(why))
        print(f"left out: {href}: {why}")
        return 0
    return 1


def study_entry(folder: Path, name: str, path: Path, price: float) -> dict[str, Any]:
    """Make a study's page; what the index says of it."""
    document, _ = write_page(folder, path.parent)
    _, rows = read_results(folder)
    once = {row["key"]: row for row in rows if "result" in row}.values()  # arms of the same flags share their runs
    hours = sum(row["seconds"] * row["machine"].get("world_size", 1) for row in once) / 3600
    arms = [
        {"name": arm, "verdict": (verdict := one["verdict"] or "missing"), "sign": SIGNS[verdict][0]}
        for arm, one in document["arms"].items()
        if arm != document["baseline"]
    ]
    cost = f"{hours:.3f} device-hours" + (f", {money(hours * price)}" if price else "")
    entry = {"name": name, "question": document["question"], "seeds": len(document["seeds"]), "arms": arms}
    return entry | {"cost": cost, "hours": hours, "kind": "study"}


def run_entry(folder: Path, path: Path, price: float) -> dict[str, Any]:
    """Make a run's page; what the index says of it."""
    facts = run_facts(folder, price)
    write_run_page(folder, facts, price, path)
    entry = {"name": folder.name, "cells": run_cells(facts), "hours": facts["hours"], "kind": "run", "report": None}
    if (folder / "card.json").exists():
        card = read_json(folder / "card.json")
        label = card["stages"][-1]["label"]
        measured = [(head(row), cell(row, row["stages"].get(label))) for row in card["metrics"]]
        hours = sum(stage["device_hours"] for stage in card["stages"])
        spent = f"{hours:.3f} device-hours" + (f", {money(hours * price)}" if price else "")
        entry["report"] = [
            ("stages", ", ".join(stage["label"] for stage in card["stages"])),
            *measured,
            ("cost", spent),
        ]
    return entry


def index_values(made: dict[str, Made], of_studies: int, price: float) -> dict[str, Any]:
    """What site.html shows."""
    entries = [one.entry for one in made.values() if one.entry]
    studies, runs = ([entry for entry in entries if entry["kind"] == kind] for kind in ("study", "run"))
    hours = sum(entry["hours"] for entry in entries)
    cost = f"{hours:.2f} device-hours in all" + (
        f", {money(hours * price)} at ${price:g} an hour of one device."
        if price
        else "; no price was given (--price-per-hour)."
    )
    return {
        "studies": studies,
        "models": [entry | {"facts": entry["report"]} for entry in runs if entry["report"]],
        "runs": runs,
        "columns": COLUMNS,
        "of_studies": of_studies,
        "cost": cost,
        "left_out": [(href, one.error) for href, one in made.items() if one.error],
    }
