"""Two revisions of the code as the arms of a study: lab compare A B. The judge for changes that are no flag.

Each run is made by its own revision's command line, in a worktree of that revision, with a base directory of its own
that shares the tokenizer and the corpora of the user's. A run is found again by the hash of its tree, its flags, its
seed, its data and the machine."""

import contextlib
import io
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanolab.cli import UserError, parse
from nanolab.data.config import DataConfig
from nanolab.lab.budget import Budget, read_budget
from nanolab.lab.config import CompareConfig
from nanolab.lab.processes import DIVERGED, REFUSED, CommandLine, Planned, in_child, make_runs
from nanolab.lab.results import Row, check_metric, check_unedited, hash_of, new_record, read_results, write_results
from nanolab.lab.revision_run import PATHS, RevisionRun, absolute, flag_parts
from nanolab.lab.revisions import Revision, add_worktree, find_revision, remove_worktree
from nanolab.lab.runner import preview_of, without_place
from nanolab.lab.study import OF_THE_LAB, read_seeds, study_of
from nanolab.records.console import clock
from nanolab.records.models import OF_STUDIES, read_json
from nanolab.runtime import base_dir, print0
from nanolab.stages.config import BaseTrainConfig


def compare(cfg: CompareConfig, flags: list[str]) -> Path:
    """Make the runs that are not there, A and B in turn; the folder of their results.

    Raises UserError, and SystemExit after a signal, when the run that is on is saved."""
    if not cfg.a or not cfg.b:
        raise UserError(
            f"lab compare {cfg.a or 'without revisions'}: expected two git revisions, or folders of working trees, then"
            " -- and flags of scripts.base_train; try lab compare HEAD . -- --depth 4 --num-iterations 300",
            "compare-two",
        )
    for name, (word, *_) in flag_parts(flags):
        if name.removeprefix("no_") in OF_THE_LAB:
            raise UserError(
                f"{word} is what the lab gives each run itself; expected other flags after --; leave it out",
                "flag-of-the-lab",
                flag=name,
            )
    seconds, seeds, words = read_budget(cfg.budget), read_seeds(cfg.seeds), absolute(flags)
    arms = dict(zip((cfg.a, f"{cfg.b} again" if cfg.a == cfg.b else cfg.b), map(find_revision, (cfg.a, cfg.b))))
    values = {"question": f"{cfg.b} against {cfg.a}: does the change of the code matter?", "baseline": cfg.a}
    values |= {"arms": {arm: revision.about for arm, revision in arms.items()}, "flags": shlex.join(flags)}
    values |= {name: getattr(cfg, name) for name in ("matters", "metric", "direction")}
    study = study_of(values | {"seeds": seeds}, "lab compare")
    fixed = study.fixed("") | {"match": "flags"}
    facts = in_child(facts_of, words)
    expected = facts.pop("seconds")
    folder = base_dir() / "lab" / f"compare-{hash_of([fixed, facts])[:8]}"
    record, before = read_results(folder)
    check_unedited(record, before, fixed, seeds, folder)
    record = (record or new_record(fixed, facts["machine"]["threads"])) | {"seeds": seeds}

    planned = plan_of(arms, seeds, words, facts)
    known = {row["key"]: without_place(row) for row in before if "result" in row or row["diverged"]}
    for run in planned:
        if run.key not in known and (path := run.dir / "row.json").exists():
            known[run.key] = read_json(path) | {"sources": run.identity["sources"]}
    todo = list({run.key: run for run in planned if run.key not in known}.values())
    budget = Budget(seconds, expected, todo, len(seeds))
    for run in planned:
        if "result" in known.get(run.key, {}):
            budget.note(run.arm, known[run.key]["seconds"])
    announce_pairs(arms, flags, facts["machine"], len({run.key for run in planned}), budget)

    def write() -> None:
        rows = [{"arm": run.arm, "seed": run.seed, **known[run.key]} for run in planned if run.key in known]
        write_results(folder, record, rows)

    def make() -> None:
        for run, row in make_runs(list[Planned](todo), 1, 0, study.metric, go_on=budget.allows):
            check_not_refused(run, row)
            known[run.key] = row
            write()
            check_comparable(list(known.values()), study.metric)
            if "result" in row:
                budget.note(run.arm, row["seconds"])

    write()
    check_comparable(list(known.values()), study.metric)
    in_worktrees(arms, todo, words, make)
    if not known:
        raise UserError(
            f"no run fits into --budget {cfg.budget}; expected time for one pair at least; raise it, or shorten the"
            " runs",
            "budget-too-small",
            budget=cfg.budget,
        )
    ran_on = {run.arm: known[run.key].get("ran_on", {}) for run in planned if run.key in known}
    for fact in sorted({fact for facts in ran_on.values() for fact in facts}):
        if len({str(facts.get(fact)) for facts in ran_on.values()}) > 1:
            print0(
                f"note            the revisions ran with {fact} "
                + ", ".join(f"{facts.get(fact)} ({arm})" for arm, facts in ran_on.items())
            )
    return folder


def check_not_refused(run: Any, row: Row) -> None:
    """Note in the row of a failed run that it diverged. Raise UserError where its revision refused it."""
    said = run.refusal() if "failed" in row else 0
    if said == DIVERGED:
        row["diverged"] = True
    if said == REFUSED:
        raise UserError(
            f"{run.arm} refuses the run: {row['failed']}; expected flags and data that both revisions take; see"
            f" {run.dir / 'log.txt'}",
            "revision-refused",
            arm=run.arm,
        )


def check_comparable(rows: list[Row], metric: str) -> None:
    """Raise UserError where runs were measured on different texts, or none has the metric."""
    found = [row for row in rows if "result" in row]
    if len(texts := {row["text"] for row in found} - {None}) > 1:
        raise UserError(
            "the revisions draw their validation text differently; expected one text; name it: -- --val-data FILE",
            "validation-differs",
            found=sorted(texts),
        )
    check_metric(metric, [row["result"] for row in found])


def in_worktrees(
    arms: dict[str, Revision], runs: list[RevisionRun], words: list[str], work: Callable[[], None]
) -> None:
    """Do the work where each run has a worktree of its revision, and remove them."""
    places: dict[str, Path] = {}  # tree -> its folder
    kept = True
    try:
        for run in runs:
            revision = arms[run.arm]
            if revision.tree not in places:
                places[revision.tree] = add_worktree(revision)
                print0(f"worktree        {run.arm}: {places[revision.tree]}")
            run.begin_in(places[revision.tree], words)
        if runs:
            work()
        kept = any(run.tries and not (run.dir / "row.json").exists() for run in runs)
    except SystemExit:  # a signal
        kept = False
        raise
    finally:
        for revision in arms.values():
            path = places.pop(revision.tree, None)
            if path and kept:
                print0(f"kept            {path}, because of a run that failed; the next lab compare removes it")
            elif path:
                remove_worktree(revision, path)


def plan_of(arms: dict[str, Revision], seeds: list[int], words: list[str], facts: dict[str, Any]) -> list[RevisionRun]:
    """The runs in the order in which they are made: A B, B A, A B, ..."""
    planned = []
    flags = [word for name, both in flag_parts(words) if name not in PATHS for word in both]  # text: by fingerprint
    trees = hash_of([revision.tree for revision in arms.values()])
    for i, seed in enumerate(seeds):
        for arm, revision in list(arms.items())[:: -1 if i % 2 else 1]:
            key = f"{OF_STUDIES}{hash_of([revision.tree, flags, seed, facts])[:16]}"
            identity = {**facts, "sources": trees, "tree": revision.tree, "commit": revision.came_from}
            base = base_dir() / "lab" / "revisions" / hash_of([revision.tree, facts])[:16]
            planned.append(RevisionRun(arm, seed, CommandLine(key, [], base, {}), identity, base=base))
    return planned


def facts_of(words: list[str]) -> dict[str, Any]:
    """Machine, data and tokenizer of runs with these flags, as this checkout reads them, and the seconds that its plan
    expects of one; None where the flags are another version's. Raises UserError.
    """
    refused = False
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            cfg = parse(BaseTrainConfig, words)
    except (UserError, SystemExit):
        refused = True
        kept = {"tokenizer", "device_type", "threads", *DataConfig.__dataclass_fields__}
        of_data = [word for name, both in flag_parts(words) if name in kept for word in both]
        try:
            cfg = parse(BaseTrainConfig, of_data)
        except SystemExit:
            raise UserError(
                f"{shlex.join(of_data)} cannot be read (see above); expected flags of data; correct them", "data-flags"
            ) from None
        print0("note            these flags are not this checkout's: the revisions check them, no time is expected")
    preview = preview_of({"": cfg}, 1, 0)
    row = preview.arms[""]
    facts = {name: row[name] for name in ("tokenizer", "data", "validation")}
    return facts | {"machine": preview.machine, "seconds": None if refused else row["seconds"]}


def announce_pairs(
    arms: dict[str, Revision], flags: list[str], machine: dict[str, Any], n: int, budget: Budget
) -> None:
    """What is about to happen, and how long it will take. n: runs in all."""
    for label, (arm, revision) in zip("AB", arms.items()):
        print0(f"{label:<16}{arm}: {revision.about}")
    if len({revision.tree for revision in arms.values()}) == 1:
        print0("note            both are the same tree: identical; one run of each seed serves both")
    print0(f"flags           {shlex.join(flags) or 'none: the defaults of each revision'}")
    print0(f"machine         {machine['device_name']}, {machine['threads']} threads a run, one run at a time")
    total = sum(map(budget.pair, budget.left))
    by = "by the runs before" if budget.took else "by the plan, without start and evaluations"
    shown = "unknown" if math.isnan(total) else f"about {clock(total).strip()}, {by}"
    todo = budget.todo
    print0(f"runs            {n}, {len(todo)} of them to make" + (f"; expected time {shown}" if todo else ""))
    if todo and budget.seconds < math.inf:
        print0(f"budget          {clock(budget.seconds).strip()}: {budget.fits()}")
