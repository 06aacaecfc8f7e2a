"""The evaluation bundle on disk: which tasks there are, their items, and how right a guess is. Downloaded where it is
missing.

  core.yaml            icl_tasks: label, icl_task_type, dataset_uri, num_fewshot, continuation_delimiter
  extra.yaml           more of them, which are not part of CORE
  eval_data/**.jsonl   items, one in a line
  eval_meta_data.csv   columns "Eval Task" and "Random baseline", in percent

A task that something is wrong with is named with what it is, and the others are there all the same.
"""

import csv
import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanolab.cli import UserError, nearest
from nanolab.evals.icl import KINDS, Question
from nanolab.files import sha256_file

# Li et al., "DataComp-LM", arXiv 2406.11794, table 1 of the appendix on evaluation
CORE = (
    "hellaswag_zeroshot",
    "jeopardy",
    "bigbench_qa_wikidata",
    "arc_easy",
    "arc_challenge",
    "copa",
    "commonsense_qa",
    "piqa",
    "openbook_qa",
    "lambada_openai",
    "hellaswag",
    "winograd",
    "winogrande",
    "bigbench_dyck_languages",
    "agi_eval_lsat_ar",
    "bigbench_cs_algorithms",
    "bigbench_operators",
    "bigbench_repeat_copy_logic",
    "squad",
    "coqa",
    "boolq",
    "bigbench_language_identification",
)
SHUFFLE_SEED = 1337
FIELDS = {"label": str, "icl_task_type": str, "dataset_uri": str, "num_fewshot": list}


@dataclass(frozen=True)
class TaskSpec:
    label: str
    kind: str  # a key of KINDS
    path: Path
    shots: int
    delimiter: str
    baseline: float  # what guessing reaches


@dataclass(frozen=True)
class Bundle:
    folder: Path
    tasks: dict[str, TaskSpec]  # in the order of their lists
    broken: dict[str, str] = field(default_factory=dict)  # label -> why it cannot be evaluated

    @property
    def missing(self) -> list[str]:
        """Tasks of CORE that no list names."""
        return [label for label in CORE if label not in self.tasks and label not in self.broken]


def open_bundle(folder: str | Path, lists: Sequence[str] = ("core.yaml",)) -> Bundle:
    """The tasks of these lists. Raises UserError where the folder is not a bundle; mistakes in a task are in
    `broken`.
    """
    folder = Path(folder).expanduser()
    for name in (*lists, "eval_meta_data.csv"):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder} has no {name}; expected an evaluation bundle: core.yaml, eval_meta_data.csv and eval_data/;"
                " type --eval-bundle DIR"
            )
    baselines = _baselines(folder / "eval_meta_data.csv")
    tasks: dict[str, TaskSpec] = {}
    broken: dict[str, str] = {}
    for path in (folder / name for name in lists):
        for i, entry in enumerate(_entries(path)):
            label = entry.get("label") if isinstance(entry, dict) else None
            if not isinstance(label, str) or label in tasks or label in broken:
                raise UserError(f"{path}: entry {i + 1} has the label {label!r}; expected a label of its own; fix it")
            try:
                tasks[label] = _task(entry, folder, baselines)
            except UserError as error:
                broken[label] = str(error)
    return Bundle(folder, tasks, broken)


def _entries(path: Path) -> list[Any]:
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} is not YAML ({' '.join(str(error).split())}); expected a list icl_tasks; fix it or copy the"
            " bundle again"
        ) from None
    entries = found.get("icl_tasks") if isinstance(found, dict) else None
    if not isinstance(entries, list) or not entries:
        raise UserError(
            f"{path} has no list icl_tasks; expected one, of tasks with label, icl_task_type, dataset_uri and"
            " num_fewshot; fix it"
        )
    return entries


def _baselines(path: Path) -> dict[str, str]:
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"{path} cannot be read ({error}); expected a CSV file in UTF-8; copy the bundle again"
        ) from None
    if not rows or not {"Eval Task", "Random baseline"} <= rows[0].keys():
        raise UserError(
            f"{path} has the columns {', '.join(rows[0]) if rows else 'of no row'}; expected Eval Task and Random"
            " baseline; copy the bundle again"
        )
    return {row["Eval Task"]: row["Random baseline"] for row in rows}


def _task(entry: dict[str, Any], folder: Path, baselines: dict[str, str]) -> TaskSpec:
    for name, kind in FIELDS.items():
        if not isinstance(entry.get(name), kind):
            raise UserError(f"{name} is {entry.get(name)!r}; expected a {kind.__name__}; fix its list")
    label, kind, (shots, *_) = entry["label"], entry["icl_task_type"], entry["num_fewshot"] or [None]
    if kind not in KINDS:
        raise UserError(
            f"the task type {kind!r} is unknown; expected one of {', '.join(KINDS)}{nearest(kind, list(KINDS))}"
        )
    if not isinstance(shots, int) or shots < 0:
        raise UserError(
            f"num_fewshot is {entry['num_fewshot']}; expected a list with a number of solved items, such as [10]"
        )
    try:
        baseline = float(baselines[label]) / 100
    except (KeyError, ValueError, TypeError):  # a line that ends before its baseline has None
        seen = f"is {baselines[label]!r}" if label in baselines else "is missing"
        raise UserError(
            f"its random baseline in {folder / 'eval_meta_data.csv'} {seen}; expected a percentage; add a line for"
            f" {label}"
        ) from None
    if not 0 <= baseline < 1:
        raise UserError(
            f"its random baseline is {baselines[label]} %; expected at least 0 and below 100; fix"
            f" {folder / 'eval_meta_data.csv'}"
        )
    if not isinstance(delimiter := entry.get("continuation_delimiter", " "), str):
        raise UserError(
            f"continuation_delimiter is {delimiter!r}; expected text; fix its list, or leave it out for a blank"
        )
    path = folder / "eval_data" / entry["dataset_uri"]
    if not path.is_file():
        raise UserError(f"its data, {path}, is missing; expected a jsonl file; copy the bundle again")
    return TaskSpec(label, kind, path, shots, delimiter, baseline)


def read_rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """(number of the line, object) of every line that is not blank. Raises UserError naming file and line."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); expected a jsonl file; copy it again") from None
    rows = []
    for n, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (
                ValueError,
                RecursionError,
            ) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors; brackets nested too deep
                expected = "expected one object per line; fix the line or copy the file again"
                raise UserError(
                    f"{path}:{n} is not JSON ({error}); {expected}", "not-json", file=str(path), line=n
                ) from None
            if not isinstance(row, dict):
                raise UserError(f"{path}:{n} holds a {type(row).__name__}; expected an object; fix the line")
            rows.append((n, row))
    if not rows:
        raise UserError(f"{path} is empty; expected one item per line; copy the file again")
    return rows


def read_items(task: TaskSpec, max_items: int = -1) -> list[Question]:
    """The task's items in the order of a fixed shuffle, the first `max_items` of it (-1: all). Raises UserError."""
    items = []
    for n, row in read_rows(task.path):
        try:
            items.append(KINDS[task.kind].item(row))
        except UserError as error:
            raise UserError(f"{task.path}:{n}: {error}; fix the line") from None
    return sample(items, max_items, task.shots, str(task.path))


def sample(items: list[Question], max_items: int, shots: int, name: str) -> list[Question]:
    """The first `max_items` of a fixed shuffle. Raises UserError for fewer than `shots` need."""
    random.Random(SHUFFLE_SEED).shuffle(items)
    kept = items[:max_items] if max_items > 0 else items
    if len(kept) <= shots:
        cut = f" of {len(items)} (--max-per-task {max_items})" if len(kept) < len(items) else ""
        raise UserError(
            f"{name} has {len(kept)} items{cut}; expected at least {shots + 1}, one to ask and {shots} solved ones;"
            " take more"
        )
    return kept


def fingerprint(bundle: Bundle) -> str:
    """sha256 of all that shapes what is asked: the lists' entries and the files' content."""
    parts = [(t.label, t.kind, t.shots, t.delimiter, t.baseline, _content(t.path)) for t in bundle.tasks.values()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _content(path: Path) -> str:
    try:
        return sha256_file(path)
    except OSError as error:  # its task fails, and is named
        return str(error)
