"""Reading prompts: in chunks, equal prompts once, prompts of one length together, from a snapshot where there is one.

A prompt that is to be scored is read whole, without a snapshot: the head sees each of its places, a few at a time.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from nanolab.inference.cache import KVCache
from nanolab.inference.prefix import PrefixCache
from nanolab.inference.request import Row
from nanolab.inference.sampling import Choice
from nanolab.model.gpt import GPT

LOGITS = 1 << 20  # numbers at once: a processor's cache holds their block, and a GPU is busy with it


def in_blocks(model: GPT, hidden: Tensor) -> Iterator[Tensor]:
    """Logits (n, V) of vectors (K, C), n places at a time."""
    yield from map(model.logits, hidden.split(max(1, LOGITS // model.config.vocab_size)))


class Part:
    """Prompts of one length that are read together, and the rows that begin with each. top: likeliest tokens to report
    at each place; -1: not scored.
    """

    def __init__(
        self,
        prompts: list[tuple[int, ...]],
        rows: list[list[Row]],
        cache: KVCache,
        logits: Tensor | None = None,
        top: int = -1,
    ):
        self.prompts, self.rows, self.cache, self.logits, self.top = prompts, rows, cache, logits, top
        self.scores = [[Choice(prompt[0], 0.0)] if top >= 0 else [] for prompt in prompts]
        self.start = self.read = cache.lengths[0]  # tokens of each prompt that a snapshot held, and that are read
        self.length = len(prompts[0])


class Prefill:
    """Rows whose prompts are being read. new_cache: (rows, capacity) -> KVCache."""

    def __init__(
        self, model: GPT, new_cache: Callable[[int, int], KVCache], device: torch.device, prefixes: PrefixCache | None
    ):
        self.model, self.new_cache, self.device, self.prefixes = model, new_cache, device, prefixes
        self.parts: list[Part] = []  # the oldest first

    def __len__(self) -> int:
        return sum(len(rows) for part in self.parts for rows in part.rows)

    def take(self, rows: list[Row], tokens: int) -> None:
        """Begin with these rows' prompts; `tokens` at most are read in one forward of several prompts."""
        reading = {(prompt, part.top): part.rows[i] for part in self.parts for i, prompt in enumerate(part.prompts)}
        fresh: dict[tuple[int, int], list[tuple[int, ...]]] = {}  # by length and top
        for row in rows:
            again = len(row.tokens) > len(row.request.prompt)  # what was answered already is read too
            prompt, top = tuple(row.tokens), -1 if again else row.request.prompt_logprobs
            if (prompt, top) in reading:
                reading[prompt, top].append(row)
                continue
            reading[prompt, top] = [row]
            if found := self.prefixes.find(prompt) if self.prefixes and top < 0 else None:
                cache = self.new_cache(1, len(prompt))
                cache.put([0], found[0], [0])
                self.parts.append(
                    Part([prompt], [reading[prompt, top]], cache, None if found[1] is None else found[1][None])
                )
            else:
                fresh.setdefault((len(prompt), top), []).append(prompt)
        for (length, top), prompts in fresh.items():
            size = max(1, tokens // length)
            for some in (prompts[i : i + size] for i in range(0, len(prompts), size)):
                self.parts.append(
                    Part(some, [reading[prompt, top] for prompt in some], self.new_cache(len(some), length), top=top)
                )

    def step(self, tokens: int) -> Iterator[tuple[Row, KVCache, int, Tensor]]:
        """Read up to `tokens` tokens; yields each row whose prompt is finished, its cache and place in it, and the
        logits (V,) after the prompt. Half of the tokens go to the oldest prompt, so that it finishes; the rest to the
        shortest, so that a long prompt does not delay the others."""
        if not self.parts:
            return
        oldest, *others = self.parts
        others.sort(key=lambda part: part.length - part.read)
        shares = [(oldest, tokens // 2), *((part, tokens) for part in others)] if others else []
        for part, most in (*shares, (oldest, tokens)):
            T = min(part.length - part.read, min(most, tokens) // len(part.prompts))
            if T:
                ids = torch.tensor([prompt[part.read : part.read + T] for prompt in part.prompts], device=self.device)
                part.logits = (
                    self.model(ids, cache=part.cache, last_only=True)[:, -1]
                    if part.top < 0
                    else self._scored(part, ids)
                )
                part.read, tokens = part.read + T, tokens - T * len(part.prompts)
            if part.read == part.length and part in self.parts:
                self.parts.remove(part)
                yield from self._finished(part)

    def _scored(self, part: Part, ids: Tensor) -> Tensor:
        """Read the next tokens ids (N, T) of a part and score the one after each; returns the logits (N, V) after the
        last.
        """
        x = self.model.hidden(ids, part.cache)
        after = [prompt[part.read + 1 : part.read + ids.size(1) + 1] for prompt in part.prompts]
        asked = [(i, token) for i, tokens in enumerate(after) for token in tokens]
        for logits in in_blocks(self.model, x[:, : len(after[0])].flatten(0, 1)):
            here, asked = asked[: len(logits)], asked[len(logits) :]
            logprobs = logits.log_softmax(-1)
            own = logprobs[range(len(here)), [token for _, token in here]].tolist()
            best = logprobs.topk(min(part.top, logprobs.size(-1)))
            for (i, token), value, tokens, values in zip(here, own, best.indices.tolist(), best.values.tolist()):
                part.scores[i].append(Choice(token, value, tuple(zip(tokens, values))))
        return self.model.logits(x[:, -1])

    def _finished(self, part: Part) -> Iterator[tuple[Row, KVCache, int, Tensor]]:
        for i, (prompt, rows) in enumerate(zip(part.prompts, part.rows)):
            for row in rows:
                if len(row.tokens) == len(row.request.prompt):
                    row.cached, row.scores = part.start, part.scores[i]
                yield row, part.cache, i, part.logits[i]
            if self.prefixes and rows:
                whole = len(part.prompts) == 1  # then the cache itself is the snapshot
                self.prefixes.keep(
                    prompt,
                    part.cache.row_bytes(i) + part.logits[i].nbytes,
                    lambda i=i, whole=whole: (part.cache if whole else part.cache.snapshot(i), part.logits[i].clone()),
                )

    def cancel(self, number: int) -> bool:
        """Whether there was such a row; its prompt is given up unless another row waits for it too."""
        for part in self.parts:
            for rows in part.rows:
                for row in rows:
                    if row.number == number:
                        rows.remove(row)
                        if not any(part.rows):
                            self.parts.remove(part)
                        return True
        return False
