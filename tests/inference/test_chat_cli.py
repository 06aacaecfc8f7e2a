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

from nanolab.config import GPTConfig, to_json
from nanolab.data.tokenizer import Tokenizer
from nanolab.model.gpt import GPT
from nanolab.runtime import Runtime
from nanolab.training import checkpoint
from scripts.chat_cli import prompt_ids, show

ROOT = Path(__file__).parents[2]
RUNTIME = Runtime(torch.device("cpu"), torch.float32)
TEXT = "漢字かな 🙂 naïve café — "
GREEDY = ["--temperature", "0", "--device-type", "cpu"]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tuple[Path, GPT, Tokenizer]:
    """A base directory with one finished run, whose model has learned TEXT by heart; characters are several tokens long."""
    base = tmp_path_factory.mktemp("world")
    tokenizer = Tokenizer.train(["plain words and plain words only " * 20], 275)
    torch.manual_seed(0)
    model = GPT(GPTConfig(sequence_len=1024, vocab_size=tokenizer.vocab_size, n_layer=2, n_head=2, n_embd=64))
    model.init_weights(0)
    ids = torch.tensor([[tokenizer.bos, *tokenizer.encode(TEXT * 4)][:129]])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss = model(ids[:, :-1], ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    folder = base / "runs" / "parrot"
    meta = {"model_config": to_json(model.config), "tokenizer_hash": tokenizer.hash}
    checkpoint.save(folder / "checkpoints", 150, weights=dict(model.state_dict()), optimizer=None, meta=meta, runtime=RUNTIME)
    tokenizer.save(folder / "tokenizer")
    (folder / "result.json").write_text(json.dumps({}))
    return base, model, tokenizer


@torch.no_grad()
def naive_reply(world, text: str, n: int) -> str:
    _, model, tokenizer = world
    ids = [tokenizer.bos, *tokenizer.encode(text)]
    start = len(ids)
    for _ in range(n):
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
        if ids[-1] == tokenizer.bos:
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
