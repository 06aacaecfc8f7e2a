"""From a study to its runs: what is planned, what is there already, what is made.

A run is found again by the hash of what decides its result: its flags, its data and tokenizer by fingerprint, the
sources that it imports, the kind of machine and its threads."""

import ast
import hashlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nanolab import runtime
from nanolab.cli import UserError, to_json
from nanolab.data.config import DataConfig
from nanolab.evals.probes.common import probe_names
from nanolab.lab.arms import FACTS, FINGERPRINTS
from nanolab.lab.match import calibrate, lengths_of, with_lengths
from nanolab.lab.processes import Planned, function_of, in_child, make_runs, row_of
from nanolab.lab.results import (
    Row,
    check_metric,
    check_unedited,
    hash_of,
    new_record,
    prior_of,
    read_results,
    write_results,
)
from nanolab.lab.stats import LOOKS, minimum_detectable, seeds_needed
from nanolab.lab.study import COSTS, OF_THE_LAB, ROOT, Noise, Study, identical_arms, stage_of
from nanolab.lab.verdict import effects_of, paired_values
from nanolab.records.console import clock
from nanolab.records.environment import environment
from nanolab.records.models import OF_STUDIES
from nanolab.runtime import print0
from nanolab.stages.config import RunFlags

OF_A_PROCESS = 700 << 20  # bytes that a run takes beside what its plan counts
MACHINE = ("device", "device_name", "dtype", "threads", "world_size", "torch")  # of env.json: they decide the last bits
# flags that say where things are, or what is said of a run: data, tokenizer and model count by their fingerprints
NOT_IN_KEY = {
    *OF_THE_LAB,
    "tokenizer",
    "model",
    "wandb",
    "trackio",
    "threads",
    "eval_bundle",
    *DataConfig.__dataclass_fields__,
}
OURS = ("nanolab", "tasks")  # packages whose sources decide a run's result


class Preview(NamedTuple):
    """What is found out before the first run, in a process of its own."""

    jobs: int
    gpus: int
    machine: dict[str, Any]
    arms: dict[str, dict[str, Any]]  # arm -> tokens, steps, parameters, seconds, fingerprints


def run_study(study: Study, folder: Path, scale: str = "", jobs: int = 0, slurm: str = "") -> None:
    """Make the runs of `study` that are not there, and write <folder>/runs.jsonl after each. jobs: at once; 0: as many
    as the machine has cores or GPUs, and memory for. slurm: parameters of a cluster's jobs, all of which are handed in
    where jobs is 0.

    Raises UserError for a study that cannot be run or was edited, and SystemExit after a signal, when the runs that are
    on are saved."""
    record, before = read_results(folder)
    fixed = study.fixed(scale)
    check_unedited(record, before, fixed, study.seeds, folder)
    rates = {}
    if study.sweep:
        from nanolab.lab.sweep import rates_for

        rates = record.get("rates") or rates_for(study, folder)
    arms = {arm: f"{flags} {rates.get(arm, '')}" for arm, flags in study.arms.items()}
    configs = study.model_copy(update={"arms": arms}).configs(scale)
    place = None
    if slurm:
        from nanolab.lab.slurm import Jobs

        place = Jobs(slurm)
    look = place.call if place else in_child
    # a job is one run, which has the whole of what it asks for
    preview = look(preview_of, configs, 1 if place else jobs, record.get("threads", 0), study.metric)
    record = record or new_record(fixed, preview.machine["threads"]) | ({"rates": rates} if rates else {})
    if study.match == "time" and "step_seconds" not in record:
        record["step_seconds"] = calibrate(configs, preview.machine["threads"], look)
    if study.match in COSTS:
        configs = with_lengths(study, configs, preview.arms, record.get("step_seconds", {}))
        record["lengths"] = lengths_of(study, preview.arms, record.get("step_seconds", {}))
    check_equal(study, preview.arms)
    planned = plan_runs(study, configs, preview)
    for run in planned:
        run.wandb = wandb_names(run, planned, (folder.parent if scale else folder).name, scale)
    known = {row["key"]: without_place(row) for row in before if "result" in row or row["diverged"]}
    known |= {run.key: row_of(run) for run in planned if run.key not in known and (run.dir / "result.json").exists()}
    todo: dict[str, Planned] = {}
    for run in (run for run in planned if run.key not in known):
        todo.setdefault(run.key, run)
    if place:
        preview = preview._replace(jobs=jobs or max(1, len(todo)))
    announce(study, preview, configs, known, list(todo.values()), planned)
    note_stale(before, planned)
    record = study.outside(record | {"seeds": study.seeds})

    def write() -> None:
        rows = [{"arm": run.arm, "seed": run.seed, **known[run.key]} for run in planned if run.key in known]
        write_results(folder, record, rows)

    write()
    function_of(study.stage)  # what it imports is imported once, before the forks
    for run, row in make_runs(list(todo.values()), preview.jobs, preview.gpus, study.metric, place):
        known[run.key] = row
        write()
        check_metric(study.metric, [row["result"] for row in known.values() if "result" in row])


def wandb_names(run: Planned, planned: list[Planned], study: str, scale: str) -> dict[str, str]:
    """The variables by which wandb groups a run under its study and tags it with its arms and scale; those that the
    user has set stay.
    """
    arms = dict.fromkeys(other.arm for other in planned if other.key == run.key)  # those of the same flags share it
    tags = [tag.replace(",", " ")[:64] for tag in (*arms, scale) if tag]  # wandb's limit; commas part its tags
    found = {"WANDB_RUN_GROUP": study, "WANDB_TAGS": ",".join(tags)}
    return {name: value for name, value in found.items() if name not in os.environ}


def without_place(row: Row) -> Row:
    """A row without arm and seed: what arms of the same flags share."""
    return {name: value for name, value in row.items() if name not in ("arm", "seed")}


def note_stale(before: list[Row], planned: list[Planned]) -> None:
    """Say which rows are made again, and for what difference."""
    now = {(run.arm, run.seed): run for run in planned}
    for row in before:
        run = now[row["arm"], row["seed"]]
        if row["key"] != run.key:
            differ = [fact for fact, value in run.identity.items() if row.get(fact) != value] or ["flags"]
            print0(f"note            {run.arm} seed {run.seed} was made with other {', '.join(differ)}: made again")


def preview_of(configs: dict[str, RunFlags], jobs: int, threads: int, metric: str = "") -> Preview:
    """Open what the runs will open, and resolve their plans. threads: of each run, 0: not decided yet."""
    first = next(iter(configs.values()))
    kind = runtime.device_kind(first.device_type)
    gpus = torch.cuda.device_count() if kind == "cuda" else 0
    cores = torch.get_num_threads()
    threads = first.threads or threads
    most = gpus or max(1, cores // (threads or 1))
    rt = runtime.start(first.device_type, "", first.seed, threads or max(1, cores // (jobs or most)))
    opened: dict[Any, Any] = {}
    arms = {arm: FACTS[stage_of(cfg)](cfg, rt, opened, metric) for arm, cfg in configs.items()}
    if not gpus:
        largest = max(row["bytes"] for row in arms.values()) + OF_A_PROCESS
        most = max(1, min(most, runtime.free_bytes(rt.device) // largest))
    machine = {key: value for key, value in environment(rt).items() if key in MACHINE}
    return Preview(jobs or most, gpus, machine, arms)


def check_equal(study: Study, arms: dict[str, dict[str, Any]]) -> None:
    """Raise UserError where the arms differ in what is held equal, or in the text that they are measured on."""
    for fact in (study.match, "validation") if study.match not in COSTS else ("validation",):
        values = {arm: row[fact] for arm, row in arms.items()}
        if None in values.values() or len(set(values.values())) > 1:
            shown = ", ".join(f"{arm} {'by the clock' if value is None else value}" for arm, value in values.items())
            raise UserError(
                f"the arms differ in {fact}: {shown}; expected the same for all"
                + (f' (match = "{study.match}"); give all arms one --num-iterations' if fact == study.match else "")
                + ("; measure all on the same text or questions" if fact == "validation" else ""),
                "arms-unequal",
                fact=fact,
                arms=values,
            )


def plan_runs(study: Study, configs: dict[str, RunFlags], preview: Preview) -> list[Planned]:
    """The runs of a study, all arms of a seed before the next seed, each named by its key."""
    # probes are imported when they are asked for
    probes = {
        f"nanolab.evals.probes.{name}" for cfg in configs.values() for name in probe_names(getattr(cfg, "probes", ""))
    }
    sources = hash_of(sources_of(f"nanolab.stages.{study.stage}", *probes))
    planned = []
    for seed in study.seeds:
        for arm, cfg in configs.items():
            cfg = replace(cfg, seed=seed, threads=preview.machine["threads"], resume=True)
            flags = {name: value for name, value in to_json(cfg).items() if name not in NOT_IN_KEY}
            facts = preview.arms[arm]
            fingerprints = {name: facts[name] for name in FINGERPRINTS if name in facts}
            identity = {"sources": sources, "machine": preview.machine, **fingerprints}
            name = f"{OF_STUDIES}{hash_of([flags, seed, identity])[:16]}"
            planned.append(Planned(arm, seed, replace(cfg, run=name), identity))
    return planned


def sources_of(*start: str) -> dict[str, str]:
    """Module of ours -> sha256 of its file, of `start` and of every module that they import, within functions too."""
    found: dict[str, str] = {}
    todo = list(start)
    while todo:
        name = todo.pop()
        path = ROOT / ("tasks/__init__.py" if name == "tasks" else name.replace(".", "/") + ".py")
        if name in found or not path.exists():  # a package, or a name in a module
            continue
        text = path.read_bytes()
        found[name] = hashlib.sha256(text).hexdigest()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in OURS:
                todo += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                todo += [alias.name for alias in node.names if alias.name.split(".")[0] in OURS]
    return found


def announce(
    study: Study,
    preview: Preview,
    configs: dict[str, RunFlags],
    known: dict[str, Row],
    todo: list[Planned],
    planned: list[Planned],
) -> None:
    """What is about to happen, and how long it will take."""
    print0(f"question        {study.question}")
    for arm in study.arms:
        facts, flags = preview.arms[arm], study.arms[arm] or "no flags of its own"
        print0(
            f"arm             {arm}: {flags}; {facts['parameters']:,} parameters, {facts['steps']:,} steps,"
            f" {facts['tokens']:,} tokens"
        )
    for arms in identical_arms(configs):
        print0(f"note            {' and '.join(arms)} have the same flags: one run serves them all")
    machine = preview.machine
    print0(
        f"machine         {machine['device_name']}, {machine['dtype']}, {machine['threads']} threads a run,"
        f" {preview.jobs} runs at a time"
    )
    took = {run.arm: known[run.key]["seconds"] for run in planned if run.key in known}
    seconds = [took.get(run.arm) or preview.arms[run.arm]["seconds"] for run in todo]
    by = "by the runs before" if took else "by the plan, without start and evaluations"
    total = "unknown" if None in seconds else f"about {clock(sum(seconds) / preview.jobs).strip()}, {by}"
    there = f"{len(planned)}, {len(todo)} of them to make"
    print0(f"runs            {there}" + (f"; expected time {total}" if todo else ""))


def check_study(study: Study, folder: Path, scale: str = "") -> dict[str, Any]:
    """Whether the study's seeds can see the difference that matters, printed; JSON-ready.

    The noise is that of the runs made, otherwise the study's own figure. Raises UserError where there is neither.
    """
    record, rows = read_results(folder)
    configs = study.configs(scale)
    check_unedited(record, rows, study.fixed(scale), study.seeds, folder)
    preview = in_child(preview_of, configs, 0, record.get("threads", 0), study.metric)
    check_equal(study, preview.arms)
    effects = effects_of(record["study"], paired_values(record, rows)[1]) if rows else {}
    noises = [effect.sd for effect in effects.values() if effect.sd]
    named = study.noise.sd if isinstance(study.noise, Noise) else study.noise
    sd, source = (max(noises), "of the runs made") if noises else (named, "that the study names")
    if sd is None:
        raise UserError(
            f"the noise of a paired difference is not known; expected {LOOKS[0]} seeds of this study, or the standard"
            " deviation in the study's file; make some runs, or add noise = 0.004",
            "noise-unknown",
        )
    arms, n = len(study.others), len(study.seeds)
    look = n if n > LOOKS[-1] else max(look for look in LOOKS if look <= n)
    prior = prior_of(study.fixed(scale))
    visible = minimum_detectable(look, sd, arms=arms, prior=prior)
    needed = seeds_needed(study.matters, sd, arms=arms, prior=prior)
    took = [row["seconds"] for row in rows if "result" in row]
    each = sum(took) / len(took) if took else max((row["seconds"] or 0) for row in preview.arms.values())
    seconds = each * needed * len(study.arms) / preview.jobs
    print0(
        f"{look} seeds see {visible:.3g} (noise {sd:.3g}, {source}); you ask for {study.matters:.3g}: {needed} seeds,"
        f" {clock(seconds).strip()}"
    )
    document = {"seeds": n, "visible": visible, "matters": study.matters, "noise": sd, "noise_source": source}
    return document | {"seeds_needed": needed, "seconds": seconds, "enough": n >= needed}
