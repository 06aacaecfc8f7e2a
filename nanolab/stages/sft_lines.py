"""What a fine-tuning run is about to do, and what becomes of its conversations, in lines for the terminal."""

from collections.abc import Sequence

from nanolab.data.shares import batch_text
from nanolab.records.console import clock
from nanolab.records.environment import attention_line
from nanolab.runtime import Runtime
from nanolab.stages.base_run import BaseRun
from nanolab.stages.config import SFTConfig
from nanolab.stages.sft_plan import SFTPlan, StageData
from nanolab.training.recipes import RECIPES, trapezoid_text, warmup_warning

FEW_STEPS, ENOUGH_STEPS = 10, 20  # below the first a plan warns, and says which epochs make the second


def conversation_lines(parts: Sequence[StageData], plan: SFTPlan) -> list[str]:
    """What becomes of the conversations, two lines per stage, and one for each thing that their files say of it."""
    lines = []
    for stage, steps, batches in parts:
        about = batches.survey
        left_out = (
            f"{about.n_dropped:,} left out (longer than a"
            f" row{'' if batches.reader.long == 'drop' else ', no whole turn fits'})"
        )
        lines.append(
            f"{stage.name:<15} {about.n_kept:,} conversations of {stage.tasks}: {about.n_tokens:,} tokens,"
            f" {about.n_supervised / about.n_tokens:.0%} of them trained on; {about.n_cropped:,} cropped after a whole"
            f" turn, {left_out}; the longest had {about.longest:,} tokens"
        )
        if about.n_masked:
            silent = f"; {about.n_silent:,} conversations left out, no turn of theirs is" if about.n_silent else ""
            lines.append(
                f"{'':<15} {about.n_masked:,} of {about.n_turns:,} assistant turns are not trained on, as the file"
                f" says{silent}"
            )
        if about.n_disobeyed:
            lines.append(
                f"{'':<15} {about.n_disobeyed:,} turns of users and system are marked to be trained on, which only"
                " assistant turns are"
            )
        text = f", {stage.replay:.0%} of all rows are text" if stage.replay else ""
        lines.append(
            f"{'':<15} an epoch is {batches.conversation_rows(1):,} rows of {batches.T} tokens"
            f" ({batches.padding(1):.1%} padding){text}; {steps:,} steps are"
            f" {batches.epochs_in(steps * plan.rows_per_step):.2f} epochs"
        )
    return lines


def few_steps(cfg: SFTConfig, parts: Sequence[StageData], plan: SFTPlan) -> list[str]:
    """A line for each stage whose epochs make so few steps that little is learned."""
    lines = []
    for stage, steps, batches in parts:
        if stage.num_iterations > 0 or steps >= FEW_STEPS:
            continue
        rows, flag = batches.rows_in(1), "--epochs" if not cfg.stages else f"epochs of stage {stage.name}:"
        epochs = -(-ENOUGH_STEPS * plan.rows_per_step // rows)
        lines.append(
            f"warning         only {steps} {'step' if steps == 1 else 'steps'}: an epoch of {batches.survey.n_kept:,}"
            f" conversations fills {rows:,} rows, and a step takes {plan.rows_per_step:,}; {flag} {epochs} would make"
            f" {-(-batches.rows_in(epochs) // plan.rows_per_step)} steps"
        )
    return lines


def describe_sft(
    cfg: SFTConfig, name: str, base: BaseRun, parts: Sequence[StageData], plan: SFTPlan, rt: Runtime
) -> list[str]:
    """What the run is about to do, one aligned line per fact."""
    m, rates = plan.model, base.rates(cfg)
    fracs = ", ".join(f"{stage.lr_frac:g}" for stage in plan.stages)
    law = (
        f"learning rates of pretraining (x {plan.batch_scale:.4f})"
        if RECIPES[plan.recipe].laws
        else f"learning rate {rates.learning_rate * plan.batch_scale:g}"
    )
    begins = f"optimizer's state of {base.name}" if cfg.load_optimizer else "fresh optimizer"
    clip = f", gradients clipped at {plan.grad_clip:g}" if plan.grad_clip > 0 else ""
    seconds = plan.tokens / base.tokens_per_second if base.tokens_per_second else None
    return [
        (
            f"run             {name}: {base.name}, depth {m.n_layer}, width {m.n_embd}, {m.n_head} heads, trained on"
            f" rows of {m.sequence_len}"
        ),
        f"device          {plan.world_size} x {rt.device_name}, {rt.dtype_name}",
        attention_line(m, rt.dtype, rt.device.type),
        *conversation_lines(parts, plan),
        *dict.fromkeys(f"{'':<15} {note}" for part in parts for note in part.batches.reader.conversations.notes),
        f"horizon         {plan.num_iterations:,} steps = {plan.tokens:,} tokens",
        f"batch           {batch_text(plan.total_batch_size, plan.seq_len, plan.device_batch_size, plan.world_size)}",
        f"rates           {plan.recipe}: {law} x {fracs}, {trapezoid_text(plan)}; {begins}{clip}",
        *warmup_warning(
            plan, [(stage.first, stage.steps, stage.lr_frac) for stage in plan.stages], "try a smaller --warmup-ratio"
        ),
        *few_steps(cfg, parts, plan),
        (
            "expected time  "
            f" {f'about {clock(seconds).strip()} at the speed of pretraining' if seconds else 'unknown'}, evaluations"
            " not counted"
        ),
    ]
