"""A reinforcement-learning run, resolved: its objective, its batch, its rates."""

from dataclasses import dataclass, replace

import torch

from nanolab.cli import UserError, nearest
from nanolab.inference.sampling import COLDEST, check_settings
from nanolab.model.accounting import train_flops_per_token
from nanolab.stages.base_run import BaseRun, FineTunePlan
from nanolab.stages.config import RLConfig
from nanolab.training.policy import ADVANTAGES, ALGORITHMS, NORMALISERS, Objective


@dataclass(frozen=True)
class RLPlan(FineTunePlan):
    """A run, resolved. total_batch_size is what a step's replies may have at most; what they have is counted in
    `Work`.
    """

    lr_frac: float

    def lr_multiplier(self, step: int, progress: float) -> float:
        """--init-lr-frac of the inherited rates."""
        return self.inherited(self.lr_frac, step, progress)


LEAST = {
    "examples_per_step": 1,
    "num_samples": 2,
    "device_batch_size": 1,
    "max_new_tokens": 1,
    "updates_per_batch": 1,
    "num_epochs": 1,
    "rollout_batch_size": 0,
}


def make_rl_plan(cfg: RLConfig, base: BaseRun, prompts: int, world_size: int) -> RLPlan:
    """prompts: in one epoch. Raises UserError for numbers that do not fit together."""
    P, G, B = cfg.examples_per_step, cfg.num_samples, cfg.device_batch_size
    for name, least in LEAST.items():
        if getattr(cfg, name) < least:
            why = ": an advantage is how a reply compares with the others" if name == "num_samples" else ""
            raise UserError(f"--{name.replace('_', '-')} is {getattr(cfg, name)}; expected at least {least}{why}")
    check_settings(cfg.temperature, cfg.top_k, 1.0)
    if cfg.temperature < COLDEST:
        raise UserError(
            f"--temperature is {cfg.temperature:g}: all replies to a prompt would be the same; expected above 0; try"
            " --temperature 1"
        )
    if P < world_size:
        fitting = next(n for n in range(world_size, world_size + B) if n * G % B == 0)
        raise UserError(
            f"{world_size} ranks cannot share {P} prompts of a rollout; expected at least a prompt for each; try"
            f" --examples-per-step {fitting}",
            "fewer-prompts-than-ranks",
            prompts=P,
            ranks=world_size,
        )
    if P * G % B:  # a batch that one rank takes, any number takes
        mine = P * G if P % world_size else P * G // world_size
        fitting = max(n for n in range(1, B) if mine % n == 0)
        shape = f"{P} prompts x {G} samples" + (f" / {world_size} ranks" if mine != P * G else "")
        raise UserError(
            f"{mine} replies ({shape}) are not a multiple of the {B} that --device-batch-size takes at once; try"
            f" --device-batch-size {fitting}",
            "batch-not-a-multiple",
            replies=P * G,
            unit=B,
        )
    steps = max(1, prompts * cfg.num_epochs // P) * cfg.updates_per_batch
    return RLPlan(
        model=base.model,
        num_iterations=cfg.num_iterations if cfg.num_iterations > 0 else steps,
        max_seconds=None,
        total_batch_size=P * G * cfg.max_new_tokens,
        device_batch_size=B,
        grad_accum=micro_batches(cfg, world_size),
        world_size=world_size,
        flops_per_token=train_flops_per_token(base.model),
        recipe=base.plan["recipe"],
        batch_scale=base.plan["batch_scale"],
        weight_decay=cfg.weight_decay,
        warmup_steps=cfg.warmup_steps,
        warmdown_ratio=cfg.warmdown_ratio,
        final_lr_frac=cfg.final_lr_frac,
        grad_clip=cfg.grad_clip,
        lr_frac=cfg.init_lr_frac,
    )


def micro_batches(cfg: RLConfig, world_size: int) -> int:
    """Of each rank in a step: as many as the one with most prompts needs; the last ones of the others may be smaller,
    or empty.
    """
    return -(-(-(-cfg.examples_per_step // world_size) * cfg.num_samples) // cfg.device_batch_size)


def objective_of(cfg: RLConfig) -> Objective:
    """The algorithm that `cfg` names, with the choices it makes on single axes. Raises UserError, naming what is
    close.
    """
    _known("algorithm", cfg.algorithm, ALGORITHMS)
    row = ALGORITHMS[cfg.algorithm]
    names = {"advantage": cfg.advantage, "normaliser": cfg.normaliser}
    numbers = {"clip_low": cfg.clip_low, "clip_high": cfg.clip_high, "kl": cfg.kl}
    chosen = replace(row, **{k: v for k, v in names.items() if v}, **{k: v for k, v in numbers.items() if v != -1})
    _known("advantage", chosen.advantage, ADVANTAGES)
    _known("normaliser", chosen.normaliser, NORMALISERS)
    if not 0 <= chosen.clip_low < 1:
        raise UserError(
            f"--clip-low is {chosen.clip_low:g}; expected at least 0 (off) and below 1: ratios end at 1 - clip-low; try"
            " --clip-low 0.2"
        )
    for name in ("clip_high", "kl"):
        if not 0 <= getattr(chosen, name) < torch.inf:
            flag = name.replace("_", "-")
            raise UserError(
                f"--{flag} is {getattr(chosen, name):g}; expected 0 (off) or more; try --{flag}"
                f" {getattr(ALGORITHMS['grpo'], name):g}"
            )
    return chosen


def _known(flag: str, name: str, table: dict) -> None:
    if name not in table:
        raise UserError(
            f"{flag} {name!r} is unknown; expected one of"
            f" {', '.join(table)}{nearest(name, list(table), prefix=f'--{flag} ')}"
        )
