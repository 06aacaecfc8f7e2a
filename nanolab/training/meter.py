"""How much a run has computed and how fast: its totals, its step line, its result."""

from collections.abc import Callable
from typing import Any

from nanolab.records.console import Eta, clock, step_line
from nanolab.records.run import Run
from nanolab.runtime import Runtime, device_peaks, print0
from nanolab.training.saving import LoopState

MEASURED_AFTER = 10  # steps, after which the expected time is corrected


class Meter:
    """Tokens and FLOPs are the plan's, or those of `work` (a work.Work) where steps differ in tokens."""

    def __init__(self, plan: Any, runtime: Runtime, work: Callable[[], Any] | None, planned_bytes: int) -> None:
        self.plan, self.runtime, self.work, self.planned_bytes = plan, runtime, work, planned_bytes
        self.eta = Eta()

    def tokens(self, step: int) -> int:
        return self.work().tokens if self.work else step * self.plan.total_batch_size

    def flops(self, step: int) -> dict[str, int]:
        if self.work is None:
            return {"total_training_flops": self.plan.flops_per_token * self.tokens(step)}
        work = self.work()
        return {"total_training_flops": work.training_flops, "total_generating_flops": work.generating_flops}

    def totals(self, state: LoopState) -> dict[str, float]:
        compiling = {"compile_seconds": state.compile_seconds} if state.compile_seconds else {}
        return {"total_training_time": state.total_training_time, **compiling, **self.flops(state.step)}

    def so_far(self, step: int) -> tuple[int, int]:
        """(tokens, FLOPs of all kinds)."""
        return self.tokens(step), sum(self.flops(step).values())

    def speed(self, before: tuple[int, int], step: int, dt: float) -> dict[str, float | None]:
        """Metrics of the step that took `dt` seconds. before: `so_far` at its beginning; step: steps done after it."""
        tokens, flops = (now - then for now, then in zip(self.so_far(step), before))
        peak = device_peaks(self.runtime.device_name)[0]
        return {
            "train/dt": dt,
            "train/tok_per_sec": tokens / dt,
            "train/mfu": 100 * flops / dt / (peak * self.runtime.world_size) if peak else None,  # percent
            **({"train/tokens": tokens} if self.work else {}),
        }

    def time_left(self, state: LoopState, dt: float) -> float | None:
        """Seconds to the end after a step of `dt` seconds; None while unknown."""
        if self.plan.num_iterations is None:
            return max(0.0, self.plan.max_seconds - state.total_training_time)
        return self.eta.after(dt, self.plan.num_iterations - state.step)

    def print_step(self, state: LoopState, progress: float, metrics: dict[str, Any], left: float | None) -> None:
        """The line of the step just made. progress: at its beginning."""
        print0(
            step_line(
                state.step - 1,
                self.plan.num_iterations,
                progress=progress,
                loss=state.mean_loss,
                lrm=metrics["train/lrm"],
                dt=metrics["train/dt"],
                tokens=metrics.get("train/tokens", self.plan.total_batch_size),
                mfu=metrics["train/mfu"],
                epoch=metrics["train/epoch"],
                elapsed=state.total_training_time,
                left=left,
            )
        )

    def print_measured(self, state: LoopState, left: float | None) -> None:
        """The plan's time and memory, corrected by what was measured. A run by the clock takes the time that it was
        given; a CPU's memory holds much else.
        """
        if self.plan.num_iterations is not None and left:
            total = state.total_training_time + left
            print0(
                f"expected time   measured: about {clock(total).strip()} in all, {clock(left).strip()} left (median of"
                f" {MEASURED_AFTER} steps, evaluations not counted)"
            )
        if self.planned_bytes and self.runtime.device.type == "cuda":
            peak, planned = self.runtime.peak_memory_mib() / 2**10, self.planned_bytes / 2**30
            print0(
                f"peak memory     {peak:.1f} GiB on rank 0, by torch.cuda.max_memory_allocated; planned {planned:.1f}"
                f" GiB ({peak / planned - 1:+.0%})"
            )

    def result(self, run: Run, state: LoopState, last: dict[str, Any]) -> dict[str, Any]:
        """The numbers that a finished run is known by. last: the metrics of the final evaluation."""
        tokens, seconds = self.tokens(state.step), state.total_training_time
        if state.waits:
            print0(
                f"waits           {state.waits:,} of {state.step:,} steps waited for their batches (the first one of"
                " each start nearly always does)"
            )
        return {
            "run": run.name,
            "kind": run.kind,
            "step": state.step,
            "tokens": tokens,
            "train/loss": state.mean_loss,
            **last,
            "min_val_bpb": state.min_val_bpb,
            **self.totals(state),
            "tok_per_sec": tokens / seconds if seconds else None,
            "mem/peak_mib": self.runtime.peak_memory_mib(),
            "steps_waited": state.waits,
        }
