"""A training run small enough to be made by hand: tiny GPT, real optimizer, batches that any code can make again."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from nanolab.data.packing import Batch
from nanolab.model.config import GPTConfig
from nanolab.model.gpt import GPT
from nanolab.records.run import Run
from nanolab.runtime import Runtime
from nanolab.stages.config import BaseTrainConfig
from nanolab.training.gradients import nats
from nanolab.training.optim import MuonAdamW
from nanolab.training.recipes import param_groups

ALONE = Runtime(torch.device("cpu"), torch.float32)
CONFIG = GPTConfig(sequence_len=8, vocab_size=64, n_layer=3, n_head=1, n_embd=32, window_pattern="L")
RATES = BaseTrainConfig(embedding_lr=0.1, unembedding_lr=0.004, matrix_lr=0.02, scalar_lr=0.1)
ROWS = 2


@dataclass
class ToyPlan:
    """Schedules that differ at every step, so that a step in the wrong place shows."""

    num_iterations: int | None = 6
    max_seconds: float | None = None
    grad_accum: int = 1
    device_batch_size: int = ROWS
    total_batch_size: int = 64
    flops_per_token: int = 1000
    grad_clip: float = -1.0
    recipe: str = "dial"
    batch_scale: float = 1.0
    weight_decay: float = 0.1
    model: GPTConfig = CONFIG

    def lr_multiplier(self, step: int, progress: float) -> float:
        return 1.0 - 0.7 * progress

    def muon_momentum(self, step: int, progress: float) -> float:
        return 0.85 + 0.01 * step

    def weight_decay_multiplier(self, step: int, progress: float) -> float:
        return 1.0 - progress


def global_micro_batch(n: int) -> Batch:
    """The n-th micro-batch of the run, counted over steps and ranks. Some have few targets, so that weighting shows."""
    g = torch.Generator().manual_seed(1000 + n)
    inputs = torch.randint(64, (ROWS, 8), generator=g)
    targets = torch.randint(64, (ROWS, 8), generator=g)
    targets[torch.rand(ROWS, 8, generator=g) < (0.9 if n % 3 == 0 else 0.1)] = -1
    targets[0, 0] = 5
    return Batch(inputs, targets, int((targets >= 0).sum()), None)


class ToyPosition(NamedTuple):
    n: int  # batches of each rank so far
    document: int

    @property
    def epoch(self) -> float:
        return self.n / 100

    def json(self, runtime: Runtime) -> dict[str, Any]:
        return {"n": self.n}

    def where(self) -> str:
        return f"document {self.document}"


class ToyBatches:
    """Micro-batches n = rank, rank + world_size, ..."""

    def __init__(self, runtime: Runtime):
        self.runtime, self.n = runtime, 0

    @property
    def position(self) -> ToyPosition:
        return ToyPosition(self.n, (self.n - 1) * self.runtime.world_size + self.runtime.rank)

    def next(self) -> Batch:
        self.n += 1
        return global_micro_batch(self.position.document)._replace(position=self.position)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.n = state["n"]


class RecordingOptimizer(MuonAdamW):
    """Remembers the rates it was given at every step."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.seen: list[dict[str, tuple]] = []

    def step(self) -> None:
        self.seen.append({g["name"]: (g["lr"], g.get("momentum"), g["weight_decay"]) for g in self.groups})
        super().step()


def noisy_nats(model: nn.Module, batch: Batch) -> torch.Tensor:
    """A loss that uses the global generator, as dropout would."""
    return nats(model, batch) * (1 + 0.1 * torch.rand(()))


def groups(model: nn.Module) -> list[dict[str, Any]]:
    return param_groups(model, RATES, ToyPlan())


def make_model(config: GPTConfig = CONFIG) -> GPT:
    """The same weights every time, all moved off zero: at initialisation many gradients are zero up to rounding, and
    Adam would blow the rounding up."""
    model, g = GPT(config), torch.Generator().manual_seed(8)
    model.init_weights(7)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=g))
    return model


def parts(
    name: str = "toy", runtime: Runtime = ALONE, resume: bool = False, config: GPTConfig = CONFIG, **flags: Any
) -> tuple[Run, GPT, RecordingOptimizer, ToyBatches]:
    """What `fit` takes first, all fresh. The global generator starts at a fixed seed."""
    torch.manual_seed(0)
    run = Run.start(name, BaseTrainConfig(**flags), runtime, resume=resume)
    model = make_model(config)
    return run, model, RecordingOptimizer(groups(model), runtime), ToyBatches(runtime)


def use_base(path: str | Path) -> None:
    os.environ["NANOLAB_BASE_DIR"] = str(path)
