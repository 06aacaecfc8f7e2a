"""Revisions of a git repository, and working trees as they are now, as folders that commands run in.

A working tree is taken as it is when it is asked for: what git tracks in it, and new files of PACKAGES that git does
not ignore. Git keeps it as a commit that no branch holds, and drops it in time."""

import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from nanolab.cli import UserError
from nanolab.lab.study import ROOT
from nanolab.runtime import base_dir

PACKAGES = ("nanolab", "scripts", "tasks")
NOBODY = {f"GIT_{who}_{what}": "nanolab" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
ALWAYS = {f"GIT_{who}_DATE": "2000-01-01T00:00:00Z" for who in ("AUTHOR", "COMMITTER")}  # one tree is one commit


class Revision(NamedTuple):
    """A state of the code."""

    name: str  # as it was typed
    repository: Path
    commit: str
    tree: str  # hash of all its files
    about: str  # what a table says of it
    came_from: str  # the commit as records name it: of a working tree with changes, the one that was changed


def find_revision(text: str) -> Revision:
    """A git revision of this checkout, or else the folder of a working tree. Raises UserError where it is neither."""
    commit = git(ROOT, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{text}^{{commit}}")
    if commit:
        return _revision(text, ROOT, commit, "")
    folder = Path(text).expanduser()
    top = git(folder, "rev-parse", "--show-toplevel") if text and folder.is_dir() else ""
    if not top:
        raise UserError(
            f"{text!r} is no revision of {ROOT} and no folder of a git checkout; expected a commit, a branch, a tag, or"
            " the path of a working tree; try lab compare HEAD .",
            "revision-unknown",
            revision=text,
        )
    return _revision(text, Path(top), *_as_it_is(Path(top)))


def _revision(name: str, repository: Path, commit: str, changed_from: str) -> Revision:
    tree = git(repository, "rev-parse", f"{commit}^{{tree}}")
    if not git(repository, "ls-tree", tree, "scripts/base_train.py"):
        raise UserError(
            f"{name} has no scripts/base_train.py; expected a revision of nanolab that trains; name another",
            "revision-without-training",
            revision=name,
        )
    shown = f"{changed_from[:12]} with changes" if changed_from else commit[:12]
    came_from = f"{changed_from}+changes" if changed_from else commit
    return Revision(name, repository, commit, tree, f"commit {shown}, tree {tree[:12]}", came_from)


def _as_it_is(top: Path) -> tuple[str, str]:
    """(the commit of the working tree as it is, the commit that it was changed from, if it was)."""
    head = git(top, "rev-parse", "HEAD")
    with tempfile.TemporaryDirectory() as folder:
        index = {"GIT_INDEX_FILE": f"{folder}/index"}
        git(top, "read-tree", "HEAD", env=index)
        git(top, "add", "--update", env=index)
        git(top, "add", "--", *(name for name in PACKAGES if (top / name).is_dir()), env=index)
        tree = git(top, "write-tree", env=index)
    if tree == git(top, "rev-parse", "HEAD^{tree}"):
        return head, ""
    return git(top, "commit-tree", tree, "-p", head, "-m", "a working tree", env=NOBODY | ALWAYS), head


def git(folder: Path, *words: str, env: dict[str, str] | None = None) -> str:
    """What a git command prints; "" where it fails."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # a hook sets some
    command = ["git", "-C", str(folder), *words]
    done = subprocess.run(command, env=own | (env or {}), capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def add_worktree(revision: Revision) -> Path:
    """A new folder with the files of the revision. Raises UserError. Those of processes that are gone are removed."""
    folder = base_dir() / "lab" / "worktrees"
    for left in folder.glob(f"{platform.node()}+*"):
        pid = left.name.split("+")[1]
        if not Path(f"/proc/{pid}").exists():
            shutil.rmtree(left)
    git(revision.repository, "worktree", "prune")
    path = (folder / f"{platform.node()}+{os.getpid()}+{revision.tree[:12]}").resolve()
    git(revision.repository, "worktree", "add", "--detach", "--force", str(path), revision.commit)
    if not (path / "scripts" / "base_train.py").exists():
        raise UserError(
            f"git could not make a worktree of {revision.name} in {path}; expected room there, and a repository that"
            f" can be written; try git worktree add {path} {revision.commit}",
            "worktree-failed",
            revision=revision.name,
        )
    return path


def remove_worktree(revision: Revision, path: Path) -> None:
    git(revision.repository, "worktree", "remove", "--force", str(path))
