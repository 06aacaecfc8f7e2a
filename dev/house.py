"""The size of the house: python dev/house.py [--check]

Prints one table: files and lines that a reader meets between a text file and a reply in the terminal, lines in all, the
longest file, lines over 120 columns, names that two modules define, and functions that touch the config of a training
run. The first and the last are traced: tok_train, three steps of base_train and one reply of chat_cli run on a toy.
--check exits with 1 where a ceiling is exceeded. The last line of output is one JSON document.
"""

import argparse
import ast
import collections
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("nanolab", "tasks", "scripts")
# Modules that the traced commands touch, but that a reader of the main line can leave for later.
EXEMPT = (
    "nanolab/data/formats.py",  # how each kind of file is read
    "nanolab/data/kept.py",
    "nanolab/data/lines.py",
    "nanolab/data/parquet.py",
    "nanolab/data/tokenizer_files.py",  # other people's formats of tokenizers
    "nanolab/inference/sandbox.py",  # where the tool `python` runs
    "nanolab/records/sink.py",  # wandb
)
ALONE = "nanolab/inference/jail.py"  # begun as a script under `python -I -S`, which imports nothing of ours
# Names that many modules define by design.
SHARED = {"run", "main", "Config"}
# The first two are far from the 28 files and 4,500 lines that were asked for: they hold what is, so that it can only
# become less. dev/LOG.md says where the rest is.
CEILINGS = {
    "files of the main line": 71,
    "lines of the main line": 10_730,
    "lines of exempt modules": 1_500,
    "longest file": 400,
    "lines over 120 columns": 0,
    "names defined twice": 20,
    "functions that touch the config": 19,
}

# Runs a module and writes down which of our functions were called, and which had the trainer's config as an argument.
TRACER = """
import atexit, json, os, runpy, sys, threading
root, out, module, args = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:]
seen, touched = set(), set()
def called(frame, event, _):
    code = frame.f_code
    if event == "call" and code.co_flags & 1 and code.co_filename.startswith(root):  # 1: a function, no body of a class
        seen.add((code.co_filename, code.co_name))
        for name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]:
            if type(frame.f_locals.get(name)).__name__ == "BaseTrainConfig":
                touched.add((code.co_filename, code.co_qualname if hasattr(code, "co_qualname") else code.co_name))
def write():
    sys.setprofile(None)
    with open(out, "w") as file:
        json.dump([sorted(seen), sorted(touched)], file)
atexit.register(write)
import torch  # its own functions are not ours, and a traced import takes seconds
threading.setprofile(called)
sys.setprofile(called)
sys.argv = [module, *args]
runpy.run_module(module, run_name="__main__")
"""


def sources() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def length(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def traced(folder: Path) -> tuple[set[Path], set[tuple[str, str]]]:
    """The files whose functions run on the main line, and the functions that touch the trainer's config."""
    text = folder / "text"
    text.mkdir()
    words = "the ferry left the island at a quarter past six and nobody waved".split()
    for i in range(8):
        lines = (" ".join(words[(i * j) % len(words) :] + words[: j % 7]) for j in range(1, 60))
        (text / f"{i}.txt").write_text("\n\n".join(lines), encoding="utf-8")
    env = os.environ | {"PYTHONPATH": str(ROOT), "NANOLAB_BASE_DIR": str(folder / "base"), "OMP_NUM_THREADS": "1"}
    data = ["--data-dir", str(text)]
    small = ["--depth", "2", "--aspect-ratio", "16", "--head-dim", "16", "--max-seq-len", "64"]
    small += ["--device-batch-size", "2", "--total-batch-size", "128", "--num-iterations", "3", "--eval-tokens", "128"]
    commands = [
        ["scripts.tok_train", *data, "--vocab-size", "300"],
        ["scripts.base_train", *data, *small, "--run", "toy"],
        ["scripts.chat_cli", "--model", "toy", "--prompt", "the ferry", "--max-tokens", "8"],
    ]
    files, touched = set(), set()
    for module, *arguments in commands:
        out = folder / f"{module}.json"
        command = [sys.executable, "-c", TRACER, str(ROOT) + os.sep, str(out), module, *arguments]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{module} failed:\n{done.stdout}{done.stderr}")
        seen, of_config = json.loads(out.read_text())
        files |= {Path(name) for name, function in seen if function != "<module>"}
        touched |= {(Path(name), function) for name, function in of_config}
    ours = set(sources())  # not what .venv holds
    return files & ours, {(str(path.relative_to(ROOT)), function) for path, function in touched if path in ours}


def doubled() -> dict[str, list[str]]:
    """Public names of classes and functions -> the modules that define them, where there are two or more."""
    places = collections.defaultdict(list)
    for path in sources():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                if not node.name.startswith("_") and node.name not in SHARED:
                    places[node.name].append(str(path.relative_to(ROOT)))
    return {name: files for name, files in sorted(places.items()) if len(files) > 1}


def measure() -> tuple[dict[str, int], dict[str, list]]:
    """(the numbers, what they are made of)."""
    with tempfile.TemporaryDirectory() as folder:
        main_line, touched = traced(Path(folder).resolve())
    names = {str(path.relative_to(ROOT)): length(path) for path in main_line}
    met = {name: n for name, n in names.items() if name not in EXEMPT}
    python = [*sources(), *(ROOT / "tests").rglob("*.py"), *(ROOT / "dev").rglob("*.py")]
    python = [path for path in python if "fixtures" not in path.parts]
    over = [path for path in python for line in path.read_text(encoding="utf-8").splitlines() if len(line) > 120]
    longest = max((path for path in sources() if path != ROOT / ALONE), key=length)
    twice = doubled()
    numbers = {
        "files of the main line": len(met),
        "lines of the main line": sum(met.values()),
        "lines of exempt modules": sum(names.values()) - sum(met.values()),
        "lines in all": sum(map(length, sources())),
        "longest file": length(longest),
        "lines over 120 columns": len(over),
        "names defined twice": len(twice),
        "functions that touch the config": len(touched),
    }
    details = {
        "main line": sorted(met.items(), key=lambda item: -item[1]),
        "longest file": [str(longest.relative_to(ROOT))],
        "names defined twice": [f"{name}: {', '.join(files)}" for name, files in twice.items()],
        "functions that touch the config": [f"{name}: {function}" for name, function in sorted(touched)],
    }
    return numbers, details


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit with 1 where a ceiling is exceeded")
    check = parser.parse_args().check
    numbers, details = measure()
    for name, of in details.items():
        print(f"\n{name}")
        for one in of:
            print("  " + (one if isinstance(one, str) else f"{one[1]:5d} {one[0]}"))
    print()
    broken = [name for name, most in CEILINGS.items() if numbers[name] > most]
    for name, value in numbers.items():
        most = f"  at most {CEILINGS[name]}" if name in CEILINGS else ""
        print(f"{name:34s} {value:6d}{most}{'  EXCEEDED' if name in broken else ''}")
    print(json.dumps({"numbers": numbers, "exceeded": broken}))
    return 1 if check and broken else 0


if __name__ == "__main__":
    sys.exit(main())
