"""The commands in runs/, .ci/ and dev/bench/: set-up, tests, quickstart, speedrun."""

import os
import re
import stat
import sys
from pathlib import Path

import pytest

# A Python that makes a virtual environment holding a copy of itself, and writes down what it is asked to do.
FAKE_PYTHON = """#!/bin/sh
echo "$@" >>"$CALLS"
case "$*" in
"-m venv --clear "*) mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;;
*torch.cuda.is_available*) test -n "${SEES_GPU:-}" || exit 1 ;;
*torch.version.cuda*) echo "for CUDA 13.0" ;;
*torch.__version__*) echo 2.13.0+cpu ;;
*platform.machine*) echo "${HERE:-Linux x86_64 3.11}" ;;
*lock_diff*) if [ -n "${DIFFER:-}" ]; then echo "$DIFFER"; fi ;;
esac
"""


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def setup(in_checkout, tmp_path):
    """A function (argument, **environment) -> (exit code, output, what Python was asked to do), in a tree without
    .venv.
    """
    python, calls = program(tmp_path / "python3", FAKE_PYTHON), tmp_path / "calls"
    in_checkout("rm -rf .venv .venv-newest")

    def run(argument: str = "", **environment: str) -> tuple[int, str, list[str]]:
        calls.write_text("")
        env = {"PYTHON": str(python), "CALLS": str(calls), "NANOLAB_PYTHON": "", "PATH": "/usr/bin:/bin"} | environment
        done = in_checkout(f"cd /; bash '{in_checkout.path}/runs/setup.sh' {argument}", **env)
        return done.returncode, done.stdout + done.stderr, calls.read_text().splitlines()

    return run


def installs(calls: list[str]) -> list[str]:
    return [call.split(" install --no-compile ")[1] for call in calls if " install " in call]


def test_setup_installs_the_pinned_torch_first(setup, in_checkout):
    code, output, calls = setup(PATH=no_gpu_path())
    assert code == 0, output
    given = "--constraint .venv/constraints.txt"
    assert installs(calls) == [f"{given} pip", f"{given} torch setuptools>=70.1", f"{given} --no-build-isolation -e ."]
    assert constraints(in_checkout) == (in_checkout.path / "runs" / "lock.txt").read_text()
    assert "installing torch==2.13.0" in output and len(output.splitlines()) < 10


def constraints(in_checkout) -> str:
    return (in_checkout.path / ".venv" / "constraints.txt").read_text()


@pytest.mark.fault("LOCK")
def test_setup_gives_pip_one_version_of_every_requirement(setup, in_checkout):
    code, output, calls = setup("test", PATH=no_gpu_path())
    assert code == 0, output
    for call in installs(calls):
        file = in_checkout.path / re.search(r"--constraint (\S+)", call)[1]
        for name in ("numpy", "tokenizers", "transformers", "lm-eval", "wandb", "pytest", "setuptools"):
            assert re.search(rf"^{name}==\d", file.read_text(), re.M), f"{name} is free in: pip install {call}"


def test_setup_locks_the_cuda_build_where_there_is_a_gpu(setup, in_checkout, tmp_path):
    program(tmp_path / "bin" / "nvidia-smi", "#!/bin/sh\necho 'GPU 0: NVIDIA H100'\n")
    path = f"{tmp_path}/bin:/usr/bin:/bin"
    code, output, calls = setup("test", PATH=path)
    assert code == 0 and [call.split()[2:] for call in installs(calls)] == [
        ["pip"],
        ["torch", "setuptools>=70.1"],
        ["--no-build-isolation", "-e", ".[test,gpu]"],
    ]
    assert "NVIDIA H100" in output and "locked by runs/lock.txt and runs/lock-gpu.txt" in output
    assert constraints(in_checkout) == "".join(
        (in_checkout.path / "runs" / name).read_text() for name in ("lock.txt", "lock-gpu.txt")
    )
    assert setup("test", PATH=path) == setup("gpu") == (0, "", [])


def test_setup_says_when_torch_does_not_see_the_gpu(setup, tmp_path):
    program(
        tmp_path / "bin" / "nvidia-smi",
        "#!/bin/sh\ncase $1 in -L) echo 'GPU 0: NVIDIA H100' ;; *) echo 535.1 ;; esac\n",
    )
    code, output, _ = setup(PATH=f"{tmp_path}/bin:/usr/bin:/bin", SEES_GPU="1")
    assert code == 0 and "torch does not see it" not in output
    code, output, _ = setup("plots", PATH=f"{tmp_path}/bin:/usr/bin:/bin", SEES_GPU="")
    assert code == 0 and re.search("does not see it.*CUDA 13.*535[.]1", output), output


def test_setup_uses_another_systems_torch_where_there_is_a_gpu(setup, in_checkout, tmp_path):
    program(tmp_path / "bin" / "nvidia-smi", "#!/bin/sh\necho 'GPU 0: NVIDIA GH200'\n")
    assert setup(PATH=f"{tmp_path}/bin:/usr/bin:/bin", HERE="Linux aarch64 3.12")[0] == 0
    assert not re.search("(?m)^(torch|nvidia-.*)==", constraints(in_checkout))


@pytest.mark.parametrize("here", ["Darwin arm64 3.12", "Linux aarch64 3.11", "Linux x86_64 3.14"])
def test_setup_says_where_nothing_is_locked(setup, here):
    code, output, _ = setup(PATH=no_gpu_path(), HERE=here)
    assert code == 0
    assert [line for line in output.splitlines() if "not locked except torch" in line and f"this is {here}" in line]


def test_setup_brings_leftovers_to_the_lock_and_names_the_others(setup):
    code, output, calls = setup(PATH=no_gpu_path(), DIFFER="numpy 1.26.4 2.4.6\nipython 9.1 -\nrich 14.0 15.0.0")
    assert code == 0 and installs(calls)[3:] == ["--no-build-isolation --no-deps numpy==2.4.6 rich==15.0.0"]
    assert "in .venv but not in runs/lock.txt and stay: ipython (" in output


def test_setup_newest_leaves_the_environment_alone(setup, in_checkout):
    assert setup("test", PATH=no_gpu_path())[0] == 0
    before = {path: path.read_bytes() for path in sorted((in_checkout.path / ".venv").rglob("*")) if path.is_file()}
    code, output, calls = setup("--newest test", PATH=no_gpu_path())
    assert code == 0 and "versions: the newest" in output, output
    assert any(call == "-m venv --clear .venv-newest" for call in calls) and all(
        "--constraint .venv-newest/" in call for call in installs(calls)
    )
    assert (in_checkout.path / ".venv-newest" / "constraints.txt").read_text() == "torch==2.13.0\n"
    assert {
        path: path.read_bytes() for path in sorted((in_checkout.path / ".venv").rglob("*")) if path.is_file()
    } == before


def test_setup_does_only_what_is_missing(setup, in_checkout):
    assert setup(PATH=no_gpu_path())[0] == 0
    assert setup() == (0, "", [])
    assert installs(setup("test", PATH=no_gpu_path())[2])[-1].endswith("-e .[test]")
    assert setup("test") == setup() == (0, "", [])
    assert installs(setup("tasks", PATH=no_gpu_path())[2])[-1].endswith("-e .[test,tasks]")
    assert setup("tasks") == setup("test") == setup() == (0, "", [])
    assert installs(setup("plots test int8", PATH=no_gpu_path())[2])[-1].endswith("-e .[test,tasks,plots,int8]")
    with open(in_checkout.path / "pyproject.toml", "a") as file:
        file.write("# another dependency\n")
    # what was asked for before stays
    assert installs(setup(PATH=no_gpu_path())[2])[-1].endswith("-e .[test,tasks,plots,int8]")


@pytest.mark.fault("LOCK")
def test_setup_notices_another_lock(setup, in_checkout):
    assert setup(PATH=no_gpu_path())[0] == 0
    with open(in_checkout.path / "runs" / "lock.txt", "a") as file:
        file.write("# another version\n")
    assert len(installs(setup(PATH=no_gpu_path())[2])) == 3


def test_setup_makes_a_broken_environment_anew(setup, in_checkout):
    assert setup(PATH=no_gpu_path())[0] == 0
    program(in_checkout.path / ".venv" / "bin" / "python", "#!/bin/sh\nexit 1\n")
    (in_checkout.path / ".venv" / "nanolab-setup").unlink()
    assert any("venv --clear" in call for call in setup(PATH=no_gpu_path())[2])


def test_setup_says_what_is_missing(setup, in_checkout, tmp_path):
    pretend = f"""[ "$1" = --version ] && echo Python 3.8.1 && exit
exec {sys.executable} -c "import sys; sys.version_info = (3, 8, 1); $2"
"""
    old = program(tmp_path / "old", f"#!/bin/sh\n{pretend}")
    code, output, _ = setup(PYTHON=str(old))
    assert code == 1 and "Python 3.8.1" in output and "3.10 or newer" in output and "PYTHON=" in output
    bare = program(tmp_path / "bare", '#!/bin/sh\ncase "$*" in *venv*) exit 1 ;; esac\n')
    code, output, _ = setup(PYTHON=str(bare))
    assert code == 1 and "apt-get install python3-venv" in output
    code, output, _ = setup("tests")
    assert code == 2 and "expected nothing or some of: test int8 hf lm_eval plots tasks slurm gen gpu" in output
    assert not (in_checkout.path / ".venv" / "nanolab-setup").exists()


def no_gpu_path() -> str:
    """A PATH on which nvidia-smi, if the machine has one, finds nothing."""
    folder = Path(os.environ["NANOLAB_BASE_DIR"]).parent / "nogpu"
    program(folder / "nvidia-smi", "#!/bin/sh\nexit 9\n")
    return f"{folder}:/usr/bin:/bin"


EVERYTHING = f"-m pytest -m not gpu -n {os.sysconf('SC_NPROCESSORS_ONLN') + 1} --dist loadfile --no-loadscope-reorder"


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("runs/test.sh", EVERYTHING.replace(" -m not gpu", "")),
        ("runs/test.sh --all -k 'a b'", "-m pytest -m not gpu -k a b"),
        ("runs/test.sh tests/data --lf", "-m pytest tests/data --lf"),
        ("runs/test.sh --all", EVERYTHING),
        (".ci/run", EVERYTHING),
    ],
)
def test_test_sh_hands_its_arguments_and_exit_code_on(in_checkout, tmp_path, command, arguments):
    python = program(tmp_path / "python", '#!/bin/sh\necho "asked: $*"\nexit 3\n')
    done = in_checkout(f"bash {command}", NANOLAB_PYTHON=str(python))
    assert f"asked: {arguments}\n" in done.stdout
    assert done.returncode == 3


def test_test_sh_newest_installs_and_so_refuses_a_python_as_it_is(in_checkout):
    done = in_checkout("bash runs/test.sh --newest", NANOLAB_PYTHON=sys.executable)
    assert done.returncode == 2 and "--newest" in done.stderr and f"NANOLAB_PYTHON={sys.executable}" in done.stderr


def test_gpu_sh_says_that_there_is_no_gpu(in_checkout):
    done = in_checkout("OUT=out bash dev/bench/gpu.sh", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1 and "no CUDA device" in done.stderr
    assert not (in_checkout.path / "out").exists()


@pytest.mark.fault("core D11")
def test_speedrun_trains_in_fp8_as_its_record_did(in_checkout):
    done = in_checkout("bash runs/speedrun.sh --dry-run")
    assert re.search(r"(?m)^\$ .*-m scripts\.base_train .* --fp8$", done.stdout), done.stderr


def test_speedrun_dry_run_plans_every_stage_and_touches_nothing(in_checkout):
    done = in_checkout("bash runs/speedrun.sh --dry-run")
    assert done.returncode == 0, done.stderr
    stages = re.findall(r"^\$ .*-m scripts\.(\w+)", done.stdout, re.M)
    assert stages == [
        "data",
        "data",
        "tok_train",
        "tok_eval",
        "base_train",
        "base_eval",
        "base_eval",
        "chat_sft",
        "chat_eval",
        "chat_rl",
        "chat_eval",
        "base_eval",
        "base_eval",
        "report",
    ]
    # torchrun has flags that --run could mean
    assert len(re.findall(r"--nproc_per_node 8 -m scripts\.\w+ -- --", done.stdout)) == 9
    # The reference's depth-24 run: 2^20 tokens a step on 8 ranks of 16 rows of 2048, and 8 tokens per scaling
    # parameter.
    assert "8 x H100, bfloat16" in done.stdout
    assert "1,048,576 tokens = 16 rows x 2048 x 8 ranks x 4 accumulation" in done.stdout
    scaling = int(re.search(r"scaling parameters ([\d,]+)", done.stdout)[1].replace(",", ""))
    tokens = int(re.search(r"= ([\d,]+) tokens \(", done.stdout)[1].replace(",", ""))
    assert scaling == 24 * 12 * 1536**2 + 12 * 12 * 12 + 32768 * 1536  # blocks, gates of value embeddings, head
    assert 0 <= 8 * scaling - tokens < 2**20
    for word in ("parameters", "FLOPs", "peak memory", "expected time"):
        assert re.search(rf"^{word} +\S", done.stdout, re.M)
    assert not in_checkout.base.exists()


def test_speedrun_refuses_a_machine_without_eight_gpus(in_checkout):
    done = in_checkout("bash runs/speedrun.sh", PATH=f"{no_gpu_path()}:{os.environ['PATH']}")
    assert done.returncode == 1 and "saw 0 NVIDIA GPUs, expected 8" in done.stderr
    assert in_checkout("bash runs/speedrun.sh --dry").returncode == 2


def test_quickstart_names_the_sizes_that_it_knows(in_checkout):
    done = in_checkout("bash runs/quickstart.sh", NANOLAB_SCALE="huge")
    assert done.returncode == 2 and "NANOLAB_SCALE is huge; expected toy or default" in done.stderr
