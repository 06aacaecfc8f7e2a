"""The dial: depth -> width, horizon, batch, learning rates, decay; and how rates move over a run.

Every law is stated where it is used. The reference point is the depth-12 model of the default architecture, at which
the rates were tuned."""

import math
from dataclasses import dataclass, fields, replace

from nanolab.cli import UserError, check_bounds, nearest
from nanolab.data.shares import share_rows
from nanolab.model.accounting import n_params, train_flops_per_token
from nanolab.model.config import Architecture, GPTConfig, ModelFlags
from nanolab.training.config import TrainingFlags
from nanolab.training.recipes import RECIPES

REFERENCE_DEPTH = 12
REFERENCE_BATCH = 2**19  # tokens per step that was best at the reference depth
DATA_PARAM_RATIO = 12.0  # tokens per scaling parameter at the compute optimum


@dataclass(frozen=True)
class Plan:
    """A run, resolved: what the loop follows and what is printed before the first step."""

    model: GPTConfig
    num_iterations: int | None  # None: the horizon is max_seconds
    max_seconds: float | None
    total_batch_size: int  # tokens per optimizer step, all ranks
    device_batch_size: int  # rows per forward pass and rank
    grad_accum: int  # micro-batches of each rank in a step
    world_size: int
    flops_per_token: int
    recipe: str  # an entry of RECIPES
    batch_scale: float  # multiplies every learning rate
    weight_decay: float  # at the start: of matrices (dial), of what has two dimensions or more (adamw_cosine)
    warmup_steps: int
    warmdown_ratio: float
    final_lr_frac: float
    grad_clip: float  # largest L2 norm of all gradients together; not above 0: off

    @property
    def tokens(self) -> int | None:
        """Tokens of the whole run, or None when the clock decides."""
        return self.num_iterations * self.total_batch_size if self.num_iterations is not None else None

    @property
    def flops(self) -> int | None:
        return self.tokens * self.flops_per_token if self.tokens is not None else None

    @property
    def rows_per_step(self) -> int:
        return self.total_batch_size // self.model.sequence_len

    def lr_multiplier(self, step: int, progress: float) -> float:
        """The recipe's shape: what every learning rate is multiplied by at this step."""
        return RECIPES[self.recipe].lr_shape(self, step, progress)

    def muon_momentum(self, step: int, progress: float) -> float:
        """0.85 -> 0.97 over 400 steps; 0.97 -> 0.90 over the warm-down; the lower one where a short run has both at
        once.
        """
        return min(0.85 + 0.12 * min(1.0, step / 400), 0.90 + 0.07 * self.warmdown_left(progress))

    def weight_decay_multiplier(self, step: int, progress: float) -> float:
        """Half a cosine from 1 to 0."""
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))

    def warmdown_left(self, progress: float) -> float:
        """1 before the warm-down, 0 at its end, and past it: a run by the clock overruns by a part of a step."""
        return min(1.0, max(0.0, 1.0 - progress) / self.warmdown_ratio) if self.warmdown_ratio > 0 else 1.0


def gpt_config(cfg: ModelFlags, vocab_size: int, bos: int = -1, depth: int = 0) -> GPTConfig:
    """The model of the flags at `depth` (default: theirs): width = depth * aspect_ratio, rounded up to whole heads."""
    check_bounds(ModelFlags, vars(cfg))
    depth = depth or cfg.depth
    heads = -(-depth * cfg.aspect_ratio // cfg.head_dim)
    architecture = {f.name: getattr(cfg, f.name) for f in fields(Architecture)}
    return GPTConfig(
        **architecture,
        sequence_len=cfg.max_seq_len,
        vocab_size=vocab_size,
        n_layer=depth,
        n_head=heads,
        n_embd=heads * cfg.head_dim,
        bos=bos,
    )


def make_plan(cfg: TrainingFlags, vocab_size: int, world_size: int, bos: int = -1) -> Plan:
    """Resolve everything that the flags leave open. Raises UserError for numbers that do not fit together."""
    check_bounds(TrainingFlags, vars(cfg))
    if cfg.recipe not in RECIPES:
        raise UserError(
            f"recipe {cfg.recipe!r} is unknown; expected one of"
            f" {', '.join(RECIPES)}{nearest(cfg.recipe, list(RECIPES), prefix='--recipe ')}"
        )
    model, recipe = gpt_config(cfg, vocab_size, bos), RECIPES[cfg.recipe]
    plain = replace(cfg, **{f.name: f.default for f in fields(Architecture)})
    reference = gpt_config(plain, vocab_size, depth=REFERENCE_DEPTH)  # on the same vocabulary and row
    flops = train_flops_per_token(model)

    # Horizon by the law D = ratio * N, with N = block matrices + lm_head, the count that gives the straightest scaling
    # laws; the ratio is Chinchilla's idea (arXiv 2203.15556) with a constant of this architecture's own.
    ratio = cfg.target_param_data_ratio if cfg.target_param_data_ratio > 0 else DATA_PARAM_RATIO
    law_tokens = ratio * n_params(model)["scaling"]
    reference_tokens = ratio * n_params(reference)["scaling"]

    # Batch: the critical batch grows as D^0.383 (Power Lines, arXiv 2505.13738); the nearest power of two.
    batch = cfg.total_batch_size
    if batch == -1:
        batch = 2 ** round(math.log2(REFERENCE_BATCH * (law_tokens / reference_tokens) ** 0.383))
    shares = share_rows(batch, cfg.max_seq_len, cfg.device_batch_size, world_size)

    # Learning rate: with batch noise falling as 1/B, AdamW's best rate goes as sqrt(B); for Muon this is an assumption,
    # and far below the reference batch a bad one: --lr-scale overrides it (dev/LOG.md).
    law_scale = math.sqrt(batch / REFERENCE_BATCH) if recipe.laws else 1.0
    batch_scale = cfg.lr_scale if cfg.lr_scale > 0 else law_scale

    # Weight decay: T_epoch = B / (lr * wd * D) stays constant (arXiv 2405.13698), so wd ~ B / (lr D), which is
    # sqrt(B) / D under the batch law. The paper is about AdamW; for Muon this is an assumption.
    weight_decay = cfg.weight_decay if recipe.decays else 0.0
    if recipe.laws:
        weight_decay *= (batch / REFERENCE_BATCH) / batch_scale * reference_tokens / law_tokens

    steps: int | None = None
    seconds: float | None = None
    if cfg.num_iterations > 0:
        steps = cfg.num_iterations
    elif cfg.target_flops > 0:
        steps = max(1, round(cfg.target_flops / (flops * batch)))
    elif cfg.target_param_data_ratio > 0 or cfg.max_seconds <= 0:
        steps = max(1, int(law_tokens) // batch)
    else:
        seconds = cfg.max_seconds
    return Plan(
        model=model,
        num_iterations=steps,
        max_seconds=seconds,
        total_batch_size=batch,
        device_batch_size=cfg.device_batch_size,
        grad_accum=-(-shares[0] // cfg.device_batch_size),
        world_size=world_size,
        flops_per_token=flops,
        recipe=cfg.recipe,
        batch_scale=batch_scale,
        weight_decay=weight_decay,
        warmup_steps=cfg.warmup_steps,
        warmdown_ratio=cfg.warmdown_ratio,
        final_lr_frac=cfg.final_lr_frac,
        grad_clip=cfg.grad_clip,
    )
