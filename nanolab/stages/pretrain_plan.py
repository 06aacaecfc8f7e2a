"""What a pretraining run is about to do, in lines for the terminal; --dry-run prints them for any machine."""

import os

import torch

from nanolab import runtime
from nanolab.cli import UserError
from nanolab.data.corpus import corpora_of
from nanolab.data.formats import find_files
from nanolab.data.shares import batch_text, share_rows
from nanolab.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from nanolab.model.accounting import n_params, peak_bytes, train_memory
from nanolab.model.config import chosen
from nanolab.model.fp8 import convert
from nanolab.model.gpt import GPT
from nanolab.records.console import clock
from nanolab.records.environment import attention_line
from nanolab.records.run import check_name
from nanolab.runtime import DTYPES, Runtime, cpu_gflops, device_peaks
from nanolab.stages.config import BaseTrainConfig
from nanolab.stages.session import Result, print_plan
from nanolab.training.optim import MuonAdamW
from nanolab.training.recipes import RECIPES, param_groups, warmup_warning
from nanolab.training.schedule import Plan, make_plan

TYPICAL_UTILISATION = {"cuda": 0.45, "cpu": 0.35}  # share of the matrix-multiply peak that a whole step reaches


def run_name(cfg: BaseTrainConfig) -> str:
    return cfg.run or (f"d{cfg.depth}" if cfg.preset == "nanolab" else cfg.preset)


def dry_run(cfg: BaseTrainConfig) -> Result:
    """Print the plan for this machine, or for the one named by --plan-for. Needs no data and no tokenizer."""
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
    # what the real run refuses is refused here, as far as it can be told without the data and the other machine
    with torch.device("meta"):
        model = GPT(plan.model, DTYPES[dtype], cfg.attn_kernel)
    if cfg.fp8:
        convert(model)
    if not cfg.plan_for:
        model.kernel_names(kind)
        if not cfg.data_dir:
            corpora_of(cfg.data)
        for text in filter(None, (cfg.data_dir, cfg.val_data)):
            find_files(text)
    of_tokenizer = f"tokenizer       {path if found else f'none yet: vocabulary of {vocab_size} assumed'}"
    memory = planned_memory(cfg, plan, kind, dtype)
    return print_plan([*describe(cfg, plan, memory, kind, name, dtype), of_tokenizer], dry_run=True)


def describe(
    cfg: BaseTrainConfig, plan: Plan, memory: dict[str, int], kind: str, device_name: str, dtype: str
) -> list[str]:
    """What the run is about to do, one aligned line per fact. memory: of `planned_memory`."""
    m, p = plan.model, n_params(plan.model)
    flops = f"{plan.flops:.3e} in all, " if plan.flops is not None else ""
    if plan.num_iterations is None:
        length = f"{plan.max_seconds:g} s of training time"
    else:
        length = (
            f"{plan.num_iterations:,} steps = {plan.tokens:,} tokens ({plan.tokens / p['scaling']:.2f} per scaling"
            " parameter)"
        )
    return [
        (
            f"run             {run_name(cfg)}: depth {m.n_layer}, width {m.n_embd}, {m.n_head} heads, rows of"
            f" {m.sequence_len}, windows {m.window_pattern}, vocabulary {m.vocab_size}"
        ),
        f"architecture    {cfg.preset}: {', '.join(chosen(m)) or 'every default'}",
        f"device          {plan.world_size} x {device_name}, {dtype}",
        (
            f"attention       chosen on {device_name} itself"
            if cfg.plan_for
            else attention_line(m, DTYPES[dtype], kind, cfg.attn_kernel)
        ),
        (
            f"parameters      {p['total']:,} (tables {p['wte'] + p['wpe'] + p['tables']:,}, matrices"
            f" {p['matrices']:,}, head {p['lm_head']:,}); scaling parameters {p['scaling']:,}"
        ),
        f"horizon         {length}",
        f"FLOPs           {flops}{plan.flops_per_token:.3e} per token",
        f"batch           {batch_text(plan.total_batch_size, m.sequence_len, plan.device_batch_size, plan.world_size)}",
        *rates_lines(cfg, plan),
        *([f"probes          {cfg.probes}: measured once, of the finished model"] if cfg.probes else []),
        *memory_lines(memory, cfg.activation_checkpointing, plan.world_size),
        f"expected time   {expected_time(plan, kind, device_name, dtype, cfg.activation_checkpointing)[1]}",
    ]


def rates_lines(cfg: BaseTrainConfig, plan: Plan) -> list[str]:
    recipe, scale, steps = RECIPES[plan.recipe], plan.batch_scale, plan.num_iterations or 0
    rate = (
        f"learning rates x {scale:.4f}"
        if recipe.laws
        else f"learning rate {cfg.learning_rate * scale:g}, betas {cfg.beta1:g} {cfg.beta2:g}"
    )
    clip = f", gradients clipped at {plan.grad_clip:g}" if plan.grad_clip > 0 else ""
    slow = warmup_warning(plan, [(0, steps, 1.0)], f"try --warmup-steps {steps // 10}") if recipe.decays else []
    return [
        (f"rates           {plan.recipe}: {rate}, {recipe.moves(plan)}; weight decay {plan.weight_decay:.4f}{clip}"),
        *slow,
    ]


def memory_lines(memory: dict[str, int], activation_checkpointing: bool, ranks: int) -> list[str]:
    gib = {part: f"{n / 2**30:.2f}" for part, n in memory.items()}
    advice = "lower --device-batch-size" + " or type --activation-checkpointing" * (not activation_checkpointing)
    saved = (memory["weights"] + memory["optimizer"]) / 2**30
    return [
        f"peak memory     about {peak_bytes(memory) / 2**30:.1f} GiB per rank ({advice} if that is too much)",
        (
            f"                GiB: weights {gib['weights']}, gradients {gib['gradients']}, optimizer"
            f" {gib['optimizer']}; then activations {gib['activations']}, or in the optimizer's step its"
            f" stacks{' and messages' * (ranks > 1)} {gib['step']}"
        ),
        (
            f"checkpoints     written beside the next steps, from a copy in the host's memory: {saved:.2f} GiB on rank"
            " 0, beside that"
        ),
    ]


def expected_time(plan: Plan, kind: str, device_name: str, dtype: str, recomputes: bool) -> tuple[float | None, str]:
    """(seconds, None where the device's peak is not known; how the plan says it)."""
    if plan.flops is None:
        return plan.max_seconds, f"{plan.max_seconds:g} s"
    peak = cpu_gflops().get(dtype, 0.0) * 1e9 if kind == "cpu" else device_peaks(device_name)[0]
    if not peak or kind not in TYPICAL_UTILISATION:
        return None, "unknown for this device"
    again = 4 / 3 if recomputes else 1  # forward passes are made twice; no FLOPs of the plan
    seconds = again * plan.flops / (peak * plan.rows_per_step / most_rows(plan) * TYPICAL_UTILISATION[kind])
    return seconds, f"about {clock(seconds).strip()} at {TYPICAL_UTILISATION[kind]:.0%} of the device's peak"


def most_rows(plan: Plan) -> int:
    """Rows per step of the rank with the most, for which all others wait."""
    return share_rows(plan.total_batch_size, plan.model.sequence_len, plan.device_batch_size, plan.world_size)[0]


def planned_memory(cfg: BaseTrainConfig, plan: Plan, kind: str, dtype: str) -> dict[str, int]:
    """Bytes of the rank with the most rows, by part; see accounting.train_memory."""
    with torch.device("meta"):
        model = GPT(plan.model, DTYPES[dtype])
    machine = Runtime(torch.device(kind), DTYPES[dtype], world_size=plan.world_size)
    return train_memory(
        plan.model,
        min(plan.device_batch_size, most_rows(plan)),
        4 if dtype == "float32" else 2,
        kind,
        activation_checkpointing=cfg.activation_checkpointing,
        optimizer=MuonAdamW(param_groups(model, cfg, plan), machine).memory(),
    )
