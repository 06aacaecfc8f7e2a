"""Talk to a model in the terminal: python -m scripts.chat_cli [--model NAME] [-p "one prompt"].

Replies go to stdout as they grow, everything else to stderr. A chat model answers and remembers the conversation, its
calls of a tool are shown as [12*34 = 408]; a base model continues the text that it is given. /help lists the commands;
Ctrl-C stops a reply, Ctrl-D leaves."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator

from nanolab.cli import UserError, check_given, main, parse
from nanolab.serving.config import ANSWERING, ChatConfig
from nanolab.terminal import harmless
from scripts import GENERATING, spin

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
BASE = (
    "this is a base model: it continues your text instead of answering it. /help lists commands, Ctrl-C stops a reply,"
    " Ctrl-D leaves."
)
CHAT = (
    "the model remembers the conversation as far as it can read. /help lists commands, Ctrl-C stops a reply, Ctrl-D"
    " leaves."
)
# bytes for what was read; 20 layers of width 1280 in fp32 at 2048 tokens take 0.4 GB, and two are at hand
SNAPSHOTS = 1 << 30
BLOCK = '"""'


def run(cfg: ChatConfig) -> int:
    spin(GENERATING)
    from nanolab import runtime
    from nanolab.inference.commands import Talk, tell
    from nanolab.inference.dialogue import Dialogue
    from nanolab.inference.engine import Engine, Request
    from nanolab.inference.prepare import prepare_for_inference
    from nanolab.inference.sampling import check_settings
    from nanolab.inference.sandbox import walls
    from nanolab.inference.tools import find_tool
    from nanolab.records.models import load_model

    check_settings(cfg.temperature, cfg.top_k, cfg.top_p)
    tool = find_tool(cfg.tool)
    if cfg.chat and cfg.raw:
        raise UserError(
            "--chat and --raw at once; expected one of them, or neither: then it goes by how the model was trained"
        )
    rt = runtime.start(cfg.device_type, seed=cfg.seed)
    with contextlib.redirect_stdout(sys.stderr):  # which model it is; stdout is for the reply
        model, tokenizer, meta = load_model(cfg.model, rt)
    answers = cfg.chat or not cfg.raw and meta.get("kind", "base") != "base"
    check_given(cfg, ANSWERING, answers=answers)
    for line in walls(cfg, answers and cfg.tool == "python"):
        tell(line)
    if cfg.system and not answers:
        raise UserError(
            "--system requires a chat model; this is a base model, which continues text; leave it out, or add --chat"
        )
    dialogue = Dialogue(
        Engine(prepare_for_inference(model), tokenizer, rt, max_rows=1, prefix_bytes=SNAPSHOTS, graphs=True),
        answers=answers,
        system=cfg.system,
    )
    request = Request(
        (), cfg.max_tokens, cfg.temperature, cfg.top_k, cfg.top_p, seed=cfg.seed, tools=tool if answers else None
    )
    marks = call_marks(tool) if answers else {}
    talk = Talk(dialogue, request, lambda steps: stream(steps, marks))
    if cfg.prompt:
        talk.answer(cfg.prompt)
    else:
        tell(CHAT if answers else BASE)
        listen(talk)
    return 0


def listen(talk) -> None:
    """Read a text or a command, do what it says, until the input ends."""
    from nanolab.inference.commands import tell

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  line editing and history for input()
    while not talk.over:
        try:
            line = typed(input) if sys.stdin.isatty() else input()
        except (EOFError, KeyboardInterrupt):
            tell("")
            return
        try:
            talk.say(line)
        except KeyboardInterrupt:
            tell("\n(stopped)")
        except UserError as error:  # a slip, or a line that is too long for this model: the next may be better
            tell(f"error: {error}")


def typed(ask: Callable[[str], str]) -> str:
    """A line; with those after it, where it ends with a backslash; or, after a line of three double quotes, all up to
    the next such.

    A block is a text even if it begins with a slash. Ctrl-C gives up what is not finished.
    """
    line = ask("> ")
    try:
        if line.strip() == BLOCK:
            text = "\n".join(iter(lambda: bare(ask(". ")), BLOCK))
            return "/" * text.startswith("/") + text
        while line.endswith("\\"):
            line = line[:-1] + "\n" + ask(". ")
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return ""
    return line


def bare(line: str) -> str:
    return BLOCK if line.strip() == BLOCK else line


def stream(steps: Iterator, marks: dict[str, tuple[str, str]]) -> str:
    """Show a reply as it grows, with a line end after it; returns how it ended. Ctrl-C stops it, and is raised then."""
    try:
        with contextlib.closing(steps), interrupts() as stopped:
            for step in steps:
                for new in step:
                    for kind, text, part, cut in new.events:
                        before, after = marks.get(kind, ("", ""))
                        write(before if not text and part is None else "")
                        show(text)
                        write(after if part is not None and not cut else "")
                if stopped:
                    raise KeyboardInterrupt
    finally:
        if DIM in "".join(before for before, _ in marks.values()):  # it may have ended inside a call
            write(PLAIN)
    write("\n")
    return new.finish


@contextlib.contextmanager
def interrupts() -> Iterator[list]:
    """A list in which each Ctrl-C is noted: raised in the midst of a step it would leave half-written snapshots
    behind.
    """
    noted: list = []
    before = signal.signal(signal.SIGINT, lambda *_: noted.append(True))
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


def call_marks(tool) -> dict[str, tuple[str, str]]:
    """What is shown before and after a call and its output: [call = output], dimmed on a terminal."""
    dim, plain = (DIM, PLAIN) if sys.stdout.isatty() and os.environ.get("TERM") != "dumb" else ("", "")
    return {"python": (dim + "[", "" if tool else "]" + plain), "python_output": (" = ", "]" + plain)}


def show(piece: str) -> None:
    """Write text of the model's."""
    write(harmless(piece) if sys.stdout.isatty() else piece)


def write(text: str) -> None:
    if text:
        sys.stdout.write(text)
        sys.stdout.flush()


if __name__ == "__main__":
    main(lambda: run(parse(ChatConfig)))
