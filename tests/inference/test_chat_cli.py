"""The terminal talk as a person sees it: a process with a prompt, a pipe, or a terminal, against a naive greedy
loop.
"""

import codecs
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nanolab.cli import UserError, to_json
from nanolab.data.chat import render, render_prompt
from nanolab.data.chat_files import read_conversations
from nanolab.data.tokenizer import Tokenizer
from nanolab.inference.calculator import calculator
from nanolab.inference.commands import BLOCK, COMMANDS, call_marks, converse, show, stream, typed
from nanolab.inference.config import ChatConfig
from nanolab.inference.dialogue import Dialogue, as_written
from nanolab.inference.engine import Engine, Request
from nanolab.model.config import GPTConfig
from nanolab.model.gpt import GPT
from nanolab.records import checkpoint
from nanolab.runtime import Runtime

ROOT = Path(__file__).parents[2]
RUNTIME = Runtime(torch.device("cpu"), torch.float32)
TEXT = "漢字かな 🙂 naïve café — "
GREEDY = ["--temperature", "0", "--device-type", "cpu"]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tuple[Path, GPT, Tokenizer]:
    """A base directory with one finished run, whose model has learned TEXT by heart; characters are several tokens
    long.
    """
    tokenizer = Tokenizer.train(["plain words and plain words only " * 20], 275)
    ids = [tokenizer.bos, *tokenizer.encode(TEXT * 4)][:129]
    return finished_run(tmp_path_factory.mktemp("world"), tokenizer, [(ids[:-1], ids[1:])], "base", 1024)


def finished_run(
    base: Path, tokenizer: Tokenizer, rows: list[tuple[list[int], list[int]]], kind: str, sequence_len: int
) -> tuple[Path, GPT, Tokenizer]:
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
    checkpoint.save(
        folder / "checkpoints", 150, weights=dict(model.state_dict()), optimizer=None, meta=meta, runtime=RUNTIME
    )
    tokenizer.save(folder / "tokenizer")
    (folder / "result.json").write_text(json.dumps({}))
    return base, model.eval(), tokenizer


HELLO = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "é 🙂 hello"}]
CALL = [
    {"type": "python", "text": "12*34"},
    {"type": "python_output", "text": "408"},
    {"type": "text", "text": "It is 408."},
]
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
    return (
        b"".join(marks.get(i, b"" if i >= tokenizer.bos else tokenizer.decode_bytes([i])) for i in ids[start:]).decode(
            "utf-8", "ignore"
        )
        + "\n"
    )


@pytest.mark.slow
def test_a_chat_model_answers_remembers_and_shows_its_calls(chat):
    done = subprocess.run(**command(chat), input=b"hi\n12*34?\n", capture_output=True, check=True)
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
        converse(ChatConfig(temperature=0.0, device_type="cpu", **flags))
        return out.getvalue().decode(), capsys.readouterr().err

    return talk


def test_a_call_is_shown_and_left_unanswered_when_no_tool_is_wanted(chat, inside):
    out, _ = inside(chat, prompt="12*34?", tool="", max_tokens=7)
    assert out.startswith("[12*34]") and "=" not in out


@pytest.mark.slow
def test_flags_say_whether_the_text_goes_into_the_template(world, chat, inside):
    assert inside(chat, prompt="hi", max_tokens=9, chat=True)[0] == naive_answer(chat, HELLO[:1], 9)
    assert inside(chat, prompt="hi", max_tokens=9, raw=True)[0] == naive_reply(chat, "hi", 9) + "\n"
    assert inside(world, prompt="hi", max_tokens=9, chat=True)[0] == naive_answer(world, HELLO[:1], 9)
    assert inside(world, prompt="hi", max_tokens=9)[0] == naive_reply(world, "hi", 9) + "\n"
    with pytest.raises(UserError, match="--chat and --raw at once"):
        converse(ChatConfig(chat=True, raw=True))
    with pytest.raises(UserError, match="tool 'calculater' is unknown.*did you mean --tool calculator"):
        converse(ChatConfig(tool="calculater"))


def test_the_oldest_turns_are_forgotten_with_a_word_when_they_no_longer_fit(chat, inside):
    """80 tokens, 20 of them kept for the reply: the third turn drops the first, and an overlong line changes
    nothing.
    """
    tokenizer = chat[2]
    longer = [{"role": "user", "content": "hi hi hi hi hi hi hi"}]
    lengths = [len(render_prompt(tokenizer, m)) for m in (HELLO + HELLO + longer, HELLO + longer)]
    assert lengths[0] > 60 >= lengths[1]
    lines = ["hi", "hi", "long " * 100, longer[0]["content"]]
    out, notes = inside(chat, "\n".join(lines), max_tokens=20)
    assert out == naive_answer(chat, HELLO[:1], 20) + naive_answer(chat, HELLO + HELLO[:1], 20) + naive_answer(
        chat, HELLO + longer, 20
    )
    assert notes.count(f"(the oldest turn is {FORGETS})") == 1 and "this model reads 1 to 79" in notes
    assert notes.index("1 to 79") < notes.index(FORGETS)


def test_an_answer_that_was_stopped_stays_as_far_as_it_went(chat, capsys):
    """Ctrl-C comes in the midst of a step, in which the model runs: the step is finished, and what it has read can be
    used.
    """
    _, model, tokenizer = chat
    talk = Dialogue(Engine(model, tokenizer, RUNTIME, prefix_bytes=1 << 24))
    request = Request((), 30, temperature=0.0, tools=calculator)

    def stopped_in_pass(n: int) -> None:
        passes = iter(range(1, n))  # the first reads the prompt
        ctrl_c = model.register_forward_hook(
            lambda *_: None if next(passes, None) else signal.raise_signal(signal.SIGINT)
        )
        try:
            with pytest.raises(KeyboardInterrupt):
                stream(talk.reply("hi", request), call_marks(calculator))
        finally:
            ctrl_c.remove()

    said = {"role": "assistant", "content": "é 🙂"}
    stopped_in_pass(n := len(tokenizer.encode(said["content"])))
    assert talk.messages == [HELLO[0], said] and talk.engine.idle
    asked = render_prompt(tokenizer, [HELLO[0], said, HELLO[0]])
    (first, *_), *_ = talk.reply("hi", request)
    assert first.cached == len(render_prompt(tokenizer, HELLO[:1])) + n - 1
    assert [i for turn in talk.turns for i in turn.ids][: len(asked) - 1] == asked[1:]
    assert [m["role"] for m in talk.messages] == ["user", "assistant"] * 2


def test_each_token_of_a_conversation_is_read_once(chat, inside, monkeypatch):
    """Over two turns, one with a tool, the model reads as many tokens as the whole conversation has but its last."""
    read, forward = [], GPT.forward
    monkeypatch.setattr("nanolab.inference.recorded.ROWS_ON_CPU", 0)  # a recorded step calls no model
    monkeypatch.setattr(
        GPT, "forward", lambda self, ids, *args, **named: read.append(ids.numel()) or forward(self, ids, *args, **named)
    )
    out, _ = inside(chat, "12*34?\nhi\n", max_tokens=26)
    assert out == "[12*34 = 408]It is 408.\né 🙂 hello\n"
    assert sum(read) == len(render(chat[2], PRODUCT + HELLO).ids) - 1


def test_a_reply_stays_as_the_model_wrote_it_where_it_is_a_turn(chat):
    tokenizer = chat[2]
    special = lambda name: tokenizer.special(f"<|{name}|>")  # noqa: E731
    begin, end = [special("assistant_start")], [special("assistant_end")]
    spelled = [i for c in "plain words" for i in tokenizer.encode(c)]
    assert spelled != tokenizer.encode("plain words")
    assert as_written(tokenizer, spelled + end) == as_written(tokenizer, spelled) == begin + spelled + end
    whole = render(tokenizer, PRODUCT[1:]).ids[1:]
    assert as_written(tokenizer, whole[1:]) == whole
    cut = [special("python_start"), *tokenizer.encode("12*")]
    assert as_written(tokenizer, cut) == begin + cut + [special("python_end")] + end
    for odd in ([*spelled, tokenizer.bos], [*spelled, special("user_start")]):
        assert as_written(tokenizer, odd) == begin + tokenizer.encode("plain words") + end


SYSTEM = {"role": "system", "content": "be kind"}


@pytest.fixture
def asked(monkeypatch) -> list[list[int]]:
    """The prompts that the engine gets."""
    prompts, add = [], Engine.add
    monkeypatch.setattr(Engine, "add", lambda self, request: prompts.append(list(request.prompt)) or add(self, request))
    return prompts


def test_commands_change_what_the_model_is_asked(chat, inside, asked):
    lines = [
        "hi",
        "/system be kind",
        "hi",
        "/undo",
        "hi",
        "hi",
        "/again",
        "/new",
        "hi",
        "/system",
        "//hi",
        "/quit",
        "hi",
    ]
    out, notes = inside(chat, "\n".join(lines), max_tokens=20)
    inside(chat, prompt="hi", system="be kind")
    hi, told = HELLO[:1], [SYSTEM, HELLO[0]]
    slash = [{"role": "user", "content": "/hi"}]
    assert out.startswith("é 🙂 hello\n" * 3)
    expected = [hi, told, told, [SYSTEM, *HELLO, *hi], [SYSTEM, *HELLO, *hi], told, slash, told]
    assert asked == [render_prompt(chat[2], messages) for messages in expected]
    for note in (
        "(a new conversation, with this system prompt)",
        "(taken back: 'hi')",
        "with the same system",
        "without a system",
    ):
        assert notes.count(note) == 1


def test_an_answer_again_takes_the_place_of_the_last(chat, inside, asked, tmp_path):
    out, _ = inside(chat, f"hi\n/again\n12*34?\n/save {tmp_path}/talk.jsonl\n", max_tokens=26)
    assert out == "é 🙂 hello\n" * 2 + "[12*34 = 408]It is 408.\n"
    assert asked == [render_prompt(chat[2], messages) for messages in (HELLO[:1], HELLO[:1], HELLO + PRODUCT[:1])]
    assert read_conversations(tmp_path / "talk.jsonl") == [HELLO + PRODUCT]


def test_a_saved_conversation_is_read_by_training_and_gone_on_with(chat, inside, asked, tmp_path):
    file = tmp_path / "talks.jsonl"
    file.write_text(json.dumps(HELLO))  # without a line end, as people write
    _, notes = inside(chat, f"/system be kind\n/load {file}\n12*34?\n/save {file}\n", max_tokens=26)
    assert "(2 messages read" in notes and "(4 messages added" in notes
    assert read_conversations(file) == [HELLO, HELLO + PRODUCT]
    file.write_text(file.read_text() + "\n" + json.dumps([SYSTEM, *PRODUCT, HELLO[0]]))
    _, notes = inside(chat, f"/load {file}\n/save {tmp_path}/two.jsonl\nhi\n", max_tokens=9)
    assert read_conversations(tmp_path / "two.jsonl") == [[SYSTEM, *PRODUCT]] and "the last of 3 conversations" in notes
    assert asked == [
        render_prompt(chat[2], messages) for messages in (HELLO + PRODUCT[:1], [SYSTEM, *PRODUCT, HELLO[0]])
    ]


def test_the_whole_conversation_is_saved_and_the_system_prompt_never_forgotten(chat, inside, asked, tmp_path):
    _, notes = inside(chat, "hi\n" * 4 + f"/save {tmp_path}/talk.jsonl", system="be kind", max_tokens=20)
    (saved,) = read_conversations(tmp_path / "talk.jsonl")
    assert saved[0] == SYSTEM and len(saved) == 9 and FORGETS in notes
    fitting = next(prompt for n in range(1, 8, 2) if len(prompt := render_prompt(chat[2], [SYSTEM, *saved[n:8]])) <= 60)
    assert asked[3] == fitting != render_prompt(chat[2], saved[:8])


def test_settings_hold_from_the_next_reply_on(world, inside):
    """Two replies after /seed 7 have the seeds 7 and 8; a temperature of 0 is greedy whatever the seed."""
    _, model, tokenizer = world
    lines = [
        "/seed 7",
        "/temperature 1.5",
        "/top-k 9",
        "/top-p 0.9",
        "/max-tokens 12",
        "hi",
        "/again",
        "/temperature 0",
        "hi",
        "/seed",
        "/max-tokens",
    ]
    out, notes = inside(world, "\n".join(lines))
    engine, prompt = Engine(model, tokenizer, RUNTIME), [tokenizer.bos, *tokenizer.encode("hi")]
    drawn = [
        engine.complete([prompt], Request(max_tokens=12, temperature=1.5, top_k=9, top_p=0.9, seed=seed))[0]
        for seed in (7, 8)
    ]
    assert (
        drawn[0] != drawn[1]
        and drawn[0] != engine.complete([prompt], Request(max_tokens=12, temperature=1.5, seed=7))[0]
    )
    assert out == "".join(cut_text(tokenizer, ids) + "\n" for ids in drawn) + naive_reply(world, "hi", 12) + "\n"
    assert "(seed is 10)" in notes and "(max-tokens is 12)" in notes and "cut: /max-tokens is 12" in notes


SLIPS = {
    "/temprature 1": "/temprature is not a command; did you mean /temperature?",
    "/etc/hosts": "typed with two: //etc/hosts",
    "/": "/help lists them",
    "/temperature hot": "/temperature with 'hot'; expected a number from 0; try /temperature 0.8",
    "/temperature -1": "temperature is -1.0; expected 0 (greedy) or more; try /temperature 0.8",
    "/top-k 1.5": "expected a whole number from 0; try /top-k 50",
    "/top-p 2": "try /top-p 0.9",
    "/max-tokens 0": "expected at least 1; try /max-tokens 256",
    "/seed -1": "expected a whole number from 0; try /seed 42",
    f"/seed {1 << 63}": "try /seed 42",
    "/undo 3": "/undo with '3'; expected nothing after it; type /undo",
    "/undo": "nothing was answered yet",
    "/again": "type a text first",
    "/save": "/save with nothing after it; expected a file; try /save chat.jsonl",
    "/save chat.jsonl": "nothing was answered yet",
    "/load nowhere.jsonl": "nowhere.jsonl is not a file",
}


def test_a_slip_is_one_line_and_the_talk_goes_on(chat, world, inside, tmp_path):
    out, notes = inside(
        chat,
        "\n".join([*SLIPS, "hi", f"/save {tmp_path}/talk.json", f"/save {tmp_path}/none/talk.jsonl"]),
        max_tokens=9,
    )
    errors = [line for line in notes.splitlines() if line.startswith("error: ")]
    assert out == naive_answer(chat, HELLO[:1], 9) and len(errors) == len(SLIPS) + 2
    for (line, expected), error in zip(SLIPS.items(), errors):
        assert expected in error, line
    assert (
        "expected .jsonl" in errors[-2] and "No such file or directory" in errors[-1] and not list(tmp_path.iterdir())
    )
    out, notes = inside(world, "/save x.jsonl\n/help\n/system be kind\n")
    assert out == "" and notes.count("start with --chat") == 2 and "  /again" in notes and "  /save" not in notes
    with pytest.raises(UserError, match="--system requires a chat model.*--chat"):
        inside(world, system="be kind")


def test_help_names_every_command(chat, inside):
    _, notes = inside(chat, "/help\n")
    assert [line.split()[0] for line in notes.splitlines() if line.startswith("  /") and line[3] != "/"] == [
        f"/{name}" for name in COMMANDS
    ]
    assert "/help" in notes.splitlines()[1]


@pytest.mark.parametrize(
    "lines, text",
    [
        (["hi"], "hi"),
        (["hi \\", "", "you"], "hi \n"),
        (["a\\", "b\\", "c", "d"], "a\nb\nc"),
        (["/system a\\", "b"], "/system a\nb"),
        ([BLOCK, "a\\", "", " b", f" {BLOCK} ", "c"], "a\\\n\n b"),
        ([BLOCK, "/new", BLOCK], "//new"),
        ([BLOCK, BLOCK, "c"], ""),
        (["a\\", KeyboardInterrupt], ""),
        ([BLOCK, "a", KeyboardInterrupt], ""),
        ([BLOCK, "a", EOFError], EOFError),
        ([KeyboardInterrupt], KeyboardInterrupt),
    ],
)
def test_a_text_of_several_lines(lines, text):
    def ask(prompt: str) -> str:
        line = next(left)
        if not isinstance(line, str):
            raise line
        return line

    left = iter(lines)
    if isinstance(text, str):
        assert typed(ask) == text
    else:
        with pytest.raises(text):
            typed(ask)


@pytest.mark.slow
def test_calls_are_dim_on_a_terminal_that_can(chat, monkeypatch):
    terminal, inside = pty.openpty()
    how = command(chat, "-p", "12*34?")
    how["env"]["TERM"] = "xterm"
    talk = subprocess.Popen(**how, stdin=inside, stdout=inside, stderr=inside, start_new_session=True)
    os.close(inside)
    try:
        assert "\x1b[2m[12*34 = 408]\x1b[0mIt is 408." in read_until(terminal, "It is 408.")
        assert talk.wait(timeout=30) == 0
    finally:
        talk.kill()
        os.close(terminal)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for kind, first in ("xterm", "\x1b[2m["), ("dumb", "["):
        monkeypatch.setenv("TERM", kind)
        assert call_marks(calculator)["python"][0] == first


@torch.no_grad()
def naive_reply(world, text: str, n: int) -> str:
    _, model, tokenizer = world
    ids = [tokenizer.bos, *tokenizer.encode(text)]
    start = len(ids)
    for _ in range(n):
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
        if ids[-1] in (tokenizer.bos, tokenizer.special("<|assistant_end|>")):
            break
    return cut_text(tokenizer, ids[start:])


def cut_text(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text of a reply that was cut: without the beginning of a character at its end."""
    return codecs.getincrementaldecoder("utf-8")("replace").decode(
        tokenizer.decode_bytes([i for i in ids if i < tokenizer.bos])
    )


def command(world, *flags: str) -> dict:
    env = os.environ | {"NANOLAB_BASE_DIR": str(world[0]), "NANOLAB_DTYPE": "float32", "TERM": "dumb"}
    return {"args": [sys.executable, "-m", "scripts.chat_cli", *GREEDY, *flags], "cwd": ROOT, "env": env}


@pytest.mark.slow
def test_one_prompt_gives_the_reply_alone_on_stdout(world):
    done = subprocess.run(**command(world, "-p", "漢字", "--max-tokens", "45"), capture_output=True, check=True)
    assert done.stdout.decode() == naive_reply(world, "漢字", 45) + "\n"
    assert "かな 🙂 naïve café" in done.stdout.decode()
    assert b"parrot@150" in done.stderr


def test_lines_from_a_pipe_are_answered_in_turn_until_it_ends(world, inside):
    """One line is one turn, whatever it ends with."""
    out, notes = inside(world, "漢字\n\n" + "long " * 300 + "\nnaïve\\\n" + BLOCK, max_tokens=7)
    # Seven tokens end inside a character: it is cut with the rest. The overlong line is refused, and the talk goes on.
    assert out == "".join(naive_reply(world, line, 7) + "\n" for line in ("漢字", "naïve\\", BLOCK))
    assert "base model" in notes and "this model reads 1 to 1023" in notes


def test_an_overlong_prompt_is_an_error(world, inside):
    with pytest.raises(UserError, match="this model reads 1 to 1023"):
        inside(world, prompt="long " * 300)


@pytest.mark.slow
def test_in_a_terminal_ctrl_c_stops_a_reply_and_ctrl_d_leaves(world):
    terminal, inside = pty.openpty()
    chat = subprocess.Popen(
        **command(world, "--max-tokens", "1000"),
        stdin=inside,
        stdout=inside,
        stderr=inside,
        start_new_session=True,
        preexec_fn=own_terminal,
    )
    os.close(inside)
    try:
        seen = read_until(terminal, "> ")
        for _ in range(2):
            os.write(terminal, f"{BLOCK}\n漢字\n{BLOCK}\n".encode())
            read_until(terminal, "かな 🙂 naïve café")  # the reply is under way, and a second long
            os.write(terminal, b"\x03")
            seen += read_until(terminal, "(stopped)\r\n> ")
        os.write(terminal, b"\x04")
        assert chat.wait(timeout=30) == 0
    finally:
        chat.kill()
        os.close(terminal)
    assert "Ctrl-D leaves" in seen and "Traceback" not in seen


@pytest.mark.parametrize(
    "is_terminal, shown",
    [(True, "\ufffd[2Jé\t\n\ufffd\ufffd"), (False, "\x1b[2Jé\t\n\x9b\x00")],
    ids=["terminal", "pipe"],
)
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
