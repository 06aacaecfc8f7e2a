"""A fine-tuning run on conversations, resolved: its stages, its batch, its rates.

In every stage the learning rates are constant, then fall linearly to --final-lr-frac of that over the last part."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from nanolab.cli import Condition, UserError, check_bounds, check_read, given, nearest, read_toml
from nanolab.data.conversations import ConversationBatches
from nanolab.data.shares import share_rows
from nanolab.model.accounting import train_flops_per_token
from nanolab.stages.base_run import BaseRun, FineTunePlan
from nanolab.stages.config import SFTConfig
from nanolab.training.recipes import RECIPES


@dataclass(frozen=True)
class StageFlags:
    """One part of a run: what is trained on, for how long, how strongly."""

    name: str
    tasks: str  # a mixture, see tasks/__init__.py
    epochs: int = 1
    num_iterations: int = -1  # optimizer steps; -1: by epochs
    init_lr_frac: float = 0.8
    replay: float = 0.0


class StageData(NamedTuple):
    """A stage with its data."""

    stage: StageFlags
    steps: int
    batches: ConversationBatches


def read_stages(cfg: SFTConfig) -> list[StageFlags]:
    """The stages of a run: one from the flags, or those of the --stages file, where the flags are the defaults.

    The file: [[stage]] tables with the fields of StageFlags; `tasks` is required, a missing name is the stage's number.
    Raises UserError for what cannot be read or meant."""
    common = {f.name: getattr(cfg, f.name) for f in fields(StageFlags) if f.name != "name"}
    stages = (
        [StageFlags(**common, name="sft")]
        if not cfg.stages
        else _stages_of_file(Path(cfg.stages).expanduser(), common, given(cfg))
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


def _stages_of_file(path: Path, common: dict[str, Any], typed: Collection[str]) -> list[StageFlags]:
    """common: the defaults of the fields, from the flags. typed: the flags that were typed, of which each has to serve
    a stage.
    """
    expected = 'expected [[stage]] tables, each with tasks = "NAME:WEIGHT,..."'
    content = read_toml(path)
    tables = content.pop("stage", [])
    if content or not isinstance(tables, list) or not tables:
        raise UserError(
            f"--stages {path} has {'the field ' + next(iter(content)) if content else 'no [[stage]]'}; {expected}; fix"
            " the file"
        )
    stages: list[StageFlags] = []
    types = {f.name: type(common.get(f.name, "")) for f in fields(StageFlags)}
    for i, table in enumerate(tables, 1):
        for key, value in table.items():
            if key not in types:
                raise UserError(
                    f"--stages {path}, stage {i}: no field {key!r}; expected some of"
                    f" {', '.join(types)}{nearest(key, list(types))}"
                )
            if not isinstance(value, (int, float) if types[key] is float else types[key]) or isinstance(value, bool):
                raise UserError(
                    f"--stages {path}, stage {i}: {key} is {value!r}; expected {types[key].__name__}; fix the file"
                )
        check_bounds(SFTConfig, table, f"--stages {path}, stage {i}: ")
        if "tasks" not in table:
            raise UserError(f"--stages {path}, stage {i}: no tasks; {expected}; add them")
        stage = StageFlags(**{"name": str(i)} | common | table)
        if not stage.name or set(stage.name) & set("/ ") or stage.name in [s.name for s in stages]:
            raise UserError(
                f"--stages {path}, stage {i}: the name {stage.name!r} is taken, or has a blank or slash; expected one"
                " of its own; fix the file"
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


class BatchShape(NamedTuple):
    """Rows and tokens of one optimizer step."""

    seq_len: int  # T of the rows of conversations
    device_batch_size: int
    total_batch_size: int  # tokens, all ranks
    world_size: int
    shares: list[int]  # rows of each rank

    @property
    def rows_per_step(self) -> int:
        return self.total_batch_size // self.seq_len


def shape_of(cfg: SFTConfig, base: BaseRun, world_size: int, batch: int = -1) -> BatchShape:
    """What the flags say; where they say nothing what pretraining had, the batch rounded to whole micro-batches.

    batch: that of the run when it was started, which it keeps if --total-batch-size is not given.
    """
    longest = base.model.sequence_len
    T = cfg.max_seq_len if cfg.max_seq_len != -1 else longest
    if not 8 <= T <= longest:
        raise UserError(
            f"--max-seq-len is {T}; expected 8 to {longest}, the rows that {base.name} was trained on; try"
            f" --max-seq-len {min(max(T, 8), longest)}"
        )
    rows = cfg.device_batch_size if cfg.device_batch_size != -1 else base.plan["device_batch_size"]
    if rows < 1:
        raise UserError(f"--device-batch-size is {rows}; expected at least 1")
    total = cfg.total_batch_size if cfg.total_batch_size != -1 else batch
    if total == -1:
        total = max(-(-world_size // rows), round(base.plan["total_batch_size"] / (rows * T))) * rows * T
    return BatchShape(T, rows, total, world_size, share_rows(total, T, rows, world_size))


@dataclass(frozen=True)
class StagePlan:
    """A stage, resolved."""

    name: str
    first: int  # optimizer steps before it
    steps: int
    lr_frac: float


@dataclass(frozen=True)
class SFTPlan(FineTunePlan):
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
        """The stage's share of the inherited rates."""
        stage = self.stage_at(step)
        return self.inherited(stage.lr_frac, step - stage.first, (step - stage.first) / stage.steps)


def make_sft_plan(
    cfg: SFTConfig, base: BaseRun, shape: BatchShape, stages: Sequence[tuple[StageFlags, int]]
) -> SFTPlan:
    """stages: with the optimizer steps of each."""
    recipe, was = base.plan["recipe"], base.plan["total_batch_size"]
    law = math.sqrt(shape.total_batch_size / was) if RECIPES[recipe].laws else 1.0  # as in schedule.make_plan
    firsts = [sum(steps for _, steps in stages[:i]) for i in range(len(stages))]
    total = sum(steps for _, steps in stages)
    shortest = min(steps for _, steps in stages)
    return SFTPlan(
        model=base.model,
        num_iterations=total,
        max_seconds=None,
        total_batch_size=shape.total_batch_size,
        device_batch_size=shape.device_batch_size,
        grad_accum=-(-shape.shares[0] // shape.device_batch_size),
        world_size=shape.world_size,
        flops_per_token=train_flops_per_token(base.model),
        recipe=recipe,
        batch_scale=base.plan["batch_scale"] * law,
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
