"""Two revisions as arms: each runs its own code, in turn, is found again, and leaves nothing behind.

Most revisions here are small packages whose scripts/base_train.py writes what a run leaves without training."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import warm

from nanolab.cli import UserError
from nanolab.data.tokenizer import Tokenizer
from nanolab.lab import budget as budgets
from nanolab.lab import compare as comparison
from nanolab.lab import revisions, runner
from nanolab.lab.budget import Budget, read_budget
from nanolab.lab.commands import lab_compare
from nanolab.lab.config import CompareConfig, spelled_out
from nanolab.lab.results import read_results
from nanolab.lab.revision_run import absolute
from nanolab.lab.revisions import add_worktree, find_revision, git, remove_worktree

SCRIPT = """
import argparse, json, os, sys
from pathlib import Path
import nanolab
from nanolab.part import SHIFT
parser = argparse.ArgumentParser()
for name in ("run", "seed", "data-dir", "number"):
    parser.add_argument("--" + name)
parser.add_argument("--resume", action="store_true")
args = parser.parse_args()
base = Path(os.environ["NANOLAB_BASE_DIR"])
assert (base / "tokenizer" / "tokenizer.json").exists() and args.resume
with open(os.environ["ORDER"], "a") as file:
    print(nanolab.NAME, args.seed, file=file)
if SHIFT == "crash":
    raise RuntimeError("broken")
if SHIFT in ("refuse", "diverge"):
    print("error: step 3 is not finite: a gradient" if SHIFT == "diverge" else "error: no")
    sys.exit(1)
folder, seed = base / "runs" / args.run, int(args.seed)
value = seed + SHIFT * (1 + seed / 1000)
(folder / "metrics.jsonl").write_text("".join(
    json.dumps({"step": step, "val/bpb": value + 4 - step, "train/loss": 9.0}) + chr(10) for step in range(5)
))
if nanolab.NAME != "old":
    (folder / "result.json").write_text(json.dumps({"run": args.run, "val/bpb": value, "total_training_time": 0.5}))
"""
FILES = {"scripts/base_train.py": SCRIPT, "scripts/__init__.py": "", "nanolab/part.py": "SHIFT = 0.0"}


def commit(repo: Path, tag: str, files: dict[str, str]) -> None:
    for path, text in files.items():
        (repo / path).parent.mkdir(parents=True, exist_ok=True)
        (repo / path).write_text(text)
    who = ["-c", "user.name=x", "-c", "user.email=x@localhost"]
    for words in (["add", "-A"], [*who, "commit", "-q", "--allow-empty", "-m", tag], ["tag", tag]):
        subprocess.run(["git", "-C", repo, *words], check=True)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with text, a base directory with a tokenizer, and a repository of revisions."""
    folder = tmp_path_factory.mktemp("compare")
    (folder / "text").mkdir()
    for i in range(12):
        (folder / "text" / f"{i:02d}.txt").write_text(f"Document {i}. " + "The cat looked at the mat. " * (i + 1))
    Tokenizer.train([path.read_text() for path in (folder / "text").iterdir()], 280).save(folder / "base" / "tokenizer")
    repo = folder / "repo"
    subprocess.run(["git", "init", "-q", repo], check=True)
    commit(repo, "empty", {"README.md": "nothing yet"})
    commit(repo, "first", FILES | {"nanolab/__init__.py": "NAME = 'first'"})
    commit(repo, "lower", {"nanolab/__init__.py": "NAME = 'lower'", "nanolab/part.py": "SHIFT = -0.5"})
    commit(repo, "same", {"nanolab/__init__.py": "NAME = 'first'", "nanolab/part.py": "SHIFT = 0.0"})
    commit(repo, "old", {"nanolab/__init__.py": "NAME = 'old'", "nanolab/part.py": "SHIFT = 0.5"})
    for name in ("crash", "refuse", "diverge"):
        commit(repo, name, {"nanolab/__init__.py": f"NAME = '{name}'", "nanolab/part.py": f"SHIFT = '{name}'"})
    astray = f"import sys\nsys.path.insert(0, {str(folder / 'other')!r})\nimport tasks\nNAME, SHIFT = 'astray', 0"
    commit(repo, "astray", {"nanolab/__init__.py": astray, "nanolab/part.py": "SHIFT = 0.0"})
    (folder / "other" / "tasks").mkdir(parents=True)
    (folder / "other" / "tasks" / "__init__.py").write_text("")
    return folder


@pytest.fixture
def judge(home, monkeypatch, tmp_path, capsys):
    """A function (A, B, flags, **of the comparison) -> (exit code, document, rows, the order of what was begun)."""
    monkeypatch.setattr(revisions, "ROOT", home / "repo")
    monkeypatch.setenv("NANOLAB_BASE_DIR", str(home / "base"))
    monkeypatch.setenv("ORDER", str(tmp_path / "order"))
    machine = {"device_name": "a CPU", "dtype": "float32", "threads": 1, "torch": "2"}
    facts = {"machine": machine, "tokenizer": "t", "data": "d", "validation": "v", "seconds": 600.0}
    monkeypatch.setattr(comparison, "facts_of", lambda words: facts)

    def compare(a: str, b: str, *flags: str, **changes):
        (tmp_path / "order").write_text("")
        values = {"seeds": "42,43,44"} | changes
        capsys.readouterr()
        code = lab_compare(CompareConfig(a, b, **values), ["--data-dir", str(home / "text"), *flags])
        out = capsys.readouterr().out
        document = json.loads(out.splitlines()[-1])
        folder = Path(next(line for line in out.splitlines() if line.startswith("table: "))[7:]).parent
        return code, document, read_results(folder)[1], (tmp_path / "order").read_text().splitlines(), out

    return compare


def worktrees(home: Path) -> list[Path]:
    return list((home / "base" / "lab" / "worktrees").glob("*"))


def test_each_revision_runs_its_own_code_in_turn_and_once(home, judge):
    code, document, rows, begun, _ = judge("first", "lower")
    assert begun == ["first 42", "lower 42", "lower 43", "first 43", "first 44", "lower 44"]
    arm = document["arms"]["lower"]
    assert (code, arm["verdict"], document["baseline"]) == (0, "better", "first")
    assert arm["effect"]["mean"] == pytest.approx(-0.5 * 1.043) and arm["mean"] == pytest.approx(43 - 0.5 * 1.043)
    assert {row["package"] for row in rows} == {"nanolab/__init__.py"}
    for row in rows:
        assert row["commit"] == git(home / "repo", "rev-parse", row["arm"])
        assert document["arms"][row["arm"]]["flags"] == f"commit {row['commit'][:12]}, tree {row['tree'][:12]}"
        assert row["tree"] == git(home / "repo", "rev-parse", f"{row['arm']}^{{tree}}")
        assert [step for step, _ in row["curve"]] == [0, 1, 2, 3, 4]
    assert str(home) not in json.dumps(document["arms"])
    assert not worktrees(home) and git(home / "repo", "worktree", "list").count("\n") == 0
    assert judge("first", "lower")[:4] == (0, document, rows, [])


@pytest.mark.slow
def test_a_run_is_found_by_its_tree_and_its_flags(judge):
    judge("first", "lower")
    code, _, _, begun, _ = judge("lower", "first", seeds="42,43,44,45,46")  # found by tree, whatever it was part of
    assert (code, begun) == (1, ["first 45", "lower 45", "lower 46", "first 46"])
    assert judge("first", "lower", "--number", "3")[3] != []  # other flags, other runs
    code, document, _, _, _ = judge("first", "lower", metric="train/loss", direction="higher")
    assert (code, document["arms"]["lower"]["verdict"]) == (3, "identical")


def test_the_same_tree_twice_is_identical(judge):
    for a, b, name in (("first", "first", "first again"), ("first", "same", "same")):
        code, document, rows, begun, out = judge(a, b, "--number", "7")
        arm = document["arms"][name]
        assert (code, arm["verdict"], arm["effect"]["mean"]) == (3, "identical", 0)
        assert len(begun) in (3, 0) and len({row["key"] for row in rows}) == 3
        assert "identical" in out.split("runs   ")[0]


def test_a_version_that_writes_no_result_is_read_by_its_metrics(judge):
    code, document, rows, _, _ = judge("first", "old")
    assert (code, document["arms"]["old"]["effect"]["mean"]) == (1, pytest.approx(0.5 * 1.043))
    assert {row["result"]["train/loss"] for row in rows if row["arm"] == "old"} == {9.0}


@pytest.mark.slow
def test_a_working_tree_is_taken_as_it_is(home, judge):
    """With its changes and its new modules, and not with other new files; what is there stays as it is."""
    tree = home / "work"
    subprocess.run(["git", "clone", "-q", home / "repo", tree], check=True)
    git(tree, "checkout", "-q", "first")
    assert find_revision(str(tree)).commit == git(tree, "rev-parse", "HEAD")
    (tree / "nanolab" / "part.py").write_text("from nanolab.fresh import SHIFT")
    (tree / "nanolab" / "fresh.py").write_text("SHIFT = -0.25")
    (tree / "large.bin").write_text("data")
    before = git(tree, "status", "--porcelain")
    code, document, rows, _, _ = judge("first", str(tree))
    assert (code, document["arms"][str(tree)]["effect"]["mean"]) == (0, pytest.approx(-0.25 * 1.043))
    assert "with changes" in document["arms"][str(tree)]["flags"] and rows[-1]["commit"].endswith("+changes")
    assert git(tree, "status", "--porcelain") == before
    files = git(tree, "ls-tree", "-r", "--name-only", rows[-1]["tree"]).split()
    assert "nanolab/fresh.py" in files and "large.bin" not in files
    assert judge("first", str(tree))[3] == []
    (tree / "nanolab" / "fresh.py").write_text("SHIFT = 0.25")
    assert judge("first", str(tree))[0] == 1


@pytest.mark.parametrize(
    "b,found,tries,verdict",
    [
        pytest.param("crash", None, 6, 4, marks=pytest.mark.slow),
        ("diverge", "diverged", 3, 1),
        ("refuse", "revision-refused", 1, 2),
    ],
)
def test_a_revision_that_fails_is_reported_and_its_worktree_kept(home, judge, capsys, b, found, tries, verdict):
    try:
        code, document, _, begun, _ = judge("first", b)
        assert document["arms"][b]["verdict"] == found and (len(document["missing"]) == 3) == (found is None)
        assert code == verdict
    except UserError as error:
        assert error.code == found and error.values["arm"] == b
        begun = Path(os.environ["ORDER"]).read_text().splitlines()
    assert len([line for line in begun if line.startswith(b)]) == tries
    [kept] = worktrees(home)
    assert (kept / "nanolab" / "part.py").read_text() == f"SHIFT = '{b}'"
    shutil.rmtree(kept)


def test_worktrees_of_processes_that_are_gone_are_removed(home, monkeypatch):
    monkeypatch.setattr(revisions, "ROOT", home / "repo")
    monkeypatch.setenv("NANOLAB_BASE_DIR", str(home / "base"))
    gone = home / "base" / "lab" / "worktrees" / f"{os.uname().nodename}+{2**22 + 1}+abc"
    other = home / "base" / "lab" / "worktrees" / f"another-machine+{2**22 + 1}+abc"
    gone.mkdir(parents=True), other.mkdir()
    revision = find_revision("lower")
    path = add_worktree(revision)
    assert set(worktrees(home)) == {other, path}
    assert (path / "nanolab" / "part.py").read_text() == "SHIFT = -0.5"
    remove_worktree(revision, path)
    assert worktrees(home) == [other] and git(home / "repo", "worktree", "list").count("\n") == 0
    other.rmdir()


def test_a_module_from_elsewhere_is_refused(home, judge):
    with pytest.raises(UserError) as error:
        judge("first", "astray")
    assert error.value.code == "imports-elsewhere"
    assert error.value.values["files"] == [str((home / "other" / "tasks" / "__init__.py").resolve())]
    for path in worktrees(home):
        shutil.rmtree(path)


def test_a_revision_cannot_change_the_users_data(home, judge):
    """Its corpora and tokenizer are links: what it puts in their place is its own."""
    judge("first", "lower")
    ours = home / "base" / "tokenizer" / "tokenizer.json"
    [theirs, *_] = (home / "base" / "lab" / "revisions").glob("*/tokenizer/tokenizer.json")
    assert theirs.samefile(ours)
    theirs.with_name("new").write_text("other")
    theirs.with_name("new").replace(theirs)
    assert ours.read_text() != "other"
    shutil.rmtree(theirs.parents[1])


@pytest.mark.parametrize(
    "a,b,flags,changes,code",
    [
        ("first", "", [], {}, "compare-two"),
        ("first", "nothing", [], {}, "revision-unknown"),
        ("first", "--all", [], {}, "revision-unknown"),
        ("first", "empty", [], {}, "revision-without-training"),
        ("first", "lower", ["--seed", "3"], {}, "flag-of-the-lab"),
        ("first", "lower", [], {"budget": "20"}, "budget"),
        ("first", "lower", [], {"seeds": "42,x"}, "seeds"),
        ("first", "lower", [], {"seeds": "42"}, "too-few"),
        ("first", "lower", [], {"metric": "val/bqb"}, "metric-unknown"),
    ],
)
def test_what_was_typed_wrong_is_refused(home, judge, a, b, flags, changes, code):
    with pytest.raises(UserError) as error:
        judge(a, b, *flags, **changes)
    assert error.value.code == code
    for path in worktrees(home):
        shutil.rmtree(path)


def test_words_after_two_dashes_are_flags_of_the_runs(tmp_path, monkeypatch):
    words = ["compare", "HEAD", ".", "--seeds", "1,2,3", "--", "--depth", "4", "--", "x"]
    assert spelled_out(words) == (
        ["--what=compare", "--a=HEAD", "--b=.", "--seeds", "1,2,3"],
        ["--depth", "4", "--", "x"],
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    flags = ["--data", "text:0.5,pydocs:0.5", "--tokenizer=text", "--data-dir", "none", "--no-smear", "--gate", "text"]
    found = ["--data", f"{tmp_path}/text:0.5,pydocs:0.5", "--tokenizer", f"{tmp_path}/text", "--data-dir", "none"]
    assert absolute(flags) == [*found, "--no-smear", "--gate", "text"]
    with pytest.raises(UserError) as error:
        absolute(["4", "--depth"])
    assert error.value.code == "flags-expected"


def test_flags_that_this_checkout_lacks_are_left_to_the_revisions(monkeypatch, capsys):
    facts, looked = {"tokenizer": "t", "data": "d", "validation": "v", "seconds": 7.0}, []

    def preview(configs, jobs, threads):
        looked.append(configs[""])
        return runner.Preview(1, 0, {}, {"": facts})

    monkeypatch.setattr(comparison, "preview_of", preview)
    assert comparison.facts_of(["--depth", "3"]) == facts | {"machine": {}}
    found = comparison.facts_of(["--number", "3", "--depth", "3", "--data-dir=x", "--no-idea", "--threads", "2"])
    assert found["seconds"] is None and "not this checkout's" in capsys.readouterr().out
    assert (looked[0].depth, looked[1].depth, looked[1].data_dir, looked[1].threads) == (3, 20, "x", 2)
    with pytest.raises(UserError) as error:
        comparison.facts_of(["--number", "3", "--data-dir"])
    assert error.value.code == "data-flags"


@pytest.mark.parametrize(
    "text,seconds", [("20m", 1200), ("1h30m", 5400), ("90s", 90), ("1.5h", 5400), ("", float("inf"))]
)
def test_a_budget_is_read(text, seconds):
    assert read_budget(text) == seconds


def test_a_budget_ends_between_pairs(monkeypatch, capsys):
    """Of ten seconds for a run of A and five for one of B, two pairs fit into 35 seconds and three into 45."""
    now = [100.0]
    monkeypatch.setattr(budgets.time, "monotonic", lambda: now[0])

    class Run:
        def __init__(self, arm: str, seed: int) -> None:
            self.arm, self.seed = arm, seed

    def begun(seconds: float, expected: float | None) -> list[str]:
        todo = [Run(arm, seed) for seed in range(5) for arm in "AB"]
        budget, found = Budget(seconds, expected, todo, 6), []
        said.append(budget.fits())
        for run in todo:
            if not budget.allows(run):
                break
            found.append(f"{run.arm}{run.seed}")
            took = 10.0 if run.arm == "A" else 5.0
            now[0] += took
            budget.note(run.arm, took)
        return found

    said: list[str] = []
    assert len(begun(35, None)) == 4 and len(begun(45, None)) == 6 and len(begun(float("inf"), None)) == 10
    assert "first pair, 3 of 6 seeds" in capsys.readouterr().out  # one was there before
    assert len(begun(35, 20.0)) == 0 and len(begun(45, 20.0)) == 6
    assert said[0].startswith("how many") and said[3].startswith("1 of 6") and said[4].startswith("2 of 6")
    assert capsys.readouterr().out.count("not begun are the seeds 0, 1, 2, 3, 4;") == 1


def test_no_time_for_one_pair_is_said(judge):
    with pytest.raises(UserError) as error:
        judge("first", "lower", "--number", "11", budget="19m59s")
    assert error.value.code == "budget-too-small"


@pytest.mark.slow
def test_a_changed_constant_shows_and_a_changed_page_does_not(tmp_path, monkeypatch, home):
    """With nanolab itself: momentum 0.85 -> 0.5 gives other runs, another README the same to the last bit."""
    repo, root = tmp_path / "repo", Path(__file__).parents[2]
    for name in ("nanolab", "scripts", "tasks"):
        shutil.copytree(root / name, repo / name, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(["git", "init", "-q", repo], check=True)
    commit(repo, "one", {"README.md": "one"})
    commit(repo, "page", {"README.md": "two"})
    schedule = (repo / "nanolab" / "training" / "schedule.py").read_text()
    assert schedule.count("min(0.85 + 0.12") == 1
    commit(repo, "constant", {"nanolab/training/schedule.py": schedule.replace("min(0.85 + 0.12", "min(0.5 + 0.12")})
    small = "--depth 1 --aspect-ratio 32 --head-dim 32 --max-seq-len 32 --device-batch-size 2 --total-batch-size 64"
    small += " --num-iterations 3 --warmup-steps 1 --lr-scale 1 --eval-tokens 128 --log-every -1"
    flags = [*small.split(), "--data-dir", str(home / "text")]
    monkeypatch.setattr(revisions, "ROOT", repo)
    monkeypatch.setenv("NANOLAB_BASE_DIR", str(home / "base"))
    monkeypatch.setenv("NANOLAB_DTYPE", "float32")
    monkeypatch.setattr(sys, "executable", str(warm.executable()))
    assert lab_compare(CompareConfig("one", "page"), flags) == 3
    assert lab_compare(CompareConfig("one", "constant", matters=1e-9), flags) in (0, 1, 4)
    bpb = {}
    for path in (home / "base" / "lab" / "revisions").glob("*/runs/*/row.json"):
        row = json.loads(path.read_text())
        if "step" in row["result"]:
            bpb.setdefault(row["tree"], set()).add(row["result"]["val/bpb"])
    one, page, constant = (bpb[git(repo, "rev-parse", f"{name}^{{tree}}")] for name in ("one", "page", "constant"))
    assert len(one) == 3 and one == page and not one & constant
