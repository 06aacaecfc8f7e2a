"""Chromium on the real server, in front of models whose words are given here. Skipped, with the reason, where there is
no Chromium.
"""

import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import uvicorn

from nanolab.data.chat import render
from nanolab.data.tokenizer import Tokenizer
from nanolab.inference.engine import Engine
from nanolab.inference.request import Request, Row, TokenOutput
from nanolab.inference.sampling import Choice
from nanolab.model.config import GPTConfig
from nanolab.model.gpt import GPT
from nanolab.runtime import Runtime
from nanolab.serving.api import create_app
from nanolab.serving.config import ServeConfig
from nanolab.serving.worker import ModelServer

# The names that runs/test.sh looks for.
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not CHROMIUM and item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(
                pytest.mark.skip(reason="there is no Chromium on this machine (Debian: apt-get install chromium)")
            )


# What the scripted models say: the user's text -> the reply. <<...>> in a reply is a tool call. Other texts are echoed.
SCRIPT: dict[str, str] = {
    "sum": "I will calculate. <<37+58>>The sum is **95**.",
    "count": " ".join(f"word{i}" for i in range(200)),  # a second or two: long enough to be stopped
}


class Scripted:
    """In an engine's place: says what SCRIPT has for the last text of the prompt, one token a step where that is to be
    seen.
    """

    max_rows, limit, pause, burst = 4, 4000, 0.01, 2000  # rows, tokens, seconds per step, tokens per step
    runtime = Runtime(torch.device("cpu"), torch.float32)

    def __init__(self, tokenizer: Tokenizer, name: str):
        self.tokenizer, self.name = tokenizer, name
        self.rows: dict[int, Iterator[TokenOutput]] = {}
        self.added = self.cancelled = 0
        self.failed: list[tuple[int, str, str]] = []  # rows that an engine gave up; a script has none
        self.bursts: dict[int, int] = {}

    def add(self, request: Request) -> int:
        prompt = self.tokenizer.decode(request.prompt)
        asked = prompt.rsplit("<|user_start|>", 1)[-1].split("<|user_end|>")[0]
        self.added += 1
        self.bursts[self.added] = 6 if asked == "count" else self.burst
        self.rows[self.added] = self.turn(self.added, SCRIPT.get(asked, f"{self.name} heard: {asked}"), request)
        return self.added

    def prepare(self) -> bool:
        return False

    def close(self) -> None:
        """There is nothing to close."""

    def turn(self, row: int, reply: str, request: Request) -> Iterator[TokenOutput]:
        """The tokens of the whole turn; a call is answered by the tool of the request."""
        special, encode, ids = self.tokenizer.special, self.tokenizer.encode, []
        for i, piece in enumerate(re.split(r"<<(.*?)>>", reply, flags=re.S)):
            if i % 2:
                ids += [special("<|python_start|>"), *encode(piece), special("<|python_end|>")]
                ids += [special("<|output_start|>"), *encode(request.tools(piece)), special("<|output_end|>")]
            else:
                ids += encode(piece)
        ids.append(special("<|assistant_end|>"))
        told = Row(row, request, self.tokenizer, self.tokenizer.vocab_size, 10**9, self.runtime.device)
        yield from (told.take(Choice(token, 0.0)) for token in ids[: request.max_tokens])

    def step(self) -> list[TokenOutput]:
        time.sleep(self.pause)
        out = [new for row, tokens in self.rows.items() for new in islice(tokens, self.bursts[row])]
        for new in out:
            if new.finish:
                del self.rows[new.row]
        return out

    def cancel(self, row: int) -> None:
        self.cancelled += 1
        del self.rows[row]


@pytest.fixture
def script() -> dict[str, str]:
    """SCRIPT, for tests to put their own replies into, with monkeypatch."""
    return SCRIPT


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["plain words and plain words only " * 20], 275)


CALL = [
    {"type": "python", "text": "12*34"},
    {"type": "python_output", "text": "408"},
    {"type": "text", "text": "It is 408."},
]
LEARNED = [{"role": "user", "content": "12*34?"}, {"role": "assistant", "content": CALL}]


@pytest.fixture(scope="session")
def parrot(tokenizer) -> Engine:
    """The engine on a tiny model that has learned LEARNED by heart, tool call and all."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(sequence_len=128, vocab_size=tokenizer.vocab_size, n_layer=2, n_head=2, n_embd=64))
    model.init_weights(0)
    ids, mask = render(tokenizer, LEARNED)
    x, y = torch.tensor([ids[:-1]]), torch.tensor([[i if m else -1 for i, m in zip(ids[1:], mask[1:])]])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(120):
        loss = model(x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    return Engine(model.eval(), tokenizer, Runtime(torch.device("cpu"), torch.float32))


class Site(NamedTuple):
    url: str
    engines: dict[str, Any]


def serve(engines: dict[str, Any], kinds: dict[str, str], **settings: Any) -> Iterator[Site]:
    """The application on a free port, in a thread."""
    models = {name: ModelServer(name, [engine], 2, kinds.get(name, "sft")) for name, engine in engines.items()}
    server = uvicorn.Server(
        uvicorn.Config(create_app(models, ServeConfig(max_tokens=2000, **settings)), port=0, log_level="warning")
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield Site(f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", engines)
    server.should_exit = True
    thread.join(10)


@pytest.fixture(scope="session")
def site(tokenizer, parrot) -> Iterator[Site]:
    """Two scripted chat models, a scripted base model, and the parrot."""
    yield from serve(
        {name: Scripted(tokenizer, name) for name in ("ada", "bert", "root")} | {"parrot": parrot}, {"root": "base"}
    )


@pytest.fixture(scope="session")
def locked_site(tokenizer) -> Iterator[Site]:
    yield from serve({"ada": Scripted(tokenizer, "ada")}, {}, api_key="open sesame")


@pytest.fixture(scope="module")
# not for the session: while it is open, asyncio has a running loop in this thread, also for the tests of other folders
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


class Visit:
    """A fresh browser profile on the page, and what went wrong in it. Playwright's own attributes are at `page`."""

    def __init__(self, browser: Any, url: str, width: int, height: int, **options: Any):
        self.context = browser.new_context(viewport={"width": width, "height": height}, **options)
        self.context.set_default_timeout(20000)
        self.page = self.context.new_page()
        self.troubles: list[str] = []  # errors on the console, uncaught ones, violations of the policy
        self.requests: list[Any] = []
        self.page.on(
            "console", lambda message: message.type in ("error", "warning") and self.troubles.append(message.text)
        )
        self.page.on("pageerror", lambda error: self.troubles.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request))
        self.page.add_init_script(
            "addEventListener('securitypolicyviolation', (event) => console.error('violation', event.violatedDirective,"
            " event.blockedURI))"
        )
        self.page.goto(url)
        self.find = self.page.locator

    def send(self, text: str) -> None:
        self.find("#model option").first.wait_for(state="attached")
        self.find("#input").fill(text)
        self.find("#input").press("Enter")

    def ask(self, text: str) -> str:
        """Send, wait for the whole reply; its text."""
        self.send(text)
        self.wait()
        return self.find(".assistant .parts").last.inner_text()

    def wait(self) -> None:
        self.find("#send:text-is('Send')").wait_for()

    def bodies(self) -> list[dict[str, Any]]:
        """What the page has asked the models, in order."""
        return [json.loads(request.post_data) for request in self.requests if request.method == "POST"]


@pytest.fixture
def visit(browser, site) -> Iterator[Callable[..., Visit]]:
    """A function (path, width, height, url=..., **options of the browser's context) -> Visit. At the end no visit may
    have had troubles.
    """
    visits = []

    def open_page(path: str = "/", width: int = 1280, height: int = 800, url: str = "", **options: Any) -> Visit:
        visits.append(Visit(browser, (url or site.url) + path, width, height, **options))
        return visits[-1]

    yield open_page
    troubles = [trouble for visit in visits for trouble in visit.troubles]
    for visit in visits:
        visit.context.close()
    assert not troubles
