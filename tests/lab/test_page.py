"""The pages of studies and the site: made of records alone, the same bytes each time, nothing of theirs is markup."""

import json
import random
import re
import statistics
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from lab.test_lab_cli import BASE, results

from nanolab.cli import UserError, parse
from nanolab.evals.config import ReportConfig
from nanolab.lab import commands, run_page, site
from nanolab.lab.config import LabConfig
from nanolab.lab.page import write_page
from nanolab.lab.results import public, read_results, training_curve, write_results
from nanolab.lab.run_page import spikes_of
from nanolab.lab.study import study_of, to_toml

MARKUP = "<script>alert(1)</script><img src=x onerror=alert(1)>"
ARMS = {"a": BASE, "b<i>": [0.0, 1.001, 2.002], "c": [1.0005, 2.001, 3.0], "d": [1.5, 1.5, 3.1], "e": [None] * 3}


class Page(HTMLParser):
    """What a browser would make of a page: its tags with their attributes, and its texts."""

    VOID = {"meta", "br", "img", "link", "hr", "input"}

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)


def check_inert(path: Path) -> Page:
    """A page that runs nothing and loads nothing, whatever it shows."""
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert not page.open
    assert not {tag for tag, _ in page.tags} & {"script", "img", "link", "iframe", "object", "i"}
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    links = [value for _, attrs in page.tags for name, value in attrs.items() if name in ("href", "src", "xlink:href")]
    assert all(link.startswith("#") or (path.parent / link).resolve().exists() for link in links), links
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert "@import" not in text and not re.search(r"url\((?!['\"]?#)", text)
    return page


def whole(folder: Path) -> Path:
    """A study with curves, predictions, published figures, a crash and markup wherever a text can be."""
    facts = {"question": f"Which? {MARKUP}", "predict": {"b<i>": "better", "c": "worse"}, "matters": 0.01}
    results(folder, ARMS, **facts, flags=f"--data-dir /home/somebody/{MARKUP.split('>')[0]} --tokenizer ~/t/tok")
    record, rows = read_results(folder)
    record |= {"published": {"a": 3.0, "b<i>": 3.4, "d": 2.9}, "published_source": f"a paper {MARKUP}"}
    for row in rows:
        loss = row["result"]["val/bpb"]
        row |= {"commit": "0123456789abcdef+changes", "curve": [[0, 9.0], [50, loss + 1], [100, loss]]}
        row["training"] = [[10 * i, loss + 3 / i] for i in range(1, 11)]
    broken = {name: rows[0][name] for name in ("key", "sources", "machine", "validation")}
    why = f"error: /home/somebody/x is gone {MARKUP}"
    rows.append(broken | {"arm": "e", "seed": 42, "failed": why, "diverged": False})
    write_results(folder, record, rows)
    return folder


@pytest.mark.slow
def test_a_page_is_made_of_runs_jsonl_alone_byte_for_byte(tmp_path):
    folder = whole(tmp_path / "first")
    write_page(folder)
    made = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert set(made) == {"runs.jsonl", "index.html", "table.md", "curves.svg", "training.svg", "differences.svg"}
    other = tmp_path / "elsewhere" / "second"
    other.mkdir(parents=True)
    (other / "runs.jsonl").write_bytes(made["runs.jsonl"])
    write_page(other)
    assert {path.name: path.read_bytes() for path in other.iterdir()} == made


@pytest.mark.slow
def test_a_page_says_all_and_runs_nothing(tmp_path):
    folder = whole(tmp_path)
    document, _ = write_page(folder)
    page = check_inert(folder / "index.html")
    said = " ".join(" ".join(page.texts).split())
    verdicts = {arm: one["verdict"] for arm, one in document["arms"].items()}
    assert verdicts == {"a": None, "b<i>": "better", "c": "equivalent", "d": "unresolved", "e": None}
    assert [tag for tag, _ in page.tags].count("svg") == 3
    cards = [attrs["class"].split()[-1] for tag, attrs in page.tags if tag == "article"]
    assert cards == ["better", "equivalent", "unresolved", "missing"]
    assert f"Which? {MARKUP}" in said and f"a paper {MARKUP}" in said
    assert "b<i> is better than a; c is equivalent to a; d is unresolved; e is missing." in said
    assert "better: as predicted" in said and "worse: not as predicted" in said
    assert "0123456789ab+changes" in said and "1 threads a run" in said
    assert f"{document['arms']['d']['effect']['seeds_needed']} seeds" in said
    ours = {arm: statistics.mean(ARMS[arm]) for arm in ("a", "b<i>", "d")}
    theirs = {"a": 3.0, "b<i>": 3.4, "d": 2.9}
    agree = sum((theirs[x] < theirs[y]) == (ours[x] < ours[y]) for x, y in combinations(theirs, 2))
    assert f"{agree} of 3 pairs" in said and "+0.4" in said
    table = (folder / "table.md").read_text()
    for text in (said, table):
        assert "somebody" not in text and "~/t" not in text and "--tokenizer tok" in text
    for name in ("curves", "training", "differences"):
        svg = (folder / f"{name}.svg").read_text()
        assert "<script" not in svg and ("band: lowest to highest seed" in svg or "does not matter" in svg)


def test_differences_are_drawn_where_they_are(tmp_path):
    """The means of the arms are on one straight scale with 0 and the band of what matters."""
    folder = results(tmp_path, {"a": BASE, "b": [x - 0.3 for x in BASE], "c": [1.1, 2.2, 3.3]}, matters=0.05)
    write_page(folder)
    svg = (folder / "differences.svg").read_text()
    assert "better" in svg and "worse" in svg
    ticks = {
        float(label.replace("\u2212", "-")): float(x)
        for x, label in re.findall(r'id="xtick_\d+">.*?x="([\d.]+)".*?<text[^>]*>([^<]+)</text>', svg, flags=re.S)
    }
    (x0, p0), (x1, p1) = sorted(ticks.items())[0], sorted(ticks.items())[-1]
    marks = [float(x) for x in re.findall(r'<use xlink:href="#\w+" x="([\d.]+)" y="[\d.]+" style="fill: #[^0]', svg)]
    drawn = sorted(round(x0 + (x - p0) * (x1 - x0) / (p1 - p0), 3) for x in marks)
    assert {-0.3, 0.2} <= set(drawn)


def test_without_matplotlib_the_page_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    folder = whole(tmp_path)
    write_page(folder)
    assert "setup.sh plots" in " ".join(check_inert(folder / "index.html").texts)
    assert "setup.sh plots" in capsys.readouterr().out and not list(folder.glob("*.svg"))


def test_published_figures_need_a_source_and_may_come_later(tmp_path, capsys):
    values = {"question": "?", "baseline": "a", "matters": 0.1, "arms": {"a": "", "b": "--gate head"}}
    for changes, code in (
        ({"published": {"a": 1.0}}, "published-unsourced"),
        ({"published": {"z": 1.0}}, "arm-unknown"),
    ):
        with pytest.raises(UserError) as error:
            study_of(values | changes, "x")
        assert error.value.code == code
    results(tmp_path / "s", {"a": BASE, "b": BASE}, arms=values["arms"])
    path = tmp_path / "s.toml"
    path.write_text(to_toml(study_of(values | {"results": "s"}, "x")))
    assert commands.lab(LabConfig("page", str(path))) == 0
    assert "Published" not in (tmp_path / "s" / "index.html").read_text()
    late = {"published": {"a": 1.25, "b": 1.5}, "published_source": "somewhere"}
    path.write_text(to_toml(study_of(values | {"results": "s"} | late, "x")))
    assert commands.lab(LabConfig("page", str(path))) == 0
    assert "1.25" in (tmp_path / "s" / "index.html").read_text()
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["question"] == "?"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("--data-dir /home/me/texts --depth 4", "--data-dir texts --depth 4"),
        ("jsonl=/a/b c.jsonl:2,gsm8k:1", "jsonl=b c.jsonl:2,gsm8k:1"),
        ("/a/b:0.3,~/c/d:0.7 and C:\\x\\y", "b:0.3,d:0.7 and y"),
        ("val/bpb, tokens/s, 1 / 2, tokenizers/mine", "val/bpb, tokens/s, 1 / 2, tokenizers/mine"),
        ("a\x1b[31m", "a\ufffd[31m"),
    ],
)
def test_no_path_of_the_machine_is_public(text, shown):
    assert public(text) == shown


def test_a_training_curve_keeps_every_loss_in_a_mean():
    rows = [{"step": step, "train/loss": float(step)} for step in range(100)] + [{"step": 100, "val/bpb": 1.0}]
    curve = training_curve(rows)
    assert len(curve) == 50 and curve[0] == [2, 0.5] and curve[-1] == [100, 98.5]
    assert training_curve(rows[:2]) == [[1, 0.0], [2, 1.0]] and training_curve([]) == []


def test_spikes_are_seven_standard_deviations_above_the_steps_before():
    drawn = random.Random(1)
    losses = [(step, 8 * 0.999**step + drawn.gauss(0, 0.05)) for step in range(1500)]
    for step, by in ((25, 2.5), (700, 20.0), (701, 30.0), (1400, 40.0), (5, 50.0)):
        losses[step] = (step, losses[step][1] + by)
    want = []
    for i, (step, loss) in enumerate(losses):
        before = np.array([value for _, value in losses[max(0, i - 1000) : i]])
        if len(before) >= 20 and loss >= before.mean() + 7 * before.std():
            want.append((step, loss, (loss - before.mean()) / before.std()))
    found = spikes_of(losses)
    assert [step for step, *_ in found] == [step for step, *_ in want] and {700, 1400} <= {step for step, *_ in found}
    assert [sds for *_, sds in found] == pytest.approx([sds for *_, sds in want])
    assert spikes_of([(step, 2.0) for step in range(100)]) == []


def run_folder(base: Path, name: str, **files) -> Path:
    """A run's records, as a training leaves them."""
    folder = base / "runs" / name
    folder.mkdir(parents=True)
    env = {"kind": "base", "host": "secret-host", "command": "python /home/somebody/x", "world_size": 2, "cpu": "C"}
    env |= {
        "device_name": "GPU",
        "dtype": "bf16",
        "threads": 1,
        "torch": "2",
        "commit": "c" * 40,
        "started": "2026-01-02T",
    }
    rows = [
        {"step": i, "train/loss": 9.0 if i == 60 else 3 - i / 100, "train/lrm": 1.0, "norm/layer_1": 1.0 + i}
        for i in range(80)
    ]
    rows[-1] |= {"val/bpb": 1.25, "total_training_time": 900.0}
    defaults = {"config": {"data_dir": "/home/somebody/texts", "depth": 4}, "env": env}
    defaults["result"] = {"step": 80, "tokens": 1000, "val/bpb": 1.2, "train/loss": 2.5, "total_training_time": 1800.0}
    for file, value in (defaults | files).items():
        if value is not None:
            (folder / f"{file}.json").write_text(json.dumps(value))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.slow
def test_the_site_joins_studies_models_and_runs(base_dir, tmp_path, capsys):
    """1,800 seconds on two devices are one device-hour; what a model wrote is text."""
    whole(tmp_path / "studies" / "gate" / "cpu")
    (tmp_path / "studies" / "broken").mkdir()
    (tmp_path / "studies" / "broken" / "runs.jsonl").write_text("{")
    said = {"question": f"q {MARKUP}", "reply": f"r {MARKUP}\x1b[2J", "correct": False, "reference": "42"}
    chat = {"tasks": {"arithmetic": {"examples": [said]}}}
    stage = {
        "label": "base",
        "run": "one",
        "step": 80,
        "tokens": 1000,
        "seconds": 1800.0,
        "flops": 10,
        "device_hours": 1.0,
    }
    metric = {"metric": "arithmetic", "unit": "share", "n": 8, "baseline": 0.1, "version": 1}
    card = {"stages": [stage], "metrics": [metric | {"stages": {"base": {"value": 0.625, "interval": None}}}]}
    run_folder(base_dir, "one", eval_chat=chat, card=card)
    run_folder(base_dir, "two", result=None)
    probes = {"kurtosis": {"c_q": [1.23456, 2.0]}, "lengths": {MARKUP: 0.5}}
    result = {"step": 80, "train/loss": 2.5, "total_training_time": 1.0, "probes": probes}
    run_folder(base_dir, "three", result=result)
    run_folder(base_dir, "damaged", env=None)
    run_folder(base_dir, "lab-0123")
    folder = tmp_path / "out"
    cfg = ReportConfig(site=str(folder), studies=str(tmp_path / "studies"), price_per_hour=3.0)
    site.write_site(cfg)
    pages = {str(path.relative_to(folder)): check_inert(path) for path in folder.rglob("*.html")}
    assert set(pages) == {
        "index.html",
        "studies/gate-cpu/index.html",
        "runs/one.html",
        "runs/two.html",
        "runs/three.html",
    }
    everything = "".join(path.read_text() for path in folder.rglob("*.*") if path.suffix in (".html", ".svg"))
    assert not re.search("somebody|secret-host|<script|\x1b", everything)
    index, one, two = (" ".join(pages[name].texts) for name in ("index.html", "runs/one.html", "runs/two.html"))
    order = [text for text in pages["index.html"].texts if text in ("Studies", "Models", "Runs") or "Which?" in text]
    assert order == ["Studies", f"Which? {MARKUP}", "Models", "Runs"]
    assert "62.5 %" in index and "1.000" in index and "$3.00" in index and "results-damaged" not in index
    assert "broken" in index and "damaged.html" in index and "1 more that belong" in index
    assert f"r {MARKUP}\ufffd[2J" in one and f"> q {MARKUP}" in one and "Not finished at step 79" in two
    three = " ".join(" ".join(pages["runs/three.html"].texts).split())
    assert "kurtosis, c_q 1.235, 2" in three and f"lengths, {MARKUP} 0.5" in three
    svg = (folder / "runs" / "one.svg").read_text()
    assert all(name in svg for name in ("loss, nats per token", "norms of layers", "learning rates"))
    assert "60" in one[one.index("Loss spikes") :] and capsys.readouterr().out.count("left out") == 2


def test_watch_makes_again_only_what_has_changed(base_dir, tmp_path, monkeypatch, capsys):
    (tmp_path / "studies").mkdir()
    first, second = (run_folder(base_dir, name) for name in ("first", "second"))
    folder = tmp_path / "out"
    looks = []

    def sleep(seconds):
        looks.append({path.name: path.stat().st_mtime_ns for path in (folder / "runs").glob("*.html")})
        if len(looks) == 2:
            with open(first / "metrics.jsonl", "a") as file:
                file.write(json.dumps({"step": 81, "train/loss": 1.0}) + "\n")
        if len(looks) == 3:
            for path in second.iterdir():
                path.unlink()
        if len(looks) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(site.time, "sleep", sleep)
    monkeypatch.setattr(run_page, "draw_run", lambda *_: None)  # which takes a second
    site.write_site(parse(ReportConfig, ["--site", str(folder), "--studies", str(tmp_path / "studies"), "--watch"]))
    one, two, three, four = looks
    assert one == two and three["second.html"] == two["second.html"] and three["first.html"] > two["first.html"]
    assert set(four) == {"first.html"} and "second" not in (folder / "index.html").read_text()
    said = capsys.readouterr().out
    assert len(re.findall(r"pages made", said)) == 3 and "the site is whole" in said


def test_a_page_of_somebody_else_is_not_replaced(base_dir, tmp_path):
    (tmp_path / "index.html").write_text("<p>mine</p>")
    with pytest.raises(UserError) as error:
        site.write_site(ReportConfig(site=str(tmp_path)))
    assert error.value.code == "site-of-others" and (tmp_path / "index.html").read_text() == "<p>mine</p>"
    with pytest.raises(UserError) as error:
        parse(ReportConfig, ["--watch"])
    assert error.value.code == "flag-not-read"
