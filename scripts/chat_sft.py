"""Fine-tune a model on conversations: python -m scripts.chat_sft --model NAME --tasks MIXTURE (see --help for every
flag).
"""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from nanolab.cli import UserError, main, parse, to_json
from nanolab.training.config import SFTConfig

EVAL_TOKENS = {"cuda": 40 * 524288}  # held out, of conversations and of text, by device; elsewhere:
EVAL_TOKENS_ELSEWHERE = 65536
FEW_STEPS, ENOUGH_STEPS = 10, 20  # below the first a plan warns, and says which epochs make the second


class Part(NamedTuple):
    """A stage with its data."""

    stage: Any  # finetune.Stage
    steps: int
    batches: Any  # ConversationBatches


def run(cfg: SFTConfig) -> int:
    from nanolab import runtime
    from nanolab.records.models import find_model, recorded

    # such a run needs nothing of the model that it started from
    going_on = cfg.resume and not cfg.dry_run and cfg.run and recorded(cfg.run)
    found = None if going_on else find_model(cfg.model, kind="base")
    name = cfg.run or f"{found.name}-sft"
    before = recorded(name) if cfg.resume else {}
    dtype = "" if os.environ.get("NANOLAB_DTYPE") else before.get("dtype", "")
    rt = runtime.start(
        cfg.device_type or before.get("device", ""),
        dtype,
        cfg.seed,
        cfg.threads or before.get("threads", 0),
        cfg.deterministic,
    )
    try:
        check_code(cfg)
        return dry_run(cfg, rt, name, found) if cfg.dry_run else train(cfg, rt, name, found)
    finally:
        rt.close()


def check_code(cfg: SFTConfig) -> None:
    """Say what the sandbox is like where evaluations on the way run code of the model's. Raises UserError where it does
    not hold.
    """
    from nanolab.evals.chatcore import MEMBERS
    from nanolab.inference.sandbox import walls
    from nanolab.runtime import print0
    from tasks import TASKS

    names = [name.strip() for name in cfg.chatcore_tasks.split(",")] if cfg.chatcore_tasks else MEMBERS
    for line in walls(cfg, cfg.chatcore_every > 0 and any(TASKS[name].runs_code for name in names if name in TASKS)):
        print0(line)


def dry_run(cfg: SFTConfig, rt, name: str, found) -> int:
    """Print the plan and stop."""
    from nanolab.data.kept import Pinned
    from nanolab.data.tokenizer import Tokenizer
    from nanolab.records.run import check_name
    from nanolab.runtime import print0
    from nanolab.training import finetune

    check_name(name)
    origin = finetune.Origin.found(found)
    parts, plan, _, _ = prepare(
        cfg, origin, Tokenizer.load(found.run_dir / "tokenizer", checked=True), rt, Pinned.of(found.run_dir)
    )
    for line in describe(cfg, name, origin, parts, plan, rt):
        print0(line)
    print0("dry run: nothing was trained")
    return 0


def train(cfg: SFTConfig, rt, name: str, found) -> int:
    import torch

    from nanolab.data.conversations import Staged
    from nanolab.data.kept import Pinned
    from nanolab.data.loader import AHEAD, Prefetch
    from nanolab.data.tokenizer import Tokenizer
    from nanolab.model.gpt import GPT
    from nanolab.records.checkpoint import load_meta
    from nanolab.records.models import find_model, load_model, read_metrics
    from nanolab.records.run import Run
    from nanolab.runtime import compiled, print0
    from nanolab.training import finetune
    from nanolab.training.loop import Every, fit
    from nanolab.training.optim import MuonAdamW
    from nanolab.training.recipes import param_groups
    from nanolab.training.signals import StopRequest

    record = Run.start(name, cfg, rt, resume=cfg.resume, kind="sft")
    if record.finished:
        print0(f"run {record.name} is finished already: {record.dir / 'result.json'}; nothing to do")
        record.close()
        return 0
    versions: dict[str, int] = {}
    batch = -1
    if record.resume_from:
        meta = load_meta(record.resume_from)
        origin, versions, batch = (
            finetune.Origin.of(meta),
            finetune.task_versions(meta),
            meta["plan"]["total_batch_size"],
        )
        with torch.device(rt.device):
            model = GPT(origin.model, rt.dtype)  # fit loads its weights
    else:
        found = found or find_model(cfg.model, kind="base")
        origin = finetune.Origin.found(found)
        model, _, _ = load_model(found, rt)
    model.activation_checkpointing = cfg.activation_checkpointing
    tokenizer = record.pin_tokenizer(lambda: Tokenizer.load(found.run_dir / "tokenizer", checked=True))
    pinned = record.pinned() if record.resume_from else Pinned.of(found.run_dir)
    parts, plan, text, versions = prepare(cfg, origin, tokenizer, rt, pinned, versions, batch)
    record.identify(
        task_versions=versions,
        origin=origin.facts(),
        stages=[to_json(part.stage) for part in parts],
        conversations=[part.batches.survey.fingerprint for part in parts],
    )
    if text and text.train:
        record.keep_data(text)
    elif text:
        record.identify(val_fingerprint=text.val_fingerprint)
    for line in describe(cfg, name, origin, parts, plan, rt):
        print0(line)

    optimizer = MuonAdamW(param_groups(model, origin.rates(cfg), plan), rt)
    if cfg.load_optimizer and not record.resume_from:
        optimizer.load_state_dict(finetune.optimizer_state(found))
    torch.manual_seed(cfg.seed + rt.rank)  # dropout: every rank drops others
    step_model = compiled(model, rt.device)
    batches = Prefetch(
        Staged([(part.steps * plan.rows_per_step, part.batches) for part in parts]), rt, plan.grad_accum + AHEAD
    )
    stop = StopRequest()
    judge = Judge(cfg, parts, plan, model, step_model, tokenizer, text, rt, versions, stop)
    try:
        fit(
            record,
            model,
            optimizer,
            batches,
            plan,
            lambda _, batch: step_model(batch.inputs, batch.targets, reduction="sum"),
            Every(
                log=cfg.log_every,
                eval_steps=judge.loss_steps | judge.chatcore_steps,
                save=cfg.save_every,
                keep=cfg.keep,
                grad_norm=cfg.log_grad_norm,
                evaluate=lambda: judge(batches.rows // plan.rows_per_step),
            ),
            stop,
            compiled=step_model is not model,
        )
        if rt.is_main:
            for line in counted(parts, plan):
                print0(line)
            if len(parts) > 1:
                found_lost = finetune.forgetting(read_metrics(record.dir), list(plan.ends()))
                print0(*finetune.forgetting_table(found_lost, list(plan.ends().values())), sep="\n")
    finally:
        batches.close()
        record.close()
    return 0


def prepare(cfg: SFTConfig, origin, tokenizer, rt, pinned, versions: Mapping[str, int] = {}, batch: int = -1):
    """(a Part for each stage, the plan, the pretraining text or None, the tasks' versions): all that is known before
    the first step.

    pinned: the validation text of the run, or of the model that it starts from. versions, batch: of a run that goes on,
    those that it began with."""
    from nanolab.data.conversations import ConversationBatches, Reader, check_share, survey
    from nanolab.data.packing import PackedBatches
    from nanolab.training import finetune
    from tasks import mixture

    finetune.check_rates(cfg, origin)
    finetune.check_chat_tokens(origin.model, tokenizer)
    stages, shape = finetune.stages_of(cfg), finetune.shape_of(cfg, origin, rt.world_size, batch)
    replayed = [check_share(stage.replay) > 0 for stage in stages]
    text = (
        open_text(cfg, origin, pinned, any(replayed))
        if any(replayed) or (cfg.eval_text and cfg.eval_every > 0)
        else None
    )
    replay = (
        PackedBatches(
            text.train, tokenizer, seq_len=shape.seq_len, device_batch_size=1, rows_per_step=shape.rows_per_step
        )
        if any(replayed)
        else None
    )
    parts, began = [], {}
    for stage, with_text in zip(stages, replayed):
        chats = mixture(stage.tasks, "train", cfg.data, seed=cfg.seed, versions=versions)
        began |= {task.name: task.version for task in chats.tasks}
        reader = Reader(chats, tokenizer, shape.seq_len + 1, cfg.long)
        batches = ConversationBatches(
            reader,
            survey(reader, rt),
            device_batch_size=shape.device_batch_size,
            rows_per_step=shape.rows_per_step,
            rank=rt.rank,
            world_size=rt.world_size,
            seed=cfg.seed,
            epochs=None if stage.num_iterations > 0 else stage.epochs,
            replay=replay if with_text else None,
            share=stage.replay,
        )
        steps = (
            stage.num_iterations
            if stage.num_iterations > 0
            else -(-batches.rows_in(stage.epochs) // shape.rows_per_step)
        )
        parts.append(Part(stage, steps, batches))
    return parts, finetune.make_plan(cfg, origin, shape, [(part.stage, part.steps) for part in parts]), text, began


def open_text(cfg: SFTConfig, origin, pinned, replayed: bool):
    """The corpus that the model was pretrained on; where it has gone, and is not trained on, the validation text alone
    that was kept of it.
    """
    from nanolab.data.corpus import open_data, validation_only
    from nanolab.runtime import print0

    pretraining = origin.rates(cfg)
    try:
        return open_data(pretraining, pretraining.seed, pinned=pinned)
    except UserError as error:
        if pinned.splits and not replayed:
            print0(f"note: {error}; bits per byte are measured on the validation text that is kept with the run")
            return validation_only(pinned)
        raise UserError(
            f"{error}. It is asked for as the pretraining text of {origin.name}; to do without it type --replay 0"
            " --no-eval-text; if it has moved, put a link where it was: ln -s NEW OLD",
            "no-pretraining-text",
            data=pretraining.data_dir or pretraining.data,
        ) from None


class Judge:
    """What is measured on the way, and when."""

    def __init__(
        self,
        cfg: SFTConfig,
        parts: list[Part],
        plan,
        model,
        step_model,
        tokenizer,
        text,
        rt,
        versions: Mapping[str, int],
        stop,
    ) -> None:
        self.versions, self.stop, self.step_model = versions, stop, step_model
        self.cfg, self.parts, self.plan, self.model, self.tokenizer, self.text, self.rt = (
            cfg,
            parts,
            plan,
            model,
            tokenizer,
            text,
            rt,
        )
        self.limit = cfg.eval_tokens if cfg.eval_tokens > 0 else EVAL_TOKENS.get(rt.device.type, EVAL_TOKENS_ELSEWHERE)
        self.loss_steps, self.chatcore_steps = (self.due(every) for every in (cfg.eval_every, cfg.chatcore_every))
        self.tasks: list = []  # those of ChatCORE
        # those of each stage, then of the text; made at the first evaluation, so that training starts at once
        self.rows: list = []

    def due(self, every: int) -> set[int]:
        """Every so many steps, and at the end of each stage."""
        return {*range(0, self.plan.num_iterations, every), *self.plan.ends()} if every > 0 else set()

    def __call__(self, step: int) -> dict[str, float]:
        metrics = self.losses() if step in self.loss_steps else {}
        return metrics | (self.chatcore() if step in self.chatcore_steps else {})

    def chatcore(self) -> dict[str, float]:
        """chatcore/TASK: accuracy; chatcore/ChatCORE: the mean above chance, where the tasks belong to it."""
        from nanolab.evals.chatcore import MEMBERS, chatcore
        from nanolab.inference.engine import Engine
        from nanolab.inference.tools import calculator
        from tasks import build

        cfg = self.cfg
        names = [name.strip() for name in cfg.chatcore_tasks.split(",")] if cfg.chatcore_tasks else MEMBERS
        self.tasks = self.tasks or [build(name, "test", cfg.data) for name in names]
        engine = Engine(self.model, self.tokenizer, self.rt)
        return chatcore(
            engine, self.tasks, cfg.chatcore_max_cat, cfg.chatcore_max_sample, tools=calculator, stop=self.stop.asked
        )

    def losses(self) -> dict[str, float]:
        """val/loss: nats per supervised token of the stages' held-out conversations, of each stage too if there are
        several; val/bpb of text.
        """
        import numpy as np

        from nanolab.data.conversations import Reader, held_out_rows
        from nanolab.data.packing import validation_rows
        from nanolab.evals.bpb import bits_per_byte
        from tasks import mixture

        cfg, T, size = self.cfg, self.plan.seq_len, self.plan.device_batch_size
        if not self.rows:
            for part in self.parts:
                held_out = mixture(part.stage.tasks, "test", cfg.data, seed=cfg.seed, versions=self.versions)
                self.rows.append(held_out_rows(Reader(held_out, self.tokenizer, T + 1), self.limit))
            if cfg.eval_text:
                self.rows.append(validation_rows(self.text.val, self.tokenizer, T, self.limit, self.rt)[:2])
        every_token = np.ones(self.tokenizer.vocab_size, dtype=np.int32)  # the end of a turn has no bytes, but counts
        full = self.step_model is not self.model
        sums = [
            bits_per_byte(self.step_model, rows, every_token, self.rt, size, self.stop.asked, full=full)
            for rows in self.rows[: len(self.parts)]
        ]
        metrics = {"val/loss": sum(s.nats for s in sums) / sum(s.n_tokens for s in sums)}
        if len(sums) > 1:
            metrics |= {f"val/loss/{part.stage.name}": s.nats / s.n_tokens for part, s in zip(self.parts, sums)}
        if cfg.eval_text:
            text_bytes = self.tokenizer.token_bytes()
            metrics["val/bpb"] = bits_per_byte(
                self.step_model, self.rows[-1], text_bytes, self.rt, size, self.stop.asked, shared=True, full=full
            ).bpb
        return metrics


def counted(parts: list[Part], plan) -> list[str]:
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


def few_steps(cfg: SFTConfig, parts: list[Part], plan) -> list[str]:
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


def describe(cfg: SFTConfig, name: str, origin, parts: list[Part], plan, rt) -> list[str]:
    """What the run is about to do, one aligned line per fact."""
    from nanolab.data.packing import batch_text
    from nanolab.records.console import clock
    from nanolab.records.environment import attention_line
    from nanolab.training.recipes import RECIPES, trapezoid_text, warmup_warning

    m, rates = plan.model, origin.rates(cfg)
    fracs = ", ".join(f"{stage.lr_frac:g}" for stage in plan.stages)
    law = (
        f"learning rates of pretraining (x {plan.batch_scale:.4f})"
        if RECIPES[plan.recipe].laws
        else f"learning rate {rates.learning_rate * plan.batch_scale:g}"
    )
    begins = f"optimizer's state of {origin.name}" if cfg.load_optimizer else "fresh optimizer"
    clip = f", gradients clipped at {plan.grad_clip:g}" if plan.grad_clip > 0 else ""
    seconds = plan.tokens / origin.tokens_per_second if origin.tokens_per_second else None
    return [
        (
            f"run             {name}: {origin.name}, depth {m.n_layer}, width {m.n_embd}, {m.n_head} heads, trained on"
            f" rows of {m.sequence_len}"
        ),
        f"device          {plan.world_size} x {rt.device_name}, {rt.dtype_name}",
        attention_line(m, rt.dtype, rt.device.type),
        *counted(parts, plan),
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


if __name__ == "__main__":
    main(lambda: run(parse(SFTConfig)))
