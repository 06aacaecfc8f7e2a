"""The terminal talk as a person sees it: a process with a prompt, a pipe, or a terminal, against a naive greedy loop."""

import io
import json
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nanolab.config import ChatConfig, GPTConfig, UserError, to_json
from nanolab.data.chat import render, render_prompt
from nanolab.data.tokenizer import Tokenizer
from nanolab.inference.engine import Engine
from nanolab.inference.tools import calculator
from nanolab.model.gpt import GPT
from nanolab.runtime import Runtime
from nanolab.training import checkpoint
from scripts import chat_cli
from scripts.chat_cli import Conversation, prompt_ids, run, show

ROOT = Path(__file__).parents[2]
RUNTIME = Runtime(torch.device("cpu"), torch.float32)
TEXT = "漢字かな 🙂 naïve café — "
GREEDY = ["--temperature", "0", "--device-type", "cpu"]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tuple[Path, GPT, Tokenizer]:
    """A base directory with one finished run, whose model has learned TEXT by heart; characters are several tokens long."""
    tokenizer = Tokenizer.train(["plain words and plain words only " * 20], 275)
    ids = [tokenizer.bos, *tokenizer.encode(TEXT * 4)][:129]
    return finished_run(tmp_path_factory.mktemp("world"), tokenizer, [(ids[:-1], ids[1:])], "base", 1024)


def finished_run(base: Path, tokenizer: Tokenizer, rows: list[tuple[list[int], list[int]]], kind: str, sequence_len: int) -> tuple[Path, GPT, Tokenizer]:
    """(base, model, tokenizer) with the run "parrot", whose model has learned the targets of these inputs by heart."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(sequence_len=sequence_len, vocab_size=tokenizer.vocab_size, n_layer=2, n_head=2, n_embd=64))
    model.init_weights(0)
    T = max(len(inputs) for inputs, _ in rows)
    x = torch.tensor([inputs + [0] * (T - len(inputs)) for inputs, _ in rows])
    y = torch.tensor([targets + [-1] * (T - len(targets)) for _, targets in rows])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss = model(x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    folder = base / "runs" / "parrot"
    meta = {"model_config": to_json(model.config), "tokenizer_hash": tokenizer.hash, "kind": kind}
    checkpoint.save(folder / "checkpoints", 150, weights=dict(model.state_dict()), optimizer=None, meta=meta, runtime=RUNTIME)
    tokenizer.save(folder / "tokenizer")
    (folder / "result.json").write_text(json.dumps({}))
    return base, model.eval(), tokenizer


HELLO = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "é 🙂 hello"}]
CALL = [{"type": "python", "text": "12*34"}, {"type": "python_output", "text": "408"}, {"type": "text", "text": "It is 408."}]
PRODUCT = [{"role": "user", "content": "12*34?"}, {"role": "assistant", "content": CALL}]
FORGETS = "forgotten: the model reads 80 tokens in all"


@pytest.fixture(scope="module")
def chat(tmp_path_factory) -> tuple[Path, GPT, Tokenizer]:
    """A finished run of a chat model that greets, and multiplies with the tool; it reads 80 tokens."""
    tokenizer = Tokenizer.train(["plain words and plain words only " * 20], 275)
    rows = []
    for messages in (HELLO, PRODUCT, HELLO + PRODUCT, PRODUCT + HELLO, HELLO + HELLO):
        ids, mask = render(tokenizer, messages)
        assert len(ids) <= 80
        rows.append((ids[:-1], [i if m else -1 for i, m in zip(ids[1:], mask[1:])]))
    return finished_run(tmp_path_factory.mktemp("chat"), tokenizer, rows, "sft", 80)


@torch.no_grad()
def naive_answer(world, messages: list[dict], n: int = 30) -> str:
    """What the terminal is to show for the greedy answer to `messages`; calls are answered by hand."""
    _, model, tokenizer = world
    special = tokenizer.special
    ids = render_prompt(tokenizer, messages)
    start = len(ids)
    while len(ids) < start + n:
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
        if ids[-1] in (tokenizer.bos, special("<|assistant_end|>")):
            break
        if ids[-1] == special("<|python_end|>"):
            call = tokenizer.decode(ids[len(ids) - 1 - ids[::-1].index(special("<|python_start|>")) + 1 : -1])
            ids += [special("<|output_start|>"), *tokenizer.encode(calculator(call)), special("<|output_end|>")]
    marks = {special("<|python_start|>"): b"[", special("<|output_start|>"): b" = ", special("<|output_end|>"): b"]"}
    return b"".join(marks.get(i, b"" if i >= tokenizer.bos else tokenizer.decode_bytes([i])) for i in ids[start:]).decode("utf-8", "ignore") + "\n"


def test_a_chat_model_answers_remembers_and_shows_its_calls(chat):
    done = subprocess.run(**command(chat), input="hi\n12*34?\n".encode(), capture_output=True, check=True)
    assert done.stdout.decode() == naive_answer(chat, HELLO[:1]) + naive_answer(chat, HELLO + PRODUCT[:1])
    assert done.stdout.decode() == "é 🙂 hello\n[12*34 = 408]It is 408.\n"
    assert b"remembers the conversation" in done.stderr and b"base model" not in done.stderr


@pytest.fixture
def inside(monkeypatch, capsys):
    """A function (world, input, **flags) -> (stdout, stderr) of the command in this process."""

    def talk(place, lines: str = "", **flags) -> tuple[str, str]:
        monkeypatch.setenv("NANOLAB_BASE_DIR", str(place[0]))
        monkeypatch.setenv("NANOLAB_DTYPE", "float32")
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out := io.BytesIO(), encoding="utf-8"))
        run(ChatConfig(temperature=0.0, device_type="cpu", **flags))
        return out.getvalue().decode(), capsys.readouterr().err

    return talk


def test_a_call_is_shown_and_left_unanswered_when_no_tool_is_wanted(chat, inside):
    out, _ = inside(chat, prompt="12*34?", tool="", max_tokens=7)
    assert out.startswith("[12*34]") and "=" not in out


def test_flags_say_whether_the_text_goes_into_the_template(world, chat, inside):
    assert inside(chat, prompt="hi", max_tokens=9, chat=True)[0] == naive_answer(chat, HELLO[:1], 9)
    assert inside(chat, prompt="hi", max_tokens=9, raw=True)[0] == naive_reply(chat, "hi", 9) + "\n"
    assert inside(world, prompt="hi", max_tokens=9, chat=True)[0] == naive_answer(world, HELLO[:1], 9)
    assert inside(world, prompt="hi", max_tokens=9)[0] == naive_reply(world, "hi", 9) + "\n"
    with pytest.raises(UserError, match="--chat and --raw at once"):
        run(ChatConfig(chat=True, raw=True))
    with pytest.raises(UserError, match="tool 'calculater' is unknown.*did you mean --tool calculator"):
        run(ChatConfig(tool="calculater"))


def test_the_oldest_turns_are_forgotten_with_a_word_when_they_no_longer_fit(chat, inside):
    """80 tokens, 20 of them kept for the reply: the third turn drops the first, and an overlong line changes nothing."""
    tokenizer = chat[2]
    longer = [{"role": "user", "content": "hi hi hi hi hi hi hi"}]
    lengths = [len(render_prompt(tokenizer, m)) for m in (HELLO + HELLO + longer, HELLO + longer)]
    assert lengths[0] > 60 >= lengths[1]
    lines = ["hi", "hi", "long " * 100, longer[0]["content"]]
    out, notes = inside(chat, "\n".join(lines), max_tokens=20)
    assert out == naive_answer(chat, HELLO[:1], 20) + naive_answer(chat, HELLO + HELLO[:1], 20) + naive_answer(chat, HELLO + longer, 20)
    assert notes.count(f"(the oldest turn is {FORGETS})") == 1 and "this model reads 1 to 79" in notes
    assert notes.index("1 to 79") < notes.index(FORGETS)


def test_an_answer_that_was_stopped_stays_as_far_as_it_went(chat, monkeypatch, capsys):
    _, model, tokenizer = chat
    talk = Conversation(Engine(model, tokenizer, RUNTIME), ChatConfig(temperature=0.0, max_tokens=30), calculator)
    steps = chat_cli.generate

    def stopped_after(n):
        def some(*args):
            for i, step in enumerate(steps(*args)):
                if i == n:
                    raise KeyboardInterrupt
                yield step

        monkeypatch.setattr(chat_cli, "generate", some)

    stopped_after(0)
    with pytest.raises(KeyboardInterrupt):
        talk.reply("hi", 0)
    assert talk.messages == []
    stopped_after(len(tokenizer.encode("é 🙂")))
    with pytest.raises(KeyboardInterrupt):
        talk.reply("hi", 0)
    assert talk.messages == [HELLO[0], {"role": "assistant", "content": [{"type": "text", "text": "é 🙂"}]}]
    monkeypatch.setattr(chat_cli, "generate", steps)
    talk.reply("12*34?", 0)
    assert [m["role"] for m in talk.messages] == ["user", "assistant"] * 2


@pytest.mark.parametrize("kind, shown", [("xterm", "\x1b[2m[12*34 = 408]\x1b[0mIt is 408."), ("dumb", "[12*34 = 408]It is 408.")])
def test_calls_are_dim_on_a_terminal_that_can(chat, kind, shown):
    terminal, inside = pty.openpty()
    how = command(chat, "-p", "12*34?")
    how["env"]["TERM"] = kind
    talk = subprocess.Popen(**how, stdin=inside, stdout=inside, stderr=inside, start_new_session=True)
    os.close(inside)
    try:
        assert shown in read_until(terminal, "It is 408.")
        assert talk.wait(timeout=30) == 0
    finally:
        talk.kill()
        os.close(terminal)


@torch.no_grad()
def naive_reply(world, text: str, n: int) -> str:
    _, model, tokenizer = world
    ids = [tokenizer.bos, *tokenizer.encode(text)]
    start = len(ids)
    for _ in range(n):
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
        if ids[-1] in (tokenizer.bos, tokenizer.special("<|assistant_end|>")):
            break
    return tokenizer.decode_bytes([i for i in ids[start:] if i < tokenizer.bos]).decode("utf-8", "ignore")


def command(world, *flags: str) -> dict:
    env = os.environ | {"NANOLAB_BASE_DIR": str(world[0]), "NANOLAB_DTYPE": "float32", "TERM": "dumb"}
    return {"args": [sys.executable, "-m", "scripts.chat_cli", *GREEDY, *flags], "cwd": ROOT, "env": env}


def test_one_prompt_gives_the_reply_alone_on_stdout(world):
    done = subprocess.run(**command(world, "-p", "漢字", "--max-tokens", "45"), capture_output=True, check=True)
    assert done.stdout.decode() == naive_reply(world, "漢字", 45) + "\n"
    assert "かな 🙂 naïve café" in done.stdout.decode()
    assert b"parrot@150" in done.stderr


def test_a_base_model_reads_the_text_as_the_start_of_a_document(world):
    _, _, tokenizer = world
    assert prompt_ids(tokenizer, "漢<|bos|>") == [tokenizer.bos, *tokenizer.encode("漢<|bos|>")]


def test_lines_from_a_pipe_are_answered_in_turn_until_it_ends(world):
    lines = "漢字\n\n" + "long " * 300 + "\nnaïve\n"
    done = subprocess.run(**command(world, "--max-tokens", "7"), input=lines.encode(), capture_output=True, check=True)
    # Seven tokens end inside a character: it is cut with the rest. The overlong line is refused, and the talk goes on.
    assert done.stdout.decode() == "".join(naive_reply(world, line, 7) + "\n" for line in ("漢字", "naïve"))
    notes = done.stderr.decode()
    assert "base model" in notes and "this model reads 1 to 1023" in notes and "Traceback" not in notes


def test_an_overlong_prompt_is_an_error_with_exit_code_1(world):
    done = subprocess.run(**command(world, "-p", "long " * 300), capture_output=True)
    assert (done.returncode, done.stdout) == (1, b"") and b"this model reads 1 to 1023" in done.stderr
    assert b"Traceback" not in done.stderr


def test_in_a_terminal_ctrl_c_stops_a_reply_and_ctrl_d_leaves(world):
    terminal, inside = pty.openpty()
    chat = subprocess.Popen(
        **command(world, "--max-tokens", "1000"), stdin=inside, stdout=inside, stderr=inside, start_new_session=True, preexec_fn=own_terminal
    )
    os.close(inside)
    try:
        seen = read_until(terminal, "> ")
        for _ in range(2):
            os.write(terminal, "漢字\n".encode())
            read_until(terminal, "かな 🙂 naïve café")  # the reply is under way, and a second long
            os.write(terminal, b"\x03")
            seen += read_until(terminal, "(stopped)\r\n> ")
        os.write(terminal, b"\x04")
        assert chat.wait(timeout=30) == 0
    finally:
        chat.kill()
        os.close(terminal)
    assert "Ctrl-D leaves" in seen and "Traceback" not in seen


@pytest.mark.parametrize("is_terminal, shown", [(True, "\ufffd[2Jé\t\n\ufffd\ufffd"), (False, "\x1b[2Jé\t\n\x9b\x00")], ids=["terminal", "pipe"])
def test_a_terminal_gets_no_control_characters_and_a_pipe_gets_every_byte(monkeypatch, is_terminal, shown):
    out = io.StringIO()
    out.isatty = lambda: is_terminal
    monkeypatch.setattr(sys, "stdout", out)
    show("\x1b[2Jé\t\n\x9b\x00")
    assert out.getvalue() == shown


def own_terminal() -> None:
    """In the child: make the terminal on stdin its controlling one, so that Ctrl-C reaches it as a signal, and heed it:
    whatever a shell starts in the background ignores SIGINT and hands that on."""
    import fcntl
    import signal
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def read_until(terminal: int, mark: str) -> str:
    seen, deadline = b"", time.monotonic() + 60
    while mark.encode() not in seen:
        ready, _, _ = select.select([terminal], [], [], max(0, deadline - time.monotonic()))
        assert ready, f"no {mark!r} in {seen!r}"
        seen += os.read(terminal, 4096)
    return seen.decode(errors="replace")
