"""Talk: what a person types to a model, line by line: texts, which are answered, and commands, which begin with a
slash.

Notes and errors go to stderr. Imports no torch.
"""

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from nanolab.cli import UserError, nearest
from nanolab.inference.dialogue import Dialogue
from nanolab.terminal import harmless

if TYPE_CHECKING:
    from nanolab.inference.request import Request, TokenOutput


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
