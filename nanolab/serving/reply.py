"""The engine's tokens -> what a client reads: text, steps of a tool and calls as they become certain, in OpenAI's
bodies and chunks. Imports no torch.

What a Reply hands out is never taken back: whole characters, no part of a stop string.

Logprobs of /v1/completions have an entry for every token, special ones and the one that ends the reply included, but
for those that a stop string swallowed; tokens have the names of `Tokenizer.name`, which are unique. With echo the
prompt's tokens come first: the bos that begins a text here is not among them, lists of ids are shown as they came, and
the first token shown has null for its logprob and its alternatives, as OpenAI's has."""

import json
import secrets
import time
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from nanolab.data.chat import parts_of, text_of
from nanolab.data.tokenizer import Tokenizer
from nanolab.data.turn import Event, Part, TurnParser
from nanolab.inference.calculator import calculator
from nanolab.serving.schemas import ChatRequest, CompletionRequest

if TYPE_CHECKING:
    from nanolab.inference.request import TokenOutput

LEAST = -9999.0  # stands for a log probability of minus infinity, which JSON does not have

Asked = ChatRequest | CompletionRequest
Tokens = Sequence["TokenOutput"]
Delta = tuple[dict[str, Any], Tokens]  # a chat chunk's delta, and the tokens of its text


class Echo:
    """A prompt as it is shown before its reply. offsets: where each token begins in its text, in characters."""

    def __init__(self, tokenizer: Tokenizer, ids: Sequence[int]):
        parser = TurnParser(tokenizer, marks=False)
        self.offsets: list[int] = []
        for token in ids:
            parser.push(token)
            self.offsets.append(parser.offset)
        self.text, self.unfinished = parser.text, parser.unfinished  # of a character that the reply may complete


class Reply:
    """One row's tokens as a client sees them. finish: None while it goes on, then stop, length or tool_calls. echo:
    comes before the first token. specials: tokens that no stop string can swallow.
    """

    def __init__(self, asked: Asked, specials: frozenset[int], echo: Echo | None = None):
        self.asked, self.specials, self.echo = asked, specials, echo
        self.finish: str | None = None
        self.parts: list[Part] = []
        self.tokens: list[TokenOutput] = []  # of the text, as far as it was handed out
        self.pending: list[TokenOutput] = []
        self.calls: list[dict[str, Any]] = []
        self.count = self.cached = self.shown = 0  # tokens; of the prompt, not computed; characters of text handed out

    def push(self, new: "TokenOutput") -> list[Delta]:
        """Take the row's next token; what it makes certain."""
        if self.finish:
            return []
        self.cached = new.cached
        out = [self._echoed(self.echo, new)] if self.echo and not self.count else []
        if self.asked.budget == 0:
            self.finish = "length"
            return out
        self.count += 1
        if self.asked.alternatives >= 0 and new.offset >= 0:
            self.pending.append(new._replace(offset=new.offset + len(self.echo.text)) if self.echo else new)
        for event in new.events:
            out += self._taken(event)
        if self.calls:  # whatever ended it: the reply is over, with one call
            self.finish = "tool_calls"
        elif new.finish:
            self.finish = new.finish
            if self.pending and not self.asked.chat and (new.finish == "length" or new.token in self.specials):
                out.append(self._text("", self.pending))
        return out

    @property
    def text(self) -> str:
        return text_of(self.parts)

    def _echoed(self, echo: Echo, new: "TokenOutput") -> Delta:
        tokens = []
        if self.asked.alternatives >= 0:
            first, *others = new.scores[-len(echo.offsets) :]  # without the bos that is not shown
            scores = [first._replace(logprob=None, top=None), *others]
            tokens = [
                new._replace(token=token, logprob=logprob, top=top, offset=offset)
                for (token, logprob, top), offset in zip(scores, echo.offsets)
            ]
        self.shown = len(echo.text)
        return self._text(echo.text, tokens)

    def _taken(self, event: Event) -> list[Delta]:
        if event.kind == "text":
            if not event.text:
                return []
            self.shown += len(event.text)
            n = sum(token.offset < self.shown for token in self.pending)
            out, self.pending = self.pending[:n], self.pending[n:]
            return [self._text(event.text, out)]
        if event.part is None or self.calls:
            return []
        if event.kind == "python" and self.asked.tools:
            return [] if event.cut else [self._call(event.part)]
        part = {"type": event.kind, "text": event.part}
        self.parts.append(part)
        return [({"part": part}, ())]

    def _text(self, text: str, tokens: Tokens) -> Delta:
        self.tokens += tokens
        self.parts = parts_of([*self.parts, {"type": "text", "text": text}])
        return {"content": text}, tokens

    def _call(self, code: str) -> Delta:
        """The model's call as one of a function that the client offers: with both, whatever is no arithmetic is
        Python.
        """
        tools = self.asked.tools
        sums = "calculator" in tools and ("python" not in tools or not calculator(code).startswith("error: "))
        name = "calculator" if sums else "python"
        arguments = json.dumps({tools[name]: code}, ensure_ascii=False)
        self.parts.append({"type": "python", "text": code})
        function = {"name": name, "arguments": arguments}
        self.calls.append({"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function})
        return {"tool_calls": [{"index": 0, **self.calls[-1]}]}, ()


class ResponseBuilder:
    """The bodies of one HTTP response: `whole` for a plain one, `first`, `chunk`, `last` and `usage` for a stream."""

    def __init__(self, asked: Asked, model: str, prompts: Sequence[Sequence[int]], tokenizer: Tokenizer):
        self.asked, self.model, self.prompt_tokens = asked, model, sum(map(len, prompts))
        self.tokenizer, self.name = tokenizer, cache(tokenizer.name)
        # a text's bos is ours
        self.echoes: list[Echo | None] = [None] * len(prompts)
        if isinstance(asked, CompletionRequest) and asked.echo:
            self.echoes = [Echo(tokenizer, ids[isinstance(p, str) :]) for p, ids in zip(asked.prompt, prompts)]
        specials = frozenset(tokenizer.specials.values())
        self.replies = [
            Reply(asked, specials, echo) for echo in self.echoes for _ in range(asked.n)
        ]  # n for each prompt
        self.id, self.created = f"{'chatcmpl' if asked.chat else 'cmpl'}-{secrets.token_hex(12)}", int(time.time())

    @property
    def done(self) -> bool:
        return all(reply.finish for reply in self.replies)

    def whole(self) -> dict[str, Any]:
        choices = []
        for i, reply in enumerate(self.replies):
            said = {"message": self._message(reply)} if self.asked.chat else {"text": reply.text}
            choices.append(
                {"index": i, **said, "logprobs": self._logprobs(reply.tokens), "finish_reason": reply.finish}
            )
        return self._body("chat.completion", choices) | {"usage": self.tokens()}

    def first(self) -> list[dict[str, Any]]:
        """Chunks before any text: who speaks."""
        said = {"role": "assistant", "content": ""}
        return [self.chunk(i, said) for i in range(len(self.replies))] if self.asked.chat else []

    def chunk(self, i: int, delta: dict[str, Any], tokens: Tokens = (), finish: str | None = None) -> dict[str, Any]:
        said = {"delta": delta} if self.asked.chat else {"text": delta.get("content", "")}
        choice = {"index": i, **said, "logprobs": self._logprobs(tokens) if tokens else None, "finish_reason": finish}
        return self._body("chat.completion.chunk", [choice]) | ({"usage": None} if self.asked.include_usage else {})

    def last(self, i: int) -> dict[str, Any]:
        return self.chunk(i, {}, finish=self.replies[i].finish)

    def usage(self) -> list[dict[str, Any]]:
        """The chunk after all others, where it was asked for."""
        return [self._body("chat.completion.chunk", []) | {"usage": self.tokens()}] if self.asked.include_usage else []

    def tokens(self) -> dict[str, Any]:
        made = sum(reply.count for reply in self.replies)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": made,
            "total_tokens": self.prompt_tokens + made,
            "prompt_tokens_details": {"cached_tokens": sum(reply.cached for reply in self.replies[:: self.asked.n])},
        }

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = kind if self.asked.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def _message(self, reply: Reply) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": reply.text}
        if reply.calls:
            message |= {"content": reply.text or None, "tool_calls": reply.calls}
        elif any(part["type"] != "text" for part in reply.parts):
            message["parts"] = reply.parts
        return message

    def _logprobs(self, tokens: Tokens) -> dict[str, Any] | None:
        if self.asked.alternatives < 0:
            return None
        if self.asked.chat:
            entries = [
                self._entry(t.token, t.logprob) | {"top_logprobs": [self._entry(*top) for top in t.top]} for t in tokens
            ]
            return {"content": entries, "refusal": None}
        name = self.name
        return {
            "tokens": [name(t.token) for t in tokens],
            "token_logprobs": [None if t.logprob is None else max(LEAST, t.logprob) for t in tokens],
            "top_logprobs": [
                None if t.top is None else {name(token): max(LEAST, logprob) for token, logprob in t.top}
                for t in tokens
            ],
            "text_offset": [t.offset for t in tokens],
        }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        data = self.tokenizer.decode_bytes([token])
        return {"token": data.decode("utf-8", "replace"), "logprob": max(LEAST, logprob), "bytes": list(data)}
