"""A run goes on wherever its data, its base directory or its files went: contents are compared, not names. What differs
is refused by name.
"""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from nanolab.cli import UserError
from nanolab.data.corpus import open_data
from nanolab.data.tokenizer import Tokenizer
from nanolab.records import checkpoint
from nanolab.records.models import read_metrics, runs_dir
from nanolab.runtime import Runtime
from nanolab.stages import pretrain as stage
from nanolab.stages.config import BaseTrainConfig, SFTConfig
from nanolab.stages.sft import sft

spec = importlib.util.spec_from_file_location("nanolab_tests_pretrained", Path(__file__).with_name("pretrained.py"))
pretrained = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pretrained)

ALONE = Runtime(torch.device("cpu"), torch.float32)
TINY = {
    "depth": 1,
    "aspect_ratio": 32,
    "head_dim": 32,
    "max_seq_len": 64,
    "device_batch_size": 2,
    "total_batch_size": 256,
    "warmup_steps": 0,
    "lr_scale": 0.1,
}
FLAGS = TINY | {
    "num_iterations": 4,
    "save_every": 2,
    "keep": "all",
    "eval_every": 2,
    "eval_tokens": 500,
    "sample_every": -1,
    "log_every": 1,
    "device_type": "cpu",
}


@pytest.fixture
def text(tmp_path) -> Path:
    """A folder whose validation text was drawn when it held half of its 60 files, and a tokenizer beside it."""
    folder = pretrained.write_text(tmp_path / "text")
    later = [path.rename(tmp_path / path.name) for path in sorted(folder.glob("*.txt"))[30:]]
    open_data(BaseTrainConfig(data_dir=str(folder)))
    for path in later:
        path.rename(folder / path.name)
    Tokenizer.train((p.read_text() for p in sorted(folder.glob("*.txt"))), 300).save(tmp_path / "tokenizer")
    return folder


def pretrain(text: Path | str, run: str = "x", **flags) -> None:
    where = {"data_dir": str(text), "tokenizer": str(Path(pretrain.home) / "tokenizer")}
    stage.pretrain(BaseTrainConfig(**FLAGS | where | {"run": run} | flags), ALONE)


@pytest.fixture
def begun(text, tmp_path):
    """The run "x" at step 2, and a function that tells whether it has become the uninterrupted one, to the bit."""
    pretrain.home = tmp_path
    return stopped(lambda: pretrain(text), "x")


def stopped(begin, name: str):
    begin()
    folder = runs_dir() / name
    whole = story(folder)
    (folder / "result.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "step_000004")
    return lambda: story(runs_dir() / name) == whole


def story(folder: Path) -> tuple:
    rows = [
        {k: v for k, v in row.items() if k in ("step", "train/loss", "val/bpb", "val/loss")}
        for row in read_metrics(folder)
    ]
    weights = checkpoint.load_weights(folder / "checkpoints" / "step_000004")
    return rows, {name: value.tolist() for name, value in weights.items()}


def moved(path: Path, name: str = "elsewhere/corpus") -> Path:
    (path.parent / name).parent.mkdir(parents=True, exist_ok=True)
    return path.rename(path.parent / name)


@pytest.mark.slow
@pytest.mark.fault("F9")
@pytest.mark.parametrize("old", [False, True])
def test_the_data_folder_moves(begun, text, old):
    """Its validation text was drawn from a part of it: drawn anew it would be another. old: a run that keeps nothing of
    its data.
    """
    if old:
        shutil.rmtree(runs_dir() / "x" / "data", ignore_errors=True)
    pretrain(moved(text), resume=True)
    assert begun()


@pytest.mark.slow
@pytest.mark.fault("F9")
def test_the_run_alone_goes_to_another_base_directory(begun, text, tmp_path, monkeypatch):
    shutil.copytree(runs_dir() / "x", tmp_path / "other" / "runs" / "x")
    shutil.rmtree(tmp_path / "base")
    monkeypatch.setenv("NANOLAB_BASE_DIR", str(tmp_path / "other"))
    pretrain(moved(text), resume=True, tokenizer=str(tmp_path / "gone"))
    assert begun()


def test_a_file_gets_a_name_that_keeps_the_order(begun, text):
    names = sorted(path.name for path in text.glob("*.txt"))
    (text / names[-1]).rename(text / f"{names[-1]}.renamed.txt")
    pretrain(text, resume=True)
    assert begun()


@pytest.mark.slow
@pytest.mark.fault("F9")
def test_a_name_that_changes_the_order_is_refused_with_both_names(begun, text):
    first, second = sorted(path.name for path in text.glob("*.txt"))[:2]
    (text / first).rename(text / "zzz.txt")
    with pytest.raises(UserError, match=f"{first}.*{second}") as error:
        pretrain(text, resume=True)
    assert error.value.code == "data-reordered" and error.value.values == {"then": first, "now": second}
    (text / "zzz.txt").rename(text / first)
    pretrain(text, resume=True)
    assert begun()


@pytest.mark.slow
@pytest.mark.fault("F9")
@pytest.mark.parametrize("kind", ["changed", "added", "missing"])
def test_other_data_is_refused_with_the_names_of_the_files(begun, text, kind):
    held_out = set(open_data(BaseTrainConfig(data_dir=str(text))).val.iterate())
    path = [p for p in sorted(text.glob("*.txt")) if p.read_text() not in held_out][0]
    if kind == "missing":
        path.unlink()
    else:
        path = path if kind == "changed" else text / "new.txt"
        path.write_text("something else")
    with pytest.raises(UserError, match=path.name) as error:
        pretrain(moved(text), resume=True)
    assert error.value.code == "data-changed" and error.value.values == {"changed": [], "added": [], "missing": []} | {
        kind: [path.name]
    }


@pytest.mark.fault("F9")
def test_a_mixture_of_folders_moves(text, tmp_path):
    pretrain.home = tmp_path
    more = pretrained.write_text(tmp_path / "more")
    (more / "0.txt").write_text("It was said at all.")
    same = stopped(lambda: pretrain("", data=f"{text}:0.7,{more}:0.3"), "x")
    with pytest.raises(UserError, match="--data was"):
        pretrain("", data=f"{text}:0.6,{more}:0.4", resume=True)
    pretrain("", data=f"{moved(text)}:0.7,{moved(more, 'z.d/more')}:0.3", resume=True)
    assert same()


@pytest.mark.fault("F9")
def test_a_moved_tokenizer_is_not_needed_and_another_is_not_read(begun, text, tmp_path, capsys):
    (tmp_path / "tokenizer").rename(tmp_path / "gone")
    Tokenizer.train(["another one"], 265).save(tmp_path / "tokenizer")
    pretrain(text, resume=True)
    assert begun() and f"--tokenizer {tmp_path / 'tokenizer'} is another one now" in capsys.readouterr().out


# --- chats ------------------------------------------------------------------------------------------------------------


def write_chats(path: Path, n: int = 60) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    chats = [
        [{"role": "user", "content": f"{i} times what"}, {"role": "assistant", "content": "it was not hers"}]
        for i in range(n)
    ]
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    return path


def tune(tasks: str, **flags) -> None:
    common = {
        "model": "b",
        "run": "s",
        "tasks": tasks,
        "num_iterations": 4,
        "save_every": 2,
        "keep": "all",
        "eval_every": 2,
        "eval_tokens": 300,
        "replay": 0.25,
        "device_type": "cpu",
    }
    cfg = SFTConfig(**common | flags)
    sft(cfg, ALONE)


@pytest.mark.slow
@pytest.mark.fault("F9")
def test_pretraining_text_that_is_only_measured_may_be_gone(text, tmp_path, monkeypatch, capsys):
    """The validation text is kept with the run; without it the same is refused, with advice."""
    pretrained.pretrain("b", text, ALONE, **TINY)
    chats = write_chats(tmp_path / "chats.jsonl")
    same = stopped(lambda: tune(f"jsonl={chats}", replay=0.0), "s")
    moved(text)
    tune(f"jsonl={chats}", replay=0.0, resume=True)
    assert same() and "kept with the run" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.fault("F9")
@pytest.mark.parametrize("stages", [False, True])
def test_a_file_of_chats_moves(text, tmp_path, stages):
    pretrained.pretrain("b", text, ALONE, **TINY)
    chats = write_chats(tmp_path / "chats.jsonl")

    def flags(path: Path) -> dict:
        if not stages:
            return {"tasks": f"jsonl={path}:2"}
        toml = path.with_suffix(".toml")
        toml.write_text(f'[[stage]]\ntasks = "jsonl={path}:2"\n')
        return {"tasks": "unused", "stages": str(toml)}

    same = stopped(lambda: tune(**flags(chats)), "s")
    other = write_chats(tmp_path / "other" / "chats.jsonl", 61)
    with pytest.raises(UserError):
        tune(**flags(other), resume=True)
    tune(**flags(moved(chats, "x.y/here@9.jsonl")), resume=True)
    assert same()


def test_flags_without_their_paths():
    from nanolab.records.run import without_paths

    for a, b, same in (
        ("jsonl=/a/b.jsonl:2,gsm8k", "jsonl=c:\\d@x.jsonl:2,gsm8k", True),
        ("jsonl=a.jsonl@9:2", "jsonl=b.jsonl@9:2", True),
        ("jsonl=a.jsonl@9", "jsonl=a.jsonl@8", False),
        ("jsonl=a.jsonl:2", "jsonl=a.jsonl:3", False),
        ("gsm8k:2", "mmlu:2", False),
        ("jsonl=a,gsm8k", "jsonl=a,mmlu", False),
        ("pydocs", "tinystories", False),
        ("/a/b:0.3,pydocs:0.7", "./c.txt:0.3,pydocs:0.7", True),
        ("/a/b:0.3,pydocs:0.7", "/a/b:0.4,pydocs:0.6", False),
        ("identity=a.toml", "jsonl=a.toml", False),
    ):
        assert (without_paths(a) == without_paths(b)) == same, (a, b)
