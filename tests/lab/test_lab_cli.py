"""From a study file to a verdict: runs are made once, found again, retried; the verdict is made of runs.jsonl alone."""

import json
import os
import platform
import signal
import statistics
import subprocess
import time
from pathlib import Path

import pytest
import scipy.stats
import warm

from nanolab.cli import UserError
from nanolab.data.tokenizer import Tokenizer
from nanolab.lab import commands, processes, runner
from nanolab.lab.config import LabConfig
from nanolab.lab.curves import draw_curves, points_of, training_saved
from nanolab.lab.results import new_record, read_results, write_results
from nanolab.lab.study import read_study, study_of, to_toml
from nanolab.lab.verdict import exit_code, verdict_of
from nanolab.records.models import find_model
from nanolab.stages.config import BaseTrainConfig

SMALL = "--depth 1 --aspect-ratio 32 --head-dim 32 --max-seq-len 32 --device-batch-size 2 --total-batch-size 64"
SHORT = f"{SMALL} --num-iterations 2 --eval-tokens 128 --log-every -1"


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with text and a base directory with a tokenizer."""
    folder = tmp_path_factory.mktemp("lab")
    (folder / "text").mkdir()
    for i in range(12):
        (folder / "text" / f"{i:02d}.txt").write_text(
            f"Document {i}. " + "The cat sat and looked at the mat. " * (i + 1)
        )
    Tokenizer.train([path.read_text() for path in (folder / "text").iterdir()], 290).save(folder / "base" / "tokenizer")
    return folder


def lab(home: Path, *argv: object) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"NANOLAB_BASE_DIR": str(home / "base"), "NANOLAB_DTYPE": "float32"}
    return warm.python("-m", "scripts.lab", *argv, env=env)


def study_file(home: Path, name: str, **changes) -> Path:
    values = {"question": "Which?", "baseline": "none", "matters": 0.01, "seeds": [42, 43, 44], "results": name}
    values |= {"flags": f"--data-dir {home / 'text'} {SHORT}", "arms": {"none": "", "same": "", "keep": "--keep 3"}}
    path = home / f"{name}.toml"
    path.write_text(to_toml(study_of(values | changes, name)))
    return path


def made(home: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in (home / "base" / "runs").glob("lab-*/result.json")}


@pytest.mark.slow
def test_runs_are_made_once_and_equal_flags_are_identical(home, monkeypatch):
    """Two settings that train alike, one of them twice: differences are exactly 0."""
    path = study_file(home, "same")
    first = lab(home, "run", path)
    assert first.returncode == 0, first.stdout + first.stderr
    document = json.loads(first.stdout.splitlines()[-1])
    assert {arm: one["verdict"] for arm, one in document["arms"].items()} == {
        "none": None,
        "same": "identical",
        "keep": "identical",
    }
    assert all(one["effect"]["mean"] == 0 for one in document["arms"].values() if one["effect"])
    assert (document["seeds"], document["missing"]) == ([42, 43, 44], [])
    runs = made(home)
    assert len(runs) == 6  # none and same share theirs

    table, results = home / "same" / "table.md", (home / "same" / "runs.jsonl").read_text()
    text = table.read_text()
    record, rows = read_results(home / "same")
    assert len({row["result"]["val/bpb"] for row in rows}) == 3  # the seeds differ
    assert platform.node() not in results and str(home / "base") not in results
    assert all([step for step, _ in row["curve"]] == [2] for row in rows)
    assert text.count("same runs: none, same.") == 1

    page = (home / "same" / "index.html").read_bytes()
    assert str(home).encode() not in page
    table.unlink()
    verdict = lab(home, "verdict", path)
    assert verdict.returncode == 3, verdict.stdout + verdict.stderr
    assert table.read_text() == text and (home / "same" / "index.html").read_bytes() == page
    assert json.loads(verdict.stdout.splitlines()[-1]) == document

    monkeypatch.setenv("NANOLAB_BASE_DIR", str(home / "base"))
    assert find_model(rows[0]["key"]).step == 2
    with pytest.raises(UserError, match="no finished run"):  # a run of a study is no model that is taken unasked
        find_model()

    # a run is found by its line, or by its directory
    (home / "same" / "runs.jsonl").write_text("".join(results.splitlines(keepends=True)[:-1]))
    again = lab(home, "run", path)
    assert again.returncode == 0 and made(home) == runs, again.stderr
    found = read_results(home / "same")[1]
    assert found[:-1] == rows[:-1] and found[-1] | {"seconds": 0} == rows[-1] | {"seconds": 0}


@pytest.mark.parametrize(
    "arms,fact",
    [
        ({"none": "", "more": "--num-iterations 3"}, "tokens"),
        ({"none": "", "clock": "--num-iterations -1 --max-seconds 1"}, "tokens"),
        ({"none": "", "text": "--val-data {}/text/03.txt"}, "validation"),
    ],
)
def test_arms_that_differ_in_what_is_held_equal_are_refused(home, monkeypatch, arms, fact):
    monkeypatch.setenv("NANOLAB_BASE_DIR", str(home / "base"))
    monkeypatch.setenv("NANOLAB_DTYPE", "float32")
    study = read_study(study_file(home, "unequal", arms={arm: flags.format(home) for arm, flags in arms.items()}))
    preview = runner.preview_of(study.configs(""), 1, 1)
    with pytest.raises(UserError) as error:
        runner.check_equal(study, preview.arms)
    assert (error.value.code, error.value.values["fact"]) == ("arms-unequal", fact)
    assert set(error.value.values["arms"]) == set(arms)


def test_what_was_typed_wrong_ends_with_code_2(home):
    path = study_file(home, "wrong")
    path.write_text(path.read_text().replace("--keep", "--kep"))
    done = lab(home, "run", path)
    assert done.returncode == 2 and done.stderr.startswith("error [unknown-flag]: arm keep"), done.stderr
    for cfg in (LabConfig("run"), LabConfig("walk", str(path))):
        with pytest.raises(UserError) as error:
            commands.lab(cfg)
        assert error.value.code == "lab-command"
    assert not (home / "wrong").exists()


@pytest.mark.slow
def test_try_asks_in_one_line(home):
    words = ["--data-dir", home / "text", *SHORT.split(), "--seeds", "1,2,3", "--matters", "0.5"]
    done = lab(home, "try", "--gate head", "--against", "", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert {arm: one["flags"] for arm, one in document["arms"].items()} == {"baseline": "", "idea": "--gate head"}
    assert (document["seeds"], document["matters"]) == ([1, 2, 3], 0.5)
    [path] = (home / "base" / "lab").glob("try-*/study.toml")
    runs = made(home)
    assert lab(home, "try", "--gate head", *words).returncode == 0 and made(home) == runs
    checked = lab(home, "check", path)
    document = json.loads(checked.stdout.splitlines()[-1])
    assert checked.returncode == (0 if document["enough"] else 4), checked.stderr
    assert document["noise"] > 0 and document["enough"] == (document["seeds_needed"] <= 3)


@pytest.mark.slow
def test_interrupted_and_typed_again_nothing_is_made_twice(home):
    """A run that was on goes on from its step, also where the lab was killed; what was finished stays."""
    flags = f"--data-dir {home / 'text'} {SMALL} --num-iterations 60 --eval-every -1"
    arms, before = {"none": "", "head": "--gate head"}, set(made(home))
    path = study_file(home, "stopped", flags=flags, arms=arms, metric="train/loss")
    code = "import os, runpy, sys; print(os.getpid(), flush=True); sys.argv[:1] = ['lab']; "
    code += "runpy.run_module('scripts.lab', run_name='__main__')"
    env = os.environ | {"NANOLAB_BASE_DIR": str(home / "base"), "NANOLAB_DTYPE": "float32"}
    command = [str(warm.executable()), "-c", code, "run", str(path)]
    finished, went_on = {}, set()
    for number, ended in ((signal.SIGINT, 128 + signal.SIGINT), (signal.SIGKILL, -signal.SIGKILL)):
        with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
            pid, deadline = int(process.stdout.readline()), time.monotonic() + 120
            while not (
                on := {name for name in started(home) - before - made(home).keys() if steps(home, name) > 3}
            ) or (made(home).keys() - before == finished.keys()):
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.02)
            os.kill(pid, number)
            process.stdout.read()
        assert process.returncode == ended
        now = {name: at for name, at in made(home).items() if name not in before}
        assert finished.items() <= now.items() and len(now) < 6
        finished, went_on = now, went_on | on - now.keys()
    again = lab(home, "run", path)
    assert again.returncode == 0, again.stdout + again.stderr
    now = {name: at for name, at in made(home).items() if name not in before}
    assert len(now) == 6 and finished.items() <= now.items()
    runs = home / "base" / "runs"
    assert went_on == {name for name in now if json.loads((runs / name / "env.json").read_text())["resumes"]}


def started(home: Path) -> set[str]:
    return {path.parent.name for path in (home / "base" / "runs").glob("lab-*/metrics.jsonl")}


def steps(home: Path, name: str) -> int:
    return len((home / "base" / "runs" / name / "metrics.jsonl").read_text().splitlines())


def planned(seed: int, name: str) -> processes.Planned:
    return processes.Planned("none", seed, BaseTrainConfig(run=f"lab-{name}", seed=seed), {"sources": "x"})


def fake_train(cfg, log, slot, gpus):
    """Does what the run's name says, and notes that it was begun."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as file:
        print(f"error [x]: attempt {slot}", file=file)
    tries, how = len(log.read_text().splitlines()), cfg.run.split("-")[1]
    if how == "killed" or how == "once" and tries == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if how in ("refused", "diverged"):
        raise SystemExit(processes.DIVERGED if how == "diverged" else processes.REFUSED)
    (log.parent / "result.json").write_text(json.dumps({"val/bpb": 1.0 + cfg.seed, "total_training_time": 1.0}))


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 3])
def test_a_crashed_run_is_tried_once_more_and_then_reported(monkeypatch, capsys, jobs):
    monkeypatch.setattr(processes, "train", fake_train)
    runs = [planned(seed, name) for seed, name in enumerate(["good", "once", "killed", "refused", "diverged"])]
    found = {run.seed: row for run, row in processes.make_runs(runs, jobs, 0, "val/bpb")}
    assert [run.tries for run in runs] == [1, 2, 2, 1, 1]
    assert (found[0]["result"]["val/bpb"], found[1]["result"]["val/bpb"]) == (1.0, 2.0)
    assert found[2]["failed"] == "killed by SIGKILL"
    assert found[3]["failed"].startswith("error [x]")
    assert [found[seed]["diverged"] for seed in (2, 3, 4)] == [False, False, True]
    assert capsys.readouterr().out.count("FAILED") == 3


def test_runs_end_where_what_asks_for_them_gives_up(monkeypatch, tmp_path):
    def endless(cfg, log, slot, gpus):
        if cfg.seed:
            (tmp_path / str(os.getpid())).touch()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(600)
        while not list(tmp_path.glob("[0-9]*")):
            time.sleep(0.01)
        fake_train(cfg, log, slot, gpus)

    monkeypatch.setattr(processes, "train", endless)
    asked = processes.make_runs([planned(0, "good"), planned(1, "good")], 2, 0, "val/bpb")
    assert next(asked)[0].seed == 0
    [pid] = [int(path.name) for path in tmp_path.glob("[0-9]*")]
    os.kill(pid, 0)
    asked.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_an_error_in_a_fork_is_raised_here():
    def work(n: int) -> int:
        if n < 0:
            raise UserError("negative", "some-code", n=n)
        return n + 1

    assert processes.in_child(work, 3) == 4
    with pytest.raises(UserError) as error:
        processes.in_child(work, -3)
    assert (error.value.code, error.value.values) == ("some-code", {"n": -3})


def test_an_edited_source_gives_other_keys_and_an_edited_page_the_same(tmp_path, monkeypatch):
    """In a small package: every run has another key after an edit of a module that they import, also within a function,
    and the same after one of a module that they do not, or of a page."""
    for path, text in {
        "nanolab/stages/pretrain.py": "from nanolab.model.gpt import GPT\ndef f():\n    import nanolab.data.late",
        "nanolab/model/gpt.py": "from nanolab.model import part\nimport torch",
        "nanolab/model/part.py": "",
        "nanolab/data/late.py": "",
        "nanolab/lab/report.py": "from nanolab.stages import pretrain",
        "dev/serving.md": "",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    study = study_of({"question": "?", "baseline": "a", "matters": 1, "arms": {"a": "", "b": "--gate head"}}, "x")
    facts = {"tokenizer": "t", "data": "d", "validation": "v"}
    preview = runner.Preview(1, 0, {"threads": 1, "device": "cpu"}, {"a": facts, "b": facts})

    def keys() -> list[str]:
        return [run.key for run in runner.plan_runs(study, study.configs(""), preview)]

    def edit(path: str) -> None:
        (tmp_path / path).write_text((tmp_path / path).read_text() + "\n# a note\n")

    first = keys()
    assert len(set(first)) == 6
    edit("dev/serving.md")
    edit("nanolab/lab/report.py")
    assert keys() == first
    seen = set(first)
    for path in ("model/gpt", "model/part", "data/late", "stages/pretrain"):
        edit(f"nanolab/{path}.py")
        assert not set(keys()) & seen
        seen |= set(keys())
    preview.machine["threads"] = 2
    assert not set(keys()) & seen


def results(folder: Path, values: dict[str, list[float | None]], **changes) -> Path:
    """A folder with the runs.jsonl of a study in which `values` came out; None: not run."""
    study = study_of(
        {"question": "?", "baseline": "a", "matters": 0.1, "arms": dict.fromkeys(values, "")} | changes, "x"
    )
    seeds = list(range(42, 42 + max(map(len, values.values()))))
    record = new_record(study.fixed(""), threads=1) | {"seeds": seeds}
    machine = {"device_name": "CPU", "dtype": "float32", "threads": 1, "torch": "2"}
    rows = [
        {
            "arm": arm,
            "seed": seed,
            "key": f"{arm} {seed}",
            "sources": "s",
            "machine": machine,
            "validation": "v",
            "seconds": 2.0,
        }
        | {"result": {"val/bpb": value}}
        for arm, found in values.items()
        for seed, value in zip(seeds, found)
        if value is not None
    ]
    write_results(folder, record, rows)
    return folder


BASE = [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    "changes,verdict,code",
    [
        ([-1.0, -1.001, -1.002], "better", 0),
        ([1.0, 1.001, 1.002], "worse", 1),
        ([0.001, -0.001, 0.0005], "equivalent", 3),
        ([0.0, 0.0, 0.0], "identical", 3),
        ([0.5, -0.5, 0.1], "unresolved", 4),
    ],
)
def test_the_exit_code_says_the_verdict(tmp_path, changes, verdict, code):
    document, lines = verdict_of(results(tmp_path, {"a": BASE, "b": [x + d for x, d in zip(BASE, changes)]}))
    assert document["arms"]["b"]["verdict"] == verdict and exit_code(document) == code
    assert any(verdict in line for line in lines)
    if verdict in ("better", "worse"):
        higher, _ = verdict_of(
            results(tmp_path, {"a": BASE, "b": [x - d for x, d in zip(BASE, changes)]}, direction="higher")
        )
        assert higher["arms"]["b"]["verdict"] == verdict


def test_of_several_arms_the_exit_code_says_whether_one_is_better(tmp_path):
    def code(**arms: list[float | None]) -> int:
        return exit_code(verdict_of(results(tmp_path, {"a": BASE} | arms))[0])

    better, worse, same = [0.0, 1.001, 2.002], [2.0, 3.001, 4.002], BASE
    assert code(b=worse, c=better, d=same) == 0
    assert code(b=worse, c=same) == 3
    assert code(b=worse, c=worse) == 1
    assert code(b=worse, c=[None, None, None]) == 4  # an arm without runs is not known


def test_an_arm_that_has_not_run_counts_in_the_family(tmp_path):
    """Holm's first step is for as many arms as the study has: the p-value doubles."""
    found = [1.05, 2.06, 3.07]
    alone = verdict_of(results(tmp_path / "1", {"a": BASE, "b": found}))[0]["arms"]["b"]["effect"]["p"]
    beside = verdict_of(results(tmp_path / "2", {"a": BASE, "b": found, "c": [None] * 3}))[0]["arms"]["b"]["effect"][
        "p"
    ]
    assert 0 < alone < 0.5 and beside == pytest.approx(2 * alone)


def test_what_is_missing_is_said(tmp_path):
    """Of the baseline's seeds those count for an arm that it has run from the first on."""
    values = {"a": [1.0, 2.0, None, 3.0], "b": [0.0, 1.001, 9.0, None], "c": [None] * 4, "d": [0.0, 1.001, 9.0, 2.002]}
    document, lines = verdict_of(results(tmp_path, values))
    assert document["missing"] == ["c seed 42", "c seed 43", "a seed 44", "c seed 44", "b seed 45", "c seed 45"]
    assert document["seeds"] == [42, 43, 45]
    effects = {arm: one["effect"] for arm, one in document["arms"].items()}
    assert effects["a"] is None and effects["c"] is None
    assert (effects["b"]["seeds"], effects["b"]["n"], effects["b"]["verdict"]) == (2, 0, "unresolved")
    assert (effects["d"]["n"], effects["d"]["verdict"]) == (3, "better")
    assert effects["d"]["mean"] == pytest.approx(-0.999)
    text = (tmp_path / "table.md").read_text()
    assert all(name in text for name in document["missing"])


def test_an_arm_whose_runs_have_no_such_number_is_named(tmp_path):
    """As of learned positions, which read no longer rows."""
    folder = results(tmp_path, {"a": BASE, "b": BASE, "c": BASE})
    record, rows = read_results(folder)
    metric = record["study"]["metric"]
    rows = [row | {"result": {metric: None}} if row["arm"] == "b" else row for row in rows]
    write_results(folder, record, rows)
    document, lines = verdict_of(folder)
    assert document["arms"]["b"]["verdict"] is None and document["missing"] == []
    assert f"No {metric} in runs of b." in lines


def test_a_run_that_diverged_is_no_missing_one(tmp_path):
    folder = results(tmp_path, {"a": BASE, "b": BASE})
    record, rows = read_results(folder)
    del rows[3]["result"]
    write_results(folder, record, [*rows[:3], rows[3] | {"failed": "loss is nan", "diverged": True}, *rows[4:]])
    document, _ = verdict_of(folder)
    assert (document["arms"]["b"]["verdict"], document["missing"], exit_code(document)) == ("diverged", [], 1)
    assert document["arms"]["b"]["failed"] == {43: "loss is nan"}
    assert "loss is nan" in (folder / "table.md").read_text()


@pytest.mark.slow
def test_curves_are_means_over_seeds_with_the_lowest_and_the_highest(tmp_path):
    folder = results(tmp_path, {"a": BASE, "b": BASE, "c": [None] * 3})
    record, rows = read_results(folder)
    assert draw_curves(folder, record, rows) == {}
    for row in rows:
        shift = {"a": 0.0, "b": 1.0}[row["arm"]] + (row["seed"] - 42) / 8
        row["curve"] = [[0, 9.0], [2, 3.0 + shift], [4, 2.0 + shift]] + [[6, 1.0]] * (row["seed"] == 42)
    write_results(folder, record, rows)
    of_b = [row for row in rows if row["arm"] == "b"]
    assert points_of(of_b) == [(2, 4.125, 4.0, 4.25), (4, 3.125, 3.0, 3.25)] and points_of([]) == []
    drawn = draw_curves(folder, record, rows)
    assert drawn == {"curves": folder / "curves.svg"}
    path = drawn["curves"]
    first = path.read_bytes()
    assert b"<svg" in first and b">a<" in first and b">b<" in first
    assert draw_curves(folder, record, rows) == drawn and path.read_bytes() == first


def with_curve(seed: int, curve) -> dict:
    return {"seed": seed, "curve": [[0, 99.0], *([step, float(value)] for step, value in curve)]}


@pytest.mark.parametrize("lower", [True, False])
def test_training_saved_is_where_the_better_curve_reaches_the_other_s_end(lower):
    """On 1 + 4 / x and 1 + 2 / x the second is at the first one's end after half of the way. By hand between two
    measurements, and with the sign that says which of the two is ahead."""
    sign = 1 if lower else -1
    steps = range(1, 101)
    slow, fast = ([with_curve(1, [(x, sign * (1 + k / x)) for x in steps])] for k in (4, 2))
    assert training_saved(fast, slow, lower) == pytest.approx(0.5)
    assert training_saved(slow, fast, lower) == pytest.approx(-0.5)
    assert training_saved(fast, fast, lower) == 0
    coarse = [with_curve(1, [(10, sign * 3), (20, sign * 1)]), with_curve(2, [(10, sign * 5), (20, sign * 3)])]
    end = [with_curve(1, [(10, sign * 9), (20, sign * 2.5)]), with_curve(2, [(10, sign * 9), (20, sign * 2.5)])]
    assert training_saved(coarse, end, lower) == pytest.approx(1 - 17.5 / 20)  # 4 at 10, 2 at 20: 2.5 at 17.5
    assert training_saved(coarse, [with_curve(1, [(20, sign * 9)])], lower) is None
    early = [with_curve(1, [(10, sign * 1), (20, sign * 0.5)])]
    assert training_saved(early, end, lower) == 0.5  # the first measurement is past it: no more is known


def test_the_table_says_what_training_an_effect_saves(tmp_path):
    folder = results(tmp_path, {"a": BASE, "b": [x - 0.5 for x in BASE], "c": BASE})
    record, rows = read_results(folder)
    for row in rows:
        last = row["result"]["val/bpb"]
        row["curve"] = [[0, 9.0], [5, last + 0.5 + (row["arm"] == "c")], [10, last]]
    write_results(folder, record, rows)
    document, lines = verdict_of(folder)
    assert [one["saved"] for one in document["arms"].values()] == [None, 0.5, 0.0]
    [row] = [line for line in (folder / "table.md").read_text().splitlines() if line.startswith("| b |")]
    assert "| +50 % |" in row
    for row in rows:
        row["result"]["train/loss"] = row["result"]["val/bpb"]
    record = new_record(record["study"] | {"metric": "train/loss"}, 1) | {"seeds": record["seeds"]}
    write_results(folder, record, rows)
    assert verdict_of(folder)[0]["arms"]["b"]["saved"] is None  # the curves are of another metric


def test_a_noise_study_moderates_the_variance_and_the_table_says_so(tmp_path):
    """As stats.verdicts does with the same prior; the difference is shown that three seeds alone do not show."""
    found = {"a": BASE, "b": [0.72, 1.76, 2.77]}
    alone, lines = verdict_of(results(tmp_path / "alone", found))
    noise = {"sd": 0.03, "df": 9}
    beside, more = verdict_of(results(tmp_path / "beside", found, noise=noise))
    effects = [one["arms"]["b"]["effect"] for one in (alone, beside)]
    assert [effect["variance"] for effect in effects] == ["own", "own, moderated"]
    assert effects[1]["df"] == 2 + 9
    square = (2 * statistics.variance(d - x for d, x in zip(found["b"], BASE)) + 9 * 0.03**2) / 11
    assert effects[1]["sd"] == pytest.approx(square**0.5)
    assert effects[1]["high"] - effects[1]["low"] < effects[0]["high"] - effects[0]["low"]
    assert any("0.03" in line and "9 degrees" in line for line in more) and not any("degrees" in line for line in lines)


def test_runs_of_other_sources_are_refused_in_one_table(tmp_path):
    folder = results(tmp_path, {"a": BASE, "b": BASE})
    for fact in ("sources", "machine", "validation"):
        record, rows = read_results(folder)
        was, rows[3][fact] = rows[3][fact], {"device_name": "GPU"} if fact == "machine" else "other"
        write_results(folder, record, rows)
        with pytest.raises(UserError) as error:
            verdict_of(folder)
        assert (error.value.code, error.value.values["fact"]) == ("runs-differ", fact)
        assert error.value.values["groups"][1] == [f"{rows[3]['arm']} seed {rows[3]['seed']}"]
        rows[3][fact] = was
        write_results(folder, record, rows)
    with pytest.raises(UserError) as error:
        verdict_of(tmp_path / "nothing")
    assert error.value.code == "no-results"


@pytest.mark.parametrize("fact", ["data", "tokenizer", "model"])
def test_what_an_arm_is_trained_on_is_one_thing_and_where_arms_differ_the_table_says_so(tmp_path, fact):
    folder = results(tmp_path, {"a": BASE, "b": BASE, "c": BASE})
    record, rows = read_results(folder)
    for row in rows:
        row[fact] = "other" if row["arm"] == "b" else "one"
    write_results(folder, record, rows)
    _, lines = verdict_of(folder)
    assert f"The arms differ in {fact}: a, c / b." in lines and f"differ in {fact}" in (folder / "table.md").read_text()
    rows[1][fact] = "third"
    write_results(folder, record, rows)
    with pytest.raises(UserError) as error:
        verdict_of(folder)
    assert (error.value.code, error.value.values["fact"]) == ("runs-differ", fact)
    assert error.value.values["groups"] == [["b seed 42"], ["b seed 43", "b seed 44"]]


def test_arms_of_the_same_flags_are_named_in_the_table(tmp_path):
    folder = results(tmp_path, {"a": BASE, "b": BASE, "c": [1.1, 2.2, 3.0]})
    record, rows = read_results(folder)
    for row in rows:
        row["key"] = f"{row['arm'].replace('b', 'a')} {row['seed']}"
    write_results(folder, record, rows)
    document, lines = verdict_of(folder)
    assert document["arms"]["b"]["verdict"] == "identical"
    assert [line for line in lines if "same runs" in line] == ["The same flags, and so the same runs: a, b."]


def test_a_metric_that_no_run_has_is_refused():
    with pytest.raises(UserError, match="did you mean val/bpb") as error:
        runner.check_metric("val/bqb", [{"val/bpb": 1.0, "kind": "base"}])
    assert error.value.code == "metric-unknown"
    runner.check_metric("val/bpb", [{}, {"val/bpb": 1.0}])


def test_a_verdict_on_a_metric_that_no_run_has_is_refused(tmp_path):
    folder = results(tmp_path, {"a": BASE, "b": BASE}, metric="val/bqb")
    with pytest.raises(UserError, match="did you mean val/bpb") as error:
        verdict_of(folder)
    assert error.value.code == "metric-unknown"


def test_a_mean_against_a_bar(base_dir, capsys):
    """nanochat's rows against GPT-2's CORE: n = 3, t = 1.2; runs by name, and numbers beside them."""
    rows = {"a": 0.2592, "b": 0.2557}
    for name, core in rows.items():
        (base_dir / "runs" / name).mkdir(parents=True)
        (base_dir / "runs" / name / "result.json").write_text(json.dumps({"run": name, "core": {"metric": core}}))
    ask = {"study": "a,b,.2584", "metric": "core.metric", "above": 0.256525}
    assert commands.lab(LabConfig("threshold", **ask)) == 4
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    want = scipy.stats.ttest_1samp([*rows.values(), 0.2584], 0.256525, alternative="greater")
    assert found["n"] == 3 and (found["t"], found["p"]) == pytest.approx((want.statistic, want.pvalue))
    assert round(found["t"], 1) == 1.2 and found["reached"] is False
    assert commands.lab(LabConfig("threshold", "a,b,.2584", metric="core.metric", below=0.2662)) == 0
    for wrong in ({"study": "a,zzz"}, {"metric": "core.none"}):
        with pytest.raises(UserError) as error:
            commands.lab(LabConfig("threshold", **ask | wrong))
        assert error.value.code == "threshold-value"
    with pytest.raises(UserError) as error:
        commands.lab(LabConfig("threshold", **ask | {"below": 0.3}))
    assert error.value.code == "one-bar"
