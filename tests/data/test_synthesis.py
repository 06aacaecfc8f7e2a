"""Synthetic conversations from a small local server that is busy, slow, wrong, or repeats itself."""

import json
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from nanolab.cli import UserError, main
from nanolab.data import endpoint, synthesis
from nanolab.data.chat_files import read_conversations
from nanolab.data.config import GenChatConfig
from nanolab.data.endpoint import Endpoint, Refused
from nanolab.data.synthesis import NEAR, Seen, messages_of, read_spec, shingles
from scripts.gen_chat import run

ROOT = Path(__file__).parents[2]
KEY = "sk-secret-0123456789"
SPEC = """
personas = ["a cook", "a pilot"]
openings = ["short", "long"]
dynamics = ["calm", "eager"]
instructions = "About {topic} by {persona}, {opening}, {dynamic}; {this} stays."
[topics]
near = ["tea", "rain"]
far = ["stars"]
"""


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.guard:
            self.server.requests.append((self.path, self.headers, body))
            fault = self.server.faults.pop(0) if self.server.faults else ""
        if self.server.pause:
            time.sleep(self.server.pause)
        text = self.server.conversation(body)
        if fault.isdecimal():
            location = {"Location": self.server.url} if fault == "302" else {}
            return self.reply(
                int(fault),
                f"no: {self.headers.get('Authorization')} says {fault}".encode(),
                {"Retry-After": "0.01"} | location,
            )
        if fault == "drop":
            self.close_connection = True
            return self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n{")
        if fault == "slow":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n")
            for _ in range(50):  # never still for long, never done
                time.sleep(0.05)
                self.wfile.write(b" ")
        if fault == "empty":
            return self.reply(200, b"{}")
        if fault == "deep":
            return self.reply(200, b"[" * 100_000)
        if fault == "large":
            return self.reply(200, b" " * (endpoint.MAX_BODY + 1))
        texts = {
            "malformed": text[:-9],
            "prose": "Of course! Here it is.",
            "same": self.server.conversation({"seed": 0}),
        }
        content = {
            "message": {"content": texts.get(fault, text)},
            "finish_reason": "length" if fault == "length" else "stop",
        }
        self.reply(
            200,
            json.dumps(
                {"choices": [content], "usage": {"prompt_tokens": 20, "completion_tokens": 22, "total_tokens": 42}}
            ).encode(),
        )

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args) -> None:
        pass


class Server(ThreadingHTTPServer):
    """`faults`: what happens to the next requests. A conversation is made of the request's seed."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url, self.faults, self.requests, self.pause, self.guard = (
            f"http://127.0.0.1:{self.server_address[1]}/v1",
            [],
            [],
            0.0,
            threading.Lock(),
        )
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def conversation(self, body: dict) -> str:
        turns = [
            ("user", f"What is {body['seed']} like?"),
            ("assistant", f"Like {body['seed'] + 1}, " + " ".join(f"w{body['seed'] * k}" for k in range(9))),
        ]
        return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]})

    def handle_error(self, request, client_address) -> None:
        pass  # a client that hangs up is part of the tests


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    found = Server()
    yield found
    found.shutdown()
    found.server_close()


@pytest.fixture
def work(server, tmp_path):
    """A function (**flags) that runs the command; `.output` is its file, `.rows()` what is in it, by index."""
    spec, output = tmp_path / "spec.toml", tmp_path / "out" / "chats.jsonl"
    spec.write_text(SPEC)

    def go(**flags) -> int:
        return run(
            GenChatConfig(
                **{
                    "spec": str(spec),
                    "output": str(output),
                    "model": "m",
                    "url": server.url,
                    "num": 8,
                    "workers": 3,
                    "timeout": 5.0,
                }
                | flags
            )
        )

    def rows() -> dict[int, dict]:
        found = [json.loads(line) for line in output.read_text().splitlines()]
        assert len({row["index"] for row in found}) == len(found)
        return {row["index"]: row for row in found}

    go.output, go.rows, go.spec = output, rows, spec
    return go


def test_every_conversation_is_kept_with_what_was_asked_for(work, server, capsys):
    work(json=True)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {
        "output": str(work.output),
        "conversations": 8,
        "tokens": 8 * 42,
        "kept": 8,
        "again": 0,
        "given up": 0,
    }
    rows, spec = work.rows(), read_spec(work.spec)
    assert sorted(rows) == list(range(8)) and len(read_conversations(work.output)) == 8
    asked = Counter(body["messages"][0]["content"] for _, _, body in server.requests)
    for index, row in rows.items():
        entries = {name: row[name] for name in ("topic", "persona", "opening", "dynamic")}
        assert entries == spec.drawn(42, index) and all(entries[name] in spec.axes[name] for name in entries)
        asked[f"About {row['topic']} by {row['persona']}, {row['opening']}, {row['dynamic']}; {{this}} stays."] -= 1
    assert not any(asked.values())
    path, headers, body = server.requests[0]
    assert (path, headers["Authorization"], body["model"], body["temperature"], body["max_tokens"]) == (
        "/v1/chat/completions",
        f"Bearer {KEY}",
        "m",
        1.0,
        4096,
    )
    schema = body["response_format"]["json_schema"]["schema"]
    assert schema["properties"]["messages"]["items"]["required"] == ["role", "content"]
    assert len({body["seed"] for _, _, body in server.requests}) == 8
    assert {topic for row in rows.values() for topic in [row["topic"]]} > {"tea"}


def test_the_same_seed_asks_for_the_same_and_another_for_other_things(work):
    spec = read_spec(work.spec)
    assert spec.drawn(1, 5) == spec.drawn(1, 5) != spec.drawn(2, 5) or spec.drawn(1, 6) != spec.drawn(2, 6)
    drawn = [spec.drawn(0, i) for i in range(300)]
    for name, entries in spec.axes.items():
        counts = Counter(d[name] for d in drawn)
        assert set(counts) == set(entries) and min(counts.values()) > 300 / len(entries) / 2
    assert len({tuple(d.values()) for d in drawn}) == 3 * 2 * 2 * 2  # every combination comes


@pytest.mark.parametrize("fault", ["429", "500", "503", "408", "drop"])
def test_a_busy_endpoint_is_asked_again(work, server, fault):
    server.faults = [fault] * 4
    work(num=3)
    assert len(work.rows()) == 3 and len(server.requests) == 7
    assert len({body["seed"] for _, _, body in server.requests}) == 3  # the same request, word for word


def test_an_answer_that_takes_too_long_is_asked_for_again(work, server):
    server.faults = ["slow"]
    work(num=1, timeout=0.3)
    assert len(work.rows()) == 1 and len(server.requests) == 2


@pytest.mark.parametrize(
    "fault, why",
    [
        ("malformed", "not JSON"),
        ("prose", "not JSON"),
        ("length", "cut for length"),
        ("empty", "not what its API promises"),
        ("deep", "not what its API promises"),
        ("large", "an answer of more than"),
    ],
)
def test_a_malformed_answer_is_replaced_by_another(work, server, capsys, fault, why):
    server.faults = [fault, fault]
    work(num=2, workers=1)
    assert len(work.rows()) == 2 and [body["seed"] for _, _, body in server.requests] == list(
        dict.fromkeys(body["seed"] for _, _, body in server.requests)
    )
    out = capsys.readouterr().out
    assert out.count("| again    |") == 2 and why in out


def test_duplicates_are_left_out_and_given_up_after_three(work, server, capsys):
    server.faults = ["same", "same", "same", "same"]
    work(num=3, workers=1)
    assert sorted(work.rows()) == [0, 2]
    out = capsys.readouterr().out
    assert (
        out.count("100% the same as conversation 0") == 3
        and out.count("| given up |") == 1
        and "2 of 3 conversations are in" in out
    )


def test_nothing_of_use_ends_the_command(work, server, monkeypatch):
    monkeypatch.setattr(synthesis, "HOPELESS", 4)
    server.faults = ["prose"] * 99
    with pytest.raises(UserError, match="4 conversations in a row came to nothing, the last one because: not JSON"):
        work(num=50)
    assert len(server.requests) <= 4 * synthesis.ATTEMPTS + 3 * synthesis.ATTEMPTS


@pytest.mark.parametrize(
    "status, said",
    [
        ("401", "gives no answer .status 401.*--api-key-env"),
        ("400", "gives no answer .status 400.*--response-format"),
        ("302", "a redirect to .*is not followed"),
    ],
)
def test_what_asking_again_does_not_mend_ends_at_once_and_keeps_what_is_there(work, server, status, said, capsys):
    work(num=2)
    server.requests.clear()
    server.faults = [status] * 9
    with pytest.raises(UserError, match=said) as error:
        work()
    assert len(work.rows()) == 2 and len(server.requests) <= 3
    assert KEY not in str(error.value) + capsys.readouterr().out
    if status != "302":
        assert "Bearer [key] says" in str(error.value)


def test_an_endpoint_that_stays_away_ends_the_command(work, server, monkeypatch):
    monkeypatch.setattr(endpoint, "TRIES", 3)
    server.faults = ["503"] * 99
    with pytest.raises(UserError, match=r"no answer in 3 tries \(status 503: .*type the same command later"):
        work(workers=1)
    assert len(server.requests) == 3
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match="no answer in 3 tries .*refused"):
        work(workers=1)


def test_the_key_is_written_nowhere(work, server, capsys):
    server.faults = ["429", "malformed", "500"]
    work(json=True)
    assert KEY not in work.output.read_text() + "".join(capsys.readouterr())


def test_without_a_key_none_is_sent(work, server, monkeypatch, capsys):
    monkeypatch.delenv("OPENAI_API_KEY")
    work(num=1)
    assert (
        "Authorization" not in server.requests[0][1]
        and "no key is sent: OPENAI_API_KEY is not set" in capsys.readouterr().out
    )


def test_without_the_client_the_command_that_installs_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match="bash runs/setup.sh gen"):
        runpy.run_path(endpoint.__file__)


def test_a_second_command_asks_only_for_what_is_missing(work, server):
    work(num=3)
    before = work.output.read_bytes()
    server.requests.clear()
    work(num=8)
    assert (
        len(server.requests) == 5
        and sorted(work.rows()) == list(range(8))
        and work.output.read_bytes().startswith(before)
    )
    server.requests.clear()
    work(num=8)
    assert server.requests == []


def test_a_torn_last_line_is_dropped_and_made_again(work, server):
    work(num=4, workers=1)
    content = work.output.read_bytes()
    work.output.write_bytes(content[:-20])
    server.requests.clear()
    work(num=4, workers=1)
    assert len(server.requests) == 1 and work.output.read_bytes() == content


def test_killed_and_started_again_it_makes_each_conversation_once(work, server):
    server.pause = 0.03
    flags = [
        "--spec",
        str(work.spec),
        "--output",
        str(work.output),
        "--model",
        "m",
        "--url",
        server.url,
        "--num",
        "40",
        "--workers",
        "3",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "scripts.gen_chat", *flags],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not work.output.exists() or work.output.read_bytes().count(b"\n") < 7:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = work.output.read_bytes()
    n = kept.count(b"\n")
    assert 7 <= n < 40
    server.requests.clear()
    server.pause = 0.0
    work(num=40)
    assert len(server.requests) == 40 - n and sorted(work.rows()) == list(range(40))
    assert work.output.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])


@pytest.mark.slow
def test_ctrl_c_ends_at_once_and_says_how_to_go_on(work, server):
    server.pause = 20.0
    flags = ["--spec", str(work.spec), "--output", str(work.output), "--model", "m", "--url", server.url]
    process = subprocess.Popen(
        [sys.executable, "-m", "scripts.gen_chat", *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 60
    while not server.requests:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=10)
    assert process.returncode == 130 and "0 of 1000 conversations are in" in out and "the same command continues" in out


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda work: work(seed=7), "made with another spec file or --seed"),
        (
            lambda work: (work.spec.write_text(SPEC.replace("calm", "wild")), work()),
            "made with another spec file or --seed",
        ),
        (lambda work: (work.output.write_text('{"a": 1}\n'), work()), r"chats.jsonl:1 is not a line of this command"),
        (lambda work: work(output="/dev/null/x"), "cannot be written"),
        (lambda work: work(output=""), "--spec or --output is not given"),
        (lambda work: work(url="localhost:8000"), "expected the address of an OpenAI-compatible endpoint"),
        (lambda work: work(model=""), "no model is named"),
        (lambda work: work(workers=0), "--workers is 0; expected at least 1"),
        (lambda work: work(response_format="json"), "did you mean --response-format json_schema"),
    ],
)
def test_what_cannot_be_continued_or_meant_is_refused(work, change, said):
    work(num=1)
    with pytest.raises(UserError, match=said):
        change(work)


def test_a_file_in_use_is_refused(work):
    work(num=1)
    held = synthesis.Collection(work.output, read_spec(work.spec), 42)
    with pytest.raises(UserError, match="being written by another process"):
        work()
    held.close()


def test_a_key_that_is_not_one_word_is_refused_unseen():
    for key in ("sk-a\nsk-b", "sk-ä", "a b"):
        with pytest.raises(UserError, match="expected one word") as error:
            Endpoint("http://x", "m", key)
        assert key not in str(error.value)


@pytest.mark.parametrize(
    "old, new, said",
    [
        ('["a cook", "a pilot"]', "[]", r"personas is \[\]; expected a list of texts"),
        ('["a cook", "a pilot"]', '["a cook", 3]', "personas is .*expected a list of texts"),
        ('near = ["tea", "rain"]', 'near = "tea"', "topics is .*expected a list of texts"),
        ("personas =", "persona =", "has the field 'persona'; .*did you mean personas"),
        ("{opening}", "", r"instructions without \{opening\}"),
        ("personas = [", "personas = ", "cannot be read as TOML"),
    ],
)
def test_a_spec_that_is_not_whole_is_refused(tmp_path, old, new, said):
    assert old in SPEC
    (tmp_path / "spec.toml").write_text(SPEC.replace(old, new))
    with pytest.raises(UserError, match=said):
        read_spec(tmp_path / "spec.toml")


def test_the_spec_that_comes_with_the_house_is_whole():
    spec = read_spec(ROOT / "runs" / "gen_chat.toml")
    assert len(spec.axes["topic"]) > 20 and "{" not in spec.filled(spec.drawn(0, 0))
    with pytest.raises(UserError, match="copy runs/gen_chat.toml"):
        read_spec(ROOT / "nowhere.toml")


GOOD = '{"messages": [{"role": "user", "content": " a "}, {"role": "assistant", "content": "b"}]}'


@pytest.mark.parametrize("text", [GOOD, f"```json\n{GOOD}\n```", f"\n```\n{GOOD}\n```\n"])
def test_an_object_with_or_without_a_fence_is_read(text):
    assert messages_of(text) == [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    "old, new, said",
    [
        (GOOD, "[]", "no object"),
        (GOOD, "[" * 100_000, "not JSON"),
        ('{"messages"', '{"title": 1, "messages"', "no object with the one field"),
        ('"b"', "7", "message 2 is not an object"),
        ('"content": "b"', '"content": "b", "mood": "good"', "message 2 is not an object"),
        ("assistant", "system", "message 2: expected role assistant, got system"),
        ("assistant", "user", "message 2: expected role assistant, got user"),
        ('"b"', '"  "', "message 2 .* is empty"),
        ("]}", ', {"role": "user", "content": "c"}]}', "end with the assistant"),
        ('[{"role": "user"', '[{"role": "system", "content": "s"}, {"role": "user"', "does not begin with the user"),
        ("{", "Sure! {", "not JSON"),
    ],
)
def test_an_answer_that_is_no_conversation_is_refused(old, new, said):
    assert old in GOOD
    with pytest.raises(Refused, match=said):
        messages_of(GOOD.replace(old, new, 1))


def chat(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def test_likeness_is_the_shared_part_of_all_runs_of_five_words():
    """Twelve words with the last one changed: 7 runs of 8 are shared, of 9 in all; and so on down."""
    words = "one two three four five six seven eight nine ten eleven twelve".split()
    seen = Seen()
    seen.add(chat(" ".join(words[:6]), " ".join(words[6:])), "conversation 3")
    for at, shared in ((11, 7), (10, 6), (9, 5)):
        changed = [*words[:at], "other", *words[at + 1 :]]
        alike = shared / (8 + 8 - shared)
        want = f"{alike:.0%} the same as conversation 3" if alike >= NEAR else None
        assert seen.like(chat(" ".join(changed))) == want, at
    assert NEAR == 0.6  # 7 of 9 and 6 of 10 are the same, 5 of 11 are not


def test_case_punctuation_and_encodings_do_not_matter():
    assert shingles(chat("Café, TWO; three", "four five!")) == shingles(
        chat("cafe\u0301 two", "Ｔhree -- four... five")
    )
    assert shingles(chat("!?", "...")) != shingles(chat("?!", "..."))  # without a word, signs are words


# --- what others see, and what is shown of others ---------------------------------------------------------------------

ESCAPES = b"\x1b[2J\x1b]0;owned\x07 denied \xc2\x9b31m \x00\x08\r"


@pytest.mark.fault("outer D22")
@pytest.mark.parametrize("status", [400, 302, 503])
def test_a_terminal_gets_no_control_characters_of_an_endpoint(work, server, monkeypatch, capsys, status):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.reply(
            status, ESCAPES, {"Location": "http://x.example/\x1b]0;y\x07"} if status == 302 else {"Retry-After": "0.01"}
        )

    monkeypatch.setattr(Handler, "do_POST", do_POST)
    monkeypatch.setattr(endpoint, "TRIES", 2)
    with pytest.raises(SystemExit) as end:
        main(lambda: work(num=1, workers=1))
    told = capsys.readouterr()
    assert end.value.code == 1 and ("denied" in told.err or status == 302)
    assert {c for c in told.out + told.err if ord(c) < 32 or 127 <= ord(c) < 160} <= {"\n", "\t"}


@pytest.mark.fault("outer D22")
@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("http://127.0.0.1:8000/v1", ""),
        ("http://localhost/v1", ""),
        ("http://[::1]:8000/v1", ""),
        ("http://127.9.9.9/v1", ""),
        ("https://api.example/v1", ""),
        ("http://api.example/v1", "api.example"),
        ("http://192.168.0.9:8000/v1", "192.168.0.9"),
        ("http://localhost.example/v1", "localhost.example"),
        ("http://[fe80::1]/v1", "fe80::1"),
    ],
)
def test_a_key_over_plain_http_is_warned_about(work, monkeypatch, capsys, url, host):
    monkeypatch.setattr(synthesis, "generate", lambda *_, **__: iter(()))
    work(url=url)
    warned = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: the key")]
    assert [host in line for line in warned] == [True] * bool(host)
    monkeypatch.delenv("OPENAI_API_KEY")
    work(url=url)
    assert "warning" not in capsys.readouterr().out


@pytest.mark.fault("outer D22")
def test_what_models_and_files_say_is_printed_without_control_characters(capsys):
    from nanolab.runtime import print0

    def failing() -> int:
        raise UserError(f"{said} cannot be read")

    said = "a\x1b[2J\x9bb\x7f\tc\nd"
    print0(said, 3)
    with pytest.raises(SystemExit):
        main(failing)
    told = capsys.readouterr()
    assert (
        told.out == "a\ufffd[2J\ufffdb\ufffd\tc\nd 3\n"
        and told.err == "error: a\ufffd[2J\ufffdb\ufffd\tc\nd cannot be read\n"
    )
