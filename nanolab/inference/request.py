"""Request, TokenOutput, Failed and Row: the engine's input, its output per step, and a request's state in between."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from nanolab.cli import UserError
from nanolab.data.tokenizer import Tokenizer
from nanolab.data.turn import Event, TurnParser
from nanolab.inference.sampling import Choice, SamplingState, check_settings, row_generators
from nanolab.inference.tools import ToolUse


@dataclass(frozen=True)
class Request:
    """One prompt and how to go on from it; without a prompt, how to go on from any. A row's tokens are those it would
    get alone, whatever else runs beside it.
    """

    prompt: tuple[int, ...] = ()
    max_tokens: int = 256
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    # above 1 lowers what prompt and reply have held, but for special tokens: turns may end again
    repetition_penalty: float = 1.0
    seed: int = 42
    # None: the tokens that begin a document (bos) and end a turn (<|assistant_end|>)
    stop_ids: tuple[int, ...] | None = None
    stop: tuple[str, ...] = ()  # the row ends in the step in which its text, calls aside, completes one of these
    logprobs: int = -1  # likeliest tokens to report beside the one that was taken
    # as many beside each token of the prompt, with the row's first token; -1: the prompt is not scored
    prompt_logprobs: int = -1
    tools: Callable[[str], str] | None = None  # given a call's text, returns the result, which is forced into the row
    # what the reply's tokens are parsed as, so that each comes with its events: "turn" | "text", whose marks mean
    # nothing | "" for a caller that reads ids alone
    parse: str = ""
    begun: bytes = b""  # of a character that the prompt begins and the reply completes

    def check(self, limit: int, row: int = 0) -> None:
        """Raise UserError for an empty prompt, one that leaves no room in `limit` tokens, and settings without
        meaning.
        """
        check_settings(self.temperature, self.top_k, self.top_p, self.repetition_penalty)
        if self.max_tokens < 1:
            raise UserError(f"max-tokens is {self.max_tokens}; expected at least 1; try --max-tokens 256")
        if not 0 < len(self.prompt) < limit:
            raise UserError(
                f"prompt {row} has {len(self.prompt)} tokens; this model reads 1 to {limit - 1}; shorten it, or begin"
                " with <|bos|>"
            )


class TokenOutput(NamedTuple):
    """One new token of one row. finish: None, "stop" (this token is a stop id or completes a stop string), or "length"
    (no room for another). forced: the token is a tool's, not the model's choice. events: see data/turn.py."""

    row: int
    token: int
    # the model's own, in nats, at temperature 1 over the whole vocabulary; 0 where forced, for it was certain
    logprob: float
    finish: str | None
    forced: bool = False
    top: tuple[tuple[int, float], ...] = ()  # (token, logprob) of the likeliest, as many as the request asked for
    cached: int = 0  # tokens of the row's prompt that were not computed, since a snapshot held them
    scores: Sequence[Choice] = ()  # of the prompt's tokens where they were asked for, 0 for the first, which is given
    events: Sequence[Event] = ()  # what the token made certain, where the request says what to parse it as
    offset: int = -1  # where it begins in the reply's text, in characters; -1: it is no part of it


class Failed(NamedTuple):
    """A row that gets no further token: the engine, not the request, has failed."""

    row: int
    code: str  # out_of_memory | non_finite_logits
    text: str


class Row:
    """A request between its first token and its last. limit: tokens of prompt and reply together."""

    def __init__(
        self,
        number: int,
        request: Request,
        tokenizer: Tokenizer,
        vocab_size: int,
        limit: int,
        device: torch.device,
        generator: torch.Generator | None = None,
    ):
        self.number, self.request, self.tokenizer = number, request, tokenizer
        self.tokens = list(request.prompt)  # prompt and reply
        self.end = min(len(request.prompt) + request.max_tokens, limit)
        self.cached = 0
        self.scores: Sequence[Choice] = ()
        self.waiting: deque[int] = deque()  # tokens that a tool has put into the row
        self.call: str | None = None  # the text of the call that the model's last token ended
        self.use = ToolUse(tokenizer, request.tools) if request.tools else None
        kind = request.parse or ("turn" if request.tools else "text" if request.stop else "")
        self.parser = TurnParser(tokenizer, request.stop, kind == "turn", request.begun) if kind else None
        self.stop_ids = frozenset(
            (tokenizer.bos, tokenizer.special("<|assistant_end|>")) if request.stop_ids is None else request.stop_ids
        )
        r = request
        generator = generator or row_generators(r.seed, 1)[0]
        self.draws = SamplingState(r.temperature, r.top_k, r.top_p, generator, r.repetition_penalty, r.logprobs)
        if r.repetition_penalty != 1:
            self.draws.seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self.special = frozenset(tokenizer.specials.values()) if tokenizer else frozenset[int]()
            self.draws.seen[[token for token in r.prompt if token not in self.special]] = True

    def force(self) -> TokenOutput:
        """Take the next token that a tool has put in; it stops nothing."""
        return self.take(Choice(self.waiting.popleft(), 0.0), True)

    def take(self, chosen: Choice, forced: bool = False) -> TokenOutput:
        """Take the next token."""
        token, events, offset = chosen.token, (), -1
        self.tokens.append(token)
        if self.draws.seen is not None and token not in self.special:
            self.draws.seen[token] = True
        finish = "length" if len(self.tokens) >= self.end else None
        if token in self.stop_ids and not forced:
            finish = "stop"
        if self.parser:
            events, offset = self.parser.push(token), self.parser.offset
            if self.parser.stopped:
                finish = "stop"
            elif self.use and not forced and self.use.ends(token, events):
                self.call = events[0].part
            if finish:
                events = (*events, *self.parser.end(finish == "stop"))
        return TokenOutput(
            self.number, token, chosen.logprob, finish, forced, chosen.top, self.cached, self.scores, events, offset
        )

    def called(self) -> str | None:
        """The text of the call that the model's last token ended, if it did; once."""
        call, self.call = self.call, None
        return call
