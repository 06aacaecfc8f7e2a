"""The server under people who leave, crowd, read slowly or pull its plug. Everything is real: sockets, threads,
engines, signals.
"""

import asyncio
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest
import torch

from nanolab.cli import UserError
from nanolab.data.chat_files import read_conversations
from nanolab.runtime import Runtime
from nanolab.serving.api import create_app
from nanolab.serving.config import ServeConfig
from nanolab.serving.server import bind, load_models, serve

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("nanolab_dev_flood", ROOT / "dev" / "bench" / "flood.py")
flood = importlib.util.module_from_spec(spec)
spec.loader.exec_module(flood)
HI = {"model": "parrot", "messages": [{"role": "user", "content": "hi"}]}
TIMED = "a normal request is answered within a second"  # a promise of dev/bench/flood.py
LONG = {"model": "endless", "prompt": "x", "max_tokens": 4000}


@contextmanager
def generating(live, n: int):
    """While inside, `n` replies of the endless model are being generated for one client. Yields the lines of its
    stream.
    """
    with httpx.stream("POST", f"{live.url}/v1/completions", json=LONG | {"stream": True, "n": n}, timeout=30) as answer:
        lines = answer.iter_lines()
        next(lines)
        live.until("nanolab_running", "endless", n)
        yield lines


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place_within_a_token(live, stream):
    before = live.gauge("nanolab_cancellations_total", "endless")
    if stream:
        with generating(live, 2):
            pass
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{live.url}/v1/completions", json=LONG | {"n": 2}, timeout=0.3)
    live.until("nanolab_running", "endless", 0)
    assert live.gauge("nanolab_cancellations_total", "endless") == before + 1
    assert live.models["endless"].replicas[0].engine.idle


def test_health_answers_during_generation(live):
    with generating(live, 4):
        for _ in range(10):
            body = live.http.get("/health").json()
            assert body["status"] == "ok" and body["models"]["endless"]["running"] == 4


def counted(live, status: str) -> int:
    """Answers of the endless model so far; the server is shared with other tests."""
    found = re.findall(
        rf'^nanolab_requests_total{{model="endless",route="/v1/completions",status="{status}"}} ([0-9.]+)$',
        live.http.get("/metrics").text,
        re.M,
    )
    return int(sum(map(float, found)))


def test_beyond_the_queue_everybody_is_refused_at_once(live):
    """Four rows run and four wait; n counts."""
    refused = counted(live, "429")
    with ThreadPoolExecutor(2) as pool:
        with generating(live, 4):
            waiting = [
                pool.submit(httpx.post, f"{live.url}/v1/completions", json=LONG | {"max_tokens": 2, "n": 3}, timeout=60)
            ]
            live.until("nanolab_queue_depth", "endless", 3)
            answer = live.http.post("/v1/completions", json=LONG | {"n": 2})  # one place is left, and it takes two
            assert (live.gauge("nanolab_running", "endless"), live.gauge("nanolab_queue_depth", "endless")) == (4, 3), (
                "while the others run and wait"
            )
            assert (answer.status_code, answer.headers["retry-after"], answer.json()["error"]["code"]) == (
                429,
                "1",
                "queue_full",
            )
            with (
                openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client,
                pytest.raises(openai.RateLimitError),
            ):
                client.completions.create(**LONG, n=2)
            never = live.http.post("/v1/completions", json=LONG | {"n": 9}).json()["error"]
            assert never["param"] == "n" and "at most 8" in never["message"]
            # the other model has a queue of its own
            assert live.http.post("/v1/chat/completions", json=HI).status_code == 200
            waiting.append(
                pool.submit(httpx.post, f"{live.url}/v1/completions", json=LONG | {"max_tokens": 2}, timeout=60)
            )
            live.until("nanolab_queue_depth", "endless", 4)
        assert [f.result().status_code for f in waiting] == [200, 200]
    assert counted(live, "429") == refused + 2


def test_a_client_that_leaves_the_queue_is_forgotten(live):
    with generating(live, 4):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{live.url}/v1/completions", json=LONG, timeout=0.2)
        live.until("nanolab_queue_depth", "endless", 0)
        assert live.gauge("nanolab_running", "endless") == 4


def test_everybody_gets_their_own_answer(live):
    """Eight at once in one batch and its queue: two questions, streams and plain, with and without logprobs."""
    answers = {"hi": "é 🙂 hello", "12*34?": "It is 408."}

    def ask(i: int) -> None:
        question = list(answers)[i // 2 % 2]
        body = {
            "model": "parrot",
            "messages": [{"role": "user", "content": question}],
            "stream": i % 2 == 0,
            "logprobs": i % 5 == 0,
        }
        answer = httpx.post(f"{live.url}/v1/chat/completions", json=body, timeout=20)
        if not body["stream"]:
            said = answer.json()["choices"][0]["message"]["content"]
        else:
            chunks = [json.loads(line[6:]) for line in answer.text.split("\n\n")[:-2]]
            said = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
        assert said == answers[question]

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(48)))


def test_a_slow_reader_blocks_nobody_and_loses_nothing(live):
    """It reads nothing until its reply is finished, which is more than all buffers between it and the server hold."""
    body = json.dumps(LONG | {"max_tokens": 900, "stream": True, "logprobs": 20}).encode()
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        s.settimeout(60)
        s.connect(("127.0.0.1", httpx.URL(live.url).port))
        s.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type:"
            b" application/json\r\n"
        )
        s.sendall(f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        live.until("nanolab_running", "endless", 1)
        assert live.http.post("/v1/completions", json=LONG | {"max_tokens": 3}).status_code == 200
        live.until("nanolab_running", "endless", 0, seconds=60)  # a bound against hanging, no measure
        got = b"".join(iter(lambda: s.recv(65536), b""))
    assert got.count(b'"text":"\\u0000"') == 900 and b"data: [DONE]\n\n" in got


def test_two_replicas_share_the_work(start_server):
    live = start_server(model="endless", replicas=2, max_rows=4, queue=0)
    first, second = live.models["endless"].replicas
    with generating(live, 6):
        assert len(first.jobs) == len(second.jobs) == 3
        assert live.http.post("/v1/completions", json=LONG | {"n": 3}).status_code == 429  # 8 places in all
        text = live.http.post("/v1/completions", json=LONG | {"n": 2, "max_tokens": 3}).json()["choices"]
        assert [choice["text"] for choice in text] == ["\0\0\0"] * 2
    live.until("nanolab_running", "endless", 0)

    first.engine.prefill = None  # pull one plug: its next step fails
    # long enough for each replica to take one
    failed = live.http.post("/v1/completions", json=LONG | {"max_tokens": 400, "n": 2})
    assert (failed.status_code, failed.json()["error"]["code"]) == (500, "engine_failed")
    health = live.http.get("/health")
    assert (health.status_code, health.json()["status"]) == (200, "degraded") and "NoneType" in health.json()["models"][
        "endless"
    ]["errors"][0]
    assert live.http.post("/v1/completions", json=LONG | {"max_tokens": 3}).status_code == 200

    with ThreadPoolExecutor(1) as pool, generating(live, 3) as lines:
        plain = pool.submit(httpx.post, f"{live.url}/v1/completions", json=LONG, timeout=20)
        live.until("nanolab_running", "endless", 4)
        second.engine.prefill = None
        assert last_error(lines) == ("server_error", "engine_failed")
        assert plain.result().status_code == 500
    health = live.http.get("/health")
    assert (health.status_code, health.json()["status"]) == (503, "failed")
    error = live.http.post("/v1/completions", json=LONG)
    assert (error.status_code, error.json()["error"]["type"], error.json()["error"]["code"]) == (
        500,
        "server_error",
        "engine_failed",
    )


@pytest.mark.slow  # importing torchao takes seconds
def test_weights_in_8_bits(start_server):
    live = start_server(model="parrot", int8=True)
    assert type(live.models["parrot"].replicas[0].engine.model.lm_head.weight).__name__ == "Int8Tensor"
    assert live.http.post("/v1/chat/completions", json=HI).json()["choices"][0]["message"]["content"] == "é 🙂 hello"


def test_conversations_are_kept_only_where_asked(start_server, tmp_path):
    path = tmp_path / "talks.jsonl"
    live = start_server(model="parrot", log_conversations=str(path))
    question = {"messages": [{"role": "user", "content": "12*34?"}]}
    live.http.post("/v1/chat/completions", json=question | {"stream": True})
    live.http.post("/v1/chat/completions", json=question | {"n": 2})
    talks = read_conversations(path)
    assert len(talks) == 3 and [part["text"] for part in talks[0][1]["content"]] == ["12*34", "408", "It is 408."]


def test_a_client_that_leaves_in_the_middle_of_its_body(live, capfd):
    with socket.create_connection(("127.0.0.1", httpx.URL(live.url).port)) as s:
        s.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length:"
            b" 100\r\n\r\n{"
        )
        assert live.http.get("/health").status_code == 200
    time.sleep(0.1)
    assert capfd.readouterr().err == ""


def command(*flags: str) -> list[str]:
    return [sys.executable, "-m", "scripts.chat_web", "--device-type", "cpu", *flags]


@pytest.fixture(scope="module")
def process(runs):
    """(process of scripts.chat_web with the endless model, its port): eight rows, eight places."""
    flags = command("--model", "endless", "--port", "0", "--queue", "8", "--max-rows", "8", "--prefix-mb", "8")
    env = os.environ | {"NANOLAB_BASE_DIR": str(runs)}
    with subprocess.Popen(
        flags, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as started:
        line = next(line for line in started.stdout if line.startswith("nanolab serves"))
        match = re.fullmatch(
            r"nanolab serves endless at http://127\.0\.0\.1:([0-9]+) \(page\), /v1 \(OpenAI API\)\n", line
        )
        yield started, int(match[1])
        started.kill()


@pytest.mark.slow
def test_a_flood_of_clients_that_leave(process):
    """A small one; the one that counts is dev/bench/flood.py itself."""
    started, port = process
    with ThreadPoolExecutor(1) as pool:  # in this thread a browser's tests may have left a loop running
        result = pool.submit(asyncio.run, flood.crowd(port, started, 200, 120)).result()
    assert sum(result["flood"]["outcomes"].values()) == 200 and set(result["flood"]["outcomes"]) <= {
        "left",
        "429",
        "200",
    }
    assert result["memory"]["outcomes"] == {"200": 108, "left": 12}
    broken = [
        promise
        for promise, kept in flood.PROMISES.items()
        if not kept(result | {"end": {"whole": True, "exit_code": 0}})
    ]
    assert set(broken) <= {TIMED}, "how fast is for a machine that does nothing else"


@pytest.mark.slow  # half a minute
def test_the_flood(tmp_path):
    done = subprocess.run([sys.executable, "dev/bench/flood.py"], cwd=ROOT, capture_output=True, text=True)
    result = json.loads(done.stdout)
    assert set(result["broken"]) <= {TIMED} and (done.returncode, done.stderr) == (len(result["broken"]), "")
    assert result["memory"]["outcomes"] == {"200": 1800, "left": 200}


@pytest.mark.slow
def test_sigterm_lets_running_requests_finish_and_refuses_new_ones(process):
    started, port = process
    url = f"http://127.0.0.1:{port}"
    with httpx.stream(
        "POST", f"{url}/v1/completions", json=LONG | {"stream": True, "max_tokens": 1500}, timeout=30
    ) as answer:
        lines = answer.iter_lines()
        next(lines)
        started.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        refused = httpx.post(f"{url}/v1/completions", json=LONG)
        assert (refused.status_code, refused.headers["retry-after"], refused.json()["error"]["code"]) == (
            503,
            "1",
            "draining",
        )
        assert httpx.get(f"{url}/health").json()["status"] == "draining"
        got = [line for line in lines if line]
    assert got[-1] == "data: [DONE]" and len(got) > 1400
    assert started.wait(10) == 0
    assert (started.stdout.read(), started.stderr.read()) == ("", "")  # and no line per request


def last_error(lines) -> tuple[str, str]:
    """Type and code of the error that a stream ends with."""
    error = json.loads([line for line in lines if line][-1].removeprefix("data: "))["error"]
    return error["type"], error["code"]


def test_draining_has_a_limit(start_server):
    live = start_server(model="endless", drain_seconds=0.1)
    with generating(live, 1) as lines:
        live.server.handle_exit(signal.SIGTERM, None)
        assert last_error(lines) == ("server_error", "draining")  # the reply itself would not have ended


@pytest.mark.fault("outer D20")
def test_a_model_that_is_named_twice_is_loaded_once(runs, monkeypatch, capsys):
    monkeypatch.setenv("NANOLAB_BASE_DIR", str(runs))
    models = load_models(
        ServeConfig(model="parrot,endless, parrot,parrot@150", port=0, device_type="cpu"),
        Runtime(torch.device("cpu"), torch.float32),
    )
    assert [*models] == ["parrot", "endless", "parrot@150"]
    assert capsys.readouterr().err.count("parrot") == 1


def test_a_prompt_that_lies_in_a_cached_prefix(start_server):
    """The same request twice, one that is the beginning of an earlier one, and one that is prompt and reply of it: as
    without snapshots.
    """
    with_cache, without = (start_server(model="parrot", prefix_mb=mb, max_rows=4, queue=4) for mb in (8, 0))
    turns = [
        {"role": "user", "content": "12*34?"},
        {"role": "assistant", "content": "It is 408."},
        {"role": "user", "content": "hi"},
    ]
    ids = list(range(40, 100))
    bodies = [
        ("chat/completions", {"messages": turns[:n], "logprobs": True, "top_logprobs": 3}) for n in (3, 3, 1, 1, 3)
    ]
    bodies += [
        ("completions", {"prompt": ids[:n], "logprobs": 3, "max_tokens": 8}) for n in (60, 60, 59, 30, 1, 30, 60)
    ]
    cached = []
    for route, body in bodies:
        found, expected = (live.http.post(f"/v1/{route}", json=body).json() for live in (with_cache, without))
        cached.append(found["usage"]["prompt_tokens_details"]["cached_tokens"])
        assert expected["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert rounded(found["choices"]) == rounded(expected["choices"])
        if (
            route == "completions" and len(body["prompt"]) == 60
        ):  # prompt and reply together: a snapshot of them holds no logits
            reply = without.models["parrot"].tokenizer.encode(expected["choices"][0]["text"])
            again = {"prompt": ids + reply[:7], "logprobs": 3, "max_tokens": 8}
            assert rounded(with_cache.http.post("/v1/completions", json=again).json()["choices"]) == rounded(
                without.http.post("/v1/completions", json=again).json()["choices"]
            )
    assert cached[0] == 0 and cached[1] == cached[4] > cached[2] and cached[6] == 60 and 0 < cached[3]


def rounded(value):
    """Numbers to four digits, since prompts are read in other pieces."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return (
        [rounded(inner) for inner in value]
        if isinstance(value, list)
        else pytest.approx(value, abs=2e-4)
        if isinstance(value, float)
        else value
    )


def test_mistakes_on_the_command_line(runs, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOLAB_BASE_DIR", str(runs))
    with pytest.raises(UserError, match="no model 'parot'.*endless, parrot"):
        serve(ServeConfig(model="parot", port=0, device_type="cpu"))
    with pytest.raises(UserError, match="--max-rows is 0"):
        serve(ServeConfig(model="parrot", port=0, max_rows=0))
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match="in use.*try --port"):
        bind("127.0.0.1", taken.getsockname()[1])
    for host, port in (("192.0.2.1", 0), ("no.such.host.invalid", 0), ("127.0.0.1", -1)):
        with pytest.raises(UserError, match="expected an address"):
            bind(host, port)
    for page in (tmp_path / "none.html", tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            create_app({}, ServeConfig(), page)
    with pytest.raises(UserError, match="unknown"):
        create_app({}, ServeConfig(tool="abacus"))
    with pytest.raises(UserError, match="cannot be written"):
        create_app({}, ServeConfig(log_conversations=str(tmp_path / "none" / "talks.jsonl")))
