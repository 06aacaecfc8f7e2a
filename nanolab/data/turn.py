"""The grammar of an assistant's turn, parsed token by token: text, calls of a tool and their outputs.

Everything that reads generated ids is a caller: parse_reply, the engine's rows with their tools and stop strings, the
server's replies, the terminal. Imports no torch.
"""

import codecs
from collections.abc import Sequence
from typing import NamedTuple

from nanolab.data.tokenizer import Tokenizer

Part = dict[str, str]  # {"type": str, "text": str}


class Mark(NamedTuple):
    start: str  # special token before the part's text; empty: none
    end: str
    trained: int


PARTS = {
    "text": Mark("", "", 1),
    "python": Mark("<|python_start|>", "<|python_end|>", 1),
    "python_output": Mark("<|output_start|>", "<|output_end|>", 0),
}


class Event(NamedTuple):
    """What a token made certain of one part. Joined, the texts of a part's events are its `part`."""

    kind: str  # of PARTS
    text: str  # what is new: whole characters, and nothing that may become a stop string; "" where a part begins
    part: str | None = None  # all of the part's text, in its last event
    cut: bool = False  # of the last event: the turn ended for want of room inside the part


class TurnParser:
    """Tokens of one turn -> events, from the first token after assistant_start.

    A start mark ends the part before it, whatever that is; an end mark ends its own part, and text follows. Other
    special tokens, and end marks of no open part, are no text. Bytes of a character that is spread over tokens are held
    back until it is whole; bytes that are not UTF-8 become U+FFFD.

    stop: strings that end the turn, looked for in its text, not in calls and outputs. The text ends before the first
    that is complete; an end of the text that may still become one is held back. marks: False for text that is only
    continued, to which the marks are special tokens like any other. begun: bytes of a character to go on with.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), marks: bool = True, begun: bytes = b""):
        self.decode, self.specials = tokenizer.decode_bytes, set(tokenizer.specials.values())
        special, marked = tokenizer.special, [(kind, mark) for kind, mark in PARTS.items() if mark.start and marks]
        self.opens = {special(mark.start): kind for kind, mark in marked}
        self.closes = {special(mark.end): kind for kind, mark in marked}
        self.stop, self.marks = [s for s in stop if s], marks
        self.longest = max(map(len, self.stop), default=1) - 1  # characters that may be the beginning of a stop string
        self.stopped = False  # a stop string is complete: nothing follows
        self.length = 0  # characters of text parts so far
        self.offset = -1  # where in the text parts the last token begins, in characters; -1: it is no part of them
        self._begin("text")
        if begun:
            self.decoder.decode(begun)

    def push(self, token: int) -> Sequence[Event]:
        """Take the next token; what it makes certain, often nothing."""
        special = token in self.specials
        is_text = self.kind == "text" and not (special and self.marks)
        self.offset = self.length + len(self.held) if is_text else -1
        if self.stopped:
            return ()
        if not special:
            text = self._certain(self.decoder.decode(self.decode([token])))
            return (self._event(text),) if text else ()
        if token not in self.opens and self.closes.get(token) != self.kind:
            return ()
        ended = self.end()
        self._begin(self.opens.get(token, "text"))
        return ended if self.kind == "text" else (*ended, Event(self.kind, ""))

    def end(self, whole: bool = True) -> Sequence[Event]:
        """The last event of the part. whole: the turn is complete; one that was cut may end inside a character, which
        is cut with it.
        """
        rest = (self._certain(self.decoder.decode(b"", final=True)) if whole else "") + self.held
        self.held = ""
        self._event(rest)
        return (Event(self.kind, rest, self.text, not whole),)

    @property
    def text(self) -> str:
        """The part that is open, as far as it is certain."""
        return "".join(self.said)

    @property
    def unfinished(self) -> bytes:
        """Of a character that is not whole yet."""
        return self.decoder.getstate()[0]

    def _begin(self, kind: str) -> None:
        self.kind, self.held, self.said = kind, "", list[str]()
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def _event(self, text: str) -> Event:
        self.said.append(text)
        self.length += len(text) if self.kind == "text" else 0
        return Event(self.kind, text)

    def _certain(self, new: str) -> str:
        """`new` after what was held back, as far as no stop string can swallow it."""
        if self.stopped:
            return ""
        if not self.stop or self.kind != "text":
            return new
        text = self.held + new
        ends = [(at + len(stop), at) for stop in self.stop if (at := text.find(stop)) >= 0]
        if ends:
            self.held, self.stopped = "", True
            return text[: min(ends)[1]]
        most = min(len(text), self.longest)
        keep = next((n for n in range(most, 0, -1) if any(s.startswith(text[-n:]) for s in self.stop)), 0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]
