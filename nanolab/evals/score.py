"""What an evaluation found: graded replies -> pass@k with intervals. Also what all evaluations of chat models share.
Imports no torch.

    pass@k = mean over problems of 1 - C(n - c, k) / C(n, k)      n replies to a problem, c of them right

is what k of these replies contain a right one with, without bias (Chen et al., arXiv 2107.03374). A 95 % interval is
Wilson's (1927) at the mean over problems. For shares of right replies between 0 and 1 it is wide enough, never too
narrow: their variance is at most that of zeros and ones with the same mean. Two models that saw the same problems are
compared by `paired`."""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from nanolab.cli import UserError
from nanolab.data.chat import parts_of, render_prompt
from nanolab.data.tokenizer import Tokenizer
from nanolab.data.turn import Part

Z95 = 1.959963984540054  # the normal distribution's 97.5 % point


class GradedTask(Protocol):
    """What is asked of a task; see tasks/common.py."""

    name: str
    kind: str
    baseline: float

    def __len__(self) -> int: ...
    def example(self, i: int) -> Any: ...  # .messages end with the reference's turn; .letters
    def correct(self, example: Any, content: Any) -> bool: ...


class Graded(NamedTuple):
    """One reply to one problem."""

    index: int  # of the task's example
    sample: int  # 0 <= sample < k
    content: str | list[Part]  # what the assistant said and did
    correct: bool
    ended: bool  # by itself, not cut for length


class Interval(NamedTuple):
    low: float
    high: float


@dataclass(frozen=True)
class Result:
    """pass_at[j] for j = 1 ... k, each with its 95 % interval. The same on every rank."""

    task: str
    n: int  # problems; one that does not fit the model counts as wrong
    k: int  # replies to each
    pass_at: dict[int, float]
    intervals: dict[int, Interval]
    too_long: int  # problems among n that do not fit the model
    replies: list[Graded]  # by index and sample
    outcomes: list[float]  # the share of right replies to each problem, in order of the problems

    @property
    def accuracy(self) -> float:
        return self.pass_at[1]

    @property
    def interval(self) -> Interval:
        """Of the accuracy."""
        return self.intervals[1]


def pass_at_k(n: int, c: int, k: int) -> float:
    """The share of the k-subsets of n replies, c of them right, that contain a right one; 1 <= k <= n."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def wilson(p: float, n: int) -> Interval:
    """The 95 % interval of a mean p of n values between 0 and 1, by inverting the score test: E. B. Wilson, JASA 22
    (1927).
    """
    shrink = 1 + Z95**2 / n
    centre = (p + Z95**2 / (2 * n)) / shrink
    half = Z95 / shrink * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n**2))
    return Interval(max(0.0, centre - half), min(1.0, centre + half))


def perplexity(nats: float) -> float:
    """e^nats of a mean loss."""
    return math.exp(nats) if nats < 709 else math.inf  # which math.exp refuses


def centred(accuracy: float, baseline: float) -> float:
    """0 where guessing is always right, and nothing could be better."""
    return (accuracy - baseline) / (1 - baseline) if baseline < 1 else 0.0


def mean_above_chance(tasks: Sequence[tuple[float, Interval, float]]) -> tuple[float, Interval]:
    """The mean of centred accuracies and its interval, from (accuracy, its interval, baseline) of independent tasks.

    Zou & Donner, Statistics in Medicine 27 (2008), 1693.
    """
    rows = [[centred(x, baseline) for x in (accuracy, *interval)] for accuracy, interval, baseline in tasks]
    value = math.fsum(row[0] for row in rows) / len(rows)
    down, up = (math.sqrt(math.fsum((row[0] - row[side]) ** 2 for row in rows)) / len(rows) for side in (1, 2))
    return value, Interval(value - down, value + up)


def summary(task: str, indices: Sequence[int], k: int, replies: list[Graded]) -> Result:
    """The result of `k` replies to each problem of `indices` that the model could read."""
    right = Counter(g.index for g in replies if g.correct)
    pass_at = {j: math.fsum(pass_at_k(k, right[i], j) for i in indices) / len(indices) for j in range(1, k + 1)}
    intervals = {j: wilson(p, len(indices)) for j, p in pass_at.items()}
    too_long = len(indices) - len({g.index for g in replies})
    in_order = sorted(replies, key=lambda g: (g.index, g.sample))
    return Result(task, len(indices), k, pass_at, intervals, too_long, in_order, [right[i] / k for i in indices])


def paired(before: Sequence[float], after: Sequence[float]) -> tuple[float, Interval]:
    """(mean of after - before over the same problems, its 95 % interval), both in [-1, 1].

    Right or wrong (0 or 1): the adjusted Wald interval of Bonett & Price, J. Educational and Behavioral Statistics 37
    (2012), 479: with n12 problems lost and n21 won of n, p12 = (n12 + 1) / (n + 2), p21 = (n21 + 1) / (n + 2), and

        p21 - p12 +- z sqrt((p12 + p21 - (p21 - p12)^2) / (n + 2))

    Shares, of several replies to a problem: mean +- z s / sqrt(n), with the normal quantile z, so for a hundred
    problems or more; of fewer it is too narrow (20: by 7 %), and of one it is everything."""
    differences = [b - a for a, b in zip(before, after, strict=True)]
    n = len(differences)
    mean = math.fsum(differences) / n
    if {*before, *after} <= {0, 1}:
        lost, won = ((differences.count(sign) + 1) / (n + 2) for sign in (-1, 1))
        centre, half = won - lost, Z95 * math.sqrt((lost + won - (won - lost) ** 2) / (n + 2))
    else:
        centre, half = mean, Z95 * statistics.stdev(differences) / math.sqrt(n) if n > 1 else 2.0
    return mean, Interval(max(-1.0, centre - half), min(1.0, centre + half))


def readable_prompts(
    tokenizer: Tokenizer, task: GradedTask, indices: Sequence[int], limit: int
) -> dict[int, list[int]]:
    """index -> prompt ids, the shortest first, of the problems whose prompt leaves room for a token below `limit`."""
    prompts = {i: render_prompt(tokenizer, task.example(i).messages[:-1]) for i in indices}
    fitting = sorted((i for i, ids in prompts.items() if len(ids) < limit), key=lambda i: (len(prompts[i]), i))
    return {i: prompts[i] for i in fitting}


def readable_turn(content: str | Sequence[Part], tool: str = "") -> str:
    """A turn as people read it, calls in brackets: "[calculator: 12+34 = 46] It is 46." tool: the name that is
    shown.
    """
    shown = ""
    for part in parts_of(content):
        if part["type"] == "python":
            shown += f"[{tool or 'python'}: {part['text']}] "
        elif part["type"] == "python_output":
            shown = f"{shown.removesuffix('] ')} = {part['text']}] "
        else:
            shown += part["text"]
    return shown.strip()


def check_problems(task: GradedTask, indices: Sequence[int]) -> None:
    """Raises UserError where there is nothing to grade."""
    if task.kind == "likelihood":
        raise UserError(
            f"task {task.name} is plain chat and has no answers; expected a task that can be graded; try gsm8k or"
            " arithmetic"
        )
    check_some(task, len(indices))


def check_some(task: GradedTask, n: int) -> None:
    if not n:
        raise UserError(
            f"task {task.name} has no problem to evaluate; expected at least one; raise --max-problems, or add data",
            "no-problems",
            task=task.name,
        )


OnReply = Callable[[Graded], None]
