"""Pretraining: documents -> a base model."""

from functools import cache
from typing import Any

import torch

from nanolab.cli import check_bounds
from nanolab.data.corpus import open_data
from nanolab.data.packing import PackedBatches
from nanolab.data.prefetch import AHEAD, Prefetch
from nanolab.data.tokenizer import Tokenizer
from nanolab.data.validation import validation_rows
from nanolab.evals.bpb import bits_per_byte
from nanolab.evals.core import metrics, open_core
from nanolab.evals.likelihood import GPTReader
from nanolab.evals.probes.common import Given, measure_probes, probe_names
from nanolab.evals.samples import print_samples
from nanolab.model.accounting import peak_bytes
from nanolab.model.fp8 import convert
from nanolab.model.gpt import GPT
from nanolab.records.environment import kernel_text
from nanolab.records.run import Run
from nanolab.runtime import Runtime, Stopped, base_dir, compiled, print0
from nanolab.stages.config import BaseTrainConfig
from nanolab.stages.pretrain_plan import describe, dry_run, planned_memory, run_name
from nanolab.stages.session import Result, every_of, finished, machine, opened, print_plan
from nanolab.training.fit import Hook, at_steps, fit
from nanolab.training.optim import MuonAdamW
from nanolab.training.recipes import param_groups
from nanolab.training.schedule import gpt_config, make_plan
from nanolab.training.signals import StopRequest
from nanolab.training.trace import traced


def pretrain(cfg: BaseTrainConfig, runtime: Runtime | None = None) -> Result:
    """Train a new model and return what result.json holds.

    runtime: of a caller that has one; default: the machine that the flags name, left again at the end. Raises UserError
    for flags, data and directories that do not fit, NonFinite when training diverges, and SystemExit after a signal,
    when the step is saved.
    """
    check_bounds(type(cfg), vars(cfg))
    if cfg.dry_run:
        return dry_run(cfg)
    name = run_name(cfg)
    with machine(cfg, name, runtime) as rt, opened(cfg, name, rt, "base", attn_kernel=kernels(cfg, rt)) as run:
        return finished(run) or _train(cfg, rt, run)


def _train(cfg: BaseTrainConfig, rt: Runtime, run: Run) -> Result:
    tokenizer = run.pin_tokenizer(lambda: Tokenizer.load(cfg.tokenizer or base_dir() / "tokenizer"))
    plan = make_plan(cfg, tokenizer.vocab_size, rt.world_size, tokenizer.bos)
    data = open_data(cfg, cfg.seed, pinned=run.pinned())
    of_tasks = cfg.eval_bundle, cfg.core_metric_max_per_task
    core = open_core(tokenizer, rt, *of_tasks) if cfg.core_metric_every > 0 else None
    run.keep_data(data)
    memory = planned_memory(cfg, plan, rt.device.type, rt.dtype_name)
    print_plan(describe(cfg, plan, memory, rt.device.type, rt.device_name, rt.dtype_name))
    print_plan([f"{label:<16}{facts}" for label, facts in data.describe(tokenizer, plan.tokens)])

    with torch.device(rt.device):
        model = GPT(plan.model, rt.dtype, cfg.attn_kernel)
    model.init_weights(cfg.seed)
    model.activation_checkpointing = cfg.activation_checkpointing
    if cfg.fp8:
        print0(f"fp8             {convert(model)} linear layers multiply in 8-bit floats, in training")
    optimizer = MuonAdamW(param_groups(model, cfg, plan), rt)
    torch.manual_seed(cfg.seed + rt.rank)  # dropout: every rank drops others
    step_model = compiled(model, rt.device)
    packed = PackedBatches(
        data.train,
        tokenizer,
        seq_len=cfg.max_seq_len,
        device_batch_size=cfg.device_batch_size,
        rows_per_step=plan.rows_per_step,
        rank=rt.rank,
        world_size=rt.world_size,
    )
    batches, stop = Prefetch(packed, rt, plan.grad_accum + AHEAD), StopRequest()

    @cache  # at the first evaluation, so that training starts at once
    def rows() -> Any:
        limit = cfg.eval_tokens if cfg.eval_tokens > 0 else 80 * 524288 if rt.device.type == "cuda" else 524288
        return validation_rows(data.val, tokenizer, cfg.max_seq_len, limit, rt)[:2]

    def validation(step: int) -> dict[str, float]:
        full, sizes = step_model is not model, tokenizer.token_bytes()
        found = bits_per_byte(step_model, rows(), sizes, rt, cfg.device_batch_size, stop.asked, shared=True, full=full)
        return {"val/bpb": found.bpb}

    def benchmark(step: int) -> dict[str, Any]:
        found = core.evaluate(GPTReader(model, rt), print0, stop=stop.asked)
        if not found:
            raise Stopped
        return metrics(found)

    def probe(step: int) -> dict[str, Any]:
        given = Given(model, tokenizer, rt, data.val, cfg.probe_tokens, cfg.device_batch_size, stop.asked, *of_tasks)
        return {"probes": measure_probes(probe_names(cfg.probes), given)}

    hooks = [
        Hook(at_steps(cfg.eval_every, first=cfg.eval_first), validation),
        Hook(at_steps(cfg.core_metric_every), benchmark, saved=True),
        Hook(at_steps(cfg.sample_every), lambda step: print_samples(model, tokenizer, rt, stop.asked)),
        Hook(lambda step, last: last and bool(cfg.probes), probe),
    ]
    hooks = traced(hooks, run.dir, rt, plan.num_iterations) if cfg.profile else hooks
    try:
        return fit(
            run,
            model,
            optimizer,
            batches,
            plan,
            every=every_of(cfg),
            hooks=hooks,
            stop=stop,
            step_model=step_model if step_model is not model else None,
            planned_bytes=peak_bytes(memory),
        )
    finally:
        batches.close()


def kernels(cfg: BaseTrainConfig, rt: Runtime) -> str:
    """The attention kernels that the model will use. Mistakes in the architecture are found here, before anything is
    written.
    """
    with torch.device("meta"):
        model = GPT(gpt_config(cfg, vocab_size=64, bos=0), rt.dtype, cfg.attn_kernel)
    return kernel_text(model.kernel_names(rt.device.type))
