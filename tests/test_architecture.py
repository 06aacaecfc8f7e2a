"""The arrows of the house: which room may import which, and which modules work without torch.

The rooms are read from the source with ast, at any depth, so that an import hidden in a function counts as well.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("nanolab", "tasks", "scripts")

# A room may import itself and rooms of a lower level.
LEVEL = {
    "help": 0,
    "presets": 0,
    "terminal": 0,
    "tables": 0,
    "cli": 1,
    "files": 2,
    "runtime": 3,
    "data": 4,
    "model": 5,
    "records": 6,
    "training": 7,
    "inference": 7,
    "evals": 8,
    "tasks": 9,
    "stages": 10,
    "serving": 11,
    "interop": 11,
    "lab": 12,
    "scripts": 13,
}


def modules(root: Path) -> dict[str, Path]:
    """Dotted name -> file, of every module under the three packages."""
    found = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: set[str]) -> list[tuple[int, str]]:
    """(line, module) of everything that `name` imports; `from a import b` counts as a.b where that is a module."""
    is_package, found = path.name == "__init__.py", []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name.split(".")[: len(name.split(".")) - node.level + is_package]
                base = ".".join(package + ([node.module] if node.module else []))
            found += [(node.lineno, f"{base}.{a.name}" if f"{base}.{a.name}" in known else base) for a in node.names]
    return sorted(set(found))


def room(module: str) -> str | None:
    """The room of a module of ours (data, scripts, ...), "" for the package nanolab itself, None for other people's."""
    parts = module.split(".")
    if parts[0] in ("tasks", "scripts"):
        return parts[0]
    if parts[0] != "nanolab":
        return None
    return parts[1] if len(parts) > 1 else ""


def violations(root: Path) -> list[str]:
    """One line for each import that the house forbids."""
    found, bad = modules(root), []
    # modules and their packages
    known = {name.rsplit(".", up)[0] for name in found for up in range(name.count(".") + 1)}
    for name, path in found.items():
        here = room(name)
        if here and here not in LEVEL:
            bad.append(
                f"{name}: {here} is not a room of the house; give it a level in tests/test_architecture.py and"
                " dev/LOG.md"
            )
            continue
        for line, target in imports(name, path, known):
            there = room(target)
            if not there:
                continue
            where = f"{path.relative_to(root)}:{line}"
            if there not in LEVEL:
                bad.append(f"{where}: imports {target}, which is in no room of the house")
            elif there == "scripts" and target != "scripts":
                bad.append(f"{where}: imports {target}; nothing imports a script, not even another script")
            elif here == there:
                continue
            elif not here:
                bad.append(
                    f"{where}: the package file imports {target}; it stays empty, so that importing one room is cheap"
                )
            elif LEVEL[there] >= LEVEL[here]:
                bad.append(f"{where}: {here} imports {there}, against the arrows")
    return bad


def test_imports_follow_the_arrows():
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("path", "text", "complaint"),
    [
        ("nanolab/model/gpt.py", "from nanolab.training.optim import MuonAdamW", "model imports training"),
        ("nanolab/model/gpt.py", "def f():\n    import nanolab.evals.bpb", "model imports evals"),
        ("nanolab/data/packing.py", "from nanolab import model", "data imports model"),
        ("nanolab/data/packing.py", "from ..model import gpt", "data imports model"),
        ("nanolab/training/fit.py", "from nanolab.inference.engine import Engine", "training imports inference"),
        ("nanolab/evals/core.py", "import tasks", "evals imports tasks"),
        ("nanolab/lab/ablate.py", "from scripts.base_train import run", "nothing imports a script"),
        ("scripts/chat_cli.py", "from scripts import base_train", "nothing imports a script"),
        ("nanolab/__init__.py", "from nanolab.runtime import start", "stays empty"),
        ("nanolab/kitchen/sink.py", "", "not a room"),
    ],
)
def test_a_forbidden_import_is_found(tmp_path, path, text, complaint):
    for known in ("nanolab/model/gpt.py", "nanolab/training/optim.py", "scripts/base_train.py", path):
        (tmp_path / known).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / known).write_text("")
    (tmp_path / path).write_text(text)
    assert len(violations(tmp_path)) == 1
    assert complaint in violations(tmp_path)[0]


def test_an_import_down_the_arrows_is_allowed(tmp_path):
    for path, text in {
        "nanolab/stages/rollout.py": "from nanolab.inference.engine import Engine",
        "nanolab/evals/bpb.py": "import torch\nfrom nanolab.records.models import find_model",
        "scripts/base_train.py": "import tasks\nfrom nanolab.cli import main",
        "nanolab/cli.py": "import json",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    assert violations(tmp_path) == []


def promised_torch_free() -> list[str]:
    """Modules whose docstring says "Imports no torch", and every script (so that --help is instant)."""
    return [
        name
        for name, path in modules(ROOT).items()
        if "imports no torch" in (ast.get_docstring(ast.parse(path.read_text())) or "").lower()
        or name.startswith("scripts")
    ]


# Stands in for a machine where torch is not installed: any import of it fails, however deep.
WITHOUT_TORCH = """
import importlib, sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ImportError("torch was imported")
sys.meta_path.insert(0, NoTorch())
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ImportError as error:
        print(f"{name}: {error}")
"""


def import_without_torch(names: list[str]) -> str:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *names], cwd=ROOT, env=env, capture_output=True, text=True
    )
    return done.stdout + done.stderr


def test_modules_that_promise_it_import_without_torch():
    names = promised_torch_free()
    assert {"nanolab.cli", "nanolab.model.config", "scripts.base_train"} <= set(names)
    assert import_without_torch(names) == ""


def test_an_import_of_torch_is_noticed():
    assert "nanolab.model.gpt: torch was imported" in import_without_torch(["nanolab.model.gpt"])


@pytest.mark.slow
def test_importing_writes_nothing(tmp_path):
    """No module makes a folder or a file when it is imported."""
    home = tmp_path / "home"
    home.mkdir()
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "NANOLAB_BASE_DIR": str(home / "base"),
        "HOME": str(home),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)"
    names = [name for name in modules(ROOT) if not name.endswith("__main__")]
    done = subprocess.run([sys.executable, "-c", code, *names], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == [home] and list(home.iterdir()) == []
