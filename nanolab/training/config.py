"""Flags that a plan and an optimizer's groups are made from (schedule.py, recipes.py). Imports no torch."""

from dataclasses import dataclass
from typing import Any

from nanolab.cli import (
    HORIZONS,
    Condition,
    Count,
    CountOrAuto,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveOrAuto,
    Share,
    ShareBelow1,
)
from nanolab.model.config import ModelFlags

ADAM = ("adamw_cosine", "adam_constant")
# The rates of a recipe; in fine-tuning the recipe is that of the model it starts from
READ_BY_RECIPE = [
    Condition(
        "learning_rate beta1 beta2 eps",
        "recipe",
        lambda c: c.recipe != "dial",
        "--recipe adamw_cosine or adam_constant",
    ),
    Condition(
        "embedding_lr unembedding_lr matrix_lr scalar_lr", "recipe", lambda c: c.recipe not in ADAM, "--recipe dial"
    ),
]


def has_vectors(c: Any) -> bool:
    """Whether the model has parameters at --scalar-lr: residual scalars, gains, biases, sinks."""
    return c.residual_scalars or c.norm_gain or bool(c.bias) or c.softmax == "sink" or c.qk_norm in ("layernorm", "l2")


def has_tables(c: Any) -> bool:
    """Whether the model has tables at --embedding-lr: a tied one is trained as the head."""
    return not c.tied_head or c.value_embeds or c.embedding != "token" or c.positions == "learned"


@dataclass(frozen=True)
class TrainingFlags(ModelFlags):
    """A model, how long it is trained, in which batches, by which recipe."""

    # training length: the first one given, in this order
    num_iterations: CountOrAuto = -1  # length in optimizer steps; -1: by another length
    target_flops: PositiveOrAuto = -1.0  # length in training FLOPs; -1: by another length
    # length in tokens per parameter without embeddings; -1: 12 if no length is given
    target_param_data_ratio: PositiveOrAuto = -1.0
    max_seconds: PositiveOrAuto = -1.0  # length in seconds of training, which schedules follow; -1: by another length
    # batch
    device_batch_size: Count = 32  # rows in one forward pass on one device
    total_batch_size: CountOrAuto = -1  # tokens in one optimizer step; -1: by the scaling law
    # optimization
    recipe: str = "dial"  # dial (Muon and AdamW, rates by the scaling laws) | adamw_cosine | adam_constant
    embedding_lr: NonNegativeFloat = 0.3  # learning rate of embedding tables, of dial
    unembedding_lr: NonNegativeFloat = 0.008  # learning rate of the head, of dial
    matrix_lr: NonNegativeFloat = 0.02  # learning rate of matrices (Muon), of dial
    scalar_lr: NonNegativeFloat = 0.5  # learning rate of residual scalars, gains, biases and sinks, of dial
    # dial: Muon's at the reference point, scaled by the laws; adamw_cosine: of tensors with two dimensions
    weight_decay: NonNegativeFloat = 0.28
    # multiplies every learning rate; -1: for dial sqrt(batch / 2^19), the batch law (small batches do better with
    # 0.5 to 1), else 1
    lr_scale: PositiveOrAuto = -1.0
    learning_rate: NonNegativeFloat = 6e-4  # learning rate of adamw_cosine and adam_constant
    beta1: ShareBelow1 = 0.9  # decay of Adam's mean, of adamw_cosine and adam_constant
    beta2: ShareBelow1 = 0.95  # decay of Adam's mean of squares, of adamw_cosine and adam_constant
    eps: PositiveFloat = 1e-8  # added to the root in Adam's denominator, of adamw_cosine and adam_constant
    grad_clip: PositiveOrAuto = -1.0  # largest L2 norm of all gradients together; -1: off
    warmup_steps: NonNegativeInt = 40  # steps over which the rates rise at the start
    warmdown_ratio: Share = 0.65  # share of the run, at its end, over which the rates of dial fall
    final_lr_frac: Share = 0.05  # share of the peak rates that is left at the end

    CONDITIONS = [
        *READ_BY_RECIPE,
        Condition("embedding_lr", "tied_head", has_tables, "--no-tied-head, --value-embeds or --positions learned"),
        Condition("scalar_lr", "residual_scalars", has_vectors, "--residual-scalars or another part with vectors"),
        Condition("warmdown_ratio", "recipe", lambda c: c.recipe not in ADAM, "--recipe dial"),
        Condition(
            "weight_decay warmup_steps final_lr_frac",
            "recipe",
            lambda c: c.recipe != "adam_constant",
            "--recipe dial or adamw_cosine",
        ),
        Condition(
            "final_lr_frac",
            "warmdown_ratio",
            lambda c: c.recipe != "dial" or c.warmdown_ratio > 0,
            "--warmdown-ratio above 0",
        ),
        *(
            Condition(" ".join(HORIZONS[i:]), by, lambda c, by=by: getattr(c, by) <= 0, "one training length")
            for i, by in enumerate(HORIZONS[:-1], 1)
        ),
    ]
