"""Dialogue: a conversation with a model, cut to its context, with replies token by token; saved to and loaded from
files.

With an engine that keeps snapshots (prefix_bytes) each turn costs only what is new in it. Imports no torch.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from nanolab.cli import UserError
from nanolab.data.chat import Message, check_messages, parse_reply, render, render_prompt, text_of
from nanolab.data.chat_files import read_conversations
from nanolab.data.tokenizer import Tokenizer
from nanolab.data.turn import Part

if TYPE_CHECKING:
    from nanolab.inference.engine import Engine
    from nanolab.inference.request import Request, TokenOutput


class Turn(NamedTuple):
    """A question and its answer. ids: both, as the model read and wrote them."""

    text: str
    reply: str | list[Part]
    ids: list[int]


class Dialogue:
    """A conversation with a chat model; or, with answers=False, texts of which each stands alone and is continued.

    turns: all of them. forgotten: how many, from the first, the model did not read for its last answer, for want of
    room. The engine is used by nobody else."""

    def __init__(self, engine: "Engine", *, answers: bool = True, system: str = ""):
        self.engine, self.tokenizer, self.answers = engine, engine.tokenizer, answers
        self.begin(system)

    def begin(self, system: str) -> None:
        """Start anew. system: what the model is told before everything; empty: nothing."""
        self.system, self.turns, self.forgotten = system, list[Turn](), 0

    @property
    def messages(self) -> list[Message]:
        """The whole conversation."""
        return self._head + [message for turn in self.turns for message in (asked(turn.text), answered(turn.reply))]

    @property
    def _head(self) -> list[Message]:
        return [{"role": "system", "content": self.system}] if self.system else []

    def reply(self, text: str, request: "Request", again: bool = False) -> Iterator[list["TokenOutput"]]:
        """The engine's steps, of no token or one, of the answer to `text`; closing the iterator stops it.

        request: how to answer; its prompt is left aside. again: in place of the last turn. Then `text` and answer are a
        turn, an answer that was stopped as far as it went. Raises UserError, at once and with nothing changed, for a
        text that does not fit."""
        turns = self.turns[:-1] if again else self.turns
        prompt, forgotten = self._prompt(turns, text, request.max_tokens)
        request = replace(request, prompt=tuple(prompt), parse="turn" if self.answers else "text")
        request.check(self.engine.limit)
        self.forgotten = forgotten
        return self._steps(request, turns, text)

    def _prompt(self, turns: Sequence[Turn], text: str, max_tokens: int) -> tuple[list[int], int]:
        """The ids of the newest turns that leave room for an answer, and how many turns are left out."""
        if not self.answers:
            return [self.tokenizer.bos, *self.tokenizer.encode(text)], 0
        head = render(self.tokenizer, self._head).ids
        question = render_prompt(self.tokenizer, [asked(text)])[1:]
        room = self.engine.limit - min(max_tokens, self.engine.limit // 2) - len(head) - len(question)
        first = 0
        while first < len(turns) and sum(len(turn.ids) for turn in turns[first:]) > room:
            first += 1
        return [*head, *(i for turn in turns[first:] for i in turn.ids), *question], first

    def _steps(self, request: "Request", turns: list[Turn], text: str) -> Iterator[list["TokenOutput"]]:
        row, ids = self.engine.add(request), list[int]()
        try:
            while not self.engine.idle:
                step = self.engine.step()
                self.engine.check()
                ids += [new.token for new in step]
                yield step
            while self.engine.prepare():
                pass
        finally:
            self.engine.cancel(row)
            if ids:
                parts = parse_reply(self.tokenizer, ids)
                reply = text_of(parts) if all(part["type"] == "text" for part in parts) else parts
                self.turns = [*turns, Turn(text, reply, self._ids(asked(text)) + as_written(self.tokenizer, ids))]

    def _ids(self, *messages: Message) -> list[int]:
        return render(self.tokenizer, messages).ids[1:]

    def save(self, path: Path | str) -> None:
        """Add the conversation to a JSONL file as a line that `read_conversations` reads, an array of messages.

        Raises UserError for a file that cannot be written, and for a conversation that it could not read.
        """
        path = Path(path).expanduser()
        if path.suffix != ".jsonl":
            raise UserError(
                f"{path} has the ending {path.suffix!r}; expected .jsonl, since conversations are added as lines; try"
                f" {path.with_suffix('.jsonl')}"
            )
        check_messages(self.messages, "the conversation")
        line = json.dumps(self.messages, ensure_ascii=False) + "\n"
        try:
            with open(path, "a+b") as file:
                size = file.seek(0, 2)
                file.seek(max(0, size - 1))
                file.write(b"\n" * (file.read() not in (b"", b"\n")) + line.encode())
        except OSError as error:
            raise UserError(
                f"{path} cannot be written ({error.strerror}); expected a place for a file; try another"
            ) from None

    def load(self, path: Path | str) -> int:
        """Go on with the last conversation of a file that `read_conversations` reads; returns how many it holds.

        A last question that has no answer there is left out.
        """
        found = read_conversations(path)
        messages = list(found[-1])
        system = messages.pop(0)["content"] if messages[0]["role"] == "system" else ""
        self.begin(system)
        for user, assistant in zip(messages[::2], messages[1::2]):
            self.turns.append(Turn(user["content"], assistant["content"], self._ids(user, assistant)))
        return len(found)


def asked(text: str) -> Message:
    return {"role": "user", "content": text}


def answered(reply: str | list[Part]) -> Message:
    return {"role": "assistant", "content": reply}


def as_written(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """An assistant's turn from the ids of its reply: these very ids, so that what was read of them need not be read
    again.

    Text has many encodings, and a model does not always write the one that `encode` gives. A reply whose special tokens
    are not those of the template (it was cut inside a call, or the model knows no better) is encoded anew."""
    end, specials = tokenizer.special("<|assistant_end|>"), set(tokenizer.specials.values())
    written = [tokenizer.special("<|assistant_start|>"), *ids, *([end] if ids[-1] != end else [])]
    anew = render(tokenizer, [answered(parse_reply(tokenizer, ids))]).ids[1:]
    same = [i for i in written if i in specials] == [i for i in anew if i in specials]
    return written if same else anew
