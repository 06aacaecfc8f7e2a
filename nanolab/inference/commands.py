"""Talk in the terminal, line by line: texts, which a model answers, and commands, which begin with a slash.

Replies go to stdout as they grow, notes and errors to stderr. Imports no torch.
"""

import contextlib
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from nanolab.cli import UserError, check_given, nearest
from nanolab.inference.config import ANSWERING, ChatConfig
from nanolab.inference.dialogue import Dialogue
from nanolab.terminal import harmless

if TYPE_CHECKING:
    from nanolab.inference.request import Request, TokenOutput

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
KEYS = "/help lists commands, Ctrl-C stops a reply, Ctrl-D leaves."
BASE = f"this is a base model: it continues your text instead of answering it. {KEYS}"
CHAT = f"the model remembers the conversation as far as it can read. {KEYS}"
# bytes for what was read; 20 layers of width 1280 in fp32 at 2048 tokens take 0.4 GB, and two are at hand
SNAPSHOTS = 1 << 30
BLOCK = '"""'


def converse(cfg: ChatConfig) -> None:
    """Answer --prompt, or all that is typed until the input ends. Raises UserError for flags and models that do not
    fit.
    """
    from nanolab import runtime
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
    engine = Engine(prepare_for_inference(model), tokenizer, rt, max_rows=1, prefix_bytes=SNAPSHOTS, graphs=True)
    request = Request(
        (), cfg.max_tokens, cfg.temperature, cfg.top_k, cfg.top_p, seed=cfg.seed, tools=tool if answers else None
    )
    marks = call_marks(tool) if answers else {}
    talk = Talk(Dialogue(engine, answers=answers, system=cfg.system), request, lambda steps: stream(steps, marks))
    if cfg.prompt:
        talk.answer(cfg.prompt)
    else:
        tell(CHAT if answers else BASE)
        listen(talk)


class Talk:
    """A dialogue and how its answers are drawn; each has a seed of its own, the next number.

    show: shows an answer as it grows, given the steps, and returns how it ended. over: somebody wants to leave.
    """

    def __init__(self, dialogue: Dialogue, request: "Request", show: Callable[[Iterator[list["TokenOutput"]]], str]):
        self.dialogue, self.request, self.show, self.over = dialogue, request, show, False

    def say(self, line: str) -> None:
        """Do what the line says. Raises UserError for one that makes no sense, and whatever `show` raises."""
        if line.startswith("/") and not line.startswith("//"):
            if note := self.command(*re.match(r"/(\S*)\s*(.*?)\s*$", line, re.DOTALL).groups()):
                tell(f"({note})")
        elif line.strip():
            self.discuss(line.removeprefix("/"))

    def command(self, name: str, argument: str) -> str | None:
        if name not in COMMANDS:
            known = nearest(name, list(COMMANDS), prefix="/")
            raise UserError(
                f"/{name} is not a command{known}; /help lists them; a text that begins with a slash is typed with two:"
                f" //{name}"
            )
        command = COMMANDS[name]
        if command.chat and not self.dialogue.answers:
            raise UserError(
                f"/{name} is about a conversation; here each text is continued alone; leave, and start with --chat"
            )
        if argument and not command.argument:
            raise UserError(f"/{name} with {argument!r}; expected nothing after it; type /{name}")
        if not argument and command.argument == "FILE":
            raise UserError(f"/{name} with nothing after it; expected a file; try /{name} chat.jsonl")
        return command.run(self, argument)

    def discuss(self, text: str, again: bool = False) -> None:
        """Answer `text`, and say so if the answer was cut."""
        if self.answer(text, again) == "length":
            tell(
                f"(cut: /max-tokens is {self.request.max_tokens}, and the model reads {self.dialogue.engine.limit} in"
                " all)"
            )

    def answer(self, text: str, again: bool = False) -> str:
        """Show the answer to `text`, and say before it what had to be forgotten; returns how it ended."""
        before = self.dialogue.forgotten
        steps = self.dialogue.reply(text, self.request, again)
        self.request = replace(self.request, seed=self.request.seed + 1)
        if (n := self.dialogue.forgotten - before) > 0:
            tell(
                f"(the oldest {'turn is' if n == 1 else f'{n} turns are'} forgotten: the model reads"
                f" {self.dialogue.engine.limit} tokens in all)"
            )
        return self.show(steps)

    def last(self) -> str:
        if not self.dialogue.turns:
            raise UserError("nothing was answered yet; expected a turn to go back to; type a text first")
        return self.dialogue.turns[-1].text


def system(talk: Talk, text: str) -> str:
    talk.dialogue.begin(text)
    return f"a new conversation, {'with this' if text else 'without a'} system prompt"


def new(talk: Talk, _: str) -> str:
    talk.dialogue.begin(talk.dialogue.system)
    return "a new conversation" + ", with the same system prompt" * bool(talk.dialogue.system)


def again(talk: Talk, _: str) -> None:
    talk.discuss(talk.last(), again=True)


def undo(talk: Talk, _: str) -> str:
    text = talk.last()
    talk.dialogue.turns.pop()
    return f"taken back: {text!r}"


def save(talk: Talk, path: str) -> str:
    talk.last()
    talk.dialogue.save(path)
    return f"{len(talk.dialogue.messages)} messages added to {path} as one line; to train on it: --tasks jsonl={path}"


def load(talk: Talk, path: str) -> str:
    count = talk.dialogue.load(path)
    return f"{len(talk.dialogue.messages)} messages read from {path}" + f", the last of {count} conversations" * (
        count > 1
    )


def usage(talk: Talk, _: str) -> None:
    for name, command in COMMANDS.items():
        if talk.dialogue.answers or not command.chat:
            tell(f"  {f'/{name} {command.argument}':20} {command.help}")
    tell("  //... is a text that begins with a slash.")
    tell(
        '  A line that ends with a backslash goes on in the next; a text of many lines stands between two lines of """.'
    )


def leave(talk: Talk, _: str) -> None:
    talk.over = True


def setting(name: str, kind: Callable[[str], float], expected: str, example: str) -> Callable[[Talk, str], str]:
    """The command that sets, or without a value tells, a field of the request."""
    field = name.replace("-", "_")

    def run(talk: Talk, text: str) -> str:
        if text:
            try:
                changed = replace(talk.request, prompt=(0,), **{field: kind(text)})
                changed.check(talk.dialogue.engine.limit)
            except UserError as error:
                raise UserError(str(error).replace("--", "/")) from None  # it knows the flags of the command line
            except ValueError:
                raise UserError(f"/{name} with {text!r}; expected {expected}; try /{name} {example}") from None
            talk.request = changed
        return f"{name} is {getattr(talk.request, field)}"

    return run


def seed(text: str) -> int:
    if not 0 <= (value := int(text)) < 1 << 63:
        raise ValueError
    return value


class Command(NamedTuple):
    argument: str  # what follows the name; only a FILE is required
    help: str
    run: Callable[[Talk, str], str | None]  # returns what to note
    chat: bool = False  # whether it is about a conversation


COMMANDS = {
    "system": Command(
        "TEXT",
        "begin a new conversation, in which the model is told this first; without TEXT: nothing",
        system,
        chat=True,
    ),
    "new": Command("", "forget the conversation and begin anew", new, chat=True),
    "again": Command("", "another reply to the last text", again),
    "undo": Command("", "take the last text and its reply back", undo, chat=True),
    "save": Command("FILE", "add the conversation to a .jsonl file, as chat_sft reads it", save, chat=True),
    "load": Command("FILE", "go on with the last conversation of such a file", load, chat=True),
    "temperature": Command(
        "X",
        "0: always the likeliest token; without X: shown, as are the next four",
        setting("temperature", float, "a number from 0", "0.8"),
    ),
    "top-k": Command(
        "N", "draw from the N likeliest tokens; 0: from all", setting("top-k", int, "a whole number from 0", "50")
    ),
    "top-p": Command(
        "X",
        "draw from the likeliest of this probability in all; 1: from all",
        setting("top-p", float, "a number from 0 to 1", "0.9"),
    ),
    "max-tokens": Command("N", "tokens of a reply at most", setting("max-tokens", int, "a whole number from 1", "256")),
    "seed": Command(
        "N",
        "seed of the next reply; the one after it has the next number",
        setting("seed", seed, "a whole number from 0", "42"),
    ),
    "help": Command("", "this list", usage),
    "quit": Command("", "leave, as Ctrl-D does", leave),
}


def tell(line: str) -> None:
    print(harmless(line), file=sys.stderr, flush=True)  # an error may quote a file


def listen(talk: Talk) -> None:
    """Read a text or a command, do what it says, until the input ends."""
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
            text = "\n".join(iter(lambda: BLOCK if (more := ask(". ")).strip() == BLOCK else more, BLOCK))
            return "/" * text.startswith("/") + text
        while line.endswith("\\"):
            line = line[:-1] + "\n" + ask(". ")
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return ""
    return line


def stream(steps: Iterator[list["TokenOutput"]], marks: dict[str, tuple[str, str]]) -> str:
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


def call_marks(tool: Any) -> dict[str, tuple[str, str]]:
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
