"""Supervised fine-tuning: a base model and conversations -> a model that answers."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from nanolab.cli import UserError, to_json
from nanolab.data.conversations import ConversationBatches, Staged, check_share, held_out_rows
from nanolab.data.corpus import Data, open_data, validation_only
from nanolab.data.kept import Pinned
from nanolab.data.packing import PackedBatches
from nanolab.data.prefetch import AHEAD, Prefetch
from nanolab.data.survey import Reader, survey
from nanolab.data.tokenizer import Tokenizer
from nanolab.data.validation import validation_rows
from nanolab.evals.bpb import bits_per_byte
from nanolab.evals.chat import MEMBERS, chatcore
from nanolab.inference.calculator import calculator
from nanolab.inference.engine import Engine
from nanolab.inference.sandbox import walls
from nanolab.model.gpt import GPT
from nanolab.records.checkpoint import load_meta
from nanolab.records.models import ModelRef, find_model, read_metrics
from nanolab.records.run import Run, check_name
from nanolab.runtime import Runtime, compiled, print0
from nanolab.stages.base_run import BaseRun, begin, check_chat_tokens, check_rates, optimizer_state, task_versions
from nanolab.stages.config import SFTConfig
from nanolab.stages.forgetting import forgetting, forgetting_table
from nanolab.stages.session import Result, every_of, finished, machine, opened, print_plan
from nanolab.stages.sft_lines import conversation_lines, describe_sft
from nanolab.stages.sft_plan import SFTPlan, StageData, make_sft_plan, read_stages, shape_of
from nanolab.training.fit import Hook, fit
from nanolab.training.optim import MuonAdamW
from nanolab.training.recipes import param_groups
from nanolab.training.signals import StopRequest
from tasks import TASKS, build, mixture

# tokens held out, of conversations and of text: on a GPU, elsewhere
EVAL_TOKENS, EVAL_TOKENS_ELSEWHERE = 40 * 524288, 65536


def sft(cfg: SFTConfig, runtime: Runtime | None = None) -> Result:
    """Fine-tune a model on conversations and return what result.json holds; arguments and errors as of `pretrain`."""
    found = begin(cfg, "base")
    name = cfg.run or f"{found.name}-sft"
    with machine(cfg, name, runtime) as rt:
        print_plan(walls(cfg, cfg.chatcore_every > 0 and any(TASKS[n].runs_code for n in judged(cfg) if n in TASKS)))
        if cfg.dry_run:
            return _dry_run(cfg, rt, name, found)
        with opened(cfg, name, rt, "sft") as run:
            return finished(run) or _train(cfg, rt, run, found)


def judged(cfg: SFTConfig) -> list[str]:
    """The tasks of --chatcore-tasks."""
    return [name.strip() for name in cfg.chatcore_tasks.split(",")] if cfg.chatcore_tasks else list(MEMBERS)


def _dry_run(cfg: SFTConfig, rt: Runtime, name: str, found: ModelRef) -> Result:
    check_name(name)
    base, tokenizer = BaseRun.found(found), Tokenizer.load(found.run_dir / "tokenizer", checked=True)
    prepared = prepare(cfg, base, tokenizer, rt, Pinned.of(found.run_dir))
    return print_plan(describe_sft(cfg, name, base, prepared.parts, prepared.plan, rt), dry_run=True)


def _train(cfg: SFTConfig, rt: Runtime, run: Run, found: ModelRef | None) -> Result:
    versions: dict[str, int] = {}
    batch = -1
    if run.resume_from:
        meta, found = load_meta(run.resume_from), None
        base, versions, batch = BaseRun.of(meta), task_versions(meta), meta["plan"]["total_batch_size"]
    else:
        found = found or find_model(cfg.model, "base")
        base = BaseRun.found(found)
    model = base.open(run, found, rt)
    model.activation_checkpointing = cfg.activation_checkpointing
    tokenizer = run.pin_tokenizer(lambda: Tokenizer.load(found.run_dir / "tokenizer", checked=True))
    pinned = Pinned.of(found.run_dir) if found else run.pinned()
    parts, plan, text, versions = prepare(cfg, base, tokenizer, rt, pinned, versions, batch)
    run.identify(
        task_versions=versions,
        origin=base.facts(),
        stages=[to_json(part.stage) for part in parts],
        conversations=[part.batches.survey.fingerprint for part in parts],
    )
    if text and text.train:
        run.keep_data(text)
    elif text:
        run.identify(val_fingerprint=text.val_fingerprint)
    print_plan(describe_sft(cfg, run.name, base, parts, plan, rt))

    optimizer = MuonAdamW(param_groups(model, base.rates(cfg), plan), rt)
    if cfg.load_optimizer and found:
        optimizer.load_state_dict(optimizer_state(found))
    torch.manual_seed(cfg.seed + rt.rank)  # dropout: every rank drops others
    step_model = compiled(model, rt.device)
    staged = Staged([(part.steps * plan.rows_per_step, part.batches) for part in parts])
    batches, stop = Prefetch(staged, rt, plan.grad_accum + AHEAD), StopRequest()
    evaluator = Evaluator(cfg, parts, plan, model, step_model, tokenizer, text, rt, versions, stop)
    hooks = [
        Hook(evaluator.when(cfg.eval_every), evaluator.losses),
        Hook(evaluator.when(cfg.chatcore_every), evaluator.chatcore),
    ]
    try:
        result = fit(
            run,
            model,
            optimizer,
            batches,
            plan,
            every=every_of(cfg),
            hooks=hooks,
            stop=stop,
            step_model=step_model if step_model is not model else None,
        )
    finally:
        batches.close()
    print_plan(conversation_lines(parts, plan))
    if len(parts) > 1 and rt.is_main:
        lost = forgetting(read_metrics(run.dir), list(plan.ends()))
        print_plan(forgetting_table(lost, list(plan.ends().values())))
    return result


class Prepared(NamedTuple):
    """All that is known before the first step."""

    parts: list[StageData]
    plan: SFTPlan
    text: Data | None  # of pretraining
    versions: dict[str, int]  # of the tasks


def prepare(
    cfg: SFTConfig,
    base: BaseRun,
    tokenizer: Tokenizer,
    rt: Runtime,
    pinned: Pinned,
    versions: Mapping[str, int] = {},
    batch: int = -1,
) -> Prepared:
    """pinned: the validation text of the run, or of the model that it starts from. versions, batch: of a run that goes
    on, those that it began with.
    """
    check_rates(cfg, base)
    check_chat_tokens(base.model, tokenizer)
    stages, shape = read_stages(cfg), shape_of(cfg, base, rt.world_size, batch)
    replayed = [check_share(stage.replay) > 0 for stage in stages]
    text = replay = None
    if any(replayed) or (cfg.eval_text and cfg.eval_every > 0):
        text = open_pretraining_text(cfg, base, pinned, any(replayed))
    if any(replayed):
        replay = PackedBatches(
            text.train, tokenizer, seq_len=shape.seq_len, device_batch_size=1, rows_per_step=shape.rows_per_step
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
        by_epochs = -(-batches.rows_in(stage.epochs) // shape.rows_per_step) if stage.num_iterations < 1 else 0
        parts.append(StageData(stage, by_epochs or stage.num_iterations, batches))
    plan = make_sft_plan(cfg, base, shape, [(part.stage, part.steps) for part in parts])
    return Prepared(parts, plan, text, began)


def open_pretraining_text(cfg: SFTConfig, base: BaseRun, pinned: Pinned, replayed: bool) -> Data:
    """The corpus that the model was pretrained on; where it has gone, and is not trained on, the validation text alone
    that was kept of it.
    """
    pretraining = base.rates(cfg)
    try:
        return open_data(pretraining, pretraining.seed, pinned=pinned)
    except UserError as error:
        if pinned.splits and not replayed:
            print0(f"note: {error}; bits per byte are measured on the validation text that is kept with the run")
            return validation_only(pinned)
        raise UserError(
            f"{error}. It is asked for as the pretraining text of {base.name}; to do without it type --replay 0"
            " --no-eval-text; if it has moved, put a link where it was: ln -s NEW OLD",
            "no-pretraining-text",
            data=pretraining.data_dir or pretraining.data,
        ) from None


class Evaluator:
    """What is measured on the way, and when."""

    def __init__(
        self,
        cfg: SFTConfig,
        parts: list[StageData],
        plan: SFTPlan,
        model: GPT,
        step_model: Any,
        tokenizer: Tokenizer,
        text: Data | None,
        rt: Runtime,
        versions: Mapping[str, int],
        stop: StopRequest,
    ) -> None:
        self.cfg, self.parts, self.plan, self.model, self.step_model = cfg, parts, plan, model, step_model
        self.tokenizer, self.text, self.rt, self.versions, self.stop = tokenizer, text, rt, versions, stop
        automatic = EVAL_TOKENS if rt.device.type == "cuda" else EVAL_TOKENS_ELSEWHERE
        self.limit = cfg.eval_tokens if cfg.eval_tokens > 0 else automatic
        self.tasks: list = []  # those of ChatCORE
        # those of each stage, then of the text; made at the first evaluation, so that training starts at once
        self.rows: list = []

    def when(self, cadence: int) -> Callable[[int, bool], bool]:
        """Every so many steps, and at the end of each stage."""
        n, ends = self.plan.num_iterations, self.plan.ends()
        return lambda step, last: cadence > 0 and (step < n and step % cadence == 0 or step in ends)

    def chatcore(self, step: int) -> dict[str, float]:
        """chatcore/TASK: accuracy; chatcore/ChatCORE: the mean above chance, where the tasks belong to it."""
        cfg = self.cfg
        self.tasks = self.tasks or [build(name, "test", cfg.data) for name in judged(cfg)]
        engine = Engine(self.model, self.tokenizer, self.rt)
        return chatcore(
            engine, self.tasks, cfg.chatcore_max_cat, cfg.chatcore_max_sample, tools=calculator, stop=self.stop.asked
        )

    def losses(self, step: int) -> dict[str, float]:
        """val/loss: nats per supervised token of the stages' held-out conversations, of each stage too if there are
        several; val/bpb of text.
        """
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
