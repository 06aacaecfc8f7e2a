"""CORE, HellaSwag and LAMBADA against sums over a table of probabilities; what fails, and ranks."""

import csv
import importlib.util
import json
import math
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nanolab.cli import UserError
from nanolab.evals import icl
from nanolab.evals.bundle import CORE, open_bundle, read_items
from nanolab.evals.core import Core, TaskScore, core_score, csv_lines, metrics
from nanolab.evals.hellaswag import encode_ending, hellaswag, lambada
from nanolab.evals.likelihood import GPTReader
from nanolab.evals.score import wilson
from nanolab.runtime import Runtime
from tasks import TASKS
from tasks.hellaswag import HellaSwag


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"nanolab_tests_{name}", Path(__file__).with_name(f"{name}.py"))
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tiny, examples = load("tiny_bundle"), load("examples")
CPU = Runtime(torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


@pytest.fixture
def table(tokenizer):
    return tiny.Table(tokenizer.vocab_size)


@pytest.fixture
def folder(tmp_path) -> Path:
    return tiny.write(tmp_path / "bundle")


def by_hand(table, tokenizer, task, max_items: int = -1) -> str:
    """1 or 0 for each item, by the definitions of the three kinds."""
    items, out = read_items(task, max_items), ""
    for group in icl.encode_groups(task.kind, items, range(len(items)), task.shots, task.delimiter, tokenizer):
        if task.kind == "language_modeling":
            right = table.greedy(*group.texts()[0])
        else:
            means = [table.nats(ids, start) / (len(ids) - start) for ids, start in group.texts()]
            right = means.index(min(means)) == items[group.index].gold
        out += str(int(right))
    return out


def test_every_task_and_their_mean(table, tokenizer, folder):
    lines: list[str] = []
    bundle = open_bundle(folder)
    found = Core(bundle, tokenizer, CPU).evaluate(table, lines.append)
    above = []
    for label, score in found.tasks.items():
        outcomes = by_hand(table, tokenizer, bundle.tasks[label])
        accuracy, baseline = outcomes.count("1") / len(outcomes), bundle.tasks[label].baseline
        assert (score.outcomes, score.n, score.accuracy, score.interval) == (
            outcomes,
            len(outcomes),
            accuracy,
            wilson(accuracy, len(outcomes)),
        )
        assert score.centred == pytest.approx((accuracy - baseline) / (1 - baseline)) and score.cut == 0
        above.append(score.centred)
    assert (found.label, found.value) == (
        "CORE-4 of 22",
        pytest.approx(sum(above) / 4),
    ) and found.interval.low < found.value < found.interval.high
    assert set("".join(s.outcomes for s in found.tasks.values())) == {"0", "1"} and not found.failed
    assert (
        [line.split()[0] for line in lines[1:5]] == list(bundle.tasks) and "left" in lines[1] and "left" not in lines[4]
    )
    assert "CORE-4 of 22" in lines[5] and lines[6].startswith(
        "  missing from the bundle: jeopardy, bigbench_qa_wikidata, arc_easy"
    )
    assert metrics(found) == {
        "core_metric": found.value,
        "centered_results": {k: s.centred for k, s in found.tasks.items()},
        "core_tasks": 4,
    }
    rows = [line.split(",") for line in csv_lines(found.to_json())]
    assert rows[0] == ["Task", "Accuracy", "Centered"] and rows[-1][:2] == ["CORE-4 of 22", ""]
    assert [(name, float(a), float(c)) for name, a, c in rows[1:-1]] == [
        (name, pytest.approx(s.accuracy, abs=1e-6), pytest.approx(s.centred, abs=1e-6))
        for name, s in found.tasks.items()
    ]
    json.dumps(found.to_json())


def test_it_keeps_what_is_there_after_each_task_and_stops_between_tasks_without_a_result(table, tokenizer, folder):
    core, kept = Core(open_bundle(folder), tokenizer, CPU), []
    whole = core.evaluate(table, keep=kept.append)
    labels = list(whole.tasks)
    assert [list(found.tasks) for found in kept] == [labels[:1], labels[:2], labels[:3]] and [
        len(found.failed) for found in kept
    ] == [3, 2, 1]
    kept.clear()
    assert (
        core.evaluate(table, keep=kept.append, stop=lambda: len(kept) == 2) is None
        and list(kept[-1].tasks) == labels[:2]
    )


@pytest.mark.fault("F17")
def test_it_stops_inside_a_task_too(table, tokenizer, folder, monkeypatch):
    passes, logits = [], tiny.Table.logits
    monkeypatch.setattr(tiny.Table, "logits", lambda self, reads: passes.append(1) or logits(self, reads))
    monkeypatch.setattr(tiny.Table, "tokens", 1)
    assert (
        Core(open_bundle(folder), tokenizer, CPU).evaluate(table, stop=lambda: len(passes) == 2) is None
        and len(passes) == 2
    )


def test_a_cut_takes_the_first_of_the_shuffle_and_shots_from_among_them(table, tokenizer, folder):
    bundle = open_bundle(folder)
    found = Core(bundle, tokenizer, CPU, 4).evaluate(table)
    for label, score in found.tasks.items():
        assert score.n == 4 and score.outcomes == by_hand(table, tokenizer, bundle.tasks[label], 4)


def test_a_task_that_fails_is_named_and_the_mean_is_over_the_others(table, tokenizer, folder):
    with open(folder / "eval_data" / "b" / "words.jsonl", "a") as file:
        file.write("{oops\n")
    whole_one = Core(open_bundle(tiny.write(folder.parent / "whole")), tokenizer, CPU).evaluate(table)
    lines: list[str] = []
    found = Core(open_bundle(folder), tokenizer, CPU).evaluate(table, lines.append)
    assert list(found.failed) == ["lambada_openai"] and "words.jsonl:7 is not JSON" in found.failed["lambada_openai"]
    assert found.label == "CORE-3 of 22" and "lambada_openai" not in found.missing
    assert {k: v.outcomes for k, v in found.tasks.items()} == {
        k: v.outcomes for k, v in whole_one.tasks.items() if k != "lambada_openai"
    }
    assert found.value == pytest.approx(sum(s.centred for s in found.tasks.values()) / 3)
    assert lines[-1].startswith("  failed: lambada_openai: ")
    assert metrics(found)["core_tasks"] == 3


@pytest.mark.fault("outer D15")
def test_a_text_that_the_model_cannot_read_fails_its_task_alone(table, tokenizer, folder):
    path = folder / "eval_data" / "b" / "words.jsonl"
    path.write_text(path.read_text() + json.dumps({"context": "after", "continuation": "x y " * 60}) + "\n")
    table.limit = 60
    found = Core(open_bundle(folder), tokenizer, CPU).evaluate(table)
    assert list(found.failed) == ["lambada_openai"] and "for a model that reads 60" in found.failed["lambada_openai"]
    assert "copa" in found.tasks and not any(s.cut for s in found.tasks.values())
    table.limit = 45
    lines: list[str] = []
    found = Core(open_bundle(folder), tokenizer, CPU).evaluate(table, lines.append)
    assert (
        found.tasks["copa"].cut == 7
        and found.tasks["winograd"].cut == 0
        and any("7 cut (100 %)" in line for line in lines)
    )
    n = sum(s.n for s in found.tasks.values())
    cut, of = (sum(getattr(s, name) for label, s in found.tasks.items() if label in CORE) for name in ("cut", "n"))
    assert any(line.startswith(f"  cut: 7 of {n} items ({100 * 7 / n:.0f} %)") for line in lines)
    assert (found.context, found.cut, found.label) == (
        45,
        cut / of,
        f"CORE-3 of 22@45, {100 * cut / of:.0f} % cut",
    ) and found.to_json()["cut"] == cut / of
    assert (
        any(found.label in line for line in lines)
        and found.label in next(csv.reader(csv_lines(found.to_json())[-1:]))
        and metrics(found)["core_cut"] == cut / of
    )


@pytest.mark.fault("outer D15")
def test_a_mean_over_cut_items_says_so():
    """61 of 100 items of each task, in its label; and what nobody cut is CORE alone."""
    scores = {label: TaskScore("schema", 0, 100, 0.6, wilson(0.6, 100), 0.5, 0.2, 61, 1.0, "") for label in CORE}
    assert (
        core_score(scores, [], {}, 512).label == "CORE@512, 61 % cut"
        and core_score({k: replace(s, cut=0) for k, s in scores.items()}, [], {}, 512).label == "CORE"
    )
    assert (
        core_score({k: replace(s, cut=int(k == "copa")) for k, s in scores.items()}, [], {}, 512).label
        == "CORE@512, under 1 % cut"
    )


def score(centred: float, baseline: float = 0.5) -> TaskScore:
    accuracy = centred * (1 - baseline) + baseline
    return TaskScore("schema", 0, 100, accuracy, wilson(accuracy, 100), baseline, centred, 0, 1.0, "")


def test_it_is_called_core_with_all_22_alone():
    scores = {label: score(i / 100) for i, label in enumerate(CORE)}
    found = core_score(scores, [], {})
    assert (found.label, found.value) == ("CORE", pytest.approx(sum(range(22)) / 2200)) and "core_tasks" not in metrics(
        found
    )
    assert core_score({**scores, "more": score(1.0)}, [], {}).value == found.value, "other tasks do not count"
    del scores["coqa"]
    assert core_score({**scores, "more": score(1.0)}, ["coqa"], {}).label == "CORE-21 of 22"
    assert core_score({"more": score(1.0)}, [], {}).value is None


def test_the_interval_is_narrower_than_a_tasks_and_holds_the_mean_of_draws():
    """Means of simulated accuracies lie in it about as often as it says."""
    assert 370 <= covered() <= 394


def covered(alike: Sequence[str] = ()) -> int:
    """Of 400 simulated tables, how many have the true mean in their interval. alike: tasks with one draw of items for
    all of them.
    """
    rng, inside = np.random.default_rng(0), 0
    for _ in range(400):
        drawn = {label: score((rng.binomial(100, 0.6) / 100 - 0.5) / 0.5) for label in CORE}
        drawn |= {label: drawn[alike[0]] for label in alike}
        low, high = core_score(drawn, [], {}).interval
        inside += low <= 0.2 <= high
    return inside


def test_two_tasks_on_the_same_items_do_not_make_the_interval_wrong():
    """hellaswag and hellaswag_zeroshot have the same items, which the interval does not know; were half of the tasks so
    alike, it would be too narrow.
    """
    assert 370 <= covered(["hellaswag", "hellaswag_zeroshot"]) <= 394
    assert covered(list(CORE)[:11]) < 320


@pytest.mark.fault("outer D16")
def test_hellaswag_by_four_rules(table, tokenizer):
    rows = [icl.KINDS["multiple_choice"].item(row) for row in tiny.CHOICES]
    items = [
        item._replace(answers=tuple(f"{a}{' and é' * j}" for j, a in enumerate(item.answers))) for item in rows
    ] * 4
    for bos in (True, False):
        want = {"sum": 0, "per_token": 0, "per_character": 0, "per_byte": 0}
        chosen = set()
        for item in items:
            head = [tokenizer.bos] * bos + tokenizer.encode(item.contexts[0])
            tails = [tokenizer.encode(" " + answer) for answer in item.answers]
            nats = [table.nats(head + tail, len(head)) for tail in tails]
            picks = {
                rule: min(range(3), key=lambda i: nats[i] / size(i))
                for rule, size in {
                    "sum": lambda i: 1,
                    "per_token": lambda i: len(tails[i]),
                    "per_character": lambda i: len(item.answers[i]),
                    "per_byte": lambda i: len(item.answers[i].encode()),
                }.items()
            }
            chosen.add(tuple(picks.values()))
            for rule, pick in picks.items():
                want[rule] += pick == item.gold
        found = hellaswag(table, tokenizer, items, CPU, bos=bos)
        assert {rule: found[rule]["accuracy"] * 28 for rule in want} == pytest.approx(want) and found["n"] == 28
        assert any(len(set(picks)) == 3 for picks in chosen) or len(chosen) > 1, "the rules do not always agree"
        assert found["sum"]["interval"] == wilson(want["sum"] / 28, 28)


class Marked:
    """As pieces with a mark before each text's first word: a text of its own that begins with a blank has two."""

    bos = 0

    def encode_batch(self, texts):
        return [[1 + ord(c) % 250 for c in re.sub("[ ]", "\u2581", f" {text}")] for text in texts]


def test_hellaswags_endings_have_one_blank_under_any_tokenizer(tokenizer):
    items = [icl.KINDS["multiple_choice"].item(row) for row in tiny.CHOICES]
    for encoder in (tokenizer, Marked()):
        for group, item in zip(encode_ending(items, range(7), encoder, True), items):
            for text, answer in zip(group.texts(), item.answers):
                whole = [encoder.bos, *encoder.encode_batch([f"{item.contexts[0]} {answer}"])[0]]
                (context,) = encoder.encode_batch(item.contexts)
                assert (list(text.ids), text.start) == (whole, 1 + len(context))
    # where whole texts are other tokens: as published
    (group,) = encode_ending([icl.Question(("cup ",), ("was", "and"))], [0], tokenizer, False)
    assert [list(text.ids) for text in group.texts()] == [
        tokenizer.encode("cup ") + tokenizer.encode(f" {word}") for word in ("was", "and")
    ]


def test_half_a_surrogate_pair_is_three_bytes(table, tokenizer):
    assert hellaswag(table, tokenizer, [icl.Question(("a",), ("\ud800 b", "c"))], CPU)["n"] == 1


def test_hellaswag_as_its_authors_publish_it(tmp_path):
    path = tmp_path / "hellaswag.jsonl"
    rows = [
        {"ctx": f"A man {i}", "ctx_a": "x", "endings": ["sits.", "runs.", "eats.", "is."], "label": label}
        for i, label in enumerate((3, "1"))
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert sorted(HellaSwag.questions(path)) == [
        icl.Question((f"A man {i}",), ("sits.", "runs.", "eats.", "is."), gold) for i, gold in enumerate((3, 1))
    ]
    for change, text in (
        ({"label": ""}, "the label ''; .*test rows"),
        ({"endings": None}, "field endings is a NoneType; expected a list"),
        ({"ctx": None}, "field ctx is a NoneType; expected a str"),
    ):
        path.write_text(json.dumps(rows[0] | change))
        with pytest.raises(UserError, match=f"hellaswag.jsonl:1: {text}"):
            HellaSwag.questions(path)


@pytest.mark.parametrize("name", ["arc-easy", "arc-challenge", "hellaswag"])
def test_a_dataset_of_letters_and_of_core_is_described_once(folder, name):
    """What base models are asked of the bundle's file is what the description of the chat task reads there."""
    task = open_bundle(folder).tasks["copa"]
    assert TASKS[name].kind == "letters" and TASKS[name].questions(task.path) == read_items(task)


def test_lambada_by_its_words(table, tokenizer, folder):
    task = open_bundle(folder).tasks["lambada_openai"]
    items = read_items(task)
    groups = icl.encode_groups(task.kind, items, range(len(items)), 0, " ", tokenizer)
    nats = [table.nats(*group.texts()[0]) for group in groups]
    found = lambada(table, tokenizer, task, CPU)
    assert found["perplexity"] == pytest.approx(math.exp(statistics.fmean(nats)))
    half = 1.959964 * statistics.stdev(nats) / math.sqrt(6)
    assert found["perplexity_interval"] == pytest.approx(
        (found["perplexity"] / math.exp(half), found["perplexity"] * math.exp(half)), rel=1e-5
    )
    assert found["accuracy"] == by_hand(table, tokenizer, task).count("1") / 6 and found["interval"] == wilson(
        found["accuracy"], 6
    )
    assert lambada(table, tokenizer, task, CPU, 1)["perplexity_interval"] is None


def on_rank(runtime: Runtime, folder: str):
    """CORE, HellaSwag and LAMBADA of a model with weights, and what a text that cannot be scored does."""
    engine = examples.engine(runtime, sequence_len=128)
    bundle, reader = open_bundle(folder), GPTReader(engine.model, runtime)
    core = Core(bundle, engine.tokenizer, runtime, 5).evaluate(reader)
    items = read_items(bundle.tasks["hellaswag_zeroshot"])
    swag, words = (
        hellaswag(reader, engine.tokenizer, items, runtime),
        lambada(reader, engine.tokenizer, bundle.tasks["lambada_openai"], runtime),
    )
    reader.limit = 12
    short = Core(bundle, engine.tokenizer, runtime).evaluate(reader)
    outcomes = {label: s.outcomes for label, s in core.tasks.items()}
    return (
        outcomes,
        round(core.value, 9),
        core.label,
        swag,
        [f"{x:.3g}" for x in np.hstack(list(words.values()))],
        sorted(short.failed),
        sorted(short.tasks),
    )


def test_any_number_of_ranks_finds_the_same(run_ranks, folder):
    want = on_rank(CPU, str(folder))
    assert want[5] and want[6], "some tasks can be read in 12 tokens, some cannot"
    assert run_ranks(on_rank, 2, str(folder)) == [want, want]
