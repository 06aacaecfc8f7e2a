"""A study: a question, arms that differ in flags, the smallest effect that matters. Read from TOML and checked.

    question = "Does a gate on attention's output help?"
    matters = 0.01                      # the smallest difference of the metric that matters
    flags = "--depth 4 --num-iterations 300"
    baseline = "none"
    [arms]
    none = ""
    head = "--gate head"
    [predict]
    head = "better"

Each (arm, seed) is a run of the study's stage (pretraining, unless `stage` says sft or rl) with the flags of the study,
of the scale and of the arm, in this order: a later one wins. Imports no torch."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

import nanolab
from nanolab.cli import HORIZONS, UserError, current_name, given, nearest, parse, read_toml, unknown_flag
from nanolab.stages.config import BaseTrainConfig, RLConfig, RunFlags, SFTConfig

ROOT = Path(nanolab.__file__).resolve().parents[1]
OF_THE_LAB = ("run", "resume", "dry_run", "plan_for", "seed", "profile")  # flags that the lab itself gives its runs
OUTSIDE = ("published", "published_source")  # what others found: kept in the record beside the study
MAY_GROW = ("seeds", "noise", "results", *OUTSIDE)  # what a study may change after its first run
LEAST_SEEDS = 3  # the first look of stats.py
COSTS = {"flops": "step_flops", "time": "step_seconds"}  # what is matched by the steps of each arm -> cost of a step
RATES = ("lr_scale", "matrix_lr", "embedding_lr", "unembedding_lr", "scalar_lr", "learning_rate", "init_lr_frac")
MATCHES = ("tokens", "steps", *COSTS)
Verdict = Literal["better", "worse", "equivalent"]


class StudyStage(NamedTuple):
    """What the runs of a study may be."""

    config: type[RunFlags]
    script: str
    metric: str  # of a study that names none; also that of its curves
    direction: str  # in which it is better
    first: tuple[str, ...] = ()  # flags of every run; a study's own come later


STAGES = {  # the function of nanolab.stages that makes a run has the name of the stage
    "pretrain": StudyStage(BaseTrainConfig, "base_train", "val/bpb", "lower", ("--sample-every", "-1")),
    "sft": StudyStage(SFTConfig, "chat_sft", "val/loss", "lower"),
    "rl": StudyStage(RLConfig, "chat_rl", "eval/pass@1", "higher"),
}


Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Noise(BaseModel):
    """What a noise study found."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sd: Positive  # of a paired difference
    df: Positive  # degrees of freedom of that: of n pairs n - 1


class Study(BaseModel):
    """The keys of a study file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    question: str
    arms: dict[str, str]  # name -> flags
    baseline: str  # the arm that the others are compared with
    matters: Positive  # in units of the metric
    stage: Literal["pretrain", "sft", "rl"] = "pretrain"  # what its runs are
    metric: str = ""  # a name in a run's result.json; A.B is B inside A; default: the stage's
    direction: Literal["lower", "higher", ""] = ""  # which is better; default: as of the stage's metric
    seeds: list[Annotated[int, Field(ge=0, lt=2**63)]] = [42, 43, 44]
    flags: str = ""  # of all arms
    predict: dict[str, Verdict] | str = ""  # arm -> verdict, or a sentence; recorded before the first run
    scales: dict[Literal["cpu", "gpu", "full"], str] = {}  # name -> more flags of all arms
    match: str = "tokens"  # what all arms have the same number of
    sweep: str = ""  # a rate and its values, of which lab sweep chooses one for each arm: "--lr-scale 0.25,0.5,1,2"
    sweep_seeds: list[Annotated[int, Field(ge=0, lt=2**63)]] = [7]  # of the sweep; no seeds of the study
    # sd of a paired difference, for check; as a table with sd and df it is known before the first run, and verdicts
    # moderate their variance by it
    noise: Noise | Positive | None = None
    results: str = ""  # folder of the results, relative to the file; default: dev/results/NAME
    published: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = {}  # arm -> what others found
    published_source: str = ""  # where, of what model, in which unit

    @property
    def swept(self) -> tuple[str, list[str]]:
        """(the flag of the sweep, its values)."""
        flag, _, values = self.sweep.strip().partition(" ")
        return flag, [value.strip() for value in values.split(",")]

    @property
    def others(self) -> list[str]:
        """The arms without the baseline."""
        return [arm for arm in self.arms if arm != self.baseline]

    def scale(self, name: str) -> str:
        """The scale called `name`; of no name the first one, or none. Raises UserError for an unknown one."""
        if name and name not in self.scales:
            raise UserError(
                f"the study has no scale {name!r}; expected one of {', '.join(self.scales) or 'none at all'};"
                + (f" try --scale {next(iter(self.scales))}" if self.scales else " leave --scale out"),
                "scale-unknown",
                scale=name,
            )
        return name or next(iter(self.scales), "")

    def config(self, arm: str, scale: str = "") -> RunFlags:
        """The flags of an arm at a scale, parsed. Raises UserError, with the name of what is wrong."""
        stage = STAGES[self.stage]
        parts = {"the study's flags": self.flags, f"scale {scale}": self.scales.get(scale, "")}  # type: ignore
        words = list(stage.first)
        for where, text in (parts | {f"arm {arm}": self.arms[arm]}).items():
            words += flag_words(text, where, stage)
        try:
            cfg = parse(stage.config, words)
        except UserError as error:
            raise UserError(f"arm {arm}: {error}", error.code, arm=arm, **error.values) from None
        except SystemExit:
            raise UserError(
                f"arm {arm}: its flags cannot be read (see above); expected those of scripts.{stage.script}; correct"
                " them",
                "arm-flags",
                arm=arm,
            ) from None
        if isinstance(cfg, BaseTrainConfig) and cfg.eval_every > 0 and "eval_first" not in given(cfg):
            cfg = replace(cfg, eval_first=False)  # of untrained weights: no verdict and no curve has it
        if not getattr(cfg, "model", "named"):
            raise UserError(
                f"arm {arm} names no model to start from; expected one, since the newest may be another tomorrow; add"
                " --model NAME to the study's flags",
                "model-unnamed",
                arm=arm,
            )
        return cfg

    def configs(self, scale: str) -> dict[str, RunFlags]:
        return {arm: self.config(arm, scale) for arm in self.arms}

    def outside(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """The study's record with what others found as the file has it now."""
        found = {name: value for name in OUTSIDE if (value := getattr(self, name))}
        return {name: value for name, value in record.items() if name not in OUTSIDE} | found

    def fixed(self, scale: str) -> dict[str, Any]:
        """What the study's record holds before its first run, and what may not change after it."""
        fixed = self.model_dump(exclude=set(MAY_GROW)) | {"scale": scale}
        return fixed | ({"noise": self.noise.model_dump()} if isinstance(self.noise, Noise) else {})


def stage_of(cfg: RunFlags) -> str:
    """The name of the stage that these are the flags of."""
    return next(name for name, stage in STAGES.items() if type(cfg) is stage.config)


def stage_in(study: Mapping[str, Any]) -> StudyStage:
    """The stage of a study's record, which may be older than the key."""
    return STAGES[study.get("stage", "pretrain")]


def flag_words(text: str, where: str, stage: StudyStage) -> list[str]:
    """The words of `text`. Raises UserError for flags that the stage does not have, or that the lab gives itself."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(
            f"{where}: {text!r} cannot be split into flags ({error}); expected flags as in a shell; close the quotes",
            "flags-quoted",
            where=where,
        ) from None
    for word in (word for word in words if word.startswith("--")):
        name = current_name(stage.config, word[2:].partition("=")[0].replace("-", "_"))
        if (hint := unknown_flag(stage.config, name)) is not None:
            raise UserError(
                f"{where}: {word} is not a flag of scripts.{stage.script}{hint}; --help lists them",
                "unknown-flag",
                where=where,
                flag=name,
            )
        if name.removeprefix("no_") in OF_THE_LAB:
            raise UserError(
                f"{where}: {word} is what the lab gives each run itself; expected other flags; leave it out",
                "flag-of-the-lab",
                where=where,
                flag=name,
            )
    return words


def read_study(path: Path) -> Study:
    """The study in a TOML file, checked as far as it can be without torch. Raises UserError."""
    study = study_of(read_toml(path), str(path))
    for scale in study.scales or [""]:
        study.configs(scale)
    return study


def study_of(values: Mapping[str, Any], where: str) -> Study:
    """A study from its keys. where: they come from."""
    try:
        study = Study(**values)
    except ValidationError as errors:
        error = errors.errors()[0]
        key = str(error["loc"][0])
        if error["type"] == "extra_forbidden":
            raise UserError(
                f"{where} has the key {key!r}, which studies do not have{nearest(key, list(Study.model_fields))};"
                f" expected {', '.join(Study.model_fields)}; rename it or leave it out",
                "study-key",
                key=key,
            ) from None
        raise UserError(
            f"{where}: {key}: {error['msg']}; found {error['input']!r}; correct it (nanolab/lab/study.py shows how)",
            "study-value",
            key=key,
        ) from None
    default = {"metric": STAGES[study.stage].metric, "direction": STAGES[study.stage].direction}
    study = study.model_copy(update={name: value for name, value in default.items() if not getattr(study, name)})
    names = list(study.arms)
    for arm in [study.baseline, *(study.predict if isinstance(study.predict, dict) else ()), *study.published]:
        if arm not in names:
            raise UserError(
                f"{where}: {arm!r} is no arm; expected one of {', '.join(names)}{nearest(arm, names)}; name an arm",
                "arm-unknown",
                arm=arm,
            )
    if study.published and not study.published_source:
        raise UserError(
            f"{where} has published figures without published_source; expected where they are from, of what model, in"
            ' which unit; try published_source = "arXiv:2603.11611, table 2: 124M, perplexity"',
            "published-unsourced",
        )
    if len(names) < 2 or len(set(study.seeds)) < max(LEAST_SEEDS, len(study.seeds)):
        raise UserError(
            f"{where} has {len(names)} arms and the seeds {study.seeds}; expected at least two arms and"
            f" {LEAST_SEEDS} different seeds, with fewer of which no verdict is read; try seeds = [42, 43, 44]",
            "too-few",
            arms=len(names),
            seeds=study.seeds,
        )
    if study.match not in MATCHES:
        raise UserError(
            f'{where}: match = {study.match!r}; expected {" or ".join(MATCHES)}; try match = "tokens"',
            "match-unknown",
            match=study.match,
        )
    if study.match in COSTS:
        check_derived(study, where)
    if study.sweep:
        check_sweep(study, where)
    return study


def check_sweep(study: Study, where: str) -> None:
    """Raise UserError where a sweep is no rate with different values, or shares seeds with the study."""
    flag, values = study.swept
    if flag.removeprefix("--").replace("-", "_") not in RATES or len(set(values)) < max(2, len(values)):
        raise UserError(
            f"{where}: sweep = {study.sweep!r}; expected one of"
            f" {', '.join('--' + name.replace('_', '-') for name in RATES)} and two or more different values; try"
            ' sweep = "--lr-scale 0.25,0.5,1,2"',
            "sweep-values",
            flag=flag,
            values=values,
        )
    if not study.sweep_seeds or set(study.sweep_seeds) & set(study.seeds):
        raise UserError(
            f"{where}: sweep_seeds = {study.sweep_seeds}, seeds = {study.seeds}; expected different ones: a rate chosen"
            " on the study's own seeds would flatter its arm; try sweep_seeds = [7]",
            "sweep-seeds",
            seeds=study.sweep_seeds,
        )


def check_derived(study: Study, where: str) -> None:
    """Raise UserError where arms say how long they are trained, or are no pretraining."""
    if study.stage != "pretrain":
        raise UserError(
            f'{where}: match = "{study.match}" of {study.stage} runs; expected pretraining, whose steps all cost the'
            ' same; try match = "steps"',
            "match-stage",
            stage=study.stage,
        )
    for arm in study.others:
        for word in flag_words(study.arms[arm], f"arm {arm}", STAGES[study.stage]):
            if word.startswith("--") and word[2:].partition("=")[0].replace("-", "_") in HORIZONS:
                raise UserError(
                    f'arm {arm} has {word}, but match = "{study.match}" says how long it is trained; expected a length'
                    " for all arms; put it into the study's flags",
                    "length-derived",
                    arm=arm,
                    flag=word,
                )


def folder_of(study: Study, path: Path, scale: str) -> Path:
    """The folder of the results of the study in file `path`: one for each scale."""
    folder = path.parent / study.results if study.results else ROOT / "dev" / "results" / path.stem
    return folder / scale


def identical_arms(configs: Mapping[str, RunFlags]) -> list[list[str]]:
    """The groups of arms whose flags come to the same."""
    groups: dict[str, list[str]] = {}
    for arm, cfg in configs.items():
        groups.setdefault(repr(cfg), []).append(arm)
    return [arms for arms in groups.values() if len(arms) > 1]


def read_seeds(text: str) -> list[int]:
    """ "42,43,44" as numbers. Raises UserError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise UserError(
            f"--seeds {text}; expected whole numbers joined by commas; try --seeds 42,43,44", "seeds", seeds=text
        )
    return [int(part) for part in parts]


def to_toml(study: Study) -> str:
    """The file of a study: what is not a default."""
    values = study.model_dump(exclude_defaults=True)
    tables = {key: value for key, value in values.items() if isinstance(value, dict)}
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values.items() if key not in tables]
    for name, rows in tables.items():
        lines += ["", f"[{name}]", *(f"{json.dumps(k)} = {json.dumps(v, ensure_ascii=False)}" for k, v in rows.items())]
    return "\n".join(lines) + "\n"
