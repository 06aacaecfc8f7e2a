"""Checkpoints: whole or invisible, whatever happens while they are written.

Run as a script this file is the process that the tests kill or starve of disk.
"""

import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import warm
from safetensors.torch import load_file

from nanolab.cli import UserError
from nanolab.records import checkpoint
from nanolab.records.checkpoint import CheckpointError
from nanolab.runtime import Runtime

ALONE = Runtime(torch.device("cpu"), torch.float32)


def tensors(seed: int, numel: int = 1000) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {"wte.weight": torch.randn(numel, 2, generator=g), "lambda": torch.randn(1, generator=g)}


def save(root: Path, step: int, runtime: Runtime = ALONE, numel: int = 1000) -> Path:
    state = {
        f"wte.weight/exp_avg@{runtime.rank * 5}:{runtime.rank * 5 + 5}": torch.full((5,), float(step + runtime.rank))
    }
    return checkpoint.save(
        root, step, weights=tensors(step, numel), optimizer=state, meta={"loop": {"step": step}}, runtime=runtime
    )


def child(*args: object) -> subprocess.CompletedProcess:
    return warm.python(__file__, *args)


def hidden(root: Path) -> list[str]:
    return [p.name for p in root.iterdir() if p.name.startswith(".")]


def test_what_is_saved_is_loaded(tmp_path):
    path = save(tmp_path, 7)
    assert path.name == "step_000007" and not hidden(tmp_path)
    assert {p.name for p in path.iterdir()} == {
        "model.safetensors",
        "optim_rank0.safetensors",
        "meta.json",
        "manifest.json",
    }
    assert len({p.stat().st_mode for p in path.iterdir()}) == 1  # who may read one may read all
    for name, value in load_file(path / "model.safetensors").items():
        assert torch.equal(value, tensors(7)[name])
    assert checkpoint.load_weights(path).keys() == tensors(7).keys()
    assert checkpoint.load_meta(path)["loop"] == {"step": 7} and checkpoint.load_meta(path)["step"] == 7
    shards = checkpoint.load_optimizer(path)
    assert list(shards) == ["wte.weight/exp_avg@0:5"] and shards["wte.weight/exp_avg@0:5"].tolist() == [7.0] * 5
    manifest = json.loads((path / "manifest.json").read_text())
    for name in ("model.safetensors", "optim_rank0.safetensors", "meta.json"):
        content = (path / name).read_bytes()
        assert manifest["files"][name] == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_generators_go_on_where_they_were(tmp_path):
    torch.manual_seed(3)
    torch.rand(10)
    path = save(tmp_path, 1)
    expected = torch.rand(5)
    torch.manual_seed(99)
    checkpoint.restore_rng(path, ALONE)
    assert torch.equal(torch.rand(5), expected)


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "manifest.json"),
    "torn manifest": (lambda p: (p / "manifest.json").write_text('{"format": 1, "fi'), "manifest.json"),
    "manifest of something else": (lambda p: (p / "manifest.json").write_text("[]"), "manifest.json"),
    "manifest without files": (
        lambda p: (p / "manifest.json").write_text('{"format": 1, "files": {}}'),
        "expected -1|damaged",
    ),
    "another format": (lambda p: (p / "manifest.json").write_text('{"format": 2, "files": {}}'), "format 2"),
    "truncated": (lambda p: os.truncate(p / "model.safetensors", 100), "model.safetensors has 100 bytes"),
    "flipped byte": (lambda p: flip_a_byte(p / "model.safetensors"), "model.safetensors"),
    "flipped byte of the optimizer": (lambda p: flip_a_byte(p / "optim_rank0.safetensors"), "optim_rank0"),
    "missing file": (lambda p: (p / "meta.json").unlink(), "meta.json is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_named_and_skipped(tmp_path, capsys, damage):
    old, new = save(tmp_path, 9), save(tmp_path, 10)
    assert checkpoint.newest_valid(tmp_path) == new
    break_it, text = DAMAGES[damage]
    break_it(new)
    with pytest.raises(CheckpointError, match=text) as error:
        checkpoint.verify(new)
    assert str(new) in str(error.value)
    capsys.readouterr()
    assert checkpoint.newest_valid(tmp_path) == old
    assert str(new) in capsys.readouterr().out
    break_it(old)
    assert checkpoint.newest_valid(tmp_path) is None


def test_a_damaged_one_is_replaced_by_the_same_step(tmp_path):
    path = save(tmp_path, 5)
    flip_a_byte(path / "model.safetensors")
    checkpoint.verify(save(tmp_path, 5))
    assert [s for s, _ in checkpoint.steps(tmp_path)] == [5] and not hidden(tmp_path)


def test_weights_alone_can_be_verified_without_the_optimizer(tmp_path):
    path = save(tmp_path, 5)
    (path / "optim_rank0.safetensors").unlink()
    checkpoint.verify(path, ("model.safetensors", "meta.json"))
    with pytest.raises(CheckpointError, match="optim_rank0"):
        checkpoint.verify(path)


def test_steps_are_in_order_of_number(tmp_path):
    for step in (1_000_000, 9, 999_999):
        save(tmp_path, step)
    (tmp_path / "step_old").mkdir()
    assert [s for s, _ in checkpoint.steps(tmp_path)] == [9, 999_999, 1_000_000]
    assert checkpoint.steps(tmp_path / "nowhere") == []


def test_what_a_killed_save_left_is_removed_by_the_next(tmp_path):
    for left in (".tmp-step_000003", ".tmp-step_000004", ".tmp-removed-step_000001"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "optim_rank9.safetensors").write_bytes(b"half")
    assert not (save(tmp_path, 4) / "optim_rank9.safetensors").exists() and not hidden(tmp_path)


@pytest.mark.parametrize(
    "keep,best,left",
    [
        (2, None, [4, 5]),
        ("2", 1, [1, 4, 5]),
        (1, 5, [5]),
        (1, 4, [4, 5]),
        ("all", None, [1, 2, 3, 4, 5]),
        (9, None, [1, 2, 3, 4, 5]),
    ],
)
def test_retention_keeps_the_last_and_the_best(tmp_path, keep, best, left):
    for step in range(1, 6):
        save(tmp_path, step)
    checkpoint.retain(tmp_path, keep, best)
    assert [s for s, _ in checkpoint.steps(tmp_path)] == left and not hidden(tmp_path)
    for _, path in checkpoint.steps(tmp_path):
        checkpoint.verify(path)


def test_retention_does_not_count_a_damaged_one(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    os.truncate(tmp_path / "step_000003" / "model.safetensors", 10)
    checkpoint.retain(tmp_path, 1)
    assert [s for s, _ in checkpoint.steps(tmp_path)] == [2, 3]


def test_full_disk_is_one_message_and_loses_nothing(tmp_path):
    process = child("starve", tmp_path)
    err = process.stderr
    assert process.returncode == 1, err
    assert (
        err.startswith("error [checkpoint-not-written]: the checkpoint of step 2 could not be written to ")
        and err.count("\n") == 1
    )
    assert "File too large" in err and "0.8 MB" in err and "--resume" in err and str(tmp_path) in err
    assert checkpoint.newest_valid(tmp_path) == tmp_path / "step_000001"
    assert [s for s, _ in checkpoint.steps(tmp_path)] == [1] and not hidden(tmp_path)


def starve(root: Path) -> None:
    from nanolab.cli import main

    save(root, 1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
    main(lambda: save(root, 2, numel=100_000))


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="Not a directory"):
        save(tmp_path / "file" / "checkpoints", 1)


@pytest.mark.parametrize("kills", [5, pytest.param(60, marks=pytest.mark.slow)])
def test_kill_at_any_moment_leaves_only_whole_checkpoints(tmp_path, kills):
    process = child("kill_loop", tmp_path, kills)
    assert process.returncode == 0, process.stderr
    report = json.loads(process.stdout.splitlines()[-1])
    assert report["kills"] >= kills and report["invalid"] == [] and report["saved"] >= 1
    assert report["torn"] >= 1, "no kill hit a save: the test shows nothing"


def kill_loop(root: Path, kills: int) -> None:
    """Fork a process that saves without end, kill it after a random time, look at what can be seen; again and again,
    and on a busy machine until a kill has hit a save.
    """
    rng, invalid, torn, done = random.Random(1), [], 0, 0
    save(root, 1, numel=200_000)
    while done < kills or (not torn and done < 20 * kills):
        done += 1
        pid = os.fork()
        if pid == 0:
            step, writer = checkpoint.steps(root)[-1][0], checkpoint.Writer(ALONE)
            while True:
                step += 1
                writer.save(root, step, weights=tensors(step, 200_000), optimizer={"a@0:5": torch.zeros(5)}, meta={})
                writer.wait()
                checkpoint.retain(root, 2)
        time.sleep(rng.uniform(0.01, 0.12))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        torn += bool(hidden(root))
        if checkpoint.newest_valid(root) is None:
            invalid.append("none left")
        for _, path in checkpoint.steps(root):
            try:
                checkpoint.verify(path)
            except CheckpointError as error:
                invalid.append(str(error))
    print(json.dumps({"kills": done, "invalid": invalid, "torn": torn, "saved": checkpoint.steps(root)[-1][0]}))


def test_two_ranks_write_one_checkpoint_or_none(tmp_path, run_ranks):
    for text in run_ranks(two_ranks, 2, tmp_path):
        assert text.startswith("the checkpoint of step 2") and "(rank 1)" in text and "File too large" in text
    path = tmp_path / "step_000001"
    assert (
        checkpoint.newest_valid(tmp_path) == path
        and [s for s, _ in checkpoint.steps(tmp_path)] == [1]
        and not hidden(tmp_path)
    )
    shards = checkpoint.load_optimizer(path)
    assert {k: v[0].item() for k, v in shards.items()} == {
        "wte.weight/exp_avg@0:5": 1.0,
        "wte.weight/exp_avg@5:10": 2.0,
    }
    (path / "optim_rank1.safetensors").unlink()
    with pytest.raises(CheckpointError, match="optim_rank1"):
        checkpoint.verify(path)


def two_ranks(runtime: Runtime, root: Path) -> str:
    writer, weights = checkpoint.Writer(runtime), tensors(1)
    writer.save(
        root,
        1,
        weights=weights,
        optimizer={
            f"wte.weight/exp_avg@{runtime.rank * 5}:{runtime.rank * 5 + 5}": torch.full((5,), 1.0 + runtime.rank)
        },
        meta={},
    )
    for value in weights.values():
        value.zero_()  # by the next steps, whose messages do not meet those of the threads
    steps = 0
    while not writer.done():
        steps += 1
        assert runtime.all_reduce_(torch.tensor(float(runtime.rank))).item() == 1.0
    writer.wait()
    assert len(set(runtime.gather_objects(steps))) == 1, "the ranks end it at the same step"
    same = checkpoint.load_weights(root / "step_000001")
    assert all(torch.equal(same[name], value) for name, value in tensors(1).items())
    if runtime.rank == 1:  # below the size of this rank's file: its generator state alone is 5 kB
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    with pytest.raises(UserError) as error:
        save(root, 2, runtime)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return str(error.value)


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"starve": starve, "kill_loop": kill_loop}[sys.argv[1]](Path(sys.argv[2]), *map(int, sys.argv[3:]))
