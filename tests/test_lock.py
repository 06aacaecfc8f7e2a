"""runs/lock.txt: it covers what pyproject.toml asks for on every Python, and is what .venv holds."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
LOCK, GPU_LOCK = ROOT / "runs" / "lock.txt", ROOT / "runs" / "lock-gpu.txt"
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]


def locked(python: str = ".".join(map(str, sys.version_info[:2])), file: Path = LOCK) -> dict[str, list[str]]:
    """Name -> versions in the lock, of the lines that apply to this Python on Linux x86-64."""
    assert file.exists(), "there is no lock: set-up takes whatever was released last"
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.1",
        "sys_platform": "linux",
        "platform_machine": "x86_64",
        "os_name": "posix",
        "platform_system": "Linux",
        "platform_python_implementation": "CPython",
        "implementation_name": "cpython",
    }
    found: dict[str, list[str]] = {}
    for line in file.read_text().splitlines():
        if line and not line.startswith("#"):
            one = Requirement(line)
            [exact] = one.specifier
            assert exact.operator == "==" and "*" not in exact.version, f"{line!r} is not one version"
            if one.marker is None or one.marker.evaluate(environment):
                found.setdefault(canonicalize_name(one.name), []).append(exact.version)
    return found


@pytest.mark.fault("LOCK")
@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_of_every_extra_has_one_version_that_fits(python):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    versions = locked(python)
    assert {name: found for name, found in versions.items() if len(found) != 1} == {}
    wanted = project["build-system"]["requires"] + project["project"]["dependencies"]
    for requirements in project["project"]["optional-dependencies"].values():
        wanted += requirements
    assert len(wanted) > 30
    for one in map(Requirement, wanted):
        if one.marker is None or one.marker.evaluate({"python_version": python}):
            [version] = versions[canonicalize_name(one.name)]
            assert one.specifier.contains(version), f"{one} and {version} in runs/lock.txt"


def test_the_page_names_every_extra():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    [named] = re.findall(r"extras\s+of\s+`pyproject.toml` \((.*?)\)", (ROOT / "README.md").read_text())
    assert named.split(", ") == list(extras)


@pytest.mark.parametrize("python", PYTHONS)
def test_no_cuda_package_is_locked(python):
    assert [name for name in locked(python) if re.match("nvidia|cuda|triton", name)] == []


@pytest.mark.parametrize("python", PYTHONS)
def test_with_a_gpu_what_the_cuda_build_brings_is_locked_too(python):
    """By the metadata of the registry's torch 2.13.0: these it asks for by name."""
    found = locked(python, GPU_LOCK)
    assert {
        "triton",
        "cuda-toolkit",
        "cuda-bindings",
        "nvidia-cudnn-cu13",
        "nvidia-nccl-cu13",
        "nvidia-nvshmem-cu13",
        "nvidia-cusparselt-cu13",
    } <= set(found)
    assert not set(found) & set(locked(python)) and all(len(versions) == 1 for versions in found.values())


def test_it_applies_to_no_other_python_or_system_except_torch():
    for other in (
        {"python_version": "3.14", "python_full_version": "3.14.0"},
        {"sys_platform": "darwin"},
        {"platform_machine": "aarch64"},
    ):
        here = {
            "python_version": "3.12",
            "python_full_version": "3.12.1",
            "sys_platform": "linux",
            "platform_machine": "x86_64",
        } | other
        lines = [Requirement(line) for line in LOCK.read_text().splitlines() if line and not line.startswith("#")]
        assert [line.name for line in lines if line.marker is None or line.marker.evaluate(here)] == ["torch"]


@pytest.mark.fault("LOCK")
def test_what_is_installed_is_what_is_locked():
    stamp = ROOT / ".venv" / "nanolab-setup"
    if Path(sys.prefix).resolve() != (ROOT / ".venv").resolve():
        pytest.skip(f"this Python is {sys.prefix}, not .venv of this checkout, which runs/setup.sh locks")
    assert stamp.exists(), ".venv was not made by runs/setup.sh, or not to the end; type: bash runs/setup.sh test"
    versions = re.findall("^versions: (.*)", stamp.read_text(), re.M)
    assert versions, ".venv is of a set-up that locked nothing; type: bash runs/setup.sh test"
    if not versions[0].startswith("locked"):
        pytest.skip(f"set-up says: {versions[0]}")
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "list", "--format", "json"],
        capture_output=True,
        text=True,
        check=True,
    )
    installed = {canonicalize_name(one["name"]): one["version"] for one in json.loads(listed.stdout)}
    lock = locked()
    if re.search("^nvidia-", (ROOT / ".venv" / "constraints.txt").read_text(), re.M):
        lock |= locked(file=GPU_LOCK)
    off = differences(installed, lock)
    assert off == [], (
        f"{len(off)} of {len(installed)} packages are not as in runs/lock.txt: {off}; type: rm -r .venv; bash"
        " runs/setup.sh test"
    )


def differences(installed: dict[str, str], lock: dict[str, list[str]]) -> list[str]:
    found = []
    # the registry's build for Linux; its own metadata pins what it brings
    cuda = not installed["torch"].endswith("+cpu")
    for name, version in installed.items():
        if name in ("pip", "nanolab") or cuda and re.fullmatch("triton|(nvidia|cuda)-.*", name):
            continue
        if name not in lock:
            found.append(f"{name} {version} is not in the lock")
        elif Version(version).public != lock[name][0] or (Version(version).local and name != "torch"):
            found.append(f"{name} {version}, locked {lock[name][0]}")
    return found


def test_a_wrong_version_and_an_unlisted_package_are_seen(tmp_path):
    """By the test above and by what set-up asks, runs/lock_diff.py."""
    lock = {"torch": ["2.13.0"], "numpy": ["2.4.6"], "rich": ["15.0.0"]}
    installed = {
        "pip": "23.2.1",
        "nanolab": "0.1.0",
        "torch": "2.13.0+cpu",
        "numpy": "2.4.7",
        "rich": "15.0.0",
        "ipython": "9.1",
    }
    assert differences(installed, lock) == ["numpy 2.4.7, locked 2.4.6", "ipython 9.1 is not in the lock"]
    assert differences({"nvidia-nccl-cu13": "2.30", "torch": "2.13.0"}, lock) == []
    assert differences({"nvidia-nccl-cu13": "2.30", "torch": "2.13.0+cpu"}, lock) == [
        "nvidia-nccl-cu13 2.30 is not in the lock"
    ]
    for name, version in installed.items():
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (tmp_path / "lock.txt").write_text(
        "# a comment\ntorch==2.13.0\nnumpy==2.4.6 ; python_version >= '3'\nnumpy==1.0 ; python_version <"
        " '3'\nrich==15.0.0\n"
    )
    code = (
        f"import sys; sys.path = [p for p in sys.path if 'site-packages' not in p] + [{str(tmp_path)!r}]; import runpy;"
        f" sys.argv = ['', {str(tmp_path / 'lock.txt')!r}]"
    )
    code = f"{code}; runpy.run_path('runs/lock_diff.py', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", f"import packaging.requirements, packaging.markers; {code}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines() == ["ipython 9.1 -", "numpy 2.4.7 2.4.6"], done.stderr
