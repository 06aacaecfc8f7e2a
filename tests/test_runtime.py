"""The machine: what is chosen, what is refused, what is written where."""

import json
import os
from pathlib import Path

import pytest
import torch

from nanolab import runtime, terminal
from nanolab.cli import UserError
from nanolab.model.kernels import fa3
from nanolab.runtime import PEAKS, Runtime, choose_dtype, cpu_gflops, device_peaks
from nanolab.stages import pretrain_plan
from nanolab.stages.config import BaseTrainConfig
from nanolab.training.guards import undisturbed

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


@pytest.mark.parametrize(
    "name", ["NVIDIA L40", "NVIDIA RTX A1000 Laptop GPU", "NVIDIA RTX A4000", "Tesla T4", "AMD EPYC", ""]
)
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
        (
            dict(device_type="cpu", dtype="bf16"),
            "'bf16' is unknown; expected one of float32, bfloat16, float16; try NANOLAB_DTYPE=float32",
        ),
        (dict(device_type="cpu", dtype="float16"), "float16 needs a GPU.*try NANOLAB_DTYPE=float32"),
    ],
)
def test_refusals(arguments, said):
    with pytest.raises(UserError, match=said):
        runtime.start(**arguments)


@pytest.mark.fault("core D9")
@pytest.mark.parametrize(
    "cuda, mps, asked, ranks, chosen",
    [
        (True, False, "", 1, "cuda"),
        (True, True, "", 1, "cuda"),
        (False, True, "", 1, "mps"),
        (False, False, "", 1, "cpu"),
        (True, False, "", 8, "cuda"),
        (False, False, "", 8, "cpu"),
        (False, True, "", 8, "ranks-on-mps"),
        (False, True, "cpu", 8, "cpu"),
        (True, True, "cpu", 1, "cpu"),
        (True, True, "mps", 1, "mps"),
        (True, True, "mps", 2, "ranks-on-mps"),
        (False, True, "mps", 1, "mps"),
        (False, True, "cuda", 1, "device-not-there"),
        (True, False, "mps", 1, "device-not-there"),
        (True, True, "tpu", 1, "device-unknown"),
    ],
)
def test_one_rule_chooses_the_device(monkeypatch, cuda, mps, asked, ranks, chosen):
    """Of a run and of its dry run alike."""
    seen = {}

    class Chosen(Exception):
        pass

    def stop(device, *_):
        seen["run"] = device.type
        raise Chosen

    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    for name, value in (("get_device_name", "NVIDIA H200"), ("get_device_capability", (9, 0)), ("set_device", None)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(fa3, "probed", lambda *_: (None, "not here"))
    monkeypatch.setattr(runtime, "meeting_place", lambda *_: None, raising=False)
    monkeypatch.setattr(runtime.dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(
        pretrain_plan, "describe", lambda cfg, plan, memory, kind, *_: seen.update({"dry run": kind}) or []
    )
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    for what, start in (
        ("dry run", lambda: pretrain_plan.dry_run(BaseTrainConfig(depth=2, device_type=asked))),
        ("run", lambda: runtime.start(asked)),
    ):
        monkeypatch.setattr(
            runtime,
            "choose_dtype",
            stop if what == "run" else lambda device: "bfloat16" if device.type == "cuda" else "float32",
        )
        try:
            start()
        except Chosen:
            pass
        except UserError as error:
            seen[what] = error.code
    assert seen == {"dry run": chosen, "run": chosen}


@pytest.fixture
def undone(monkeypatch):
    """What --deterministic sets is as before after the test."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    yield
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.mark.fault("core D5")
def test_deterministic_is_all_that_torch_asks_for(undone, monkeypatch):
    """torch's page on reproducibility, and cuBLAS's. Set before the device is looked for, since cuBLAS reads it when
    CUDA starts.
    """
    order = []
    monkeypatch.setattr(runtime, "devices", lambda: order.append(os.environ.get("CUBLAS_WORKSPACE_CONFIG")) or ["cpu"])
    runtime.start("cpu", "float32", deterministic=True)
    assert order == [":4096:8"]
    assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch._inductor.config.deterministic, "what is compiled is not tuned by its speed"
    runtime.start("cpu", "float32")
    assert not torch.are_deterministic_algorithms_enabled() and not torch._inductor.config.deterministic


@pytest.mark.fault("core D5")
@pytest.mark.parametrize(
    "workspace, refused", [(":16:8", False), (":4096:8", False), (":0:0", True), (":4096:2:16:8", True)]
)
def test_a_workspace_that_is_set_already_counts(undone, monkeypatch, workspace, refused):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", workspace)
    if refused:
        with pytest.raises(UserError) as error:
            runtime.only_deterministic(True)
        assert (error.value.code, error.value.values) == ("workspace-not-deterministic", {"workspace": workspace})
    else:
        runtime.only_deterministic(True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == workspace


@pytest.mark.fault("core D5")
def test_samples_may_be_drawn_in_a_deterministic_run(undone):
    """By a sum that torch refuses then on GPUs; and what is trained after them is deterministic again."""
    runtime.only_deterministic(True)
    model = torch.nn.Linear(1, 1)
    with undisturbed(model, CPU):
        assert torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    runtime.only_deterministic(False)
    with undisturbed(model, CPU):
        assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


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
    assert (rt.device, rt.dtype, rt.dtype_name, rt.backend, rt.world_size, rt.is_main) == (
        CPU,
        torch.bfloat16,
        "bfloat16",
        "none",
        1,
        True,
    )
    monkeypatch.setenv("NANOLAB_DTYPE", "float32")
    assert runtime.start("cpu").dtype == torch.float32
    assert runtime.start("cpu", "bfloat16").dtype == torch.bfloat16, (
        "what is asked for in so many words goes before the environment"
    )


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
    assert terminal.progress(items, "counting") is items
    assert capsys.readouterr() == ("", "")
