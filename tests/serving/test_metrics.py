"""/metrics, read by the parser of prometheus_client. Oracle: counts by hand."""

from prometheus_client.parser import text_string_to_metric_families

from nanolab.serving.metrics import Metrics


def parse(text: str) -> tuple[dict[str, str], dict[tuple, float]]:
    """(type by name, value by name and labels)."""
    families = list(text_string_to_metric_families(text))
    samples = [sample for family in families for sample in family.samples]
    values = {(sample.name, *sorted(sample.labels.items())): sample.value for sample in samples}
    assert len(values) == len(samples)
    return {family.name: family.type for family in families}, values


def test_the_text_format():
    metrics = Metrics()
    metrics.requests.labels("a", "/v1/completions", "200").inc()
    metrics.requests.labels("a", "/v1/completions", "200").inc(2)
    metrics.requests.labels('quo"te\\n\n', "/v1/completions", "429").inc()
    metrics.tokens.labels("a", "completion").inc(12_345_678)
    for seconds in (0.001, 0.01, 0.02, 0.3, 100):
        metrics.first_token.labels("a").observe(seconds)
    kinds, values = parse(metrics.text({"a": 2, "b": 0}, {"a": 4, "b": 0}).decode())
    assert kinds == {
        "nanolab_requests": "counter",
        "nanolab_tokens": "counter",
        "nanolab_cancellations": "counter",
        "nanolab_conversations_lost": "counter",
        "nanolab_time_to_first_token_seconds": "histogram",
        "nanolab_queue_depth": "gauge",
        "nanolab_running": "gauge",
    }
    route = ("route", "/v1/completions")
    assert values["nanolab_requests_total", ("model", "a"), route, ("status", "200")] == 3
    assert values["nanolab_requests_total", ("model", 'quo"te\\n\n'), route, ("status", "429")] == 1
    assert values["nanolab_tokens_total", ("kind", "completion"), ("model", "a")] == 12_345_678
    assert (values["nanolab_queue_depth", ("model", "a")], values["nanolab_running", ("model", "b")]) == (2, 0)
    name, model = "nanolab_time_to_first_token_seconds", ("model", "a")
    buckets = {key[1][1]: value for key, value in values.items() if key[0] == f"{name}_bucket"}
    # at most the edge
    assert [buckets[edge] for edge in ("0.01", "0.025", "0.25", "0.5", "60.0", "+Inf")] == [2, 3, 3, 4, 4, 5]
    assert values[f"{name}_count", model] == 5 and abs(values[f"{name}_sum", model] - 100.331) < 1e-6
    edges = [float(edge) for edge in buckets]
    assert edges == sorted(edges) and list(buckets.values()) == sorted(buckets.values())


def test_a_server_counts(start_server):
    live = start_server(model="parrot,endless")
    chat = {"model": "parrot", "messages": [{"role": "user", "content": "hi"}]}
    for _ in range(2):
        live.http.post("/v1/chat/completions", json=chat)
    live.http.post("/v1/completions", json={"model": "endless", "prompt": "x", "max_tokens": 3, "n": 2, "stream": True})
    live.http.post("/v1/completions", json={"model": "endless", "prompt": "x", "max_tokens": -2})
    _, values = parse(live.http.get("/metrics").text)
    requests = {key[1:]: value for key, value in values.items() if key[0] == "nanolab_requests_total"}
    chats, completions = ("route", "/v1/chat/completions"), ("route", "/v1/completions")
    assert requests == {
        (("model", "parrot"), chats, ("status", "200")): 2,
        (("model", "endless"), completions, ("status", "200")): 1,
        (("model", ""), completions, ("status", "400")): 1,
    }
    tokens = {(key[2][1], key[1][1]): value for key, value in values.items() if key[0] == "nanolab_tokens_total"}
    assert tokens == {
        ("parrot", "prompt"): 12,
        ("parrot", "completion"): 28,
        ("parrot", "cached"): 6,  # the second prompt was known
        ("endless", "prompt"): 2,
        ("endless", "completion"): 6,
        ("endless", "cached"): 0,
    }
    assert values["nanolab_time_to_first_token_seconds_count", ("model", "parrot")] == 2
