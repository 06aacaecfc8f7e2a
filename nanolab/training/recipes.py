"""How a model is trained: which optimizer takes which parameter at what rate, and how the rates move over the run.

A recipe is an entry of RECIPES. Its groups are total: every parameter is in exactly one, or the run does not start.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from nanolab.training.config import TrainingFlags


@dataclass(frozen=True)
class Recipe:
    """An optimizer's groups, and the shape of its rates. What is read of a plan is named in `param_groups`."""

    # (model, flags, plan) -> groups, some perhaps empty
    groups: Callable[[nn.Module, TrainingFlags, Any], list[dict[str, Any]]]
    lr_shape: Callable[[Any, int, float], float]  # (plan, step, progress) -> factor of every learning rate
    moves: Callable[[Any], str]  # plan -> that shape in words
    laws: (
        bool  # rates and decay are scaled by the laws of batch and horizon (schedule.py); otherwise they are the flags'
    )
    decays: bool = True


def param_groups(model: nn.Module, cfg: TrainingFlags, plan: Any) -> list[dict[str, Any]]:
    """Groups for MuonAdamW by the recipe of `plan`, learning rates final but for their shape over the run.

    Rates are read from the flags; recipe, batch_scale, weight_decay and model.n_embd from the plan. Raises ValueError
    for a parameter that is in no group, or in two.
    """
    named = dict(model.named_parameters())
    groups = [group for group in RECIPES[plan.recipe].groups(model, cfg, plan) if group["params"]]
    taken = [name for group in groups for name, _ in group["params"]]
    if wrong := [f"{name} {tuple(p.shape)}" for name, p in named.items() if taken.count(name) != 1]:
        raise ValueError(
            f"recipe {plan.recipe}: not in exactly one group: {', '.join(wrong)}; expected a rule for each; add it to"
            " training/recipes.py"
        )
    return groups


def declared_groups(model: nn.Module) -> dict[str, str]:
    """Parameter -> group, for those whose module says it: `group` for all inside it, `groups` for its own by name
    (model/variants/parts.py).
    """
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        for name, _ in module.named_parameters():
            if group := getattr(module, "group", "") or getattr(module, "groups", {}).get(name, ""):
                found[f"{path}.{name}"] = group
    return found


def dial_groups(model: nn.Module, cfg: TrainingFlags, plan: Any) -> list[dict[str, Any]]:
    """Muon for the matrices of blocks, by shape; AdamW for everything else.

    The rates of tables are scaled by sqrt(768 / width), the width at which they were tuned. A table of positions has a
    quarter of the embedding's rate, since its initial values are a quarter as large; that is untuned. A tied table
    trains like a head: it gets the head's gradient in every row at every step, and the embedding's rate is meant for
    rows that are rarely seen. Vectors (gains, biases, sinks) begin where they work already, so they move slowly and do
    not decay; their rate is untuned."""
    m, c = plan.batch_scale, math.sqrt(768 / plan.model.n_embd)
    # group: lr, betas, weight decay
    adamw = {
        "lm_head": (cfg.unembedding_lr * m * c, (0.8, 0.96), 0.01),
        "wte": (cfg.embedding_lr * m * c, (0.8, 0.995), 0.001),
        "positions": (0.25 * cfg.embedding_lr * m * c, (0.8, 0.995), 0.001),
        "value_embeds": (0.5 * cfg.embedding_lr * m * c, (0.8, 0.995), 0.01),
        "resid_lambdas": (0.01 * cfg.scalar_lr * m, (0.8, 0.95), 0.05),
        "x0_lambdas": (cfg.scalar_lr * m, (0.96, 0.95), 0.0),
        "smear_backout": (0.2, (0.8, 0.95), 0.0),
        "vectors": (0.01 * cfg.scalar_lr * m, (0.8, 0.95), 0.0),
    }
    muon = dict(kind="muon", momentum=0.95, beta2=0.9, weight_decay=plan.weight_decay, ns_steps=5)
    named, declared = dict(model.named_parameters()), declared_groups(model)
    ends = {"wte.weight": "wte", "lm_head.weight": "lm_head"}
    if "lm_head.weight" not in named:
        ends["wte.weight"] = "lm_head"
    params: dict[Any, list[tuple[str, nn.Parameter]]] = {}  # by group, or by shape
    for name, p in named.items():
        group: Any = declared.get(name) or ends.get(name)
        if not group and p.ndim < 2 and re.match(r"(h\.\d+|norm_e|norm_f|lm_head)\.", name):
            group = "vectors"
        elif not group and p.ndim == 2 and name.startswith("h."):
            group = tuple(p.shape)
        params.setdefault(group, []).append((name, p))
    groups = []
    for group, (lr, betas, decay) in adamw.items():
        rates = dict(kind="adamw", lr=lr, betas=betas, eps=1e-10, weight_decay=decay)
        groups.append(dict(name=group, params=params.get(group, []), **rates))
    for shape in sorted(group for group in params if isinstance(group, tuple)):
        lr = cfg.matrix_lr * m * math.sqrt(max(1.0, shape[0] / shape[1]))
        groups.append(dict(name=f"muon_{shape[0]}x{shape[1]}", params=params[shape], lr=lr, **muon))
    return groups


def adam_groups(model: nn.Module, cfg: TrainingFlags, plan: Any) -> list[dict[str, Any]]:
    """AdamW for all, with decay for what has two dimensions or more: matrices and tables, not gains and biases."""
    named = dict(model.named_parameters())
    rates = dict(kind="adamw", lr=cfg.learning_rate * plan.batch_scale, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps)
    return [
        dict(
            name="matrices",
            params=[(n, p) for n, p in named.items() if p.ndim >= 2],
            weight_decay=plan.weight_decay,
            **rates,
        ),
        dict(name="vectors", params=[(n, p) for n, p in named.items() if p.ndim < 2], weight_decay=0.0, **rates),
    ]


def warmup(plan: Any, step: int) -> float:
    """Linear over the first steps, above zero at the very first."""
    return min(1.0, (step + 1) / plan.warmup_steps) if plan.warmup_steps > 0 else 1.0


def trapezoid(plan: Any, step: int, progress: float) -> float:
    """Warm-up, constant, linear fall over the last `warmdown_ratio` to `final_lr_frac`."""
    return warmup(plan, step) * (plan.final_lr_frac + (1.0 - plan.final_lr_frac) * plan.warmdown_left(progress))


def cosine(plan: Any, step: int, progress: float) -> float:
    """Warm-up, then half a cosine to `final_lr_frac` (SGDR, arXiv 1608.03983).

    By the clock nobody knows which share of the run the warm-up is; there the cosine begins with the run.
    """
    before = min(1.0, plan.warmup_steps / plan.num_iterations) if plan.num_iterations else 0.0
    share = min(1.0, max(0.0, progress - before) / (1.0 - before)) if before < 1.0 else 0.0
    return warmup(plan, step) * (
        plan.final_lr_frac + (1.0 - plan.final_lr_frac) * 0.5 * (1.0 + math.cos(math.pi * share))
    )


def constant(plan: Any, step: int, progress: float) -> float:
    return 1.0


def warmup_text(plan: Any) -> str:
    return f"warm-up over {plan.warmup_steps:,} steps, " if plan.warmup_steps > 0 else ""


def trapezoid_text(plan: Any) -> str:
    fall = (
        f", then to {plan.final_lr_frac:g} over the last {plan.warmdown_ratio:.0%}" if plan.warmdown_ratio > 0 else ""
    )
    return f"{warmup_text(plan)}constant{fall}"


def cosine_text(plan: Any) -> str:
    return f"{warmup_text(plan)}half a cosine to {plan.final_lr_frac:g}"


def warmup_warning(plan: Any, spans: Sequence[tuple[int, int, float]], advice: str) -> list[str]:
    """A line where the warm-up keeps the rates well below the plan's. spans: (first step, steps, factor of the rates)
    of each part of the run.
    """
    if not plan.num_iterations or plan.warmup_steps <= 0:
        return []
    peaks = []
    for first, steps, factor in spans:
        rising = range(first, first + min(steps, plan.warmup_steps + 1))  # what follows falls
        peaks.append(
            max((plan.lr_multiplier(step, step / plan.num_iterations) for step in rising), default=0.0) / factor
        )
    longer = any(plan.warmup_steps > steps for _, steps, _ in spans)
    if not longer and min(peaks) >= 0.9:
        return []
    why = (
        f"the warm-up of {plan.warmup_steps:,} steps is longer than the run of {plan.num_iterations:,}"
        if longer
        else "the rates fall before the warm-up ends"
    )
    return [f"warning         {why}: the rates reach {min(peaks):.2f} of the plan's at most; {advice}"]


RECIPES: dict[str, Recipe] = {
    # Muon and AdamW, rates by the scaling laws
    "dial": Recipe(dial_groups, trapezoid, trapezoid_text, laws=True),
    # AdamW, arXiv 1711.05101, as GPT-2's reproductions use it
    "adamw_cosine": Recipe(adam_groups, cosine, cosine_text, laws=False),
    # Adam, arXiv 1412.6980, and nothing else: no warm-up, no decay of rates or weights
    "adam_constant": Recipe(adam_groups, constant, lambda plan: "constant", laws=False, decays=False),
}
