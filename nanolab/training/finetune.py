"""Fine-tuning: what a run inherits from the model it starts from, its stages, its plan, and what later stages
unlearned.

Learning rates are the pretraining run's own, with its batch law in them, times --init-lr-frac; the batch law also
covers a batch of another size. In every stage they are constant, then fall linearly to --final-lr-frac of that over the
last part. Matrices do not decay, as in nanochat's recipe. The model keeps its row length, whatever the rows of
conversations: windows of attention are shares of it."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from nanolab.cli import (
    Condition,
    UserError,
    check_bounds,
    check_given,
    check_read,
    from_json,
    given,
    nearest,
    read_toml,
)
from nanolab.data.packing import share_rows
from nanolab.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from nanolab.model.accounting import train_flops_per_token
from nanolab.model.config import GPTConfig
from nanolab.records import checkpoint
from nanolab.records.models import ModelRef
from nanolab.training.config import READ_BY_RECIPE, BaseTrainConfig, RLConfig, SFTConfig
from nanolab.training.recipes import RECIPES
from nanolab.training.schedule import Plan

RATES = ("embedding_lr", "unembedding_lr", "matrix_lr", "learning_rate")  # flags of which -1 means: as in pretraining
PEAK_MOMENTUM, MOMENTUM_STEPS = 0.95, 300  # Muon's, from 0.85


@dataclass(frozen=True)
class Origin:
    """The model that a run starts from, and how that was pretrained. JSON of it is kept in the run's checkpoints."""

    name: str  # NAME@STEP
    model: GPTConfig
    pretraining: dict[str, Any]  # flags of base_train
    plan: dict[str, Any]  # its Plan
    # at which it, or what was fine-tuned from it, was trained; None after rl, whose time is mostly for drawing replies
    tokens_per_second: float | None

    @classmethod
    def of(cls, meta: dict[str, Any], name: str = "") -> "Origin":
        """From the meta of a checkpoint of pretraining, or of a run that has an origin of its own.

        name: default is the recorded one, for a run that goes on without the model that it started from.
        """
        was, seconds = (
            meta.get("origin", {"pretraining": meta["config"], "plan": meta["plan"]}),
            meta["loop"]["total_training_time"],
        )
        rate = meta["tokens"] / seconds if seconds and meta.get("kind") != "rl" else None
        return cls(
            name or was["name"], from_json(GPTConfig, meta["model_config"]), was["pretraining"], was["plan"], rate
        )

    @classmethod
    def found(cls, model: ModelRef) -> "Origin":
        return cls.of(checkpoint.load_meta(model.checkpoint), f"{model.name}@{model.step}")

    def facts(self) -> dict[str, Any]:
        """What `of` reads from a checkpoint's "origin"."""
        return {"name": self.name, "pretraining": self.pretraining, "plan": self.plan}

    def rates(self, cfg: SFTConfig) -> BaseTrainConfig:
        """The flags that learning rates are computed from: pretraining's, and those given now."""
        given = {name: getattr(cfg, name) for name in RATES if getattr(cfg, name) >= 0}
        return replace(from_json(BaseTrainConfig, self.pretraining), **given)


def check_rates(cfg: SFTConfig | RLConfig, origin: Origin) -> None:
    """Raise UserError for a rate that was typed and that the recipe of the model does not read."""
    check_given(cfg, READ_BY_RECIPE, recipe=origin.plan["recipe"])


def check_chat_tokens(model: GPTConfig, tokenizer: Tokenizer) -> None:
    """Raise UserError for a model that has no place for the tokens that mark up conversations."""
    if missing := [name for name in SPECIAL_TOKENS if tokenizer.special(name) >= model.vocab_size]:
        raise UserError(
            f"the model has a vocabulary of {model.vocab_size} tokens, without {', '.join(missing)}; expected one with"
            " chat tokens; start from a model trained by scripts.base_train"
        )


def task_versions(meta: dict[str, Any]) -> dict[str, int]:
    """Versions of the tasks that a fine-tuned model learned from. A checkpoint that does not name them has files of
    conversations split by the first rule.
    """
    return meta.get("task_versions", {"jsonl": 1})


@dataclass(frozen=True)
class Stage:
    """One part of a run: what is trained on, for how long, how strongly."""

    name: str
    tasks: str  # a mixture, see tasks/__init__.py
    epochs: int = 1
    num_iterations: int = -1  # optimizer steps; -1: by epochs
    init_lr_frac: float = 0.8
    replay: float = 0.0


def stages_of(cfg: SFTConfig) -> list[Stage]:
    """The stages of a run: one from the flags, or those of the --stages file, where the flags are the defaults.

    The file: [[stage]] tables with the fields of Stage; `tasks` is required, a missing name is the stage's number.
    Raises UserError for what cannot be read or meant."""
    common = {f.name: getattr(cfg, f.name) for f in fields(Stage) if f.name != "name"}
    stages = (
        [Stage(**common, name="sft")]
        if not cfg.stages
        else _read_stages(Path(cfg.stages).expanduser(), common, given(cfg))
    )
    for stage in stages:
        at = f"stage {stage.name}: " if cfg.stages else ""
        if stage.num_iterations < 1 and stage.epochs < 1:
            raise UserError(
                f"{at}neither epochs ({stage.epochs}) nor num-iterations ({stage.num_iterations}) is above 0; expected"
                " one of them; try --epochs 1"
            )
        if not stage.init_lr_frac > 0:
            raise UserError(f"{at}--init-lr-frac is {stage.init_lr_frac:g}; expected above 0; try --init-lr-frac 0.8")
    return stages


def _read_stages(path: Path, common: dict[str, Any], typed: Collection[str]) -> list[Stage]:
    """common: the defaults of the fields, from the flags. typed: the flags that were typed, of which each has to serve
    a stage.
    """
    expected = 'expected [[stage]] tables, each with tasks = "NAME:WEIGHT,..."'
    content = read_toml(path)
    tables = content.pop("stage", [])
    if content or not isinstance(tables, list) or not tables:
        raise UserError(
            f"--stages {path} has {'the field ' + next(iter(content)) if content else 'no [[stage]]'}; {expected}; mend"
            " the file"
        )
    stages: list[Stage] = []
    types = {f.name: type(common.get(f.name, "")) for f in fields(Stage)}
    for i, table in enumerate(tables, 1):
        for key, value in table.items():
            if key not in types:
                raise UserError(
                    f"--stages {path}, stage {i}: no field {key!r}; expected some of"
                    f" {', '.join(types)}{nearest(key, list(types))}"
                )
            if not isinstance(value, (int, float) if types[key] is float else types[key]) or isinstance(value, bool):
                raise UserError(
                    f"--stages {path}, stage {i}: {key} is {value!r}; expected {types[key].__name__}; mend the file"
                )
        check_bounds(SFTConfig, table, f"--stages {path}, stage {i}: ")
        if "tasks" not in table:
            raise UserError(f"--stages {path}, stage {i}: no tasks; {expected}; add them")
        stage = Stage(**{"name": str(i)} | common | table)
        if not stage.name or set(stage.name) & set("/ ") or stage.name in [s.name for s in stages]:
            raise UserError(
                f"--stages {path}, stage {i}: the name {stage.name!r} is taken, or has a blank or slash; expected one"
                " of its own; mend the file"
            )
        if stage.num_iterations > 0:
            check_read(
                {"epochs"} & {*table},
                {
                    "epochs": Condition(
                        "epochs", "num_iterations", bool, f"one of the two in stage {stage.name} of {path}"
                    )
                },
                vars(stage),
            )
        stages.append(stage)
    read = {
        name
        for table, stage in zip(tables, stages)
        for name in common
        if name not in table and (name != "epochs" or stage.num_iterations < 1)
    }
    check_read(
        typed,
        {name: Condition(name, "stages", bool, f"a stage of {path} without it") for name in {*common} - read},
        {"stages": str(path)},
    )
    return stages


class Shape(NamedTuple):
    """Rows and tokens of one optimizer step."""

    seq_len: int  # T of the rows of conversations
    device_batch_size: int
    total_batch_size: int  # tokens, all ranks
    world_size: int
    shares: list[int]  # rows of each rank

    @property
    def rows_per_step(self) -> int:
        return self.total_batch_size // self.seq_len


def shape_of(cfg: SFTConfig, origin: Origin, world_size: int, batch: int = -1) -> Shape:
    """What the flags say; where they say nothing what pretraining had, the batch rounded to whole micro-batches.

    batch: that of the run when it was started, which it keeps if --total-batch-size is not given.
    """
    longest = origin.model.sequence_len
    T = cfg.max_seq_len if cfg.max_seq_len != -1 else longest
    if not 8 <= T <= longest:
        raise UserError(
            f"--max-seq-len is {T}; expected 8 to {longest}, the rows that {origin.name} was trained on; try"
            f" --max-seq-len {min(max(T, 8), longest)}"
        )
    rows = cfg.device_batch_size if cfg.device_batch_size != -1 else origin.plan["device_batch_size"]
    if rows < 1:
        raise UserError(f"--device-batch-size is {rows}; expected at least 1")
    total = cfg.total_batch_size if cfg.total_batch_size != -1 else batch
    if total == -1:
        total = max(-(-world_size // rows), round(origin.plan["total_batch_size"] / (rows * T))) * rows * T
    return Shape(T, rows, total, world_size, share_rows(total, T, rows, world_size))


@dataclass(frozen=True)
class StagePlan:
    """A stage, resolved."""

    name: str
    first: int  # optimizer steps before it
    steps: int
    lr_frac: float


@dataclass(frozen=True)
class FineTunePlan(Plan):
    """A fine-tuning run, resolved. batch_scale holds pretraining's factor and that of a batch of another size."""

    seq_len: int
    stages: tuple[StagePlan, ...]

    @property
    def rows_per_step(self) -> int:
        return self.total_batch_size // self.seq_len

    def stage_at(self, step: int) -> StagePlan:
        """The stage that trains step `step`, counted from 0; the last one for all that follow."""
        return next(stage for stage in reversed(self.stages) if stage.first <= step)

    def ends(self) -> dict[int, str]:
        """Steps done at the end of each stage -> its name."""
        return {stage.first + stage.steps: stage.name for stage in self.stages}

    def lr_multiplier(self, step: int, progress: float) -> float:
        """The stage's share of the inherited rates: warm-up, constant, linear fall over its last `warmdown_ratio`."""
        stage = self.stage_at(step)
        done = (step - stage.first) / stage.steps
        rise = min(1.0, (step - stage.first + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return stage.lr_frac * rise * (self.final_lr_frac + (1.0 - self.final_lr_frac) * self.warmdown_left(done))

    def muon_momentum(self, step: int, progress: float) -> float:
        return 0.85 + (PEAK_MOMENTUM - 0.85) * min(1.0, step / MOMENTUM_STEPS)


def make_plan(cfg: SFTConfig, origin: Origin, shape: Shape, stages: Sequence[tuple[Stage, int]]) -> FineTunePlan:
    """stages: with the optimizer steps of each."""
    recipe, was = origin.plan["recipe"], origin.plan["total_batch_size"]
    law = math.sqrt(shape.total_batch_size / was) if RECIPES[recipe].laws else 1.0  # as in schedule.make_plan
    firsts = [sum(steps for _, steps in stages[:i]) for i in range(len(stages))]
    total = sum(steps for _, steps in stages)
    shortest = min(steps for _, steps in stages)
    return FineTunePlan(
        model=origin.model,
        num_iterations=total,
        max_seconds=None,
        total_batch_size=shape.total_batch_size,
        device_batch_size=shape.device_batch_size,
        grad_accum=-(-shape.shares[0] // shape.device_batch_size),
        world_size=shape.world_size,
        flops_per_token=train_flops_per_token(origin.model),
        recipe=recipe,
        batch_scale=origin.plan["batch_scale"] * law,
        weight_decay=0.0,
        warmup_steps=round(cfg.warmup_ratio * shortest),
        warmdown_ratio=cfg.warmdown_ratio,
        final_lr_frac=cfg.final_lr_frac,
        grad_clip=cfg.grad_clip,
        seq_len=shape.seq_len,
        stages=tuple(
            StagePlan(stage.name, first, steps, stage.init_lr_frac) for first, (stage, steps) in zip(firsts, stages)
        ),
    )


def optimizer_state(found: ModelRef) -> Mapping[str, Tensor]:
    """The optimizer's state as the checkpoint's ranks left it, for any number of ranks. Raises UserError where it has
    none.
    """
    checkpoint.verify(found.checkpoint)
    pieces = checkpoint.load_optimizer(found.checkpoint)
    if not len(pieces):
        raise UserError(
            f"{found.checkpoint} holds weights only; expected the optimizer's state beside them; type"
            " --no-load-optimizer to start with a fresh one"
        )
    return pieces


class Forgotten(NamedTuple):
    """What became of one metric over the stages."""

    metric: str
    after: list[float | None]  # at the start, then after each stage; None where it was not measured
    best: float
    final: float

    @property
    def lost(self) -> float:
        """How much worse the end is than the best, in the metric's units; never negative."""
        return abs(self.best - self.final)


def forgetting(rows: Sequence[dict[str, Any]], ends: Sequence[int]) -> list[Forgotten]:
    """rows: a run's metrics; ends: steps done at the end of each stage. Losses and bits are better low, all else
    high.
    """
    evaluated = {row["step"]: row for row in rows}
    names = dict.fromkeys(name for row in rows for name in row if name.startswith(("val/", "eval/", "chatcore")))
    out = []
    for name in names:
        values = [row[name] for row in rows if row.get(name) is not None]
        final = evaluated.get(ends[-1], {}).get(name)
        if final is not None:
            low = name.startswith(("val/loss", "val/bpb"))
            out.append(
                Forgotten(
                    name,
                    [evaluated.get(step, {}).get(name) for step in (0, *ends)],
                    min(values) if low else max(values),
                    final,
                )
            )
    return out


def forgetting_table(found: Sequence[Forgotten], stages: Sequence[str]) -> list[str]:
    """Lines of a Markdown table: a metric per row, its value at the start and after each stage, the best, and what was
    lost.
    """
    cell = lambda value: "-" if value is None else f"{value:.4f}"  # noqa: E731
    head = ["metric", "start", *(f"after {name}" for name in stages), "best", "lost"]
    body = [[one.metric, *map(cell, (*one.after, one.best, one.lost))] for one in found]
    return ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *body]]
