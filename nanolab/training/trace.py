"""--profile: what five steps did when, on the CPU and the GPU, as a trace that a browser shows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanolab.cli import UserError
from nanolab.runtime import Runtime, print0
from nanolab.training.fit import Hook

WARMUP, STEPS = 10, 5  # steps before the trace, of which the first ones allocate and compile, and in it
VIEWERS = "https://ui.perfetto.dev, which keeps it in the browser, or chrome://tracing"


def traced(hooks: Sequence[Hook], folder: Path, runtime: Runtime, steps: int | None) -> list[Hook]:
    """`hooks`, and after them one that writes <folder>/trace_FIRST-LAST.json, of rank 0. steps: of the whole run; None:
    the clock ends it. The run's numbers are the same without it.

    Where too few steps are left, training raises UserError before its first one."""
    tracer = Tracer(folder, runtime, steps)
    return [*hooks, Hook(tracer.due, tracer.step)]


class Tracer:
    """One trace of torch.profiler: STEPS steps after WARMUP others of this start, or fewer where the clock ends it."""

    def __init__(self, folder: Path, runtime: Runtime, steps: int | None):
        self.folder, self.runtime, self.steps = folder, runtime, steps
        self.first = self.made = -1  # step of the trace, -1: not known yet; steps made
        self.profiler: Any = None
        self.over = False

    def due(self, step: int, last: bool) -> bool:
        if self.first < 0:
            self.first = step + WARMUP
            if not last and self.steps is not None and self.steps < self.first + STEPS:
                raise UserError(
                    f"--profile traces {STEPS} steps after {WARMUP} others, but {self.steps - step} are left; expected"
                    f" {WARMUP + STEPS} at least; leave --profile out, or train for longer",
                    "profile-too-short",
                    left=self.steps - step,
                    needed=WARMUP + STEPS,
                )
        due, self.over = not self.over and (last or step >= self.first - 1), last or step >= self.first + STEPS
        return due

    def step(self, step: int) -> None:
        """Called after all that is done beside training, which the trace holds too."""
        self.runtime.synchronize()
        self.made = step
        if self.profiler is not None:
            self.profiler.step()
            if self.over:
                self.profiler.stop()
        elif not self.over:
            self.profiler = self.begun()
        else:
            print0(f"profile         no trace: the run has ended after {step:,} steps, before step {self.first:,}")

    def begun(self) -> Any:
        """The profiler, which first runs for a step whose figures it drops."""
        from torch.profiler import ProfilerActivity, profile, schedule

        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.runtime.device.type == "cuda")
        plan = schedule(wait=0, warmup=1, active=STEPS, repeat=1)
        profiler = profile(activities=activities, schedule=plan, on_trace_ready=self.write)
        profiler.start()
        return profiler

    def write(self, profiler: Any) -> None:
        path = self.folder / f"trace_{self.first}-{self.made - 1}.json"
        if self.runtime.is_main:
            profiler.export_chrome_trace(str(path))
        print0(f"profile         {path}: steps {self.first:,} to {self.made - 1:,}; open it in {VIEWERS}")
