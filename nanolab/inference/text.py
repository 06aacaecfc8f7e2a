"""TextStream: token ids -> text as it grows: whole characters only, and nothing that a stop string may turn out to
swallow.
"""

import codecs
from collections.abc import Sequence

from nanolab.data.tokenizer import Tokenizer


class TextStream:
    """A character's bytes may be spread over tokens: they are held back until it is whole. Special tokens print as
    nothing.

    The pieces that `push` and `flush` return, joined, are the decoded text of all ids, up to the first place where one
    of the strings in `stop` is complete, without that string; bytes that are not UTF-8 become U+FFFD. An end of the
    text that may still become a stop string is held back too. `stopped` says that a stop string has come; all later
    text is nothing."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self.tokenizer, self.stop = tokenizer, [s for s in stop if s]
        self.specials = set(tokenizer.specials.values())
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.held, self.stopped = "", False

    def push(self, token: int) -> str:
        """The text that is certain with this token; often empty inside a multi-byte character."""
        return (
            "" if token in self.specials else self._released(self.decoder.decode(self.tokenizer.decode_bytes([token])))
        )

    def flush(self) -> str:
        """What was held back, at the end of the ids; U+FFFD if they ended inside a character."""
        text = self._released(self.decoder.decode(b"", final=True)) + self.held
        self.held = ""
        return text

    def _released(self, new: str) -> str:
        if self.stopped:
            return ""
        text = self.held + new
        ends = [(at + len(stop), at) for stop in self.stop if (at := text.find(stop)) >= 0]
        if ends:
            self.held, self.stopped = "", True
            return text[: min(ends)[1]]
        keep = next(
            (n for n in range(min(len(text), self._longest), 0, -1) if any(s.startswith(text[-n:]) for s in self.stop)),
            0,
        )
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    @property
    def _longest(self) -> int:
        return max(map(len, self.stop), default=1) - 1
