"""fit(): the only training loop. Pretraining, fine-tuning and reinforcement learning pass it batches and a loss.

One step: save, evaluate and sample where due; gather the micro-batches; gradients of the mean loss over the global
batch; stop if anything is not finite; schedules; update; log. The save comes before the evaluation, so that a crash in
a long evaluation loses nothing.
"""

import dataclasses
import shlex
import signal
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from nanolab.cli import UserError
from nanolab.records import checkpoint
from nanolab.records.console import Eta, clock, step_line
from nanolab.records.run import Run
from nanolab.runtime import Stop, Stopped, device_peaks, print0
from nanolab.training.gradients import Batches, Micro, accumulate, gather
from nanolab.training.guards import out_of_memory_named, quiet_gc, undisturbed
from nanolab.training.scaler import LossScaler
from nanolab.training.signals import StopRequest

MEASURED_AFTER = 10  # steps, after which the expected time is corrected
SMOOTHING = 0.9  # of the loss on the console


@dataclass
class Every:
    """Cadences in steps, -1 is off, and what to do at them. All functions are called on every rank, `measure` at every
    step.
    """

    log: int = 1
    eval: int = -1
    eval_steps: Collection[int] = ()  # more steps at which to evaluate, whatever the cadence
    benchmark: int = -1  # not before the first step
    sample: int = -1
    save: int = -1  # the last step is always saved
    keep: int | str = 2  # newest checkpoints that stay beside the best one, or "all"
    grad_norm: bool = False
    # metrics, for example {"val/bpb": 1.2}. What looks at fit's `stop` raises Stopped, on every rank
    evaluate: Callable[[], dict[str, float]] = dict
    # metrics of what takes longer, for example {"core_metric": 0.2, "centered_results": {...}}; it gets what says
    # whether this rank is to stop, and is None, on every rank, where it did. The step is saved before it.
    run_benchmark: Callable[[Stop], dict[str, Any] | None] = lambda stop: {}
    measure: Callable[[], dict[str, float]] = dict  # metrics of the step just made, beside the loop's own
    # rollout.Work so far, where steps differ in tokens; None: each has the plan's
    work: Callable[[], Any] | None = None
    draw_samples: Callable[[], None] = lambda: None
    planned_bytes: int = 0  # of one rank, at the peak; a GPU's statistics are printed beside it

    def __post_init__(self) -> None:
        if self.keep != "all" and not (str(self.keep).isdigit() and int(self.keep) >= 1):
            raise UserError(
                f"--keep is {self.keep!r}; expected a number of checkpoints from 1 on, or all; try --keep 2"
            )


@dataclass
class LoopState:
    """What the loop itself carries from step to step, and through a checkpoint."""

    step: int = 0  # optimizer steps done
    total_training_time: float = 0.0  # seconds in steps; compiling, evaluation and saving not counted
    compile_seconds: float = 0.0  # of all starts of the run
    waits: int = 0  # steps that had to wait for their batches
    smooth_loss: float = 0.0  # moving average, factor 0.9, not yet debiased
    min_val_bpb: float | None = None


@dataclass
class Loop:
    """The parts of one training run and its state; `fit` drives it."""

    run: Run
    model: nn.Module
    optimizer: Any
    batches: Batches
    plan: Any
    loss_fn: Callable[[nn.Module, Any], torch.Tensor]
    every: Every
    compiled: bool = False
    state: LoopState = field(default_factory=LoopState)
    saved_step: int | None = None

    def __post_init__(self) -> None:
        self.runtime = self.run.runtime
        self.scaler = LossScaler(self.runtime) if self.runtime.dtype == torch.float16 else None
        self.bare_model = getattr(self.model, "_orig_mod", self.model)  # without torch.compile's wrapper
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        self.eta = Eta()
        self.cold = self.compiled  # until the first step's shapes are compiled
        self.writer = checkpoint.Writer(self.runtime)
        for group in self.optimizer.groups:
            group.setdefault("initial_weight_decay", group["weight_decay"])

    def progress(self) -> float:
        """Share of the run that is done, in [0, 1], the same on every rank."""
        if self.plan.num_iterations is not None:
            return min(1.0, self.state.step / max(1, self.plan.num_iterations))
        elapsed = torch.tensor(
            self.state.total_training_time if self.runtime.is_main else 0.0, device=self.runtime.device
        )
        return min(1.0, self.runtime.all_reduce_(elapsed).item() / self.plan.max_seconds)

    def last(self, progress: float) -> bool:
        return self.state.step >= self.plan.num_iterations if self.plan.num_iterations is not None else progress >= 1.0

    def due(self, cadence: int) -> bool:
        return cadence > 0 and self.state.step % cadence == 0

    def eval_due(self, last: bool) -> bool:
        return self.state.step in self.every.eval_steps or (self.every.eval > 0 and (last or self.due(self.every.eval)))

    def benchmark_due(self, last: bool) -> bool:
        return self.every.benchmark > 0 and (last or (self.state.step > 0 and self.due(self.every.benchmark)))

    @property
    def tokens(self) -> int:
        return self.every.work().tokens if self.every.work else self.state.step * self.plan.total_batch_size

    @property
    def smooth_loss(self) -> float | None:
        return self.state.smooth_loss / (1 - SMOOTHING**self.state.step) if self.state.step else None

    def totals(self) -> dict[str, float]:
        compiling = {"compile_seconds": self.state.compile_seconds} if self.state.compile_seconds else {}
        return {"total_training_time": self.state.total_training_time, **compiling, **self.flops()}

    def flops(self) -> dict[str, int]:
        if self.every.work is None:
            return {"total_training_flops": self.plan.flops_per_token * self.tokens}
        return {
            "total_training_flops": self.every.work().training_flops,
            "total_generating_flops": self.every.work().generating_flops,
        }

    def resume(self) -> None:
        """Load everything from the run's checkpoint, if it has one."""
        path = self.run.resume_from
        if path is None:
            return
        meta = checkpoint.load_meta(path)
        self.bare_model.load_state_dict(checkpoint.load_weights(path), strict=True)
        self.optimizer.load_state_dict(checkpoint.load_optimizer(path))
        self.batches.load_state_dict(meta["batches"])
        self.state = LoopState(**meta["loop"])
        if self.scaler:
            self.scaler.load_state_dict(meta["scaler"])
        checkpoint.restore_rng(path, self.runtime)
        self.saved_step = self.state.step
        print0(f"resumed at step {self.state.step} from {path}")

    def save(self) -> None:
        """Begin to save this step; `retain` ends it."""
        if self.saved_step == self.state.step:
            return
        if self.writer.busy:
            self.retain()
        meta = {
            "run": self.run.name,
            "kind": self.run.kind,
            **self.run.facts,
            "model_config": dataclasses.asdict(self.bare_model.config),
            "config": self.run.config,
            "plan": dataclasses.asdict(self.plan),
            "env": self.run.env,
            "loop": dataclasses.asdict(self.state),
            "tokens": self.tokens,
            "batches": self.batches.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else None,
        }
        self.run.sync()
        self.writer.save(
            self.run.checkpoints,
            self.state.step,
            weights=self.bare_model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            meta=meta,
        )
        self.saved_step = self.state.step

    def retain(self) -> None:
        """Wait for the checkpoint that is being written and drop old ones; called after the metrics of its step are on
        record, since they decide which is the best.
        """
        self.writer.wait()
        if self.runtime.is_main:
            checkpoint.retain(self.run.checkpoints, self.every.keep, self.run.best_step())

    def evaluate(self, last: bool, stop: StopRequest) -> dict[str, Any] | None:
        """The metrics of what is due at this step; None where a part of it was asked to stop: then none of it counts,
        and a resumed run makes it again.
        """
        metrics: dict[str, Any] = {}
        if self.eval_due(last):
            try:
                with undisturbed(self.model, self.runtime.device):
                    metrics |= self.every.evaluate()
            except Stopped:
                return None
        if self.benchmark_due(last):
            with undisturbed(self.model, self.runtime.device):
                found = self.every.run_benchmark(stop.asked)
            if found is None:
                return None
            metrics |= found
        bpb = metrics.get("val/bpb")
        if bpb is not None:
            self.state.min_val_bpb = bpb if self.state.min_val_bpb is None else min(bpb, self.state.min_val_bpb)
        if metrics:
            print0(
                f"step {self.state.step:05d} | "
                + " | ".join(f"{k} {v:.6f}" for k, v in metrics.items() if isinstance(v, float))
            )
        return metrics

    def train_step(self, progress: float, stop: StopRequest) -> tuple[dict[str, Any], bool]:
        """One update. Returns (its metrics, whether a rank was asked to stop)."""
        began, waits = time.perf_counter(), self.waits()
        step, plan, tokens, flops = self.state.step, self.plan, self.tokens, sum(self.flops().values())
        micro = gather(self.batches, plan.grad_accum)
        if self.cold:
            began += self.warm_up(micro)
        loss, asked = accumulate(
            self.model,
            self.params,
            micro,
            self.loss_fn,
            step=step,
            runtime=self.runtime,
            scaler=self.scaler,
            stop=stop.asked,
        )
        overflow = self.scaler.unscale_(self.optimizer) if self.scaler else False
        wanted = plan.grad_clip > 0 or (self.every.grad_norm and self.log_due())
        grad_norm = self.optimizer.grad_norm(plan.grad_clip) if wanted else None
        lrm = plan.lr_multiplier(step, progress)
        for group in self.optimizer.groups:
            group["lr"] = group["initial_lr"] * lrm
            if group["kind"] == "muon":
                group["momentum"] = plan.muon_momentum(step, progress)
                group["weight_decay"] = group["initial_weight_decay"] * plan.weight_decay_multiplier(step, progress)
        if not overflow:
            self.optimizer.step()
        if self.scaler:
            self.scaler.update(overflow)
        self.optimizer.zero_grad()
        self.runtime.synchronize()

        dt = time.perf_counter() - began
        self.state.step += 1
        self.state.waits += self.waits() > waits
        self.state.total_training_time += dt
        self.state.smooth_loss = SMOOTHING * self.state.smooth_loss + (1 - SMOOTHING) * loss
        peak, tokens, flops = (
            device_peaks(self.runtime.device_name)[0],
            self.tokens - tokens,
            sum(self.flops().values()) - flops,
        )
        metrics = {
            "train/loss": loss,
            "train/lrm": lrm,
            "train/dt": dt,
            "train/tok_per_sec": tokens / dt,
            "train/mfu": 100 * flops / dt / (peak * self.runtime.world_size) if peak else None,  # percent
            "train/epoch": float(self.batches.epoch),
            "mem/peak_mib": self.runtime.peak_memory_mib(),
        }
        metrics |= {"train/tokens": tokens} if self.every.work else {}
        return (
            metrics | ({} if grad_norm is None else {"train/grad_norm": grad_norm.item()}) | self.every.measure(),
            asked,
        )

    def waits(self) -> int:
        # of Prefetch; what makes its batches in the step itself has none ahead
        return getattr(self.batches, "waits", 0)

    def warm_up(self, micro: Micro) -> float:
        """Compile the model: one forward and backward pass for each shape of the step, whose gradients are dropped.
        Returns the seconds it took.

        Weights, batches and the generators' states are as before, so that the run is the same without it; the ranks go
        on together."""
        began = time.perf_counter()
        devices = [self.runtime.device] if self.runtime.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            for batch in {batch.inputs.shape: batch for batch in micro.batches}.values():
                self.loss_fn(self.model, batch).backward()
        for p in self.params:
            p.grad = None
        self.runtime.synchronize()
        self.runtime.barrier()
        self.cold, seconds = False, time.perf_counter() - began
        self.state.compile_seconds += seconds
        print0(f"compiled        in {seconds:.1f} s, which are no training time")
        return seconds

    def log_due(self) -> bool:
        return self.due(self.every.log) or (self.every.log > 0 and self.state.step + 1 == self.plan.num_iterations)

    def print_step(self, step: int, progress: float, metrics: dict[str, Any], left: float | None) -> None:
        print0(
            step_line(
                step,
                self.plan.num_iterations,
                progress=progress,
                loss=self.smooth_loss,
                lrm=metrics["train/lrm"],
                dt=metrics["train/dt"],
                tokens=metrics.get("train/tokens", self.plan.total_batch_size),
                mfu=metrics["train/mfu"],
                epoch=metrics["train/epoch"],
                elapsed=self.state.total_training_time,
                left=left,
            )
        )

    def time_left(self, dt: float) -> float | None:
        """Seconds to the horizon after a step of `dt` seconds; None while unknown."""
        if self.plan.num_iterations is None:
            return max(0.0, self.plan.max_seconds - self.state.total_training_time)
        return self.eta.after(dt, self.plan.num_iterations - self.state.step)

    def print_expected_time(self, left: float | None) -> None:
        """The plan's expected time, corrected by what steps take here. A run by the clock takes what it was given."""
        if self.plan.num_iterations is not None and left:
            total = self.state.total_training_time + left
            print0(
                f"expected time   measured: about {clock(total).strip()} in all, {clock(left).strip()} left (median of"
                f" {MEASURED_AFTER} steps, evaluations not counted)"
            )

    def print_memory(self) -> None:
        """The plan's peak of memory beside that of the device so far. A CPU's holds much else."""
        if self.every.planned_bytes and self.runtime.device.type == "cuda":
            peak, planned = self.runtime.peak_memory_mib() / 2**10, self.every.planned_bytes / 2**30
            print0(
                f"peak memory     {peak:.1f} GiB on rank 0, by torch.cuda.max_memory_allocated; planned {planned:.1f}"
                f" GiB ({peak / planned - 1:+.0%})"
            )

    def result(self, last: dict[str, Any]) -> dict[str, Any]:
        """The numbers that a finished run is known by; `last` are the metrics of the final evaluation."""
        seconds = self.state.total_training_time
        return {
            "run": self.run.name,
            "kind": self.run.kind,
            "step": self.state.step,
            "tokens": self.tokens,
            "train/loss": self.smooth_loss,
            **last,
            "min_val_bpb": self.state.min_val_bpb,
            **self.totals(),
            "tok_per_sec": self.tokens / seconds if seconds else None,
            "mem/peak_mib": self.runtime.peak_memory_mib(),
            "steps_waited": self.state.waits,
        }

    def leave(self, stop: StopRequest) -> None:
        """Say how to go on and end the process with the exit code that a shell expects of the signal."""
        number = signal.Signals(stop.number or signal.SIGTERM)
        command = "the same command with --resume"
        if self.runtime.world_size == 1:
            words = sys.orig_argv if "--resume" in sys.orig_argv else [*sys.orig_argv, "--resume"]
            command = shlex.join(words)
        print0(f"stopped by {number.name}; step {self.state.step} is saved. To go on, type: {command}")
        raise SystemExit(128 + number)


def fit(
    run: Run,
    model: nn.Module,
    optimizer: Any,
    batches: Batches,
    plan: Any,
    loss_fn: Callable[[nn.Module, Any], torch.Tensor],
    every: Every,
    stop: StopRequest | None = None,
    compiled: bool = False,
) -> dict[str, Any]:
    """Train until the plan's horizon, from the run's checkpoint if it has one; finish the run and return its result.

    plan: a schedule.Plan or anything with its fields and schedules. loss_fn(model, micro_batch): the SUM of nats over
    the micro-batch's targets. stop: what evaluations look at, too. compiled: whether the loss compiles at its first
    call: that is then no training time. Raises NonFinite, and UserError when memory or the disk is full; signals (see
    signals.py) save and raise SystemExit. A line of metrics.jsonl holds what was measured with the weights after `step`
    updates (val/bpb, train/loss) and the totals up to there."""
    loop = Loop(run, model, optimizer, batches, plan, loss_fn, every, compiled)
    try:
        with (
            stop or StopRequest() as stop,
            quiet_gc() as after_step,
            out_of_memory_named(plan.device_batch_size, plan.grad_accum if run.runtime.world_size == 1 else 1),
        ):
            loop.resume()
            model.train()
            first, asked = loop.state.step, False
            while True:
                step, progress = loop.state.step, loop.progress()
                last = loop.last(progress)
                if last or asked or (step > 0 and loop.due(every.save)) or loop.benchmark_due(last):
                    loop.save()
                row = None if asked else loop.evaluate(last, stop)
                if row is not None and every.sample > 0 and (last or (step > 0 and loop.due(every.sample))):
                    with undisturbed(model, run.runtime.device):
                        every.draw_samples()
                    row = None if run.runtime.any(stop.asked()) else row
                if row is None:
                    loop.save()
                    loop.retain()
                    loop.leave(stop)
                totals = loop.totals()
                if last:
                    if row:
                        run.log(step, {**row, **totals})
                    loop.retain()
                    result = loop.result(row)
                    if loop.state.waits:
                        print0(
                            f"waits           {loop.state.waits:,} of {step:,} steps waited for their batches (the"
                            " first one of each start nearly always does)"
                        )
                    run.finish(result)
                    return result
                log_due = loop.log_due()
                metrics, asked = loop.train_step(progress, stop)
                after_step(loop.state.step - first)
                left = loop.time_left(metrics["train/dt"])
                if log_due:
                    loop.print_step(step, progress, metrics, left)
                    row = {**metrics, **row}
                if loop.state.step - first == MEASURED_AFTER:
                    loop.print_expected_time(left)
                    loop.print_memory()
                if row:
                    run.log(step, {**row, **totals})
                if loop.writer.busy and loop.writer.done():
                    loop.retain()
    except BaseException:
        loop.writer.close()
        run.close()
        raise
