"""Saving and resuming: everything that the next step depends on, in a checkpoint."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import nn

from nanolab.records import checkpoint
from nanolab.records.run import Run
from nanolab.runtime import print0
from nanolab.training.gradients import Batches
from nanolab.training.scaler import LossScaler

SMOOTHING = 0.9  # of the loss on the console


@dataclass
class LoopState:
    """What the loop itself carries from step to step, and through a checkpoint."""

    step: int = 0  # optimizer steps done
    total_training_time: float = 0.0  # seconds in steps; compiling, evaluation and saving not counted
    compile_seconds: float = 0.0  # of all starts of the run
    waits: int = 0  # steps that had to wait for their batches
    smooth_loss: float = 0.0  # moving average, not yet debiased
    min_val_bpb: float | None = None

    def after_step(self, loss: float, seconds: float, waited: bool) -> None:
        self.step += 1
        self.total_training_time += seconds
        self.waits += waited
        self.smooth_loss = SMOOTHING * self.smooth_loss + (1 - SMOOTHING) * loss

    @property
    def mean_loss(self) -> float | None:
        return self.smooth_loss / (1 - SMOOTHING**self.step) if self.step else None


class Saves:
    """The checkpoints of one run. Every rank has one and calls each method when the others do."""

    def __init__(
        self,
        run: Run,
        model: nn.Module,
        optimizer: Any,
        batches: Batches,
        plan: Any,
        scaler: LossScaler | None,
        keep: int | str,
    ) -> None:
        self.run, self.model, self.optimizer, self.batches, self.plan = run, model, optimizer, batches, plan
        self.scaler, self.keep = scaler, keep
        self.writer = checkpoint.Writer(run.runtime)
        self.saved_step: int | None = None

    def resume(self) -> LoopState:
        """Load everything from the run's checkpoint, if it has one."""
        path = self.run.resume_from
        if path is None:
            return LoopState()
        meta = checkpoint.load_meta(path)
        self.model.load_state_dict(checkpoint.load_weights(path), strict=True)
        self.optimizer.load_state_dict(checkpoint.load_optimizer(path))
        self.batches.load_state_dict(meta["batches"])
        state = LoopState(**meta["loop"])
        if self.scaler:
            self.scaler.load_state_dict(meta["scaler"])
        checkpoint.restore_rng(path, self.run.runtime)
        self.saved_step = state.step
        print0(f"resumed at step {state.step} from {path}")
        return state

    def save(self, state: LoopState, tokens: int) -> None:
        """Begin to save this step, if it is not saved; `retain` ends it. tokens: trained on so far."""
        if self.saved_step == state.step:
            return
        if self.writer.busy:
            self.retain()
        run = self.run
        meta = {
            "run": run.name,
            "kind": run.kind,
            **run.facts,
            "model_config": dataclasses.asdict(self.model.config),
            "config": run.config,
            "plan": dataclasses.asdict(self.plan),
            "env": run.env,
            "loop": dataclasses.asdict(state),
            "tokens": tokens,
            "batches": self.batches.position.json(run.runtime),
            "scaler": self.scaler.state_dict() if self.scaler else None,
        }
        run.sync()
        weights, shards = self.model.state_dict(), self.optimizer.state_dict()
        self.writer.save(run.checkpoints, state.step, weights=weights, optimizer=shards, meta=meta)
        self.saved_step = state.step

    def retain(self) -> None:
        """Wait for the checkpoint that is being written and drop old ones; called after the metrics of its step are on
        record, since they decide which is the best.
        """
        self.writer.wait()
        if self.run.runtime.is_main:
            checkpoint.retain(self.run.checkpoints, self.keep, self.run.best_step())

    def retain_if_written(self) -> None:
        if self.writer.busy and self.writer.done():
            self.retain()
