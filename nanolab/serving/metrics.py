"""What /metrics says: counters and histograms with labels, in Prometheus' text format. Imports no torch.

https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from bisect import bisect_left
from collections.abc import Iterable

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # upper edges of the histogram's buckets

Labels = tuple[str, ...]


class Counter:
    """A number per combination of labels that only grows."""

    kind = "counter"

    def __init__(self, name: str, help: str, *labels: str):
        self.name, self.help, self.labels = name, help, labels
        self.values: dict[Labels, float] = {}

    def add(self, amount: float, *values: str) -> None:
        self.values[values] = self.values.get(values, 0) + amount

    def lines(self) -> Iterable[str]:
        return (sample(self.name, self.labels, values, number) for values, number in sorted(self.values.items()))


class Histogram:
    """How many observations were at most as large as each of SECONDS, their number and their sum, per combination of
    labels.
    """

    kind = "histogram"

    def __init__(self, name: str, help: str, *labels: str):
        self.name, self.help, self.labels = name, help, labels
        self.counts: dict[Labels, list[int]] = {}  # one per bucket, the last without an upper edge
        self.sums: dict[Labels, float] = {}

    def observe(self, seconds: float, *values: str) -> None:
        self.counts.setdefault(values, [0] * (len(SECONDS) + 1))[bisect_left(SECONDS, seconds)] += 1
        self.sums[values] = self.sums.get(values, 0.0) + seconds

    def lines(self) -> Iterable[str]:
        for values, counts in sorted(self.counts.items()):
            total = 0
            for edge, count in zip((*SECONDS, "+Inf"), counts):
                total += count
                yield sample(f"{self.name}_bucket", (*self.labels, "le"), (*values, str(edge)), total)
            yield sample(f"{self.name}_sum", self.labels, values, self.sums[values])
            yield sample(f"{self.name}_count", self.labels, values, total)


class Metrics:
    """All that a server counts. Touched by the event loop's thread only."""

    def __init__(self) -> None:
        self.requests = Counter(
            "nanolab_requests_total", "Requests answered, by HTTP status.", "model", "route", "status"
        )
        self.tokens = Counter(
            "nanolab_tokens_total",
            "Tokens of prompts, of replies, and of prompts that were not computed again.",
            "model",
            "kind",
        )
        self.cancellations = Counter(
            "nanolab_cancellations_total", "Requests whose client left before the end.", "model"
        )
        self.lost = Counter(
            "nanolab_conversations_lost_total", "Conversations that could not be written to the log.", "model"
        )
        self.first_token = Histogram(
            "nanolab_time_to_first_token_seconds", "From the arrival of a request to its first token.", "model"
        )

    def text(self, queued: dict[str, int], running: dict[str, int]) -> str:
        """The whole page; `queued` and `running` are the rows of each model now."""
        lines: list[str] = []
        for metric in (self.requests, self.tokens, self.cancellations, self.lost, self.first_token):
            lines += [f"# HELP {metric.name} {metric.help}", f"# TYPE {metric.name} {metric.kind}", *metric.lines()]
        for name, help, rows in (
            ("nanolab_queue_depth", "Rows that wait for a place in a batch.", queued),
            ("nanolab_running", "Rows in a batch.", running),
        ):
            lines += [
                f"# HELP {name} {help}",
                f"# TYPE {name} gauge",
                *(sample(name, ("model",), (model,), n) for model, n in rows.items()),
            ]
        return "\n".join(lines) + "\n"


def sample(name: str, labels: Labels, values: Labels, number: float) -> str:
    inside = ",".join(f'{label}="{escaped(value)}"' for label, value in zip(labels, values, strict=True))
    return f"{name}{{{inside}}} {number:.10g}"


def escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
