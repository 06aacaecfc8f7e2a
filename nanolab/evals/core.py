"""CORE: one number for a base model, the mean over 22 in-context tasks of accuracy above chance. arXiv 2406.11794.

    CORE = mean over tasks of (accuracy - baseline) / (1 - baseline)        baseline: what guessing reaches

A mean over fewer tasks is called "CORE-k of 22" and is not to be compared with one over others. Texts are cut to the
model's context, as DCLM does; where some are, the label says so: "CORE@512, 61 % cut" is of a model that reads 512
tokens, which 61 % of the items exceed.

The interval takes the tasks as independent. hellaswag and hellaswag_zeroshot ask the same questions: at worst, of tasks
with as many items each and a correlation of 1, it should be sqrt(24 / 22) times as wide (4.4 %); with all items of the
bundle less than 1 %."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nanolab.cli import UserError
from nanolab.evals import icl
from nanolab.evals.bundle import CORE, Bundle, TaskSpec, open_bundle, read_items
from nanolab.evals.likelihood import Scorer, judge_groups
from nanolab.evals.published import ensure_bundle
from nanolab.evals.score import Interval, centred, mean_above_chance, wilson
from nanolab.records.console import clock
from nanolab.runtime import Runtime, Stop, Stopped, print0

Say = Callable[[str], None]
UNFINISHED = "the evaluation ended before it"


@dataclass(frozen=True)
class TaskScore:
    """What a model reached on one task."""

    kind: str
    shots: int
    n: int
    accuracy: float
    interval: Interval
    baseline: float
    centred: float
    cut: int  # items whose texts lost their first tokens, being longer than the model reads
    seconds: float
    # 1 for each right item and 0 for each wrong one, in the order of the items, which is the same for every model
    outcomes: str


@dataclass(frozen=True)
class CoreScore:
    """The same on every rank. `value` is None where not one task of CORE could be evaluated."""

    label: str  # "CORE", or "CORE-k of 22"; with the model's context and the share of cut items where there are any
    value: float | None
    interval: Interval | None
    tasks: dict[str, TaskScore]
    missing: list[str]  # tasks of CORE that the bundle does not list
    failed: dict[str, str]  # label -> why there is no score
    context: int = 0  # tokens of a text that the model reads; 0 where nobody says
    cut: float = 0.0  # share of the items of CORE's tasks that were cut to it

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Core:
    """The tasks of a bundle for one tokenizer: read here, encoded once, at the first of any number of evaluations.

    Rank r of W has items r, r + W, ... of each task. max_per_task: items of each, drawn by a fixed seed; -1: all.
    """

    def __init__(self, bundle: Bundle, tokenizer: icl.Encoder, runtime: Runtime, max_per_task: int = -1):
        self.bundle, self.tokenizer, self.runtime = bundle, tokenizer, runtime
        self.failed, self.items = dict(bundle.broken), {}
        for task in bundle.tasks.values():
            try:
                self.items[task.label] = read_items(task, max_per_task)
            except UserError as error:
                self.failed[task.label] = str(error)
        self._groups: dict[str, list[icl.ItemGroup]] = {}

    def groups(self, task: TaskSpec) -> Iterator[icl.ItemGroup]:
        if task.label not in self._groups:
            items = self.items[task.label]
            mine = range(self.runtime.rank, len(items), self.runtime.world_size)
            self._groups[task.label] = list(
                icl.encode_groups(task.kind, items, mine, task.shots, task.delimiter, self.tokenizer)
            )
        yield from self._groups[task.label]

    def evaluate(
        self,
        reader: Scorer,
        say: Say = lambda line: None,
        keep: Callable[[CoreScore], None] = lambda found: None,
        stop: Stop = lambda: False,
    ) -> CoreScore | None:
        """CORE of one model; called on every rank. say: gets the lines of a table, each when it is known.

        keep: gets what is there after each task but the last, the others in its `failed`. stop: asked before each pass;
        where it says so on a rank, there is no result."""
        scores: dict[str, TaskScore] = {}
        failed = dict(self.failed)
        tasks = [self.bundle.tasks[label] for label in self.items]
        work = [characters(task, self.items[task.label]) for task in tasks]
        began = time.perf_counter()
        if tasks:
            say(header())
        for i, task in enumerate(tasks):
            try:
                self.runtime.check_stop(stop())
                scores[task.label] = self.measure(reader, task, stop)
            except Stopped:
                return None
            except UserError as error:
                failed[task.label] = str(error)
                continue
            spent = time.perf_counter() - began
            left = spent * sum(work[i + 1 :]) / sum(work[: i + 1])
            say(row(task.label, scores[task.label]) + (f"{clock(left)} left" if i + 1 < len(tasks) else ""))
            if i + 1 < len(tasks):
                keep(
                    core_score(
                        dict(scores),
                        self.bundle.missing,
                        failed | {later.label: UNFINISHED for later in tasks[i + 1 :]},
                        reader.limit,
                    )
                )
        found = core_score(scores, self.bundle.missing, failed, reader.limit)
        for line in closing(found):
            say(line)
        return found

    def measure(self, reader: Scorer, task: TaskSpec, stop: Stop = lambda: False) -> TaskScore:
        began, right = time.perf_counter(), icl.KINDS[task.kind].right

        def judge(scores: Sequence[icl.Score], group: icl.ItemGroup) -> tuple[bool, bool]:
            return right(scores, group.gold), any(score.cut for score in scores)

        found = judge_groups(reader, self.groups(task), self.runtime, judge, task.label, stop)
        n, accuracy = len(found), sum(ok for ok, _ in found) / len(found)
        return TaskScore(
            task.kind,
            task.shots,
            n,
            accuracy,
            wilson(accuracy, n),
            task.baseline,
            centred(accuracy, task.baseline),
            sum(cut for _, cut in found),
            time.perf_counter() - began,
            "".join(str(int(ok)) for ok, _ in found),
        )


def open_core(tokenizer: icl.Encoder, runtime: Runtime, where: str, max_per_task: int) -> Core:
    """The tasks of CORE in the bundle `where` (see `ensure_bundle`). What is wrong with them is said here.

    Raises UserError where not one can be asked.
    """
    core = Core(open_bundle(ensure_bundle(where)), tokenizer, runtime, max_per_task)
    k = sum(label in CORE for label in core.items)
    missing = f"; missing: {', '.join(core.bundle.missing)}" if core.bundle.missing else ""
    print0(f"CORE            {k} of {len(CORE)} tasks of {core.bundle.folder}{missing}")
    for label, why in core.failed.items():
        print0(f"                without {label}: {why}")
    if not k:
        raise UserError(
            f"no task of CORE in {core.bundle.folder} can be evaluated; expected at least one; name another"
            " --eval-bundle, or leave out --core-metric-every"
        )
    return core


def characters(task: TaskSpec, items: Sequence[icl.Question]) -> float:
    """About how many characters a model reads of a task where what an item's texts begin with is read once."""
    solved = sum(len(item.contexts[0]) + len(item.answers[0]) for item in items)
    return task.shots * solved + sum(len(text) for item in items for text in (*item.contexts, *item.answers))


def core_score(scores: dict[str, TaskScore], missing: list[str], failed: dict[str, str], context: int = 0) -> CoreScore:
    """The mean over those scores whose tasks belong to CORE. context: tokens that the model reads."""
    members = [s for label, s in scores.items() if label in CORE]
    name = "CORE" if len(members) == len(CORE) else f"CORE-{len(members)} of {len(CORE)}"
    value, interval = (
        mean_above_chance([(s.accuracy, s.interval, s.baseline) for s in members]) if members else (None, None)
    )
    cut = sum(s.cut for s in members) / sum(s.n for s in members) if members else 0.0
    return CoreScore(
        name + (f"@{context}, {percent_text(cut)} cut" if cut else ""),
        value,
        interval,
        scores,
        missing,
        failed,
        context,
        cut,
    )


def percent_text(part: float) -> str:
    return "under 1 %" if part < 0.01 else f"{100 * part:.0f} %"


def header() -> str:
    return (
        f"  {'task':<34}{'shots':>5}{'items':>8}{'accuracy':>10} "
        f" {'95 % interval':<18}{'above chance':>12}{'seconds':>9}"
    )


def row(label: str, s: TaskScore) -> str:
    low, high = s.interval
    note = f"  {s.cut:,} cut ({percent_text(s.cut / s.n)})" if s.cut else ""
    return (
        f"  {label:<34}{s.shots:>5}{s.n:>8,}{s.accuracy:>10.4f} "
        f" {f'{low:.4f} to {high:.4f}':<18}{s.centred:>12.4f}{s.seconds:>9.1f}{note}"
    )


def closing(found: CoreScore) -> list[str]:
    """The mean, and what it lacks."""
    lines = []
    if found.value is not None:
        low, high = found.interval
        lines += [f"  {found.label:<57}  {f'{low:.4f} to {high:.4f}':<18}{found.value:>12.4f}"]
    if cut := sum(s.cut for s in found.tasks.values()):
        n = sum(s.n for s in found.tasks.values())
        lines += [
            f"  cut: {cut:,} of {n:,} items ({percent_text(cut / n)}) are longer than the model reads; of their texts"
            " the last tokens count"
        ]
    if found.missing:
        lines += [f"  missing from the bundle: {', '.join(found.missing)}"]
    return lines + [f"  failed: {label}: {why}" for label, why in found.failed.items()]


def csv_lines(found: dict[str, Any]) -> list[str]:
    """Task, Accuracy, Centered of `to_json`'s dict, as karpathy/nanochat's base_eval writes them; the mean is the last
    line.
    """
    lines = [f"{label},{s['accuracy']:.6f},{s['centred']:.6f}" for label, s in found["tasks"].items()]
    label = found["label"] if "," not in found["label"] else f'"{found["label"]}"'
    return [
        "Task,Accuracy,Centered",
        *lines,
        *([f"{label},,{found['value']:.6f}"] if found["value"] is not None else []),
    ]


def metrics(found: CoreScore) -> dict[str, Any]:
    """For the log of a training run, by the names that dashboards watch; core_tasks where it is not all of CORE,
    core_cut where items were cut.
    """
    k = sum(label in CORE for label in found.tasks)
    partial = ({"core_tasks": k} if k < len(CORE) else {}) | ({"core_cut": found.cut} if found.cut else {})
    return {
        "core_metric": found.value,
        "centered_results": {label: s.centred for label, s in found.tasks.items() if label in CORE},
    } | partial
