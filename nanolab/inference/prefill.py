"""Reading prompts: in chunks, equal prompts once, prompts of one length together, from a snapshot where there is one."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from nanolab.inference.cache import KVCache
from nanolab.inference.prefix import Prefixes
from nanolab.inference.request import Row


class Part:
    """Prompts of one length that are read together, and the rows that begin with each."""

    def __init__(self, prompts: list[tuple[int, ...]], rows: list[list[Row]], cache: KVCache, logits: Tensor | None = None):
        self.prompts, self.rows, self.cache, self.logits = prompts, rows, cache, logits
        self.start = self.read = cache.lengths[0]  # tokens of each prompt that a snapshot held, and that are read
        self.length = len(prompts[0])


class Prefill:
    """Rows whose prompts are being read. new_cache: (rows, capacity) -> KVCache."""

    def __init__(self, model: Callable, new_cache: Callable[[int, int], KVCache], device: torch.device, prefixes: Prefixes | None):
        self.model, self.new_cache, self.device, self.prefixes = model, new_cache, device, prefixes
        self.parts: list[Part] = []  # the oldest first

    def __len__(self) -> int:
        return sum(len(rows) for part in self.parts for rows in part.rows)

    def take(self, rows: list[Row], tokens: int) -> None:
        """Begin with these rows' prompts; `tokens` at most are read in one forward of several prompts."""
        reading = {prompt: part.rows[i] for part in self.parts for i, prompt in enumerate(part.prompts)}
        fresh: dict[int, list[tuple[int, ...]]] = {}  # by length
        for row in rows:
            prompt = row.request.prompt
            if prompt in reading:
                reading[prompt].append(row)
                continue
            reading[prompt] = [row]
            if found := self.prefixes.find(prompt) if self.prefixes else None:
                cache = self.new_cache(1, len(prompt))
                cache.put([0], found[0], [0])
                self.parts.append(Part([prompt], [reading[prompt]], cache, None if found[1] is None else found[1][None]))
            else:
                fresh.setdefault(len(prompt), []).append(prompt)
        for length, prompts in fresh.items():
            size = max(1, tokens // length)
            for some in (prompts[i : i + size] for i in range(0, len(prompts), size)):
                self.parts.append(Part(some, [reading[prompt] for prompt in some], self.new_cache(len(some), length)))

    def step(self, tokens: int) -> Iterator[tuple[Row, KVCache, int, Tensor]]:
        """Read up to `tokens` tokens; for each row whose prompt is through: the row, its cache and place therein, and the logits
        (V,) behind the prompt. Half of the tokens are the oldest prompt's, so that it arrives; the rest goes to the shortest, so
        that a long prompt does not hold up those behind it.
        """
        if not self.parts:
            return
        oldest, *others = self.parts
        shares = [(oldest, tokens // 2), *((part, tokens) for part in sorted(others, key=lambda part: part.length - part.read))] if others else []
        for part, most in (*shares, (oldest, tokens)):
            T = min(part.length - part.read, min(most, tokens) // len(part.prompts))
            if T:
                ids = torch.tensor([prompt[part.read : part.read + T] for prompt in part.prompts], device=self.device)
                part.logits = self.model(ids, cache=part.cache, last_only=True)[:, -1]
                part.read, tokens = part.read + T, tokens - T * len(part.prompts)
            if part.read == part.length and part in self.parts:
                self.parts.remove(part)
                yield from self._through(part)

    def _through(self, part: Part) -> Iterator[tuple[Row, KVCache, int, Tensor]]:
        for i, (prompt, rows) in enumerate(zip(part.prompts, part.rows)):
            for row in rows:
                row.cached = part.start
                yield row, part.cache, i, part.logits[i]
            if self.prefixes and rows:
                self.prefixes.keep(prompt, part.cache if len(part.prompts) == 1 else part.cache.snapshot(i), part.logits[i].clone())

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
