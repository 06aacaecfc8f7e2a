"""Memory: the formula against the peak of a process that trains, measured from outside the formula; and what activation checkpointing keeps."""

import subprocess
import sys

import pytest
import torch

from nanolab.config import GPTConfig
from nanolab.model.accounting import train_memory_bytes
from nanolab.model.gpt import GPT

TRAIN = """
import sys, torch
from nanolab.config import BaseTrainConfig
from nanolab.model.gpt import GPT
from nanolab.runtime import Runtime, keep_freed_memory
from nanolab.training.optim import MuonAdamW
from nanolab.training.recipes import param_groups
from nanolab.training.schedule import make_plan
runtime = Runtime(torch.device("cpu"), torch.float32)
keep_freed_memory()
before, rows = runtime.peak_memory_mib(), int(sys.argv[1])
cfg = BaseTrainConfig(depth=4, head_dim=64, max_seq_len=256)
plan = make_plan(cfg, 4096, 1)
model = GPT(plan.model)
model.init_weights(1)
optimizer = MuonAdamW(param_groups(model, cfg, plan), runtime)
for _ in range(2):
    idx = torch.randint(0, 4096, (rows, 256))
    (model(idx, idx, reduction="sum") / idx.numel()).backward()
    optimizer.step()
    optimizer.zero_grad()
print(runtime.peak_memory_mib() - before)
"""


@pytest.mark.parametrize("rows", [8, pytest.param(24, marks=pytest.mark.slow)])
def test_predicted_peak_is_near_the_measured(rows):
    measured = float(subprocess.run([sys.executable, "-c", TRAIN, str(rows)], capture_output=True, text=True, check=True).stdout)
    config = GPTConfig(sequence_len=256, vocab_size=4096, n_layer=4, n_head=4, n_embd=256)
    assert train_memory_bytes(config, rows, 4) / 2**20 == pytest.approx(measured, rel=0.4)


def kept_bytes(config: GPTConfig, rows: int, activation_checkpointing: bool) -> int:
    """Bytes of the storages, other than parameters', that a forward pass saves for the backward pass."""
    model = GPT(config)
    model.init_weights(0)
    model.activation_checkpointing = activation_checkpointing
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    idx = torch.zeros(rows, config.sequence_len, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(idx, idx, reduction="sum")
    assert loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in parameters)


def test_activation_checkpointing_keeps_the_input_of_each_layer():
    """One vector per token and layer, where the plain pass keeps about twenty."""
    configs = [GPTConfig(sequence_len=64, vocab_size=512, n_layer=n, n_head=2, n_embd=64) for n in (4, 8)]
    vectors = 2 * 64 * 64 * 4
    plain, checkpointed = ([kept_bytes(c, 2, on) for c in configs] for on in (False, True))
    assert checkpointed[1] - checkpointed[0] == 4 * vectors
    assert plain[1] - plain[0] > 4 * 18 * vectors
