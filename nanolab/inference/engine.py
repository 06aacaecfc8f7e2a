"""Generation: prefill each prompt once, then decode all rows together; rows that have finished leave the batch.

Dims: B rows, V vocabulary. A row is one prompt and its continuation.
"""

from collections import deque
from typing import Callable, Collection, Iterator, NamedTuple, Sequence

import torch
from torch import Tensor

from nanolab.config import UserError
from nanolab.data.tokenizer import Tokenizer
from nanolab.inference.cache import KVCache
from nanolab.inference.sampling import check_settings, row_generators, sample
from nanolab.inference.tools import ToolUse
from nanolab.model.gpt import GPT
from nanolab.runtime import Runtime

HEADROOM = 256  # slots for new tokens that a fresh cache has at most; it doubles when a reply grows longer


class Sampled(NamedTuple):
    """One new token of one row. finish: None, "stop" (this token is a stop id), or "length" (no room for another).

    forced: the token is a tool's, not the model's choice.
    """

    row: int
    token: int
    logprob: float  # the model's own, in nats, at temperature 1 over the whole vocabulary; 0 where forced, for it was certain
    finish: str | None
    forced: bool = False


class Engine:
    """Generates with a model: `generate` streams tokens, `complete` returns them.

    prefill_tokens: tokens in one prefill forward at most; longer prompts are read in chunks, which bounds memory.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, runtime: Runtime, prefill_tokens: int = 2048):
        self.model, self.tokenizer, self.runtime = model, tokenizer, runtime
        self.prefill_tokens = prefill_tokens
        self.limit = model.config.sequence_len  # tokens of prompt and reply together

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int = 256,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | Sequence[int] = 42,
        stop_ids: Collection[int] | None = None,
        tools: Callable[[str], str] | None = None,
    ) -> Iterator[list[Sampled]]:
        """Continue every prompt; each step yields one `Sampled` per row that is still running.

        A row ends with its first stop id (which is yielded), after `max_tokens`, or when prompt and reply fill the
        model's sequence length. Its tokens are those it would get alone: `seed` is explained in `row_generators`.
        stop_ids: default the tokens that end a document or a turn, <|bos|> and <|assistant_end|>.
        tools: given a call's text, returns the result, which is forced into the row (see `tools.TOOLS`); None: a call is
        text like any other. Forced tokens count towards `max_tokens` and the sequence length; they never stop a row.
        Raises UserError, before anything is computed, for an empty or overlong prompt or meaningless settings.
        """
        check_settings(temperature, top_k, top_p)
        if max_tokens < 1:
            raise UserError(f"max-tokens is {max_tokens}; expected at least 1; try --max-tokens 256")
        for row, prompt in enumerate(prompts):
            if not 0 < len(prompt) < self.limit:
                raise UserError(f"prompt {row} has {len(prompt)} tokens; this model reads 1 to {self.limit - 1}; shorten it, or begin with <|bos|>")
        if stop_ids is None:
            stop_ids = (self.tokenizer.bos, self.tokenizer.special("<|assistant_end|>"))
        budgets = [min(max_tokens, self.limit - len(prompt)) for prompt in prompts]
        uses = [ToolUse(self.tokenizer, tools) if tools else None for _ in prompts]
        return self._steps(prompts, budgets, (temperature, top_k, top_p), row_generators(seed, len(prompts)), frozenset(stop_ids), uses)

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int = 256,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | Sequence[int] = 42,
        stop_ids: Collection[int] | None = None,
        tools: Callable[[str], str] | None = None,
    ) -> list[list[int]]:
        """`generate` to the end: each row's new tokens, forced ones too, without the stop id."""
        out: list[list[int]] = [[] for _ in prompts]
        steps = self.generate(
            prompts, max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, stop_ids=stop_ids, tools=tools
        )
        for step in steps:
            for new in step:
                if new.finish != "stop":
                    out[new.row].append(new.token)
        return out

    @torch.no_grad()
    def _steps(self, prompts, budgets, settings, generators, stop_ids, uses) -> Iterator[list[Sampled]]:
        if not prompts:
            return
        live = list(range(len(prompts)))
        waiting: list[deque[int]] = [deque() for _ in prompts]  # tokens that a tool has put into each row
        cache, logits = self.prefill(prompts, max(budgets))
        for n in range(1, max(budgets) + 1):
            free = [i for i, row in enumerate(live) if not waiting[row]]
            drawn = iter(self._draw(logits, free, settings, generators))
            step = []
            for row in live:
                forced = bool(waiting[row])
                token, logprob = (waiting[row].popleft(), 0.0) if forced else next(drawn)
                finish = "stop" if token in stop_ids and not forced else "length" if n >= budgets[row] else None
                step.append(Sampled(row, token, logprob, finish, forced))
            yield step
            for new in step:
                if uses[new.row] and not new.finish and not new.forced:
                    waiting[new.row].extend(uses[new.row].push(new.token))
            running = [i for i, new in enumerate(step) if new.finish is None]
            if not running:
                return
            if len(running) < len(live):
                cache.select(running)
                live, generators = [live[i] for i in running], [generators[i] for i in running]
            ids = torch.tensor([step[i].token for i in running], device=self.runtime.device)
            logits = self.model(ids[:, None], cache=cache, last_only=True)[:, -1]

    @staticmethod
    def _draw(logits: Tensor, rows: list[int], settings, generators) -> list[tuple[int, float]]:
        """(token, logprob) of these rows of logits; the others' random streams stay where they are."""
        if not rows:
            return []
        if len(rows) < len(logits):
            logits, generators = logits[rows], [generators[i] for i in rows]
        ids, logprobs = sample(logits, *settings, generators)
        return list(zip(ids.tolist(), logprobs.tolist()))

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Sequence[int]], new_tokens: int = 0) -> tuple[KVCache, Tensor]:
        """Read prompts of any lengths: a cache of one row per prompt, and the logits (B, V) after each one's last token.

        Equal prompts are read once. Prompts of one length are read together, so no row is ever padded.
        """
        longest = max(len(prompt) for prompt in prompts)
        cache = self._new_cache(len(prompts), longest + min(new_tokens, HEADROOM))
        rows_of: dict[tuple[int, ...], list[int]] = {}
        for row, prompt in enumerate(prompts):
            rows_of.setdefault(tuple(prompt), []).append(row)
        logits: list[Tensor | None] = [None] * len(prompts)
        for group in self._groups(rows_of):
            part = self._new_cache(len(group), len(group[0]))
            ids = torch.tensor(group, device=self.runtime.device)
            for chunk in ids.split(self.prefill_tokens, dim=1):
                last = self.model(chunk, cache=part, last_only=True)[:, -1]
            rows, sources = zip(*((row, i) for i, prompt in enumerate(group) for row in rows_of[prompt]))
            cache.put(list(rows), part, list(sources))
            for row, i in zip(rows, sources):
                logits[row] = last[i]
        return cache, torch.stack(logits)

    def _groups(self, prompts: Collection[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
        """Prompts of one length, as many as `prefill_tokens` holds."""
        by_length: dict[int, list[tuple[int, ...]]] = {}
        for prompt in prompts:
            by_length.setdefault(len(prompt), []).append(prompt)
        for length, same in by_length.items():
            size = max(1, self.prefill_tokens // length)
            yield from (same[i : i + size] for i in range(0, len(same), size))

    def _new_cache(self, rows: int, capacity: int) -> KVCache:
        return KVCache(self.model.config, rows, capacity=capacity, dtype=self.model.compute_dtype, device=self.runtime.device)
