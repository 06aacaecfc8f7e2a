"""What fails while a model is served: recording, the conversation log, a tool, memory, logits, a step. The server says
so and goes on.
"""

import json
import logging
import os
import resource
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import pytest
import torch

from nanolab.data.chat_files import read_conversations
from nanolab.inference import recorded
from nanolab.inference.cache import KVCache
from nanolab.inference.engine import Engine, Request
from nanolab.serving import api, worker
from nanolab.serving.worker import ModelServer

HI = {"model": "parrot", "messages": [{"role": "user", "content": "hi"}]}
PRODUCT = {"model": "parrot", "messages": [{"role": "user", "content": "12*34?"}]}
LONG = {"model": "endless", "prompt": "x", "max_tokens": 4000}
SAID = "é 🙂 hello"
WAIT = 20  # seconds after which a test gives up; nothing is measured


def said(live, body=HI) -> str:
    answer = live.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]


def streamed(live, body) -> list[str]:
    return [
        line.removeprefix("data: ")
        for line in live.http.post("/v1/chat/completions", json=body | {"stream": True}).text.split("\n\n")
        if line
    ]


def is_well(live) -> bool:
    health = live.http.get("/health")
    return (health.status_code, health.json()["status"]) == (200, "ok")


class Model(torch.nn.Module):
    """A model whose passes are changed: change(the pass's number, logits) -> logits."""

    def __init__(self, model, change):
        super().__init__()
        self.config, self.compute_dtype, self.model, self.change, self.passes = (
            model.config,
            model.compute_dtype,
            model,
            change,
            0,
        )

    def forward(self, ids, **more):
        self.passes += 1
        return self.change(self.passes - 1, self.model(ids, **more))


def change(live, name: str, how) -> Engine:
    engine = live.models[name].replicas[0].engine
    engine.model = engine.prefill.model = Model(engine.model, how)
    engine.recorder = None  # it would replay passes
    return engine


def fail_at(number: int, error: Exception):
    def how(n, logits):
        if n == number:
            raise error
        return logits

    return how


@pytest.mark.fault("outer D2")
def test_a_recorder_that_fails_costs_no_request(start_server, monkeypatch, caplog):
    tried = threading.Event()

    def fails(step, inputs):
        tried.set()
        raise RuntimeError("torch.jit.trace is not supported")

    monkeypatch.setattr(recorded, "record_cpu", fails)
    live = start_server(model="parrot")
    live.models["parrot"].replicas[0].engine.recorder.after = 2
    assert said(live) == SAID and tried.wait(WAIT)
    assert [said(live) for _ in range(2)] == [SAID] * 2 and is_well(live)
    assert sum("not recorded" in r.message for r in caplog.records) == 1


def lost(live) -> float:
    return live.gauge("nanolab_conversations_lost_total", "parrot")


@pytest.mark.fault("outer D3")
def test_a_log_whose_folder_is_gone_costs_no_reply(start_server, tmp_path, caplog):
    folder = tmp_path / "logs"
    folder.mkdir()
    live = start_server(model="parrot", log_conversations=str(folder / "talks.jsonl"))
    (folder / "talks.jsonl").unlink()
    folder.rmdir()
    assert said(live) == SAID
    *_, last, done = streamed(live, HI)
    assert done == "[DONE]" and json.loads(last)["choices"][0]["finish_reason"] == "stop"
    assert lost(live) == 2 and sum(r.levelno == logging.ERROR for r in caplog.records) == 1
    folder.mkdir()
    assert said(live) == SAID and lost(live) == 2
    assert len(read_conversations(folder / "talks.jsonl")) == 1
    assert caplog.records[-1].levelname == "WARNING" and "2 conversations" in caplog.records[-1].message


@pytest.mark.fault("outer D3")
def test_a_full_disk_costs_the_lines_that_do_not_fit_and_leaves_no_half_ones(start_server, tmp_path):
    path = tmp_path / "talks.jsonl"
    live = start_server(model="parrot", log_conversations=str(path))
    assert said(live) == SAID
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, limits[1]))  # the disk takes 20 bytes of a line
    try:
        assert said(live) == SAID
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and lost(live) == 1
    assert said(live, PRODUCT) == "It is 408."
    assert len(read_conversations(path)) == 2


def test_every_line_is_whole_and_of_its_conversation(start_server, tmp_path):
    path = tmp_path / "talks.jsonl"
    live = start_server(model="parrot", log_conversations=str(path), max_rows=8)

    def ask(i: int) -> None:
        messages = [{"role": "system", "content": f"{i:04}" * 8}, *HI["messages"]]
        httpx.post(
            f"{live.url}/v1/chat/completions", json={"messages": messages, "max_tokens": 3, "n": 2}, timeout=WAIT
        )

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, range(24)))
    lines = [json.loads(line)["messages"] for line in path.read_text().splitlines()]
    systems = [line[0]["content"][:4] for line in lines]
    assert sorted(systems) == [f"{i:04}" for i in range(24) for _ in range(2)]
    assert systems[::2] == systems[1::2]  # both choices at once


@pytest.mark.fault("outer D3")
def test_a_disk_that_hangs_holds_up_nobody_else(start_server, tmp_path):
    """The log becomes a pipe: who opens it waits until somebody reads."""
    path = tmp_path / "talks.jsonl"
    live = start_server(model="parrot", log_conversations=str(path))
    path.unlink()
    os.mkfifo(path)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(httpx.post, f"{live.url}/v1/chat/completions", json=HI, timeout=WAIT)
        engine = live.models["parrot"].replicas[0].engine
        while not (engine.numbers and engine.idle):
            time.sleep(0.01)
        time.sleep(0.3)  # the reply reaches its end; asking for it would wait on the old code
        try:
            assert httpx.get(f"{live.url}/health", timeout=5).status_code == 200
        finally:
            line = path.open().readline()
        assert first.result().status_code == 200 and json.loads(line)["messages"][0] == HI["messages"][0]


@pytest.mark.fault("outer D10")
@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), SystemExit(1)], ids=repr)
def test_a_tool_that_raises_is_read_by_its_own_row_alone(start_server, monkeypatch, error):
    def tool(code: str) -> str:
        raise error

    monkeypatch.setattr(api, "find_tool", lambda name: tool)
    live = start_server(model="parrot")
    parts = live.http.post("/v1/chat/completions", json=PRODUCT).json()["choices"][0]["message"]["parts"]
    assert {"type": "python_output", "text": f"error: {type(error).__name__}"} in parts
    assert said(live) == SAID and is_well(live)


@pytest.mark.fault("outer D11")
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA"), MemoryError(), RuntimeError("can't allocate memory")],
    ids=lambda e: type(e).__name__,
)
def test_out_of_memory_is_503_and_the_next_request_is_answered(start_server, error, stream):
    live = start_server(model="parrot", prefix_mb=0)
    change(live, "parrot", fail_at(3, error))
    answer = live.http.post("/v1/chat/completions", json=HI | {"stream": stream})
    if stream:
        assert json.loads(answer.text.rstrip().split("data: ")[-1])["error"]["code"] == "out_of_memory"
    else:
        assert (answer.status_code, answer.headers["retry-after"], answer.json()["error"]["code"]) == (
            503,
            "1",
            "out_of_memory",
        )
    assert said(live) == SAID and is_well(live)


@pytest.mark.fault("outer D11")
def test_out_of_memory_drops_snapshots_before_rows(start_server):
    live = start_server(model="parrot")
    assert said(live) == SAID
    engine = change(live, "parrot", fail_at(2, MemoryError()))
    assert engine.prefixes.kept and said(live, PRODUCT) == "It is 408." and engine.model.passes > 2


@pytest.mark.fault("outer NaN")
@pytest.mark.parametrize("at", [0, 2])
def test_logits_that_are_no_numbers_are_an_error_with_the_id(start_server, caplog, at):
    live = start_server(model="parrot")
    change(live, "parrot", lambda n, logits: logits * float("nan") if n == at else logits)
    error = live.http.post("/v1/chat/completions", json=HI)
    assert (error.status_code, error.json()["error"]["code"]) == (500, "non_finite_logits")
    id = error.json()["error"]["message"].split()[-1]
    assert id.startswith("chatcmpl-") and any(id in r.getMessage() for r in caplog.records)
    assert said(live) == SAID and is_well(live)


@pytest.mark.fault("outer D11")
def test_a_step_that_fails_costs_its_rows_and_many_in_a_row_the_replica(start_server):
    live = start_server(model="parrot")
    change(live, "parrot", fail_at(2, ValueError("a bug")))
    failed = live.http.post("/v1/chat/completions", json=HI)
    assert (failed.status_code, failed.json()["error"]["code"]) == (500, "engine_failed")
    assert "ValueError" in failed.json()["error"]["message"]
    assert said(live) == SAID and is_well(live)

    def broken(n, logits):
        raise ValueError("for ever")

    change(live, "parrot", broken)
    assert [
        live.http.post("/v1/chat/completions", json=HI).json()["error"]["code"] for _ in range(worker.FAILURES + 1)
    ] == ["engine_failed"] * (worker.FAILURES + 1)
    health = live.http.get("/health")
    assert (health.status_code, health.json()["status"]) == (503, "failed")


@pytest.mark.fault("outer D12")
@pytest.mark.parametrize("where", ["step", "cancel", "add"])
def test_nobody_waits_for_an_engine(start_server, monkeypatch, where):
    """The engine is held inside a step, a copy of keys and values, or the set-up of a row; submitting, cancelling and
    /health are not.
    """
    live = start_server(model="endless")
    served, running, inside, go = live.models["endless"], threading.Event(), threading.Event(), threading.Event()
    engine, items = served.replicas[0].engine, []

    def held(*args, plain):
        if threading.current_thread() is served.replicas[0] and not go.is_set():
            inside.set()
            assert go.wait(2 * WAIT)
        return plain(*args)

    def stay() -> list:
        time.sleep(0.001)
        return []

    def everything() -> tuple[bool, int]:
        jobs = served.submit([Request((1, 2), 5)], lambda i, item: None)
        return served.cancel(jobs), httpx.get(f"{live.url}/health", timeout=5).status_code

    monkeypatch.setattr(engine, "step", lambda plain=engine.step: stay() if len(items) > 1 else plain())
    with ThreadPoolExecutor(2) as pool:
        jobs = served.submit(
            [Request((1, 2), 4000, 0.0, stop_ids=())],
            lambda i, item: (items.append(item), running.set() if len(items) > 1 else None),
        )
        assert running.wait(WAIT)
        if where == "step":
            monkeypatch.setattr(engine, "step", lambda plain=engine.step: held(plain=plain))
        elif where == "add":
            monkeypatch.setattr(engine, "add", lambda request, plain=engine.add: held(request, plain=plain))
            jobs += served.submit([Request((1, 2), 5)], lambda i, item: None)
        else:
            monkeypatch.setattr(
                KVCache, "snapshot", lambda cache, row, plain=KVCache.snapshot: held(cache, row, plain=plain)
            )
            assert served.cancel(jobs)
        assert inside.wait(WAIT)
        try:
            assert pool.submit(everything).result(WAIT) == (True, 200)
        finally:
            go.set()
        served.cancel(jobs)
        live.until("nanolab_running", "endless", 0)


@pytest.mark.fault("outer D12")
def test_a_large_body_is_not_read_on_the_event_loop(start_server, monkeypatch):
    live = start_server(model="parrot")
    inside, go = threading.Event(), threading.Event()

    def loads(body):
        inside.set()
        assert go.wait(2 * WAIT)
        return json.loads(body)

    monkeypatch.setattr(api, "json", SimpleNamespace(loads=loads, dumps=json.dumps))
    with ThreadPoolExecutor(1) as pool:
        large = pool.submit(
            httpx.post, f"{live.url}/v1/chat/completions", json=HI | {"user": "x" * (1 << 20)}, timeout=2 * WAIT
        )
        assert inside.wait(WAIT)
        try:
            assert httpx.get(f"{live.url}/health", timeout=5).status_code == 200
        finally:
            go.set()
        assert large.result().status_code == 200


@pytest.mark.fault("outer D12")
def test_more_values_than_can_be_read_at_once_are_refused(start_server, live):
    body = '{"model": "endless", "prompt": [' + "1," * (2 << 19) + "1]}"
    answer = live.http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")


def test_places_are_counted_while_rows_are_taken():
    """Of a queue of one and two rows at once, with an engine that takes its time to add."""
    inside, go = threading.Event(), threading.Event()

    class Slow:
        tokenizer = SimpleNamespace(token_bytes=lambda: torch.ones(1))
        limit, max_rows, failed, runtime = 100, 2, [], SimpleNamespace(device=torch.device("cpu"))

        def add(self, request):
            inside.set()
            assert go.wait(WAIT)
            return 0

        step = lambda self: []  # noqa: E731
        prepare = lambda self: False  # noqa: E731
        close = cancel = lambda self, *number: None  # noqa: E731

    served = ModelServer("slow", [Slow()], 1, "base")
    served.start(lambda function, *args: function(*args))
    served.submit([Request((1,))], lambda i, item: None)
    assert inside.wait(WAIT)
    assert (served.running, served.busy) == (1, True)
    go.set()
    served.stop()
    served.join()
