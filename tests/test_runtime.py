"""The machine: what is chosen, what is refused, what is written where."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanolab import runtime
from nanolab.config import UserError
from nanolab.runtime import PEAKS, Runtime, choose_dtype, cpu_gflops, device_peaks

CPU = torch.device("cpu")
NAMES = {  # as drivers spell them: bf16 TFLOP/s, TB/s
    "NVIDIA H200": (989, 4.8),
    "NVIDIA H200 NVL": (836, 4.8),
    "NVIDIA H100 80GB HBM3": (989, 3.35),
    "NVIDIA H100 NVL": (835, 3.9),
    "NVIDIA H100 PCIe": (756, 2.0),
    "NVIDIA GB200": (2500, 8.0),
    "NVIDIA B200": (2250, 8.0),
    "NVIDIA A100-SXM4-80GB": (312, 2.0),
    "NVIDIA A40": (149.7, 0.696),
    "NVIDIA L40S": (362, 0.864),
    "NVIDIA L4": (121, 0.3),
    "NVIDIA GeForce RTX 4090": (165.2, 1.01),
    "AMD Instinct MI300X": (1307.4, 5.3),
    "AMD Instinct MI325X": (1307.4, 6.0),
}


@pytest.mark.parametrize("name", NAMES)
def test_peaks_of_known_devices(name):
    flops, bandwidth = device_peaks(name)
    assert (flops / 1e12, bandwidth / 1e12) == pytest.approx(NAMES[name])


@pytest.mark.parametrize("name", ["NVIDIA L40", "NVIDIA RTX A1000 Laptop GPU", "NVIDIA RTX A4000", "Tesla T4", "AMD EPYC", ""])
def test_an_unknown_device_is_unknown(name):
    """Also one whose name only contains a known one's."""
    assert device_peaks(name) == (None, None)


def test_no_row_of_the_peaks_hides_another():
    for key, *peaks in PEAKS:
        assert device_peaks(key) == tuple(peaks), key


def test_base_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("NANOLAB_BASE_DIR", str(tmp_path / "x"))
    assert runtime.base_dir() == tmp_path / "x" and not (tmp_path / "x").exists()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NANOLAB_BASE_DIR", "~/y")
    assert runtime.base_dir() == tmp_path / "y"
    monkeypatch.delenv("NANOLAB_BASE_DIR")
    assert runtime.base_dir() == tmp_path / ".cache" / "nanolab"


@pytest.mark.parametrize(
    "arguments,said",
    [
        (dict(device_type="tpu"), "'tpu' is unknown; expected cuda, mps or cpu; try --device-type cpu"),
        (dict(device_type="cpu", dtype="bf16"), "'bf16' is unknown; expected one of float32, bfloat16, float16; try NANOLAB_DTYPE=float32"),
        (dict(device_type="cpu", dtype="float16"), "float16 needs a GPU.*try NANOLAB_DTYPE=float32"),
    ],
)
def test_refusals(arguments, said):
    with pytest.raises(UserError, match=said):
        runtime.start(**arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there():
    with pytest.raises(UserError, match="--device-type cuda was asked for.*try --device-type cpu"):
        runtime.start("cuda", "float32")


def test_start_seeds_and_takes_the_named_dtype(monkeypatch):
    draws = []
    for seed in (1, 1, 2):
        rt = runtime.start("cpu", "bfloat16", seed)
        draws.append(torch.rand(1).item())
    assert draws[0] == draws[1] != draws[2]
    assert (rt.device, rt.dtype, rt.dtype_name, rt.backend, rt.world_size, rt.is_main) == (CPU, torch.bfloat16, "bfloat16", "none", 1, True)
    monkeypatch.setenv("NANOLAB_DTYPE", "float32")
    assert runtime.start("cpu").dtype == torch.float32
    assert runtime.start("cpu", "bfloat16").dtype == torch.bfloat16, "what is asked for in so many words goes before the environment"


def test_probe_is_cached_on_disk(base_dir):
    """Measured once; afterwards the file decides, which here says something no machine would."""
    first, path = cpu_gflops(), base_dir / "machine.json"
    assert first["float32"] > 0 and list(json.loads(path.read_text()).values()) == [first]
    (key,) = json.loads(path.read_text())
    assert torch.__version__ in key and f"threads {torch.get_num_threads()}" in key
    path.write_text(json.dumps({key: {"float32": 0.25}, "another machine": {"float32": 9.0}}))
    assert cpu_gflops() == {"float32": 0.25}
    path.write_text(json.dumps({"another machine": {"float32": 9.0}}))
    assert cpu_gflops()["float32"] > 0.25
    assert set(json.loads(path.read_text())) == {key, "another machine"}
    assert [p.name for p in base_dir.iterdir()] == ["machine.json"], "a temporary file was left"


def test_cpu_dtype_follows_the_measurement(base_dir):
    cpu_gflops()
    path = base_dir / "machine.json"
    (key,) = json.loads(path.read_text())
    for bf16, chosen in ((None, "float32"), (50.0, "float32"), (110.0, "float32"), (180.0, "bfloat16")):
        path.write_text(json.dumps({key: {"float32": 100.0} | ({"bfloat16": bf16} if bf16 else {})}))
        assert choose_dtype(CPU) == chosen
        assert runtime.start("cpu").dtype_name == chosen


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="the oracle is the one of x86 Linux")
def test_native_bf16_agrees_with_torch():
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        assert runtime.native_cpu_bf16()


def test_one_rank_needs_no_process_group():
    rt, x = Runtime(CPU, torch.float32), torch.ones(2)
    assert rt.all_reduce_(x) is x and x.tolist() == [1, 1]
    assert rt.any(True) is True and rt.any(False) is False
    assert rt.broadcast_object("x") == "x" and rt.gather_objects("x") == ["x"]
    rt.barrier(), rt.synchronize(), rt.close()
    assert 50 < rt.peak_memory_mib() < 50_000


def test_print0_is_silent_on_other_ranks(monkeypatch, capsys):
    runtime.print0("one")
    monkeypatch.setenv("RANK", "1")
    runtime.print0("two")
    assert capsys.readouterr().out == "one\n"


def test_progress_is_plain_off_a_terminal(capsys):
    items = [1, 2, 3]
    assert runtime.progress(items, "counting") is items
    assert capsys.readouterr() == ("", "")


IMPORT_ALL = """
import importlib, pkgutil, nanolab
names = [m.name for m in pkgutil.walk_packages(nanolab.__path__, "nanolab.")]
for name in names:
    importlib.import_module(name)
print(len(names))
"""


def test_importing_writes_nothing(tmp_path):
    """Every module of the package, in a fresh process whose home and base directories must stay as they are."""
    home = tmp_path / "home"
    home.mkdir()
    env = os.environ | {"HOME": str(home), "NANOLAB_BASE_DIR": str(tmp_path / "base"), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20
    assert list(tmp_path.iterdir()) == [home] and list(home.iterdir()) == []
