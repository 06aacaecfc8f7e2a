"""What /metrics says, in Prometheus' text format. Imports no torch."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # upper edges of the histogram's buckets


class Metrics:
    """All that a server counts, in a registry of its own."""

    def __init__(self) -> None:
        disable_created_metrics()  # a time beside each number
        here = CollectorRegistry()
        self.registry = here
        self.requests = Counter(
            "nanolab_requests", "Requests answered, by HTTP status.", ["model", "route", "status"], registry=here
        )
        self.tokens = Counter(
            "nanolab_tokens",
            "Tokens of prompts, of replies, and of prompts that were not computed again.",
            ["model", "kind"],
            registry=here,
        )
        self.cancellations = Counter(
            "nanolab_cancellations", "Requests whose client left before the end.", ["model"], registry=here
        )
        self.lost = Counter(
            "nanolab_conversations_lost", "Conversations that could not be logged.", ["model"], registry=here
        )
        self.first_token = Histogram(
            "nanolab_time_to_first_token_seconds",
            "From the arrival of a request to its first token.",
            ["model"],
            buckets=SECONDS,
            registry=here,
        )
        self.queued = Gauge("nanolab_queue_depth", "Rows that wait for a place in a batch.", ["model"], registry=here)
        self.running = Gauge("nanolab_running", "Rows in a batch.", ["model"], registry=here)

    def text(self, queued: dict[str, int], running: dict[str, int]) -> bytes:
        """The whole page; `queued` and `running` are the rows of each model now."""
        for gauge, rows in ((self.queued, queued), (self.running, running)):
            for model, n in rows.items():
                gauge.labels(model).set(n)
        return generate_latest(self.registry)
