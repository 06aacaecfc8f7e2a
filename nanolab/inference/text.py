"""TextStream: token ids -> text as it grows, whole characters only."""

import codecs

from nanolab.data.tokenizer import Tokenizer


class TextStream:
    """A character's bytes may be spread over tokens: they are held back until it is whole. Special tokens print as nothing.

    The pieces that `push` and `flush` return, joined, are the decoded text of all ids; bytes that are not UTF-8 become
    U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.specials = set(tokenizer.specials.values())
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that this token completes; often empty inside a multi-byte character."""
        return "" if token in self.specials else self.decoder.decode(self.tokenizer.decode_bytes([token]))

    def flush(self) -> str:
        """U+FFFD if the text ended inside a character, else nothing."""
        return self.decoder.decode(b"", final=True)
