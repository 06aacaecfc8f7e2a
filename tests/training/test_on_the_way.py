"""What base_train and chat_sft measure while they train, and their plan of memory: on what model, and against what
statistics.
"""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nanolab.data.tokenizer import Tokenizer
from nanolab.records.models import read_metrics, runs_dir
from nanolab.runtime import Runtime
from nanolab.stages import pretrain as stage
from nanolab.stages import sft as tuning
from nanolab.stages.config import BaseTrainConfig, SFTConfig
from nanolab.stages.pretrain_plan import planned_memory
from nanolab.training.meter import Meter
from nanolab.training.saving import LoopState
from nanolab.training.schedule import make_plan

spec = importlib.util.spec_from_file_location("nanolab_tests_pretrained", Path(__file__).with_name("pretrained.py"))
pretrained = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pretrained)

ALONE = Runtime(torch.device("cpu"), torch.float32)
TINY = dict(
    depth=1,
    aspect_ratio=32,
    head_dim=32,
    max_seq_len=64,
    device_batch_size=2,
    total_batch_size=256,
    warmup_steps=0,
    lr_scale=0.1,
    device_type="cpu",
)


class Compiled(torch.nn.Module):
    """Stands in for torch.compile(model): it counts the rows of every call, by whether gradients are wanted."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model, self.rows = model, {True: [], False: []}

    def forward(self, x, y, reduction):
        self.rows[torch.is_grad_enabled()].append(len(x))
        return self.model(x, y, reduction=reduction)


@pytest.mark.slow
@pytest.mark.fault("core likely: Evaluation while training is uncompiled")
def test_evaluations_run_on_the_compiled_model_in_batches_of_one_shape(tmp_path, monkeypatch):
    """Stages share the seam `runtime.compiled`. Both give the figures of the plain model, to rounding."""
    made = []
    text = pretrained.write_text(tmp_path / "text")
    Tokenizer.train((p.read_text() for p in sorted(text.glob("*.txt"))), 300).save(tmp_path / "tokenizer")
    flags = TINY | dict(
        data_dir=str(text),
        tokenizer=str(tmp_path / "tokenizer"),
        num_iterations=2,
        eval_every=2,
        eval_tokens=900,
        sample_every=-1,
    )
    chats = tmp_path / "chats.jsonl"
    chats.write_text(
        "".join(
            f'[{{"role": "user", "content": "{i} times what"}}, {{"role": "assistant", "content": "it was not'
            ' hers"}]\n'
            for i in range(60)
        )
    )
    chat = dict(tasks=f"jsonl={chats}", num_iterations=2, eval_every=2, eval_tokens=300, device_type="cpu")
    measured = {}
    for name in ("plain", "compiled"):
        if name == "compiled":
            for module in (stage, tuning):
                monkeypatch.setattr(module, "compiled", lambda model, device: made.append(Compiled(model)) or made[-1])
        stage.pretrain(BaseTrainConfig(run=name, **flags), ALONE)
        tuning.sft(SFTConfig(model="plain", run=f"{name}-sft", **chat), ALONE)
        measured[name] = [
            row[key]
            for run in (name, f"{name}-sft")
            for row in read_metrics(runs_dir() / run)
            for key in ("val/bpb", "val/loss")
            if row.get(key) is not None
        ]
    assert len(measured["plain"]) == 6 and measured["compiled"] == pytest.approx(measured["plain"], rel=1e-6)
    assert len(made) == 2 and all(set(step_model.rows[False]) == {2} for step_model in made)


class Device(Runtime):
    """A CPU that says it is a GPU, and what torch.cuda.max_memory_allocated says there."""

    @property
    def device(self):
        return SimpleNamespace(type="cuda")

    def peak_memory_mib(self) -> float:
        return 9 * 2**10


@pytest.mark.fault("core likely: Memory plan without communication")
def test_the_plan_of_memory_is_printed_beside_the_devices_statistics(capsys):
    for rt, said in ((object.__new__(Device), True), (ALONE, False)):
        Meter(SimpleNamespace(num_iterations=None), rt, None, planned_bytes=12 * 2**30).print_measured(
            LoopState(), None
        )
        out = capsys.readouterr().out
        assert ("9.0 GiB" in out and "12.0 GiB (-25%)" in out) if said else not out


@pytest.mark.fault("core likely: Memory plan without communication")
def test_the_plan_for_other_hardware_counts_what_ranks_exchange():
    """Depth 24 on 8 GPUs: Muon's stack of all matrix gradients, and a rank's share twice, in fp32."""
    cfg = BaseTrainConfig(depth=24, device_batch_size=16)
    plan = make_plan(cfg, 32768, 8)
    memory = planned_memory(cfg, plan, "cuda", "bfloat16")
    matrices = 4 * 679_477_248  # in blocks of 1536 columns, without the gates
    assert memory["weights"] == memory["gradients"] == 4 * 1_384_122_122
    assert memory["step"] > matrices * (1 + 2 / 8)
    assert planned_memory(cfg, make_plan(cfg, 32768, 1), "cuda", "bfloat16")["step"] < matrices, (
        "one rank exchanges nothing"
    )
    again = planned_memory(
        BaseTrainConfig(depth=24, device_batch_size=16, activation_checkpointing=True), plan, "cuda", "bfloat16"
    )
    assert again["activations"] < memory["activations"] / 3 and again | {"activations": 0} == memory | {
        "activations": 0
    }
