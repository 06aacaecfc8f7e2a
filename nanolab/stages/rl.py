"""Reinforcement learning: a chat model and a task that scores replies -> a model whose replies score better."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from nanolab.cli import UserError
from nanolab.data.tokenizer import Tokenizer
from nanolab.evals.chat import evaluate_sampled
from nanolab.inference.engine import Engine
from nanolab.inference.sandbox import walls
from nanolab.inference.tools import find_tool
from nanolab.records.checkpoint import load_meta
from nanolab.records.environment import attention_line
from nanolab.records.models import ModelRef, find_model, load_model, read_metrics
from nanolab.records.run import Run, check_name
from nanolab.runtime import Runtime
from nanolab.stages.base_run import BaseRun, begin, check_rates
from nanolab.stages.config import RLConfig
from nanolab.stages.reward import reward_parts
from nanolab.stages.rl_plan import RLPlan, make_rl_plan, objective_of
from nanolab.stages.rollout import Rollouts, rollout_request
from nanolab.stages.session import Result, every_of, finished, machine, opened, print_plan
from nanolab.training.fit import Hook, at_steps, fit
from nanolab.training.optim import MuonAdamW
from nanolab.training.policy import ALGORITHMS, Objective, PolicyLoss
from nanolab.training.recipes import param_groups, trapezoid_text, warmup_warning
from nanolab.training.signals import StopRequest
from tasks import build


def rl(cfg: RLConfig, runtime: Runtime | None = None) -> Result:
    """Improve a chat model by its own replies and return what result.json holds; arguments and errors as of
    `pretrain`.
    """
    found = begin(cfg, "sft")
    name = cfg.run or f"{found.name}-rl"
    with machine(cfg, name, runtime) as rt:
        goal = open_goal(cfg)
        print_plan(walls(cfg, cfg.tool == "python" or goal.task.runs_code))
        if cfg.dry_run:
            return _dry_run(cfg, rt, name, found, goal)
        with opened(cfg, name, rt, "rl") as run:
            return finished(run) or _train(cfg, rt, run, found, goal)


class Goal(NamedTuple):
    """What the replies are to become better at."""

    objective: Objective
    tools: Callable[[str], str] | None
    task: Any
    held_out: Any  # the examples that pass@k is measured on; None without


def open_goal(cfg: RLConfig) -> Goal:
    """Raises UserError for flags that name nothing, and where there is nothing to measure pass@k on."""
    objective, tools = objective_of(cfg), find_tool(cfg.tool)
    task = build(cfg.task, cfg.split, cfg.data, seed=cfg.seed)
    held_out = build(cfg.task, cfg.eval_split, cfg.data, cfg.eval_examples, cfg.seed) if cfg.eval_every > 0 else None
    if held_out is not None and not len(held_out):
        raise UserError(
            f"task {cfg.task} has no example in {cfg.eval_split}; expected at least one; name another --eval-split, or"
            " type --eval-every -1"
        )
    return Goal(objective, tools, task, held_out)


def _dry_run(cfg: RLConfig, rt: Runtime, name: str, found: ModelRef, goal: Goal) -> Result:
    check_name(name)
    check_talks(found)
    base, first = BaseRun.found(found), goal.task.example(0)
    check_rates(cfg, base)
    reward_parts(cfg.reward, list(goal.task.rewards(first, first.messages[-1]["content"])))
    plan = make_rl_plan(cfg, base, len(goal.task), rt.world_size)
    return print_plan(describe_rl(cfg, name, base, plan, goal, rt), dry_run=True)


def _train(cfg: RLConfig, rt: Runtime, run: Run, found: ModelRef | None, goal: Goal) -> Result:
    objective, tools, task, held_out = goal
    if run.resume_from:
        base, found = BaseRun.of(load_meta(run.resume_from)), None
    else:
        found = found or find_model(cfg.model, "sft")
        check_talks(found)
        base = BaseRun.found(found)
    check_rates(cfg, base)
    tokenizer = run.pin_tokenizer(lambda: Tokenizer.load(found.run_dir / "tokenizer", checked=True))
    plan = make_rl_plan(cfg, base, len(task), rt.world_size)
    print_plan(describe_rl(cfg, run.name, base, plan, goal, rt))
    run.identify(
        origin=base.facts(), data_fingerprint=task_fingerprint(task), questions=task_fingerprint(task, len(task))
    )
    model = base.open(run, found, rt)
    model.activation_checkpointing = cfg.activation_checkpointing
    reference = load_model(base.name, rt)[0].requires_grad_(False) if objective.kl else None
    engine = Engine(model, tokenizer, rt)
    batches = Rollouts(cfg, objective, model, engine, task, rt, run.dir, tools, reference)
    stop, loss = StopRequest(), PolicyLoss(objective, cfg.max_new_tokens, rt)
    hook = Hook(at_steps(cfg.eval_every, first=True), lambda step: passes(cfg, engine, held_out, tools, stop.asked))
    try:
        result = fit(
            run,
            model,
            MuonAdamW(param_groups(model, base.rates(cfg), plan), rt),
            batches,
            plan,
            loss,
            every_of(cfg),
            [hook],
            stop=stop,
            measure=lambda: batches.measure() | loss.measure(),
            work=lambda: batches.work,
        )
    finally:
        batches.close()
    print_plan(changes(run.dir))
    return result


def check_talks(found: ModelRef) -> None:
    """Raise UserError for a model that has not learnt to answer: it would never end a turn, and no reply would earn
    anything.
    """
    if load_meta(found.checkpoint)["kind"] == "base":
        raise UserError(
            f"{found.name} is a base model: it has never seen the tokens that mark up a conversation; expected one that"
            f" was fine-tuned on chat; first type: python -m scripts.chat_sft --model {found.name}"
        )


def task_fingerprint(task: Any, examples: int = 256) -> str:
    """Tells apart tasks that would ask other questions, from their length and about so many examples."""
    n = len(task)
    return hashlib.sha256(
        repr([n, *(task.example(i) for i in range(0, n, max(1, n // examples)))]).encode()
    ).hexdigest()


def passes(
    cfg: RLConfig, engine: Engine, task: Any, tools: Any, stop: Callable[[], bool] = lambda: False
) -> dict[str, float]:
    """pass@k on the held-out examples, for k = 1, 2, 4, ... and --eval-samples; replies are drawn as for training."""
    result = evaluate_sampled(
        engine,
        task,
        range(len(task)),
        rollout_request(cfg, tools),
        num_samples=cfg.eval_samples,
        batch_size=cfg.rollout_batch_size or cfg.examples_per_step * cfg.num_samples // engine.runtime.world_size,
        stop=stop,
    )
    shown = sorted({2**i for i in range(cfg.eval_samples.bit_length())} | {cfg.eval_samples})
    return {f"eval/pass@{k}": result.pass_at[k] for k in shown}


def describe_rl(cfg: RLConfig, name: str, base: BaseRun, plan: RLPlan, goal: Goal, rt: Runtime) -> list[str]:
    """What the run is about to do, one aligned line per fact."""
    objective, task = goal.objective, goal.task
    m = plan.model
    choices = f"{objective.advantage} advantages, {objective.normaliser} normaliser"
    clip = (
        f", ratios clipped at {1 - objective.clip_low:g} and {1 + objective.clip_high:g}"
        if objective.clip_low or objective.clip_high
        else ""
    )
    kl = f", divergence from {base.name} x {objective.kl:g}" if objective.kl else ""
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
        f"run             {name}: from {base.name}, depth {m.n_layer}, width {m.n_embd}, rows of {m.sequence_len}",
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


def changes(run_dir: Path) -> list[str]:
    """The first and the last measurement of rewards and pass@k."""
    rows, lines = read_metrics(run_dir), []
    for metric in dict.fromkeys(key for row in rows for key in row if key.startswith("eval/") or key == "rl/reward"):
        values = [(row["step"], row[metric]) for row in rows if row.get(metric) is not None]
        lines.append(
            f"{metric:16s}{values[0][1]:.4f} at step {values[0][0]} -> {values[-1][1]:.4f} at step {values[-1][0]}"
        )
    return lines
