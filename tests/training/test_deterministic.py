"""--deterministic: the same numbers each time. What a CPU can show of it, and the run on a GPU."""

from pathlib import Path

import pytest
import torch
import warm
from torch.utils._python_dispatch import TorchDispatchMode

from nanolab.data.tokenizer import Tokenizer
from nanolab.model.config import GPTConfig
from nanolab.model.gpt import cross_entropy
from nanolab.records.models import read_json, read_metrics, runs_dir
from nanolab.runtime import Runtime
from nanolab.stages.config import BaseTrainConfig
from nanolab.training.optim import MuonAdamW
from nanolab.training.recipes import param_groups
from nanolab.training.schedule import make_plan

ROOT = Path(__file__).parents[2]
# In aten's words, what torch.use_deterministic_algorithms refuses on CUDA, of what a language model could use; of sums
# along an axis, those of floats.
REFUSED = {
    "cumsum",
    "cumsum_",
    "put",
    "put_",
    "histc",
    "bincount",
    "median",
    "nanmedian",
    "kthvalue",
    "nll_loss2d_forward",
    "_embedding_bag",
}
MODELS = {
    "default": {},
    "alibi": {"positions": "alibi"},
    "latent": {"attention": "mla", "value_embeds": False},
    "sinks": {"softmax": "sink"},
    "documents": {"document_mask": True, "bos": 3, "positions": "learned"},
    "softcap": {"score_softcap": 20.0},
    "dropout": {"attn_dropout": 0.1, "embed_dropout": 0.1, "resid_dropout": 0.1, "mlp_dropout": 0.1},
}


class Operations(TorchDispatchMode):
    """The names of aten's operations that are called inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if not name.startswith("cumsum") or args[0].is_floating_point():
            self.names.add(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.fault("core D5")
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_nothing_in_a_step_is_refused_on_gpus(make_gpt, changes):
    """Forward, backward and both optimizers."""
    flags = BaseTrainConfig(
        num_iterations=4, total_batch_size=64, device_batch_size=2, max_seq_len=32, depth=2, deterministic=True
    )
    model = make_gpt(
        GPTConfig(sequence_len=32, vocab_size=64, n_layer=3, n_head=2, n_embd=32, window_size=9, **changes)
    )
    model.loss = cross_entropy  # the blocked loss is for CPUs
    ids = torch.randint(64, (2, 33), generator=torch.Generator().manual_seed(0))
    optimizer = MuonAdamW(
        param_groups(model, flags, make_plan(flags, 64, 1)), Runtime(torch.device("cpu"), torch.float32)
    )
    with Operations() as seen:
        model(ids[:, :-1], ids[:, 1:], reduction="sum").backward()
        optimizer.grad_norm(1.0)
        optimizer.step()
    assert len(seen.names) > 20 and not seen.names & REFUSED


def trained(folder: Path, run: str, **flags) -> tuple[list[float], dict]:
    """(losses, result) of a tiny run in a process of its own, as CUDA starts once in a process."""
    typed = {
        "run": run,
        "data-dir": folder / "text",
        "tokenizer": folder / "tokenizer",
        "depth": 2,
        "aspect-ratio": 64,
        "head-dim": 64,
        "max-seq-len": 128,
        "device-batch-size": 8,
        "total-batch-size": 4 * 8 * 128,
        "num-iterations": 12,
        "eval-every": -1,
        "sample-every": -1,
        "save-every": 6,
        "keep": "all",
    } | flags
    words = [str(word) for name, value in typed.items() for word in (f"--{name}", value) if word != ""]
    done = warm.python("-m", "scripts.base_train", "--deterministic", *words)
    assert done.returncode == 0, done.stderr[-2000:]
    folder = runs_dir() / run
    return [row["train/loss"] for row in read_metrics(folder) if "train/loss" in row], read_json(folder / "result.json")


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("\n".join(f"document number {n}; " * (n % 13 + 1) for n in range(4000)))
    Tokenizer.train([], 265).save(tmp_path / "tokenizer")
    return tmp_path


@pytest.mark.slow
@pytest.mark.fault("core D5")
def test_on_a_cpu_it_changes_nothing(text):
    small = {"device-type": "cpu", "num-iterations": 3, "aspect-ratio": 16, "head-dim": 16}
    deterministic, _ = trained(text, "a", **small)
    plain, result = trained(text, "b", **small, **{"no-deterministic": ""})
    assert deterministic == plain and "compile_seconds" not in result


@pytest.mark.gpu
def test_on_a_gpu_a_run_repeats_to_the_bit_and_so_does_a_resumed_one(text):
    """core D5; and D6 and D8: few steps wait for data, compiling is no training time."""
    one, result = trained(text, "a")
    two, _ = trained(text, "b")
    assert one == two
    assert (
        0 < result["compile_seconds"]
        and result["total_training_time"] < result["compile_seconds"]
        and result["steps_waited"] < 12
    )
    folder = runs_dir() / "b"
    (folder / "result.json").unlink()
    for path in (folder / "checkpoints" / "step_000012").iterdir():
        path.unlink()
    (folder / "checkpoints" / "step_000012").rmdir()
    again, _ = trained(text, "b", resume="")
    assert again == one
