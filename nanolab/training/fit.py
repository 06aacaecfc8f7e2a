"""fit(): the only training loop. Pretraining, fine-tuning and reinforcement learning pass it batches and a loss.

One step: save where due; hooks (evaluation, benchmark, samples) where due; gather the micro-batches; gradients of the
mean loss over the global batch; stop if anything is not finite; schedules; update; log. The save comes before the
hooks, so that a crash in a long evaluation loses nothing."""

import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
from torch import nn

from nanolab.cli import UserError
from nanolab.records.run import Run
from nanolab.runtime import Runtime, Stopped, print0
from nanolab.training.gradients import Batches, Loss, accumulate, gather, nats
from nanolab.training.guards import out_of_memory_named, quiet_gc, undisturbed
from nanolab.training.meter import MEASURED_AFTER, Meter
from nanolab.training.saving import LoopState, Saves
from nanolab.training.scaler import LossScaler
from nanolab.training.signals import StopRequest


class Hook(NamedTuple):
    """What is done beside training, without gradients, in evaluation mode, on every rank."""

    when: Callable[[int, bool], bool]  # (steps done, whether these were all)
    # steps done -> metrics of the model as it is, for example {"val/bpb": 1.2}; None where there are none. What looks
    # at fit's `stop` raises Stopped, on every rank: then no hook of this step counts, and a resumed run does all again
    do: Callable[[int], dict[str, Any] | None]
    saved: bool = False  # the step is saved before it: it takes long


def at_steps(cadence: int, first: bool = False) -> Callable[[int, bool], bool]:
    """`Hook.when`: every so many steps (-1: never), after the last one, and, with `first`, before the first one."""
    return lambda step, last: cadence > 0 and (last or step % cadence == 0 and (first or step > 0))


@dataclass(frozen=True)
class Every:
    """Cadences of the run's own records, in steps; -1 is off."""

    log: int = 1
    save: int = -1  # the last step is always saved
    keep: int | str = 2  # newest checkpoints that stay beside the best one, or "all"
    grad_norm: bool = False  # where it is logged

    def __post_init__(self) -> None:
        if self.keep != "all" and not (str(self.keep).isdigit() and int(self.keep) >= 1):
            raise UserError(
                f"--keep is {self.keep!r}; expected a number of checkpoints from 1 on, or all; try --keep 2"
            )


def fit(
    run: Run,
    model: nn.Module,
    optimizer: Any,
    batches: Batches,
    plan: Any,
    loss_fn: Loss = nats,
    every: Every | None = None,
    hooks: Sequence[Hook] = (),
    *,
    stop: StopRequest | None = None,
    step_model: nn.Module | None = None,
    measure: Callable[[], dict[str, float]] = dict,
    work: Callable[[], Any] | None = None,
    planned_bytes: int = 0,
) -> dict[str, Any]:
    """Train until the plan's horizon, from the run's checkpoint if it has one; finish the run and return its result.

    plan: a schedule.Plan or anything with its fields and schedules. loss_fn(model, micro_batch): the SUM of nats over
    the micro-batch's targets. stop: what hooks look at, too. step_model: `model` compiled, which the loss is given in
    its place; its first call is no training time. measure: metrics of the step just made. work: see Meter.
    planned_bytes: of one rank, at the peak. Raises NonFinite, and UserError when memory or the disk is full; signals
    (see signals.py) save and raise SystemExit. A line of metrics.jsonl holds what was measured with the weights after
    `step` updates (val/bpb, train/loss) and the totals up to there."""
    every = every or Every()
    runtime, meter = run.runtime, Meter(plan, run.runtime, work, planned_bytes)
    scaler = LossScaler(runtime) if runtime.dtype == torch.float16 else None
    params = [p for p in model.parameters() if p.requires_grad]
    cold, trained = step_model is not None, model if step_model is None else step_model
    saves = Saves(run, model, optimizer, batches, plan, scaler, every.keep)
    for group in optimizer.groups:
        group.setdefault("initial_weight_decay", group["weight_decay"])
    try:
        with (
            stop or StopRequest() as stop,
            quiet_gc() as after_step,
            out_of_memory_named(plan.device_batch_size, plan.grad_accum if runtime.world_size == 1 else 1),
        ):
            state = saves.resume()
            model.train()
            first, asked = state.step, False
            while True:
                step, progress = state.step, progress_of(plan, state, runtime)
                last = progress >= 1.0 if plan.num_iterations is None else step >= plan.num_iterations
                due = [hook for hook in hooks if hook.when(step, last)]
                if last or asked or (step and every.save > 0 and step % every.save == 0) or any(h.saved for h in due):
                    saves.save(state, meter.tokens(step))
                found = None if asked else do(due, step, model, runtime, stop)
                if found is None:
                    saves.save(state, meter.tokens(step))
                    saves.retain()
                    leave(step, runtime, stop)
                bpb = found.get("val/bpb")
                if bpb is not None:
                    state.min_val_bpb = bpb if state.min_val_bpb is None else min(bpb, state.min_val_bpb)
                totals = meter.totals(state)
                if last:
                    if found:
                        run.log(step, {**found, **totals})
                    saves.retain()
                    result = meter.result(run, state, found)
                    run.finish(result)
                    return result

                log_due = every.log > 0 and (step % every.log == 0 or step + 1 == plan.num_iterations)
                norm_wanted = plan.grad_clip > 0 or (every.grad_norm and log_due)
                began, waits, before = time.perf_counter(), waits_of(batches), meter.so_far(step)
                micro = gather(batches, plan.grad_accum)
                if cold:
                    seconds, cold = warm_up(trained, params, micro, loss_fn, runtime), False
                    state.compile_seconds += seconds
                    began += seconds
                loss, asked = accumulate(
                    trained, params, micro, loss_fn, step=step, runtime=runtime, scaler=scaler, stop=stop.asked
                )
                lrm, grad_norm = update(optimizer, plan, scaler, step, progress, norm_wanted)
                runtime.synchronize()
                dt = time.perf_counter() - began
                state.after_step(loss, dt, waits_of(batches) > waits)
                metrics = {
                    "train/loss": loss,
                    "train/lrm": lrm,
                    **meter.speed(before, state.step, dt),
                    "train/epoch": float(batches.position.epoch),
                    "mem/peak_mib": runtime.peak_memory_mib(),
                    **({} if grad_norm is None else {"train/grad_norm": grad_norm.item()}),
                    **measure(),
                }
                after_step(state.step - first)
                left = meter.time_left(state, dt)
                if log_due:
                    meter.print_step(state, progress, metrics, left)
                    found = {**metrics, **found}
                if state.step - first == MEASURED_AFTER:
                    meter.print_measured(state, left)
                if found:
                    run.log(step, {**found, **totals})
                saves.retain_if_written()
    except BaseException:
        saves.writer.close()
        run.close()
        raise


def progress_of(plan: Any, state: LoopState, runtime: Runtime) -> float:
    """Share of the run that is done, in [0, 1], the same on every rank."""
    if plan.num_iterations is not None:
        return min(1.0, state.step / max(1, plan.num_iterations))
    elapsed = torch.tensor(state.total_training_time if runtime.is_main else 0.0, device=runtime.device)
    return min(1.0, runtime.all_reduce_(elapsed).item() / plan.max_seconds)


def do(due: Sequence[Hook], step: int, model: nn.Module, runtime: Runtime, stop: StopRequest) -> dict[str, Any] | None:
    """The metrics of the hooks that are due, printed; None where one was asked to stop on some rank."""
    metrics: dict[str, Any] = {}
    try:
        for hook in due:
            with undisturbed(model, runtime.device):
                found = hook.do(step)
            if found is None:
                runtime.check_stop(stop.asked())
            metrics |= found or {}
            if numbers := [f"{k} {v:.6f}" for k, v in (found or {}).items() if isinstance(v, float)]:
                print0(f"step {step:05d} | {' | '.join(numbers)}")
    except Stopped:
        return None
    return metrics


def waits_of(batches: Batches) -> int:
    # of Prefetch; what makes its batches in the step itself has none ahead
    return getattr(batches, "waits", 0)


def warm_up(
    model: nn.Module, params: Sequence[nn.Parameter], micro: Sequence[Any], loss_fn: Loss, runtime: Runtime
) -> float:
    """Compile the model: one forward and backward pass for each shape of the step, whose gradients are dropped.
    Returns the seconds it took.

    Weights, batches and the generators' states are as before, so that the run is the same without it; the ranks go on
    together."""
    began = time.perf_counter()
    devices = [runtime.device] if runtime.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        for batch in {batch.inputs.shape: batch for batch in micro}.values():
            loss_fn(model, batch).backward()
    for p in params:
        p.grad = None
    runtime.synchronize()
    runtime.barrier()
    seconds = time.perf_counter() - began
    print0(f"compiled        in {seconds:.1f} s, which are no training time")
    return seconds


def update(
    optimizer: Any, plan: Any, scaler: LossScaler | None, step: int, progress: float, norm_wanted: bool
) -> tuple[float, torch.Tensor | None]:
    """Clip, set the rates, step. Returns (what the learning rates were multiplied by, the gradients' norm)."""
    overflow = scaler.unscale_(optimizer) if scaler else False
    grad_norm = optimizer.grad_norm(plan.grad_clip) if norm_wanted else None
    lrm = plan.lr_multiplier(step, progress)
    for group in optimizer.groups:
        group["lr"] = group["initial_lr"] * lrm
        if group["kind"] == "muon":
            group["momentum"] = plan.muon_momentum(step, progress)
            group["weight_decay"] = group["initial_weight_decay"] * plan.weight_decay_multiplier(step, progress)
    if not overflow:
        optimizer.step()
    if scaler:
        scaler.update(overflow)
    optimizer.zero_grad()
    return lrm, grad_norm


def leave(step: int, runtime: Runtime, stop: StopRequest) -> NoReturn:
    """Say how to go on and end the process with the exit code that a shell expects of the signal."""
    number = signal.Signals(stop.number or signal.SIGTERM)
    command = "the same command with --resume"
    if runtime.world_size == 1:
        words = sys.orig_argv if "--resume" in sys.orig_argv else [*sys.orig_argv, "--resume"]
        command = shlex.join(words)
    print0(f"stopped by {number.name}; step {step} is saved. To go on, type: {command}")
    raise SystemExit(128 + number)
