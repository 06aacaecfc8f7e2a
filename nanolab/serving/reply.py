"""Sampled tokens -> what a client reads: text, steps of a tool and calls as they become certain, in OpenAI's bodies and
chunks. Imports no torch.

A row's tokens go into one Reply; what it hands out is never taken back: whole characters, no part of a stop string.

Logprobs of /v1/completions have an entry for every token, special ones and the one that ends the reply included, but
for those that a stop string swallowed; tokens have the names of `Tokenizer.name`, which are unique. With echo the
prompt's tokens come first: the bos that begins a text here is not among them, lists of ids are shown as they came, and
the first token shown has null for its logprob and its alternatives, as OpenAI's has."""

import json
import secrets
import time
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from nanolab.data.chat import PARTS, Part, parts_of, text_of
from nanolab.data.tokenizer import Tokenizer
from nanolab.inference.text import TextStream
from nanolab.inference.tools import calculator
from nanolab.serving.openai import Ask

if TYPE_CHECKING:
    from nanolab.inference.request import TokenOutput
    from nanolab.inference.sampling import Choice

LEAST = -9999.0  # stands for a log probability of minus infinity, which JSON does not have


class Token(NamedTuple):
    """A token of the text with its alternatives, and where in the text it begins, in characters."""

    new: "TokenOutput | Choice"
    offset: int


class Piece(NamedTuple):
    """What became certain at once: text, or a whole call or output."""

    kind: str  # text | python | python_output | tool_call
    text: str
    tokens: tuple[Token, ...] = ()  # of text


class Echo:
    """A prompt as it is shown before its reply. offsets: where each token begins in its text, in characters."""

    def __init__(self, tokenizer: Tokenizer, ids: Sequence[int]):
        stream, texts, length = TextStream(tokenizer), [], 0
        self.offsets: list[int] = []
        for token in ids:
            self.offsets.append(length)
            texts.append(stream.push(token))
            length += len(texts[-1])
        # of a character that the reply may complete
        self.text, self.unfinished = ("".join(texts), stream.decoder.getstate())


class Reply:
    """One row's tokens as a client sees them. finish: None while it goes on, then stop, length or tool_calls. echo:
    comes before the first token.
    """

    def __init__(self, tokenizer: Tokenizer, ask: Ask, echo: Echo | None = None):
        self.tokenizer, self.ask, self.echo = tokenizer, ask, echo
        marks = {kind: mark for kind, mark in PARTS.items() if mark.start and ask.chat}
        self.opens = {tokenizer.special(mark.start): kind for kind, mark in marks.items()}
        self.closes = {tokenizer.special(mark.end): kind for kind, mark in marks.items()}
        self.finish: str | None = None
        self.parts: list[Part] = []
        self.tokens: list[Token] = []  # of the text, as far as it was handed out
        self.calls: list[dict[str, Any]] = []
        self.count = self.cached = self.shown = 0  # tokens; of the prompt, not computed; characters of text handed out
        self.pending: list[Token] = []
        self._begin("text")
        if echo:
            self.stream.decoder.setstate(echo.unfinished)

    def push(self, new: "TokenOutput") -> list[Piece]:
        """Take the row's next token; what it makes certain."""
        if self.finish:
            return []
        self.cached = new.cached
        pieces = self._echoed(new) if self.echo and not self.count else []
        if self.ask.max_tokens == 0:
            self.finish = "length"
            return pieces
        self.count += 1
        if new.token in self.opens:
            pieces += self._end(whole=True)
            self._begin(self.opens[new.token])
        elif new.token in self.closes:
            if self.closes[new.token] == self.kind:
                pieces += self._end(whole=True)
                self._begin("text")
        else:
            token = Token(new, self.shown + len(self.stream.held))
            pieces += self._text(self.stream.push(new.token), token)
        if not self.calls and (end := "stop" if self.stream.stopped else new.finish):
            pieces += self._end(whole=end == "stop")
            self.finish = end
            if self.pending and not self.ask.chat and not self.stream.stopped:
                pieces.append(self._hand_out("", self.pending))
        if self.calls:  # whatever ended it: the reply is over, with one call
            self.finish = "tool_calls"
        return pieces

    @property
    def text(self) -> str:
        return text_of(self.parts)

    def _echoed(self, new: "TokenOutput") -> list[Piece]:
        self.shown = len(self.echo.text)
        tokens = []
        if self.ask.logprobs >= 0:
            first, *others = new.scores[-len(self.echo.offsets) :]  # without the bos that is not shown
            tokens = [
                Token(score, offset)
                for score, offset in zip([first._replace(logprob=None, top=None), *others], self.echo.offsets)
            ]
        return [self._hand_out(self.echo.text, tokens)]

    def _begin(self, kind: str) -> None:
        self.kind, self.code = kind, ""
        self.stream = TextStream(self.tokenizer, self.ask.stop if kind == "text" else ())

    def _end(self, whole: bool) -> list[Piece]:
        """The rest of the part. A reply that was cut (not whole) may end inside a character, which is cut with it."""
        rest = self.stream.flush() if whole else self.stream.held
        if self.kind == "text":
            return self._text(rest)
        if self.kind == "python" and self.ask.tools:
            return self._call(self.code + rest) if whole else []
        self.parts.append({"type": self.kind, "text": self.code + rest})
        return [Piece(self.kind, self.code + rest)]

    def _text(self, text: str, token: Token | None = None) -> list[Piece]:
        if self.kind != "text":
            self.code += text
            return []
        if token and self.ask.logprobs >= 0 and not (self.ask.chat and token.new.token in self.stream.specials):
            self.pending.append(token)
        self.shown += len(text)
        if not text:
            return []
        n = sum(token.offset < self.shown for token in self.pending)
        out, self.pending = self.pending[:n], self.pending[n:]
        return [self._hand_out(text, out)]

    def _hand_out(self, text: str, tokens: list[Token]) -> Piece:
        self.tokens += tokens
        self.parts = parts_of([*self.parts, {"type": "text", "text": text}])
        return Piece("text", text, tuple(tokens))

    def _call(self, code: str) -> list[Piece]:
        """The model's call as one of a function that the client offers: with both, whatever is no arithmetic is
        Python.
        """
        name = (
            "calculator"
            if "calculator" in self.ask.tools
            and ("python" not in self.ask.tools or not calculator(code).startswith("error: "))
            else "python"
        )
        arguments = json.dumps({self.ask.tools[name]: code}, ensure_ascii=False)
        self.parts.append({"type": "python", "text": code})
        self.calls.append(
            {
                "id": f"call_{secrets.token_hex(12)}",
                "type": "function",
                "function": {"name": name, "arguments": arguments},
            }
        )
        return [Piece("tool_call", code)]


class Answer:
    """The bodies of one HTTP request: `whole` for a plain answer, `first`, `chunk`, `last` and `usage` for a stream."""

    def __init__(self, ask: Ask, model: str, prompts: Sequence[Sequence[int]], tokenizer: Tokenizer):
        self.ask, self.model, self.prompt_tokens = ask, model, sum(map(len, prompts))
        self.tokenizer, self.name = tokenizer, cache(tokenizer.name)
        # a text's bos is ours
        echoes = [
            Echo(tokenizer, ids[isinstance(given, str) :]) if ask.echo else None
            for given, ids in zip(ask.prompt, prompts)
        ]
        self.replies = [Reply(tokenizer, ask, echo) for echo in echoes for _ in range(ask.n)]  # n for each prompt
        self.id, self.created = f"{'chatcmpl' if ask.chat else 'cmpl'}-{secrets.token_hex(12)}", int(time.time())

    @property
    def done(self) -> bool:
        return all(reply.finish for reply in self.replies)

    def whole(self) -> dict[str, Any]:
        choices = []
        for i, reply in enumerate(self.replies):
            said = {"message": self._message(reply)} if self.ask.chat else {"text": reply.text}
            choices.append(
                {"index": i, **said, "logprobs": self._logprobs(reply.tokens), "finish_reason": reply.finish}
            )
        return self._body("chat.completion", choices) | {"usage": self.tokens()}

    def first(self) -> list[dict[str, Any]]:
        """Chunks before any text: who speaks."""
        return (
            [self._chunk(i, {"role": "assistant", "content": ""}) for i in range(len(self.replies))]
            if self.ask.chat
            else []
        )

    def chunk(self, i: int, piece: Piece) -> dict[str, Any]:
        delta: dict[str, Any] = {"part": {"type": piece.kind, "text": piece.text}}
        if piece.kind == "text":
            delta = {"content": piece.text}
        elif piece.kind == "tool_call":
            delta = {"tool_calls": [{"index": 0, **self.replies[i].calls[-1]}]}
        return self._chunk(i, delta, piece.tokens)

    def last(self, i: int) -> dict[str, Any]:
        return self._chunk(i, {}, finish=self.replies[i].finish)

    def usage(self) -> list[dict[str, Any]]:
        """The chunk after all others, where it was asked for."""
        return [self._body("chat.completion.chunk", []) | {"usage": self.tokens()}] if self.ask.include_usage else []

    def tokens(self) -> dict[str, Any]:
        made = sum(reply.count for reply in self.replies)
        cached = {"cached_tokens": sum(reply.cached for reply in self.replies[:: self.ask.n])}
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": made,
            "total_tokens": self.prompt_tokens + made,
            "prompt_tokens_details": cached,
        }

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind if self.ask.chat else "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def _chunk(
        self, i: int, delta: dict[str, Any], tokens: tuple[Token, ...] = (), finish: str | None = None
    ) -> dict[str, Any]:
        said = {"delta": delta} if self.ask.chat else {"text": delta.get("content", "")}
        choice = {"index": i, **said, "logprobs": self._logprobs(tokens) if tokens else None, "finish_reason": finish}
        return self._body("chat.completion.chunk", [choice]) | ({"usage": None} if self.ask.include_usage else {})

    def _message(self, reply: Reply) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": reply.text}
        if reply.calls:
            message |= {"content": reply.text or None, "tool_calls": reply.calls}
        elif any(part["type"] != "text" for part in reply.parts):
            message["parts"] = reply.parts
        return message

    def _logprobs(self, tokens: list[Token] | tuple[Token, ...]) -> dict[str, Any] | None:
        if self.ask.logprobs < 0:
            return None
        if self.ask.chat:
            entries = [
                self._entry(t.new.token, t.new.logprob) | {"top_logprobs": [self._entry(*top) for top in t.new.top]}
                for t in tokens
            ]
            return {"content": entries, "refusal": None}
        name = self.name
        return {
            "tokens": [name(t.new.token) for t in tokens],
            "token_logprobs": [None if t.new.logprob is None else max(LEAST, t.new.logprob) for t in tokens],
            "top_logprobs": [
                None if t.new.top is None else {name(token): max(LEAST, logprob) for token, logprob in t.new.top}
                for t in tokens
            ],
            "text_offset": [t.offset for t in tokens],
        }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        data = self.tokenizer.decode_bytes([token])
        return {"token": data.decode("utf-8", "replace"), "logprob": max(LEAST, logprob), "bytes": list(data)}
