"""Pretrain a base model: python -m scripts.base_train --depth 4 --run NAME (see --help for every flag)."""

import os

from nanolab.cli import UserError, main, parse
from nanolab.evals.config import check_max_per_task
from nanolab.model.config import chosen
from nanolab.training.config import BaseTrainConfig

TYPICAL_UTILISATION = {"cuda": 0.45, "cpu": 0.35}  # share of the matrix-multiply peak that a whole step reaches


def run(cfg: BaseTrainConfig) -> int:
    from nanolab import runtime
    from nanolab.records.models import recorded

    check_max_per_task(cfg.core_metric_max_per_task, "--core-metric-max-per-task")
    if cfg.dry_run:
        return dry_run(cfg)
    before = recorded(run_name(cfg)) if cfg.resume else {}
    dtype = "" if os.environ.get("NANOLAB_DTYPE") else before.get("dtype", "")
    rt = runtime.start(
        cfg.device_type or before.get("device", ""),
        dtype,
        cfg.seed,
        cfg.threads or before.get("threads", 0),
        cfg.deterministic,
    )
    try:
        return train(cfg, rt)
    finally:
        rt.close()


def train(cfg: BaseTrainConfig, rt) -> int:
    import torch

    from nanolab.data.corpus import open_data
    from nanolab.data.loader import AHEAD, Prefetch
    from nanolab.data.packing import PackedBatches, validation_rows
    from nanolab.data.tokenizer import Tokenizer
    from nanolab.evals.bpb import bits_per_byte
    from nanolab.evals.core import metrics
    from nanolab.evals.likelihood import GPTReader
    from nanolab.evals.samples import print_samples
    from nanolab.model.accounting import peak_bytes
    from nanolab.model.fp8 import convert, full_precision
    from nanolab.model.gpt import GPT
    from nanolab.records.run import Run
    from nanolab.runtime import base_dir, compiled, print0
    from nanolab.training.loop import Every, fit
    from nanolab.training.optim import MuonAdamW
    from nanolab.training.recipes import param_groups
    from nanolab.training.schedule import make_plan
    from nanolab.training.signals import StopRequest

    record = Run.start(run_name(cfg), cfg, rt, resume=cfg.resume, env={"attn_kernel": kernels(cfg, rt)})
    if record.finished:
        print0(f"run {record.name} is finished already: {record.dir / 'result.json'}; nothing to do")
        record.close()
        return 0
    tokenizer = record.pin_tokenizer(lambda: Tokenizer.load(cfg.tokenizer or base_dir() / "tokenizer"))
    plan = make_plan(cfg, tokenizer.vocab_size, rt.world_size, tokenizer.bos)
    data = open_data(cfg, cfg.seed, pinned=record.pinned())
    core = open_core(cfg, tokenizer, rt) if cfg.core_metric_every > 0 else None
    record.keep_data(data)
    for line in describe(cfg, plan, rt.device.type, rt.device_name, rt.dtype_name):
        print0(line)
    for label, facts in data.describe(tokenizer, plan.tokens):
        print0(f"{label:<16}{facts}")

    with torch.device(rt.device):
        model = GPT(plan.model, rt.dtype, cfg.attn_kernel)
    model.init_weights(cfg.seed)
    model.activation_checkpointing = cfg.activation_checkpointing
    if cfg.fp8:
        print0(f"fp8             {convert(model)} linear layers multiply in 8-bit floats, in training")
    optimizer = MuonAdamW(param_groups(model, cfg, plan), rt)
    torch.manual_seed(cfg.seed + rt.rank)  # dropout: every rank drops others
    step_model = compiled(model, rt.device)
    batches = Prefetch(
        PackedBatches(
            data.train,
            tokenizer,
            seq_len=cfg.max_seq_len,
            device_batch_size=cfg.device_batch_size,
            rows_per_step=plan.rows_per_step,
            rank=rt.rank,
            world_size=rt.world_size,
        ),
        rt,
        plan.grad_accum + AHEAD,
    )
    rows, stop = [], StopRequest()

    def evaluate() -> dict[str, float]:
        if not rows:  # tokenised at the first evaluation, so that training starts at once
            limit = cfg.eval_tokens if cfg.eval_tokens > 0 else 80 * 524288 if rt.device.type == "cuda" else 524288
            rows.append(validation_rows(data.val, tokenizer, cfg.max_seq_len, limit, rt)[:2])
        with full_precision(model):
            found = bits_per_byte(
                step_model,
                rows[0],
                tokenizer.token_bytes(),
                rt,
                cfg.device_batch_size,
                stop.asked,
                shared=True,
                full=step_model is not model,
            )
        return {"val/bpb": found.bpb}

    def run_benchmark(asked) -> dict | None:
        with full_precision(model):
            found = core.evaluate(GPTReader(model, rt), print0, stop=asked)
        return metrics(found) if found else None

    def draw_samples() -> None:
        with full_precision(model):
            print_samples(model, tokenizer, rt, stop.asked)

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
                eval=cfg.eval_every,
                benchmark=cfg.core_metric_every,
                sample=cfg.sample_every,
                save=cfg.save_every,
                keep=cfg.keep,
                grad_norm=cfg.log_grad_norm,
                evaluate=evaluate,
                run_benchmark=run_benchmark,
                draw_samples=draw_samples,
                planned_bytes=peak_bytes(planned_memory(cfg, plan, rt.device.type, rt.dtype_name)),
            ),
            stop,
            compiled=step_model is not model,
        )
    finally:
        batches.close()
        record.close()
    return 0


def open_core(cfg: BaseTrainConfig, tokenizer, rt):
    """The tasks of CORE. What is wrong with them is said here, before the first step."""
    from nanolab.evals.bundle import CORE, open_bundle
    from nanolab.evals.core import Core
    from nanolab.evals.published import ensure
    from nanolab.runtime import print0

    core = Core(open_bundle(ensure(cfg.eval_bundle)), tokenizer, rt, cfg.core_metric_max_per_task)
    k = sum(label in CORE for label in core.items)
    print0(
        f"CORE            {k} of {len(CORE)} tasks of {core.bundle.folder}"
        + (f"; missing: {', '.join(core.bundle.missing)}" if core.bundle.missing else "")
    )
    for label, why in core.failed.items():
        print0(f"                without {label}: {why}")
    if not k:
        raise UserError(
            f"no task of CORE in {core.bundle.folder} can be evaluated; expected at least one; name another"
            " --eval-bundle, or leave out --core-metric-every"
        )
    return core


def run_name(cfg: BaseTrainConfig) -> str:
    return cfg.run or (f"d{cfg.depth}" if cfg.preset == "nanolab" else cfg.preset)


def kernels(cfg: BaseTrainConfig, rt) -> str:
    """The attention kernels that the model will use. Mistakes in the architecture are found here, before anything is
    written.
    """
    import torch

    from nanolab.model.gpt import GPT
    from nanolab.records.environment import kernel_text
    from nanolab.training.schedule import gpt_config

    with torch.device("meta"):
        return kernel_text(
            GPT(gpt_config(cfg, vocab_size=64, bos=0), rt.dtype, cfg.attn_kernel).kernel_names(rt.device.type)
        )


def dry_run(cfg: BaseTrainConfig) -> int:
    """Print the plan for this machine, or for the one named by --plan-for, and stop. Needs no data and no tokenizer."""
    import torch

    from nanolab import runtime
    from nanolab.data.corpus import parse_mixture
    from nanolab.data.formats import find_files
    from nanolab.data.tokenizer import SPECIAL_TOKENS, Tokenizer
    from nanolab.model.fp8 import convert
    from nanolab.model.gpt import GPT
    from nanolab.records.run import check_name
    from nanolab.training.schedule import make_plan

    check_name(run_name(cfg))
    count, _, device = cfg.plan_for.partition("x")
    if cfg.plan_for and not (count.isdigit() and int(count) and device):
        raise UserError(f"--plan-for {cfg.plan_for!r} is not COUNTxDEVICE; try --plan-for 8xH100")
    path = cfg.tokenizer or runtime.base_dir() / "tokenizer"
    found = os.path.exists(path)
    tokenizer = Tokenizer.load(path) if found else None
    vocab_size, bos = (tokenizer.vocab_size, tokenizer.bos) if tokenizer else (32768, 32768 - len(SPECIAL_TOKENS))
    if cfg.plan_for:
        ranks, kind, name, dtype = int(count), "cuda", device, "bfloat16"
    else:
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        kind = runtime.device_kind(cfg.device_type, ranks)
        name = torch.cuda.get_device_name() if kind == "cuda" else runtime.cpu_name()
        dtype = os.environ.get("NANOLAB_DTYPE") or runtime.choose_dtype(torch.device(kind))
        runtime.check_dtype(dtype, kind)
    plan = make_plan(cfg, vocab_size, ranks, bos)
    with torch.device(
        "meta"
    ):  # what the real run refuses is refused here, as far as it can be told without the data and the other machine
        model = GPT(plan.model, runtime.DTYPES[dtype], cfg.attn_kernel)
    if cfg.fp8:
        convert(model)
    if not cfg.plan_for:
        model.kernel_names(kind)
        if not cfg.data_dir:
            parse_mixture(cfg.data)
        for text in filter(None, (cfg.data_dir, cfg.val_data)):
            find_files(text)
    for line in describe(cfg, plan, kind, name, dtype):
        runtime.print0(line)
    runtime.print0(f"tokenizer       {path if found else f'none yet: vocabulary of {vocab_size} assumed'}")
    runtime.print0("dry run: nothing was trained")
    return 0


def describe(cfg: BaseTrainConfig, plan, kind: str, device_name: str, dtype: str) -> list[str]:
    """What the run is about to do, one aligned line per fact."""
    from nanolab.data.packing import batch_text, share_rows
    from nanolab.model.accounting import n_params, peak_bytes
    from nanolab.records.environment import attention_line
    from nanolab.runtime import DTYPES, cpu_gflops, device_peaks
    from nanolab.training.recipes import RECIPES, warmup_warning

    m, p = plan.model, n_params(plan.model)
    # rows of the rank that all wait for
    most = share_rows(plan.total_batch_size, m.sequence_len, plan.device_batch_size, plan.world_size)[0]
    memory = planned_memory(cfg, plan, kind, dtype)
    gib = {part: f"{n / 2**30:.2f}" for part, n in memory.items()}
    advice = "lower --device-batch-size" + " or type --activation-checkpointing" * (not cfg.activation_checkpointing)
    saved = (memory["weights"] + memory["optimizer"]) / 2**30
    peak = cpu_gflops().get(dtype, 0.0) * 1e9 if kind == "cpu" else device_peaks(device_name)[0]
    if plan.flops is None:
        horizon, time = f"{plan.max_seconds:g} s of training time", f"{plan.max_seconds:g} s"
    else:
        horizon = (
            f"{plan.num_iterations:,} steps = {plan.tokens:,} tokens ({plan.tokens / p['scaling']:.2f} per scaling"
            " parameter)"
        )
        again = 4 / 3 if cfg.activation_checkpointing else 1  # forward passes are made twice; no FLOPs of the plan
        seconds = (
            again * plan.flops / (peak * plan.rows_per_step / most * TYPICAL_UTILISATION[kind])
            if peak and kind in TYPICAL_UTILISATION
            else None
        )
        time = (
            f"about {clock(seconds)} at {TYPICAL_UTILISATION[kind]:.0%} of the device's peak"
            if seconds
            else "unknown for this device"
        )
    flops = f"{plan.flops:.3e} in all, " if plan.flops is not None else ""
    scale, decay = plan.batch_scale, f"weight decay {plan.weight_decay:.4f}"
    rate = (
        f"learning rates x {scale:.4f}"
        if RECIPES[plan.recipe].laws
        else f"learning rate {cfg.learning_rate * scale:g}, betas {cfg.beta1:g} {cfg.beta2:g}"
    )
    clip = f", gradients clipped at {plan.grad_clip:g}" if plan.grad_clip > 0 else ""
    steps = plan.num_iterations or 0
    slow = (
        warmup_warning(plan, [(0, steps, 1.0)], f"try --warmup-steps {steps // 10}")
        if RECIPES[plan.recipe].decays
        else []
    )
    return [
        (
            f"run             {run_name(cfg)}: depth {m.n_layer}, width {m.n_embd}, {m.n_head} heads, rows of"
            f" {m.sequence_len}, windows {m.window_pattern}, vocabulary {m.vocab_size}"
        ),
        f"architecture    {cfg.preset}: {', '.join(chosen(cfg)) or 'every default'}",
        f"device          {plan.world_size} x {device_name}, {dtype}",
        (
            f"attention       chosen on {device_name} itself"
            if cfg.plan_for
            else attention_line(m, DTYPES[dtype], kind, cfg.attn_kernel)
        ),
        (
            f"parameters      {p['total']:,} (tables {p['wte'] + p['wpe'] + p['value_embeds']:,}, matrices"
            f" {p['matrices']:,}, head {p['lm_head']:,}); scaling parameters {p['scaling']:,}"
        ),
        f"horizon         {horizon}",
        f"FLOPs           {flops}{plan.flops_per_token:.3e} per token",
        f"batch           {batch_text(plan.total_batch_size, m.sequence_len, plan.device_batch_size, plan.world_size)}",
        f"rates           {plan.recipe}: {rate}, {RECIPES[plan.recipe].moves(plan)}; {decay}{clip}",
        *slow,
        f"peak memory     about {peak_bytes(memory) / 2**30:.1f} GiB per rank ({advice} if that is too much)",
        (
            f"                GiB: weights {gib['weights']}, gradients {gib['gradients']}, optimizer"
            f" {gib['optimizer']}; then activations {gib['activations']}, or in the optimizer's step its"
            f" stacks{' and messages' * (plan.world_size > 1)} {gib['step']}"
        ),
        (
            f"checkpoints     written beside the next steps, from a copy in the host's memory: {saved:.2f} GiB on rank"
            " 0, beside that"
        ),
        f"expected time   {time}",
    ]


def planned_memory(cfg: BaseTrainConfig, plan, kind: str, dtype: str) -> dict[str, int]:
    """Bytes of the rank with the most rows, by part; see accounting.train_memory."""
    import torch

    from nanolab.data.packing import share_rows
    from nanolab.model.accounting import train_memory
    from nanolab.model.gpt import GPT
    from nanolab.runtime import DTYPES, Runtime
    from nanolab.training.optim import MuonAdamW
    from nanolab.training.recipes import param_groups

    m = plan.model
    most = share_rows(plan.total_batch_size, m.sequence_len, plan.device_batch_size, plan.world_size)[0]
    with torch.device("meta"):
        model = GPT(m, DTYPES[dtype])
    optimizer = MuonAdamW(
        param_groups(model, cfg, plan), Runtime(torch.device(kind), DTYPES[dtype], world_size=plan.world_size)
    ).memory()
    size = 4 if dtype == "float32" else 2
    return train_memory(
        m,
        min(plan.device_batch_size, most),
        size,
        kind,
        activation_checkpointing=cfg.activation_checkpointing,
        optimizer=optimizer,
    )


def clock(seconds: float) -> str:
    """Seconds as people say them: 45 s, 12 min, 3.4 h."""
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


if __name__ == "__main__":
    main(lambda: run(parse(BaseTrainConfig)))
