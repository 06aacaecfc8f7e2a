"""The memory formula against the peak of a process that trains, measured from outside the formula: the resident size."""

import subprocess
import sys

import pytest

from nanolab.config import GPTConfig
from nanolab.model.accounting import train_memory_bytes

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
