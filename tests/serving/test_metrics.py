"""/metrics, read by a small parser written from the format's description. Oracle: counts by hand."""

import re

from nanolab.serving.metrics import Metrics

SAMPLE = re.compile(r'([a-zA-Z_:][a-zA-Z0-9_:]*)\{((?:[a-zA-Z_]\w*="(?:[^"\\\n]|\\["\\n])*",?)*)\} (\S+)')
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
PLAIN = {"\\\\": "\\", '\\"': '"', "\\n": "\n"}


def parse(text: str) -> tuple[dict[str, str], dict[tuple, float]]:
    """(type by name, value by name and labels) of the text format 0.0.4; fails on what is not in it."""
    assert text.endswith("\n")
    kinds, values = {}, {}
    for line in text[:-1].split("\n"):
        if line.startswith("# TYPE "):
            _, _, name, kinds[name] = line.split(" ")
        elif not line.startswith("# HELP "):
            name, labels, value = SAMPLE.fullmatch(line).groups()
            assert re.sub("_(bucket|sum|count)$", "", name) in kinds or name in kinds  # a type comes before its samples
            found = [(key, re.sub(r"\\.", lambda m: PLAIN[m[0]], raw)) for key, raw in LABEL.findall(labels)]
            assert (name, *found) not in values
            values[(name, *found)] = float(value)
    return kinds, values


def test_the_text_format():
    metrics = Metrics()
    metrics.requests.add(1, "a", "/v1/completions", "200")
    metrics.requests.add(2, "a", "/v1/completions", "200")
    metrics.requests.add(1, 'quo"te\\n\n', "/v1/completions", "429")
    metrics.tokens.add(12_345_678, "a", "completion")
    for seconds in (0.001, 0.01, 0.02, 0.3, 100):
        metrics.first_token.observe(seconds, "a")
    kinds, values = parse(metrics.text({"a": 2, "b": 0}, {"a": 4, "b": 0}))
    assert kinds == {
        "nanolab_requests_total": "counter",
        "nanolab_tokens_total": "counter",
        "nanolab_cancellations_total": "counter",
        "nanolab_conversations_lost_total": "counter",
        "nanolab_time_to_first_token_seconds": "histogram",
        "nanolab_queue_depth": "gauge",
        "nanolab_running": "gauge",
    }
    route = ("route", "/v1/completions")
    assert values["nanolab_requests_total", ("model", "a"), route, ("status", "200")] == 3
    assert values["nanolab_requests_total", ("model", 'quo"te\\n\n'), route, ("status", "429")] == 1
    assert values["nanolab_tokens_total", ("model", "a"), ("kind", "completion")] == 12_345_678
    assert (values["nanolab_queue_depth", ("model", "a")], values["nanolab_running", ("model", "b")]) == (2, 0)
    name, model = "nanolab_time_to_first_token_seconds", ("model", "a")
    buckets = {key[2][1]: value for key, value in values.items() if key[0] == f"{name}_bucket"}
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
    tokens = {(key[1][1], key[2][1]): value for key, value in values.items() if key[0] == "nanolab_tokens_total"}
    assert tokens == {
        ("parrot", "prompt"): 12,
        ("parrot", "completion"): 28,
        ("parrot", "cached"): 6,  # the second prompt was known
        ("endless", "prompt"): 2,
        ("endless", "completion"): 6,
        ("endless", "cached"): 0,
    }
    assert values["nanolab_time_to_first_token_seconds_count", ("model", "parrot")] == 2
