"""dev/bench/gpu.py: what is kept of each piece, and where the next call goes on. The pieces themselves: gpu.sh
--rehearse.
"""

import importlib.util
import json
import subprocess
from pathlib import Path

import pytest


@pytest.fixture
def gpu(monkeypatch):
    spec = importlib.util.spec_from_file_location(
        "nanolab_dev_gpu", Path(__file__).parents[1] / "dev" / "bench" / "gpu.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.git_commit = lambda: "abc"
    called = module.called = []
    for name in module.ORDER:
        monkeypatch.setattr(module.Pieces, name, lambda self, name=name: called.append(name) or {"from": name})
    return module


def run(gpu, monkeypatch, out: Path, *flags: str) -> int:
    monkeypatch.setattr("sys.argv", ["gpu.py", "--out", str(out), *flags])
    gpu.called.clear()
    return gpu.main()


def test_each_piece_is_kept_as_it_ends_and_a_later_call_goes_on(gpu, monkeypatch, tmp_path):
    def cut(self):
        raise subprocess.TimeoutExpired("python", 1)

    def broken(self):
        raise RuntimeError("no such kernel")

    with monkeypatch.context() as patch:
        patch.setattr(gpu.Pieces, "feeding", cut)
        patch.setattr(gpu.Pieces, "twice", broken)
        assert run(gpu, monkeypatch, tmp_path) == 1
    kept = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert set(kept) == {name.replace("_", "-") for name in gpu.ORDER} and kept["speed"]["result"] == {"from": "speed"}
    assert "result" not in kept["feeding"] and "no such kernel" in kept["twice"]["error"]
    assert run(gpu, monkeypatch, tmp_path) == 0 and gpu.called == ["feeding", "twice"]
    gpu.git_commit = lambda: "def"  # other code: everything again
    assert run(gpu, monkeypatch, tmp_path) == 0 and gpu.called == list(gpu.ORDER)


def test_what_does_not_fit_is_left_and_failed_tests_are_told(gpu, monkeypatch, tmp_path):
    assert (
        run(gpu, monkeypatch, tmp_path, "--seconds", "5") == 3
        and gpu.called == []
        and not list(tmp_path.glob("*.json"))
    )
    monkeypatch.setattr(gpu.Pieces, "recorded_steps", lambda self: {"passed": 1, "failed": ["test_x"]})
    assert run(gpu, monkeypatch, tmp_path) == 1
