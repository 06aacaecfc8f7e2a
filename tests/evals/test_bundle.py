"""Evaluation bundles: what they hold, and every complaint about one."""

import importlib.util
import json
import random
import sys
from pathlib import Path

import pytest
import yaml

from nanolab.cli import UserError
from nanolab.evals.bundle import CORE, fingerprint, open_bundle, read_items
from nanolab.evals.icl import Question

spec = importlib.util.spec_from_file_location("nanolab_tests_tiny_bundle", Path(__file__).with_name("tiny_bundle.py"))
tiny = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)


@pytest.fixture
def folder(tmp_path) -> Path:
    return tiny.write(tmp_path / "bundle")


def changed(folder: Path, label: str, **fields) -> Path:
    """The bundle with other fields of one entry; None removes a field."""
    path = folder / "core.yaml"
    entries = yaml.safe_load(path.read_text())["icl_tasks"]
    for entry in entries:
        if entry["label"] == label:
            entry.update(fields)
            for name in [name for name, value in entry.items() if value is None]:
                del entry[name]
    path.write_text(yaml.safe_dump({"icl_tasks": entries}))
    return folder


def test_tasks_are_as_listed_with_their_baselines(folder):
    bundle = open_bundle(folder)
    assert list(bundle.tasks) == ["copa", "winograd", "lambada_openai", "hellaswag_zeroshot"] and not bundle.broken
    copa, winograd = bundle.tasks["copa"], bundle.tasks["winograd"]
    assert (copa.kind, copa.shots, copa.delimiter, copa.baseline) == ("multiple_choice", 2, "\nAnswer: ", 0.25)
    assert (winograd.delimiter, winograd.path) == (" ", folder / "eval_data" / "b" / "schemas.jsonl")
    assert len(CORE) == len(set(CORE)) == 22
    assert bundle.missing == [label for label in CORE if label not in bundle.tasks] and len(bundle.missing) == 18


def test_further_lists_are_read_when_asked_for(folder):
    extra = {"label": "more", "dataset_uri": "b/words.jsonl", "num_fewshot": [1], "icl_task_type": "language_modeling"}
    (folder / "extra.yaml").write_text(yaml.safe_dump({"icl_tasks": [extra]}))
    with open(folder / "eval_meta_data.csv", "a") as file:
        file.write("more,,0,\n")
    assert "more" not in open_bundle(folder).tasks
    assert list(open_bundle(folder, ("core.yaml", "extra.yaml")).tasks)[-1] == "more"


def test_items_are_shuffled_by_a_fixed_seed_and_then_cut(folder):
    task = open_bundle(folder).tasks["winograd"]
    rows = list(tiny.SCHEMAS)
    random.Random(1337).shuffle(rows)
    want = [Question(tuple(row["context_options"]), (row["continuation"],), row["gold"]) for row in rows]
    assert read_items(task) == want and read_items(task, 2) == want[:2] and rows != tiny.SCHEMAS


def test_the_fingerprint_is_of_all_that_is_asked(folder):
    first = fingerprint(open_bundle(folder))
    assert fingerprint(open_bundle(folder)) == first
    seen = {first}
    seen.add(fingerprint(open_bundle(changed(folder, "copa", num_fewshot=[1]))))
    with open(folder / "eval_data" / "b" / "words.jsonl", "a") as file:
        file.write("\n")
    seen.add(fingerprint(open_bundle(folder)))
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (
            {"icl_task_type": "schemas"},
            (
                "task type 'schemas' is unknown; expected one of multiple_choice, schema, language_modeling; did you"
                " mean schema"
            ),
        ),
        ({"icl_task_type": None}, "icl_task_type is None; expected a str"),
        ({"num_fewshot": 3}, "num_fewshot is 3; expected a list"),
        ({"num_fewshot": []}, r"num_fewshot is \[\]; expected a list with a number of solved items, such as \[10\]"),
        ({"num_fewshot": [-1]}, r"num_fewshot is \[-1\]; expected"),
        ({"continuation_delimiter": 3}, "continuation_delimiter is 3; expected text"),
        ({"dataset_uri": "a/none.jsonl"}, "its data, .*a/none.jsonl, is missing; expected a jsonl file"),
    ],
)
def test_a_mistake_in_one_entry_is_named_and_leaves_the_others(folder, fields, text):
    bundle = open_bundle(changed(folder, "copa", **fields))
    assert list(bundle.tasks) == ["winograd", "lambada_openai", "hellaswag_zeroshot"] and list(bundle.broken) == [
        "copa"
    ]
    with pytest.raises(UserError, match=text):
        raise UserError(bundle.broken["copa"])
    assert "copa" not in bundle.missing


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        (
            "winograd,,50,\n",
            "its random baseline in .*eval_meta_data.csv is missing; expected a percentage; add a line for copa",
        ),
        ("copa,\nwinograd,,50,\n", "its random baseline in .* is None; expected a percentage"),
        ("copa,,lots,\nwinograd,,50,\n", "its random baseline in .* is 'lots'; expected a percentage"),
        ("copa,,100,\nwinograd,,50,\n", "its random baseline is 100 %; expected at least 0 and below 100"),
    ],
)
def test_a_baseline_that_is_missing_or_impossible_is_named(folder, lines, text):
    (folder / "eval_meta_data.csv").write_text("Eval Task,Task Category,Random baseline,Description\n" + lines)
    bundle = open_bundle(folder)
    assert "winograd" in bundle.tasks
    with pytest.raises(UserError, match=text):
        raise UserError(bundle.broken["copa"])


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b'{"query": "a", ', r"choices.jsonl:3 is not JSON \(.*\); expected one object per line"),
        (b"\xff\xfe", r"choices.jsonl:3 is not JSON \(.*\)"),
        (b"[1, 2]", "choices.jsonl:3 holds a list; expected an object"),
        (
            b'{"query": "a", "choices": ["b"], "gold": 0}',
            r"choices.jsonl:3: choices is \['b'\]; expected a list of at least 2 texts; fix the line",
        ),
        (b'{"query": "a", "choices": ["b", "c"], "gold": 2}', "choices.jsonl:3: gold is 2; expected the number"),
    ],
)
def test_a_broken_line_is_named_by_file_and_number(folder, line, text):
    path = folder / "eval_data" / "a" / "choices.jsonl"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*lines[:1], b"", line, *lines[1:]]))
    with pytest.raises(UserError, match=text):
        read_items(open_bundle(folder).tasks["copa"])


def test_an_empty_delimiter_is_no_word_none(folder):
    entries = yaml.safe_load((folder / "core.yaml").read_text())["icl_tasks"]
    (folder / "core.yaml").write_text(
        yaml.safe_dump({"icl_tasks": [entries[0] | {"continuation_delimiter": None}, *entries[1:]]})
    )
    bundle = open_bundle(folder)
    assert list(bundle.broken) == ["copa"] and "continuation_delimiter is None; expected text" in bundle.broken["copa"]


def test_data_that_cannot_be_read_is_a_mistake_of_its_task(folder, monkeypatch):
    whole, task = fingerprint(open_bundle(folder)), open_bundle(folder).tasks["copa"]
    task.path.unlink()
    with pytest.raises(UserError, match="choices.jsonl cannot be read .*; expected a jsonl file"):
        read_items(task)
    bundle = open_bundle(tiny.write(folder))
    task.path.unlink()
    assert fingerprint(bundle) != whole


def test_too_few_items_are_named(folder):
    task = open_bundle(folder).tasks["copa"]
    with pytest.raises(
        UserError,
        match=r"choices.jsonl has 2 items of 7 \(--max-per-task 2\); expected at least 3, one to ask and 2 solved ones",
    ):
        read_items(task, 2)
    task.path.write_text(json.dumps(tiny.CHOICES[0]) + "\n")
    with pytest.raises(UserError, match="choices.jsonl has 1 items; expected at least 3"):
        read_items(task)
    task.path.write_text("\n \n")
    with pytest.raises(UserError, match="choices.jsonl is empty; expected one item per line"):
        read_items(task)


def test_a_folder_that_is_no_bundle_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match="has no core.yaml; expected an evaluation bundle: .*; type --eval-bundle DIR"):
        open_bundle(tmp_path)
    with pytest.raises(UserError, match="has no extra.yaml"):
        open_bundle(folder, ("core.yaml", "extra.yaml"))
    (folder / "eval_meta_data.csv").write_text("a,b\n1,2\n")
    with pytest.raises(
        UserError, match="eval_meta_data.csv has the columns a, b; expected Eval Task and Random baseline"
    ):
        open_bundle(folder)
    (folder / "eval_meta_data.csv").write_bytes(b"Eval Task,Random baseline\n\xff,3\n")
    with pytest.raises(UserError, match="eval_meta_data.csv cannot be read .*; expected a CSV file in UTF-8"):
        open_bundle(folder)
    (folder / "eval_meta_data.csv").unlink()
    with pytest.raises(UserError, match="has no eval_meta_data.csv"):
        open_bundle(folder)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("icl_tasks: [", "core.yaml is not YAML"),
        ("tasks: []", "core.yaml has no list icl_tasks"),
        ("icl_tasks: []", "core.yaml has no list icl_tasks"),
        ("icl_tasks: [{dataset_uri: x}]", "core.yaml: entry 1 has the label None; expected a label of its own"),
        ("icl_tasks: [{label: a}, {label: a}]", "core.yaml: entry 2 has the label 'a'"),
    ],
)
def test_a_list_that_cannot_be_read_is_refused(folder, text, complaint):
    (folder / "core.yaml").write_text(text)
    with pytest.raises(UserError, match=complaint):
        open_bundle(folder)
