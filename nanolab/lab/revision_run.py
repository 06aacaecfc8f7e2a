"""A run that another revision of nanolab makes, by its own command line: how it is started, what is read of its files.

Its flags are words that only that revision has to understand; its files are those of whatever version wrote them."""

import json
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from nanolab.cli import UserError
from nanolab.files import replacing, write_text
from nanolab.lab.processes import DIVERGED, REFUSED, CommandLine, Planned
from nanolab.lab.results import Row
from nanolab.lab.runner import MACHINE
from nanolab.records.models import read_json, read_metrics
from nanolab.runtime import base_dir

SHARED = ("tokenizer", "corpora", "eval_bundle")  # of the user's base directory
PATHS = ("tokenizer", "data_dir", "val_data", "eval_bundle", "data")  # flags that may name a place on this machine
# Runs scripts.base_train of the folder it begins in, and writes down where the modules came from.
START = f"""
import atexit, json, os, runpy, sys
out, *argv = sys.argv[1:]
root = os.path.realpath(os.getcwd()) + os.sep
sys.path.insert(0, root)
sys.argv = ["scripts.base_train", *argv]
sys.orig_argv = [sys.executable, "-m", *sys.argv]
def note():
    ours = [m for n, m in sys.modules.items() if n.split(".")[0] in ("nanolab", "scripts", "tasks")]
    files = {{os.path.realpath(m.__file__) for m in ours if getattr(m, "__file__", None)}}
    package = getattr(sys.modules.get("nanolab"), "__file__", None)
    with open(out, "w") as file:
        found = {{"package": package and os.path.relpath(package, root)}}
        json.dump({{**found, "elsewhere": sorted(f for f in files if not f.startswith(root))}}, file)
atexit.register(note)
try:
    runpy.run_module("scripts.base_train", run_name="__main__", alter_sys=True)
except SystemExit as end:
    raise SystemExit({REFUSED} if end.code in (1, 2) or isinstance(end.code, str) else end.code)
"""


@dataclass
class RevisionRun(Planned):
    """A run of a revision."""

    base: Path = Path()  # the revision's base directory

    @property
    def dir(self) -> Path:
        return self.base / "runs" / self.key

    def row(self, seconds: float) -> Row:
        """Its line, which is kept in its folder; its weights are not. Raises UserError where it imported what is not
        its revision's.
        """
        imported = read_json(self.dir / "imports.json")
        if imported["elsewhere"]:
            raise UserError(
                f"{self.arm} seed {self.seed} imported {', '.join(imported['elsewhere'][:3])}; expected modules of its"
                " own worktree only; leave these out of PYTHONPATH and of installed packages",
                "imports-elsewhere",
                files=imported["elsewhere"],
            )
        rows, path = read_metrics(self.dir), self.dir / "result.json"
        result = {name: value for row in rows for name, value in row.items() if value is not None}
        result |= read_json(path) if path.exists() else {}
        result.pop("run", None)
        curve = [[row["step"], row["val/bpb"]] for row in rows if row.get("val/bpb") is not None]
        saved = max(self.dir.glob("checkpoints/*/meta.json"), key=lambda path: path.parent.name, default=None)
        facts = read_json(saved) if saved else {}
        env = read_json(self.dir / "env.json") if (self.dir / "env.json").exists() else {}
        took = max(seconds, result.get("total_training_time") or 0.0)  # one that was finished before took nothing now
        row = {"key": self.key, **self.identity, "package": imported["package"], "seconds": round(took, 3)}
        row |= {"text": facts.get("val_fingerprint")}  # that it was measured on, as it says itself
        row |= {"ran_on": {name: env[name] for name in MACHINE if name in env}, "result": result, "curve": curve}
        write_text(self.dir / "row.json", json.dumps(row) + "\n")
        shutil.rmtree(self.dir / "checkpoints", ignore_errors=True)
        return row

    def refusal(self) -> int:
        """Whether what it said at its end is that it diverged, or that it refuses its flags or data; else 0."""
        log = self.dir / "log.txt"
        lines = log.read_text(errors="replace").splitlines()[-10:] if log.exists() else []
        said = [line for line in lines if line.startswith("error") or "is not a flag of this command" in line]
        return 0 if not said else DIVERGED if re.search(r"step \d+ is not finite", said[-1]) else REFUSED

    def begin_in(self, worktree: Path, words: list[str]) -> None:
        """Make its command, and the base directory that it needs. words: flags of both revisions."""
        linked_base(self.base)
        env = os.environ | {"NANOLAB_BASE_DIR": str(self.base)}
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(worktree), os.environ.get("PYTHONPATH")]))
        ours = sys.modules.get("scripts")
        if ours is not None and not ours.GIVEN:
            env.pop("GOMP_SPINCOUNT", None)  # of this process: each revision has its own idea of it
        own = ["--run", self.key, "--seed", str(self.seed), "--resume"]
        self.cfg = CommandLine(self.key, ["-c", START, str(self.dir / "imports.json"), *words, *own], worktree, env)


def linked_base(base: Path) -> None:
    """Make a base directory with the tokenizer and the corpora of the user's. Files are linked, so that they take no
    room, and a revision that puts others in their place leaves the user's alone.
    """

    def link(source: str, target: str) -> str:
        try:
            os.link(source, target)
        except OSError:  # another file system
            shutil.copy2(source, target)
        return target

    if base.exists():
        return
    with replacing(base) as fresh:
        fresh.mkdir(parents=True)
        for name in SHARED:
            if (source := base_dir() / name).exists():
                shutil.copytree(source, fresh / name, copy_function=link, ignore=shutil.ignore_patterns("*.lock"))


def flag_parts(words: list[str]) -> list[tuple[str, list[str]]]:
    """(name, words) of each flag. Raises UserError where no flag begins the words."""
    found: list[tuple[str, list[str]]] = []
    for word in words:
        if not word.startswith("--") and not found:
            raise UserError(
                f"{word!r} after --; expected flags of scripts.base_train; try -- --depth 4", "flags-expected"
            )
        if word.startswith("--"):
            found.append((word[2:].partition("=")[0].replace("-", "_"), []))
        found[-1][1].append(word)
    return found


def absolute(words: list[str]) -> list[str]:
    """The flags with paths that hold from everywhere: the runs begin in their own folders."""

    def there(text: str) -> str:  # PATH, or PATH:WEIGHT
        path, colon, weight = (text, "", "") if Path(text).expanduser().exists() else text.rpartition(":")
        place = Path(path).expanduser()
        return f"{place.resolve()}{colon}{weight}" if path and place.exists() else text

    out: list[str] = []
    for name, (flag, *values) in flag_parts(words):
        flag, equals, value = flag.partition("=")
        values = [value] if equals else values
        if name in PATHS:
            values = [",".join(map(there, value.split(",") if name == "data" else [value])) for value in values]
        out += [flag, *values]
    return out
