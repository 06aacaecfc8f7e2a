"""Improve a chat model by its own replies: python -m scripts.chat_rl --model NAME --task gsm8k (see --help for every
flag).
"""

import os

from nanolab.cli import UserError, main, nearest, parse
from nanolab.training.config import RLConfig


def run(cfg: RLConfig) -> int:
    from nanolab import runtime
    from nanolab.records.models import find_model, recorded

    found = None if cfg.resume and not cfg.dry_run and recorded(cfg.run) else find_model(cfg.model, kind="sft")
    name = cfg.run or f"{found.name}-rl"
    before = recorded(name) if cfg.resume else {}
    dtype = "" if os.environ.get("NANOLAB_DTYPE") else before.get("dtype", "")
    rt = runtime.start(
        cfg.device_type or before.get("device", ""), dtype, cfg.seed, cfg.threads or before.get("threads", 0)
    )
    try:
        return train(cfg, rt, name, found)
    finally:
        rt.close()


def train(cfg: RLConfig, rt, name: str, found) -> int:
    import torch

    from nanolab.data.tokenizer import Tokenizer
    from nanolab.inference.engine import Engine
    from nanolab.inference.sandbox import walls
    from nanolab.inference.tools import TOOLS
    from nanolab.model.gpt import GPT
    from nanolab.records.checkpoint import load_meta
    from nanolab.records.models import find_model, load_model
    from nanolab.records.run import Run, check_name
    from nanolab.runtime import print0
    from nanolab.training import finetune
    from nanolab.training.loop import Every, fit
    from nanolab.training.optim import MuonAdamW
    from nanolab.training.policy import objective_of
    from nanolab.training.recipes import param_groups
    from nanolab.training.rollout import PolicyLoss, Rollouts, fingerprint, make_plan, reward_parts
    from nanolab.training.signals import StopRequest
    from tasks import build

    objective = objective_of(cfg)
    if cfg.tool and cfg.tool not in TOOLS:
        raise UserError(
            f"--tool {cfg.tool!r} is unknown; expected one of {', '.join(TOOLS)}, or"
            f" nothing{nearest(cfg.tool, list(TOOLS), prefix='--tool ')}"
        )
    tools = TOOLS[cfg.tool] if cfg.tool else None
    task = build(cfg.task, cfg.split, cfg.data, seed=cfg.seed)
    held_out = build(cfg.task, cfg.eval_split, cfg.data, cfg.eval_examples, cfg.seed) if cfg.eval_every > 0 else None
    if held_out is not None and not len(held_out):
        raise UserError(
            f"task {cfg.task} has no example in {cfg.eval_split}; expected at least one; name another --eval-split, or"
            " type --eval-every -1"
        )
    for line in walls(cfg, cfg.tool == "python" or task.runs_code):
        print0(line)
    if cfg.dry_run:
        check_name(name)
        check_talks(found, load_meta(found.checkpoint))
        origin, first = finetune.Origin.found(found), task.example(0)
        finetune.check_rates(cfg, origin)
        reward_parts(cfg.reward, list(task.rewards(first, first.messages[-1]["content"])))
        for line in describe(cfg, name, origin, make_plan(cfg, origin, len(task), rt.world_size), objective, task, rt):
            print0(line)
        print0("dry run: nothing was trained")
        return 0

    record = Run.start(name, cfg, rt, resume=cfg.resume, kind="rl")
    if record.finished:
        print0(f"run {name} is finished already: {record.dir / 'result.json'}; nothing to do")
        record.close()
        return 0
    try:
        if record.resume_from:
            origin = finetune.Origin.of(load_meta(record.resume_from))
        else:
            found = found or find_model(cfg.model, kind="sft")
            check_talks(found, load_meta(found.checkpoint))
            origin = finetune.Origin.found(found)
        finetune.check_rates(cfg, origin)
        tokenizer = record.pin_tokenizer(lambda: Tokenizer.load(found.run_dir / "tokenizer", checked=True))
        plan = make_plan(cfg, origin, len(task), rt.world_size)
        for line in describe(cfg, name, origin, plan, objective, task, rt):
            print0(line)
        record.identify(
            origin=origin.facts(), data_fingerprint=fingerprint(task), questions=fingerprint(task, len(task))
        )
        if record.resume_from:
            with torch.device(rt.device):
                model = GPT(origin.model, rt.dtype)
        else:
            model, _, _ = load_model(found, rt)
        model.activation_checkpointing = cfg.activation_checkpointing
        reference = load_model(origin.name, rt)[0].requires_grad_(False) if objective.kl else None
        engine = Engine(model, tokenizer, rt)
        batches = Rollouts(cfg, objective, model, engine, task, rt, record.dir, tools, reference)
        stop = StopRequest()
        loss = PolicyLoss(objective, cfg.max_new_tokens, rt)
        try:
            fit(
                record,
                model,
                MuonAdamW(param_groups(model, origin.rates(cfg), plan), rt),
                batches,
                plan,
                loss,
                Every(
                    log=cfg.log_every,
                    eval=cfg.eval_every,
                    save=cfg.save_every,
                    keep=cfg.keep,
                    grad_norm=cfg.log_grad_norm,
                    evaluate=lambda: passes(cfg, engine, held_out, tools, stop.asked),
                    measure=lambda: batches.measure() | loss.measure(),
                    work=lambda: batches.work,
                ),
                stop,
            )
        finally:
            batches.close()
        for line in changes(record.dir):
            print0(line)
    finally:
        record.close()
    return 0


def check_talks(found, meta: dict) -> None:
    """Raise UserError for a model that has not learnt to answer: it would never end a turn, and no reply would earn
    anything.
    """
    if meta["kind"] == "base":
        raise UserError(
            f"{found.name} is a base model: it has never seen the tokens that mark up a conversation; expected one that"
            f" was fine-tuned on chat; first type: python -m scripts.chat_sft --model {found.name}"
        )


def passes(cfg: RLConfig, engine, task, tools, stop=lambda: False) -> dict[str, float]:
    """pass@k on the held-out examples, for k = 1, 2, 4, ... and --eval-samples; replies are drawn as for training."""
    from nanolab.evals.generative import evaluate

    result = evaluate(
        engine,
        task,
        range(len(task)),
        num_samples=cfg.eval_samples,
        max_tokens=cfg.max_new_tokens,
        temperature=cfg.temperature,
        top_k=cfg.top_k,
        seed=cfg.seed,
        tools=tools,
        batch_size=cfg.rollout_batch_size or cfg.examples_per_step * cfg.num_samples // engine.runtime.world_size,
        stop=stop,
    )
    shown = sorted({2**i for i in range(cfg.eval_samples.bit_length())} | {cfg.eval_samples})
    return {f"eval/pass@{k}": result.pass_at[k] for k in shown}


def describe(cfg: RLConfig, name: str, origin, plan, objective, task, rt) -> list[str]:
    """What the run is about to do, one aligned line per fact."""
    from nanolab.records.environment import attention_line
    from nanolab.training.policy import ALGORITHMS
    from nanolab.training.recipes import trapezoid_text, warmup_warning

    m = plan.model
    choices = f"{objective.advantage} advantages, {objective.normaliser} normaliser"
    clip = (
        f", ratios clipped at {1 - objective.clip_low:g} and {1 + objective.clip_high:g}"
        if objective.clip_low or objective.clip_high
        else ""
    )
    kl = f", divergence from {origin.name} x {objective.kl:g}" if objective.kl else ""
    mixed = "" if ALGORITHMS[cfg.algorithm] == objective else " with changes"
    updates = f", {cfg.updates_per_batch} updates on each" if cfg.updates_per_batch > 1 else ""
    slow = warmup_warning(
        plan, [(0, plan.num_iterations, plan.lr_frac)], f"try --warmup-steps {plan.num_iterations // 10}"
    )
    held = (
        f"; {cfg.eval_split}: {cfg.eval_examples} x {cfg.eval_samples} every {cfg.eval_every} steps"
        if cfg.eval_every > 0
        else ""
    )
    return [
        f"run             {name}: from {origin.name}, depth {m.n_layer}, width {m.n_embd}, rows of {m.sequence_len}",
        f"device          {rt.world_size} x {rt.device_name}, {rt.dtype_name}",
        attention_line(m, rt.dtype, rt.device.type),
        f"task            {cfg.task} {cfg.split}, {len(task):,} examples{held}",
        f"reward          {cfg.reward}",
        f"objective       {cfg.algorithm}{mixed}: {choices}{clip}{kl}",
        (
            f"rollouts        {cfg.examples_per_step} prompts x {cfg.num_samples} replies of at most"
            f" {cfg.max_new_tokens} tokens, temperature {cfg.temperature:g}, top-k {cfg.top_k}{updates}"
        ),
        f"batch           {plan.device_batch_size} replies x {plan.world_size} ranks x {plan.grad_accum} accumulation"
        + (
            f"; ranks answer {-(-cfg.examples_per_step // plan.world_size)} or"
            f" {cfg.examples_per_step // plan.world_size} prompts"
            if cfg.examples_per_step % plan.world_size
            else ""
        ),
        f"rates           {plan.recipe}: pretraining's x {plan.lr_frac:g}, {trapezoid_text(plan)}",
        *slow,
        (
            f"horizon         {plan.num_iterations:,} steps,"
            f" {plan.num_iterations / cfg.updates_per_batch * cfg.examples_per_step / len(task):.2f} epochs"
        ),
    ]


def changes(run_dir) -> list[str]:
    """The first and the last measurement of rewards and pass@k."""
    from nanolab.records.models import read_metrics

    rows, lines = read_metrics(run_dir), []
    for metric in dict.fromkeys(key for row in rows for key in row if key.startswith("eval/") or key == "rl/reward"):
        values = [(row["step"], row[metric]) for row in rows if row.get(metric) is not None]
        lines.append(
            f"{metric:16s}{values[0][1]:.4f} at step {values[0][0]} -> {values[-1][1]:.4f} at step {values[-1][0]}"
        )
    return lines


if __name__ == "__main__":
    main(lambda: run(parse(RLConfig)))
