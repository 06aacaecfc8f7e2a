"""The model that fine-tuning starts from: its run, its rates, its weights.

Learning rates are the pretraining run's own, with its batch law in them, times --init-lr-frac; the batch law also
covers a batch of another size. Matrices do not decay in SFT, as in nanochat's recipe. The model keeps its context
length, whatever the rows of conversations: windows of attention are shares of it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nanolab.cli import UserError, check_given, from_json
from nanolab.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from nanolab.model.config import GPTConfig
from nanolab.model.gpt import GPT
from nanolab.records import checkpoint
from nanolab.records.models import ModelRef, find_model, load_model, recorded
from nanolab.records.run import Run
from nanolab.runtime import Runtime
from nanolab.stages.config import BaseTrainConfig, FineTuneFlags
from nanolab.training.config import READ_BY_RECIPE
from nanolab.training.recipes import warmup
from nanolab.training.schedule import Plan

RATES = ("embedding_lr", "unembedding_lr", "matrix_lr", "learning_rate")  # flags of which -1 means: as in pretraining
PEAK_MOMENTUM, MOMENTUM_STEPS = 0.95, 300  # Muon's, from 0.85


@dataclass(frozen=True)
class BaseRun:
    """The model that a run starts from, and how that was pretrained. JSON of it is kept in the run's checkpoints."""

    name: str  # NAME@STEP
    model: GPTConfig
    pretraining: dict[str, Any]  # flags of base_train
    plan: dict[str, Any]  # its Plan
    # at which it, or what was fine-tuned from it, was trained; None after rl, whose time is mostly for drawing replies
    tokens_per_second: float | None

    @classmethod
    def of(cls, meta: dict[str, Any], name: str = "") -> "BaseRun":
        """From the meta of a checkpoint of pretraining, or of a run that has a base run of its own.

        name: default is the recorded one, for a run that goes on without the model that it started from.
        """
        was = meta.get("origin", {"pretraining": meta["config"], "plan": meta["plan"]})
        seconds = meta["loop"]["total_training_time"]
        rate = meta["tokens"] / seconds if seconds and meta.get("kind") != "rl" else None
        model = from_json(GPTConfig, meta["model_config"])
        return cls(name or was["name"], model, was["pretraining"], was["plan"], rate)

    @classmethod
    def found(cls, model: ModelRef) -> "BaseRun":
        return cls.of(checkpoint.load_meta(model.checkpoint), f"{model.name}@{model.step}")

    def facts(self) -> dict[str, Any]:
        """What `of` reads from a checkpoint's "origin"."""
        return {"name": self.name, "pretraining": self.pretraining, "plan": self.plan}

    def rates(self, cfg: FineTuneFlags) -> BaseTrainConfig:
        """The flags that learning rates are computed from: pretraining's, and those given now."""
        given = {name: getattr(cfg, name) for name in RATES if getattr(cfg, name) >= 0}
        return replace(from_json(BaseTrainConfig, self.pretraining), **given)

    def open(self, run: Run, found: ModelRef | None, rt: Runtime) -> GPT:
        """The model on the runtime's device: with the weights of `found`, or without where `fit` loads the run's own
        checkpoint.
        """
        if found is not None:
            return load_model(found, rt)[0]
        with torch.device(rt.device):
            return GPT(self.model, rt.dtype)


def begin(cfg: FineTuneFlags, kind: str) -> ModelRef | None:
    """The model to start from; None where the run is resumed, which needs nothing of the model that it started from.
    kind: of the newest finished run, the default.
    """
    going_on = cfg.resume and not cfg.dry_run and cfg.run and recorded(cfg.run)
    return None if going_on else find_model(cfg.model, kind)


def check_rates(cfg: FineTuneFlags, base: BaseRun) -> None:
    """Raise UserError for a rate that was typed and that the recipe of the model does not read."""
    check_given(cfg, READ_BY_RECIPE, recipe=base.plan["recipe"])


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


@dataclass(frozen=True)
class FineTunePlan(Plan):
    """A plan whose rates are inherited: constant, then a linear fall over the last `warmdown_ratio`."""

    def inherited(self, lr_frac: float, step: int, progress: float) -> float:
        """`lr_frac` of the inherited rates: warm-up, constant, linear fall to `final_lr_frac`."""
        fall = self.final_lr_frac + (1.0 - self.final_lr_frac) * self.warmdown_left(progress)
        return lr_frac * warmup(self, step) * fall

    def muon_momentum(self, step: int, progress: float) -> float:
        return 0.85 + (PEAK_MOMENTUM - 0.85) * min(1.0, step / MOMENTUM_STEPS)
