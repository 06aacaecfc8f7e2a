"""Memory: the formula against the peak of a process that trains, measured from outside the formula; and what activation
checkpointing keeps.
"""

import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from nanolab.model import accounting
from nanolab.model.config import GPTConfig
from nanolab.model.gpt import GPT
from nanolab.runtime import DTYPES, Runtime
from nanolab.stages.config import BaseTrainConfig
from nanolab.training import groups
from nanolab.training.optim import MuonAdamW
from nanolab.training.recipes import param_groups
from nanolab.training.schedule import make_plan

TRAIN = """
import sys, torch
from nanolab.stages.config import BaseTrainConfig
from nanolab.model.gpt import GPT
from nanolab.runtime import Runtime, keep_freed_memory
from nanolab.training.optim import MuonAdamW
from nanolab.training.recipes import param_groups
from nanolab.training.schedule import make_plan
runtime = Runtime(torch.device("cpu"), torch.float32)
keep_freed_memory()
if sys.argv[2]:
    import torch._dynamo  # torch.utils.checkpoint takes it along, some 100 MB of code
before, rows = runtime.peak_memory_mib(), int(sys.argv[1])
cfg = BaseTrainConfig(depth=4, head_dim=64, max_seq_len=256)
plan = make_plan(cfg, 4096, 1)
model = GPT(plan.model)
model.init_weights(1)
model.activation_checkpointing = bool(sys.argv[2])
optimizer = MuonAdamW(param_groups(model, cfg, plan), runtime)
for _ in range(2):
    idx = torch.randint(0, 4096, (rows, 256))
    (model(idx, idx, reduction="sum") / idx.numel()).backward()
    optimizer.step()
    optimizer.zero_grad()
print(runtime.peak_memory_mib() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "rows, again",
    [(8, False), pytest.param(24, False, marks=pytest.mark.slow), pytest.param(24, True, marks=pytest.mark.slow)],
)
def test_predicted_peak_is_near_the_measured(rows, again):
    measured = float(
        subprocess.run(
            [sys.executable, "-c", TRAIN, str(rows), "again" * again], capture_output=True, text=True, check=True
        ).stdout
    )
    config = GPTConfig(sequence_len=256, vocab_size=4096, n_layer=4, n_head=4, n_embd=256)
    assert accounting.peak_bytes(
        accounting.train_memory(config, rows, 4, activation_checkpointing=again)
    ) / 2**20 == pytest.approx(measured, rel=0.4)


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


class Live(TorchDispatchMode):
    """Counts the bytes of the storages that operators make within it, while they live; `peak` is the most at once."""

    def __init__(self):
        super().__init__()
        self.made, self.peak = WeakIdKeyDictionary(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = function(*args, **(kwargs or {}))
        for storage in (t.untyped_storage() for t in tree_leaves(out) if isinstance(t, torch.Tensor)):
            if storage._cdata not in given:
                self.made[storage] = storage.nbytes()
        self.peak = max(self.peak, sum(self.made.values()))
        return out


def optimizer_bytes(runtime: Runtime) -> list[tuple[tuple[int, int], int, int]]:
    """For some recipes and sizes of stacks: (state and step of this rank's optimizer by the plan, bytes of its state,
    peak of the bytes that a step makes).
    """
    found = []
    for recipe, chunk in (("dial", groups.BIG_CHUNK), ("dial", 100_000), ("adamw_cosine", groups.BIG_CHUNK)):
        groups.CHUNK["cpu"] = chunk
        cfg = BaseTrainConfig(
            depth=5,
            head_dim=32,
            aspect_ratio=24,
            max_seq_len=64,
            recipe=recipe,
            device_batch_size=2,
            total_batch_size=1536,
        )
        plan = make_plan(cfg, 1000, runtime.world_size)
        with torch.device("meta"):
            planned = MuonAdamW(
                param_groups(GPT(plan.model), cfg, plan),
                Runtime(runtime.device, runtime.dtype, world_size=runtime.world_size),
            ).memory()
        model = GPT(plan.model)
        model.init_weights(0)
        optimizer = MuonAdamW(param_groups(model, cfg, plan), runtime)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        with Live() as live:
            optimizer.step()
        found.append(
            (planned, sum(t.nbytes for name, t in optimizer.state_dict().items() if name != "step"), live.peak)
        )
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "ranks, dtype",
    [(1, "float32"), (1, "bfloat16"), (2, "float32"), pytest.param(3, "bfloat16", marks=pytest.mark.slow)],
)
@pytest.mark.fault("core likely: Memory plan without communication")
def test_the_plan_knows_what_the_optimizer_holds(run_ranks, monkeypatch, ranks, dtype):
    """Its state to the byte. The peak of a step, of every storage that an operator makes in it on the rank with most,
    is not above the plan (by small vectors at most), nor far below it: gloo may let go of a message sooner or later."""
    monkeypatch.setattr(groups, "CHUNK", dict(groups.CHUNK))
    alone = Runtime(torch.device("cpu"), DTYPES[dtype])
    found = [optimizer_bytes(alone)] if ranks == 1 else run_ranks(optimizer_bytes, ranks, dtype=dtype)
    for case in zip(*found):
        (state, step), held, peak = case[0][0], case[0][1], max(peak for _, _, peak in case)
        assert {planned for planned, _, _ in case} == {(state, step)} and state == held
        assert 0.85 * step <= peak < 1.03 * step + 50_000, case


def test_parts_that_are_not_there_at_once_are_not_added():
    c = GPTConfig(sequence_len=64, vocab_size=512, n_layer=4, n_head=2, n_embd=64)
    memory = accounting.train_memory(c, 2, 4, optimizer=(1000, 10**9))
    assert accounting.peak_bytes(memory) == memory["weights"] + memory["gradients"] + 1000 + 10**9
    assert (
        accounting.peak_bytes(memory | {"step": 0})
        == memory["weights"] + memory["gradients"] + 1000 + memory["activations"]
    )
