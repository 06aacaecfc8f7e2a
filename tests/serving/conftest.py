"""Two models made in seconds, and the real server around them: in a thread of this process, on a port of its own."""

import json
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch

from nanolab.cli import to_json
from nanolab.data.chat import render
from nanolab.data.tokenizer import Tokenizer
from nanolab.model.config import GPTConfig
from nanolab.model.gpt import GPT
from nanolab.records import checkpoint
from nanolab.runtime import Runtime
from nanolab.serving.api import create_app
from nanolab.serving.config import ServeConfig
from nanolab.serving.server import Server, bind, load_models
from nanolab.serving.worker import ModelServer

RUNTIME = Runtime(torch.device("cpu"), torch.float32)


def conversation(user: str, *parts: str) -> list[dict]:
    kinds = ("text",) if len(parts) == 1 else ("python", "python_output", "text")
    return [
        {"role": "user", "content": user},
        {"role": "assistant", "content": [{"type": k, "text": t} for k, t in zip(kinds, parts)]},
    ]


HELLO = conversation("hi", "é 🙂 hello")
PRODUCT = conversation("12*34?", "12*34", "408", "It is 408.")
PROGRAM = conversation("say", "print('a')", "a", "Said.")
LINES = conversation("ends", "a\u2028b\u2029c\x85")


def save(base: Path, name: str, model: GPT, tokenizer: Tokenizer, kind: str) -> None:
    folder = base / "runs" / name
    meta = {"model_config": to_json(model.config), "tokenizer_hash": tokenizer.hash, "kind": kind}
    checkpoint.save(
        folder / "checkpoints", 150, weights=dict(model.state_dict()), optimizer=None, meta=meta, runtime=RUNTIME
    )
    tokenizer.save(folder / "tokenizer")
    (folder / "result.json").write_text(json.dumps({"kind": kind}))


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Path:
    """A base directory with the runs "parrot", a chat model that knows its answers by heart, "endless", a base model
    that never stops, and "young", a chat model that was never trained.
    """
    base = tmp_path_factory.mktemp("served")
    tokenizer = Tokenizer.train(["plain words and plain words only " * 20], 275)
    rows = [
        render(tokenizer, messages) for messages in (HELLO, PRODUCT, PROGRAM, LINES, HELLO + PRODUCT, PRODUCT + HELLO)
    ]
    T = max(len(ids) for ids, _ in rows) - 1
    x = torch.tensor([ids[:-1] + [0] * (T + 1 - len(ids)) for ids, _ in rows])
    y = torch.tensor(
        [[i if m else -1 for i, m in zip(ids[1:], mask[1:])] + [-1] * (T + 1 - len(ids)) for ids, mask in rows]
    )
    torch.manual_seed(0)
    model = GPT(GPTConfig(sequence_len=128, vocab_size=tokenizer.vocab_size, n_layer=2, n_head=2, n_embd=64))
    model.init_weights(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(120):
        loss = model(x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    save(base, "parrot", model, tokenizer, "sft")
    young = GPT(GPTConfig(sequence_len=256, vocab_size=tokenizer.vocab_size, n_layer=1, n_head=1, n_embd=32))
    young.init_weights(2)
    save(base, "young", young, tokenizer, "sft")
    endless = GPT(GPTConfig(sequence_len=4096, vocab_size=tokenizer.vocab_size, n_layer=1, n_head=1, n_embd=32))
    endless.init_weights(1)
    with torch.no_grad():
        endless.lm_head.weight.zero_()  # all logits equal: greedy takes the lowest id, for ever
    save(base, "endless", endless, tokenizer, "base")
    return base


@dataclass
class Live:
    """A server that listens. http: a client of its address."""

    url: str
    http: httpx.Client
    models: dict[str, ModelServer]
    server: Server

    def gauge(self, name: str, model: str) -> float:
        """A value of /metrics; 0 for one that is not there yet."""
        return next(
            (
                float(line.split()[1])
                for line in self.http.get("/metrics").text.splitlines()
                if line.startswith(f'{name}{{model="{model}"}}')
            ),
            0.0,
        )

    def until(self, name: str, model: str, value: float, seconds: float = 60.0) -> None:
        """Wait until /metrics shows `value`; longer than `seconds` is a failure."""
        start = time.monotonic()
        while self.gauge(name, model) != value:
            assert time.monotonic() - start < seconds, f"{name} is {self.gauge(name, model)}, not {value}"
            time.sleep(0.01)


@pytest.fixture(scope="session")
def start_server(runs):
    """A function (**flags) -> Live; every server is ended when the session ends."""
    started: list[tuple[Live, threading.Thread]] = []

    def start(**flags) -> Live:
        cfg = ServeConfig(
            **{
                "model": "parrot,endless",
                "port": 0,
                "device_type": "cpu",
                "temperature": 0.0,
                "drain_seconds": 1.0,
                "prefix_mb": 8,
            }
            | flags
        )
        os.environ["NANOLAB_BASE_DIR"], before = str(runs), os.environ.get("NANOLAB_BASE_DIR")
        try:
            models = load_models(cfg, RUNTIME)
        finally:
            os.environ["NANOLAB_BASE_DIR"] = before or ""
        listening, ready = bind(cfg.host, cfg.port), threading.Event()
        server = Server(create_app(models, cfg), models.values(), cfg.drain_seconds, ready.set)
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        assert ready.wait(20)
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        live = Live(url, httpx.Client(base_url=url, timeout=30), models, server)
        started.append((live, thread))
        return live

    yield start
    for live, thread in started:
        live.http.close()
        if thread.is_alive():
            live.server.handle_exit(15, None)
            thread.join(20)
            assert not thread.is_alive()


@pytest.fixture(scope="session")
def live(start_server) -> Live:
    """The server that most tests talk to: it has few places."""
    return start_server(max_rows=4, queue=4)
