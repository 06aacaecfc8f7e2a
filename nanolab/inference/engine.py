"""Generation by continuous batching: requests join and leave the running batch between steps.

A step reads a bounded number of prompt tokens of joining rows and decodes one token of every running one. Dims: B rows,
V vocabulary. A row is one request: a prompt and its continuation.
"""

import logging
import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace

import torch
from torch import Tensor

from nanolab.cli import UserError
from nanolab.data.tokenizer import Tokenizer
from nanolab.inference.cache import KVCache, most_bytes
from nanolab.inference.prefill import Prefill
from nanolab.inference.prefix import PrefixCache
from nanolab.inference.recorded import Recorder
from nanolab.inference.request import Failed, Request, Row, TokenOutput
from nanolab.inference.sampling import choose, row_generators
from nanolab.model.gpt import GPT
from nanolab.runtime import Runtime, Stop, out_of_memory

__all__ = ["Engine", "Failed", "Request", "TokenOutput"]

log = logging.getLogger(__name__)

PATIENCE = 0.02  # seconds that a step waits for a tool where no row has anything else to do
REMEDIES = {
    "out_of_memory": "try fewer rows at once, or a shorter --max-tokens",
    "non_finite_logits": "expected numbers; try another checkpoint, NAME@STEP",
}
REQUEST = Request()
HEADROOM = 256  # slots for new tokens that a fresh cache has at most; it doubles when a reply grows longer


class Engine:
    """Generates with a model: `add` a request, `step` until it is finished. `generate` and `complete` run many at once.

    max_rows: rows that run at once; more wait. prefill_tokens: maximum prompt tokens per step, which bounds how long
    running rows wait; 0 chooses by device. prefix_bytes: memory for the prefix cache (prefix.py). graphs: record decode
    steps and replay them (recorded.py). Both need weights that do not change (prepare.py); `generate` never replays.
    tool_threads: threads for slow tools, whose rows leave the batch meanwhile; 0: a tool runs inside the step that
    called it, so that a text does not depend on how long it took, as in `generate`. A row that cannot go on is in
    `failed` after the step: the youngest rows where memory runs out once the snapshots are gone, and a row with
    non-finite logits. The others go on. Not thread-safe."""

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        runtime: Runtime,
        *,
        max_rows: int = 64,
        prefill_tokens: int = 0,
        prefix_bytes: int = 0,
        graphs: bool = False,
        tool_threads: int = 0,
    ):
        self.model, self.tokenizer, self.runtime = model, tokenizer, runtime
        self.max_rows = max_rows
        self.prefill_tokens = prefill_tokens or (256 if runtime.device.type == "cpu" else 2048)
        self.limit = model.config.sequence_len  # tokens of prompt and reply together
        self.prefixes = PrefixCache(prefix_bytes) if prefix_bytes else None
        self.recorder = Recorder(model, runtime.device) if graphs and runtime.device.type != "mps" else None
        # one query in bf16 takes a CPU ten times as long
        dtype = torch.float32 if runtime.device.type == "cpu" else model.compute_dtype
        # not a method: with a cycle through it, an engine's cache would stay until the garbage is collected, which
        # training does rarely
        self._new_cache = lambda rows, capacity: KVCache(
            model.config, rows, capacity=capacity, dtype=dtype, device=runtime.device
        )
        self.most_bytes = most_bytes(model.config, max_rows, dtype)  # of keys and values
        self.rows: list[Row] = []  # running; row i of the cache is rows[i]
        self.cache = self._new_cache(0, 0)
        self.prefill = Prefill(model, self._new_cache, runtime.device, self.prefixes)
        self.queue: deque[Row] = deque()
        self.tools = ThreadPoolExecutor(tool_threads) if tool_threads else None
        self.aside: list[
            tuple[Row, KVCache | None, Future[list[int]]]
        ] = []  # rows that wait for a tool, each with what it has read; None: to be read again
        self.live: dict[int, Row] = {}  # every row that is not finished, the oldest first
        self.failed: list[Failed] = []  # rows that ended without a token; whoever steps takes them from here
        self.tight = False  # memory ran out since a row last ended
        self.numbers = 0

    @property
    def running(self) -> int:
        """Rows that are decoded, or wait for a tool."""
        return len(self.rows) + len(self.aside)

    @property
    def waiting(self) -> int:
        """Rows whose prompt is not read to its end, or that wait for a place."""
        return len(self.queue) + len(self.prefill)

    @property
    def idle(self) -> bool:
        return not (self.running or self.waiting)

    def add(self, request: Request) -> int:
        """Queue a request, which joins the batch in one of the next steps; returns its row's number. Raises UserError
        for a bad one.
        """
        request.check(self.limit)
        return self._queue(request)

    def _queue(self, request: Request, generator: torch.Generator | None = None) -> int:
        self.numbers += 1
        row = Row(
            self.numbers - 1,
            request,
            self.tokenizer,
            self.model.config.vocab_size,
            self.limit,
            self.runtime.device,
            generator,
        )
        self.queue.append(row)
        self.live[row.number] = row
        return row.number

    @torch.inference_mode()
    def cancel(self, number: int) -> None:
        """Remove a row, which frees its place in the next step. Does nothing if it is finished."""
        self.live.pop(number, None)
        for row in self.queue:
            if row.number == number:
                self.queue.remove(row)
                return
        for entry in self.aside:
            if entry[0].number == number:
                entry[2].cancel()  # if it has not begun
                self.aside.remove(entry)
                return
        if not self.prefill.cancel(number):
            for i, row in enumerate(self.rows):
                if row.number == number:
                    self._leave(i)
                    return

    @torch.inference_mode()
    def prepare(self) -> bool:
        """Record one step for later replay, some ten milliseconds; whether there was one. Call it while the engine is
        idle.
        """
        return self.recorder is not None and self.recorder.prepare(self.cache)

    def close(self) -> None:
        """Start no more tools; those that run end by themselves. Do not use the engine afterwards."""
        if self.tools:
            self.tools.shutdown(wait=False, cancel_futures=True)

    @torch.inference_mode()
    def step(self) -> list[TokenOutput]:
        """Read a chunk of the joining prompts, and give one token to every row that runs, those that have just joined
        included.

        A step that memory does not suffice for gives no tokens. Its rows begin again by reading what they have so far.
        """
        try:
            return self._step()
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            text = str(error).strip().split("\n")[0][:300] or type(error).__name__
        self._relieve(text)  # here the tensors of the step are gone
        return []

    def _relieve(self, text: str) -> None:
        """After running out of memory: snapshots go first; where there are none, or that was not enough, the youngest
        quarter of the rows.
        """
        snapshots, enough = len(self.prefixes.kept) if self.prefixes else 0, not self.tight
        if self.prefixes:
            self.prefixes.clear()
        self.tight = True
        waiting = {row.number for row in self.queue}
        rows = [row for row in self.live.values() if row.number not in waiting]  # a row that only waits takes no memory
        lost = [] if snapshots and enough else rows[-max(1, len(rows) // 4) :]
        log.warning(
            "out of memory (%s): %d snapshots dropped, %d of %d rows given up", text, snapshots, len(lost), len(rows)
        )
        for row in lost:
            self._fail(row, "out_of_memory", "there is not enough memory for this reply beside the others")
        self.reset()

    def reset(self) -> None:
        """Throw away all that was computed: the rows in `live` are queued, to be read again."""
        self.rows, self.cache = [], self._new_cache(0, 0)
        self.prefill.parts.clear()
        if self.recorder:
            self.recorder.release()
        for row, _, result in self.aside:
            if row.number not in self.live:
                result.cancel()
        self.aside = [(row, None, result) for row, _, result in self.aside if row.number in self.live]
        beside = {row.number for row, *_ in self.aside}
        self.queue = deque(row for row in self.live.values() if row.number not in beside)

    def _fail(self, row: Row, code: str, text: str) -> None:
        self.failed.append(Failed(row.number, code, text))
        self.live.pop(row.number, None)

    def check(self) -> None:
        """Raise UserError if a row has failed."""
        if self.failed:
            row, code, text = self.failed[0]
            self.failed.clear()
            raise UserError(f"{text}; {REMEDIES[code]}", code.replace("_", "-"), row=row)

    def _step(self) -> list[TokenOutput]:
        logits: list[Tensor] = []
        self._call_tools()
        if self.rows:
            ids = torch.tensor([row.tokens[-1:] for row in self.rows], device=self.runtime.device)
            if self.recorder:
                logits.append(self.recorder.step(self.cache, ids))
            else:
                logits.append(self.model(ids, cache=self.cache, last_only=True)[:, -1])
        room = self.max_rows - self.running - len(self.prefill)
        self.prefill.take([self.queue.popleft() for _ in range(min(room, len(self.queue)))], self.prefill_tokens)
        for row, cache, place, last in self.prefill.step(self.prefill_tokens):
            self._join(row, cache, place)
            logits.append(last[None])
        if not self.rows:
            return []
        step = self._tokens(torch.cat(logits) if len(logits) > 1 else logits[0])
        for i in reversed([i for i, new in enumerate(step) if new is None or new.finish]):
            row = self.rows[i]
            if step[i]:
                self.tight = False
                self.live.pop(row.number, None)
                self._leave(i)
            else:
                if self.prefixes:
                    self.prefixes.forget(row.tokens)
                self.cache.wipe(i)
                self._remove(i)
                self._fail(row, "non_finite_logits", "the model's logits are not finite numbers")
        return [new for new in step if new]

    def _call_tools(self) -> None:
        """Answer the calls that ended in the last step, or move their rows aside; take back the rows whose tool has
        finished.
        """
        calls = [(i, code) for i, row in enumerate(self.rows) if (code := row.called()) is not None]
        if self.tools is None:
            for i, code in calls:
                self.rows[i].waiting.extend(self.rows[i].use.answer(code))
        elif calls:
            first = len(self.aside)
            # a call is begun once, whatever fails below
            self.aside += [(self.rows[i], None, self._begin(self.rows[i], code)) for i, code in calls]
            for place, (i, _) in reversed(list(enumerate(calls, first))):
                row, _, result = self.aside[place]
                self.aside[place] = row, self.cache.snapshot(i), result
                self._remove(i)
        if self.aside and not (self.rows or self.prefill.parts or (self.queue and self.running < self.max_rows)):
            wait([result for *_, result in self.aside], PATIENCE, FIRST_COMPLETED)
        for entry in [entry for entry in self.aside if entry[2].done()]:
            row, cache, result = entry
            self.aside.remove(entry)
            row.waiting.extend(result.result())
            if cache is None:
                self.queue.appendleft(row)
            else:
                self._join(row, cache, 0)

    def _begin(self, row: Row, code: str) -> Future[list[int]]:
        """The tool's answer, in a thread."""
        try:
            return self.tools.submit(row.use.answer, code)
        except RuntimeError as error:  # the machine has no thread left
            result: Future[list[int]] = Future()
            result.set_result(row.use.failed(error))
            return result

    def _tokens(self, logits: Tensor) -> list[TokenOutput | None]:
        """The next token of each row; None where the model's choice has no probability: its logits were not finite."""
        free = [i for i, row in enumerate(self.rows) if not row.waiting]
        if len(free) < len(self.rows):
            logits = logits[free]
        chosen = iter(choose(logits, [self.rows[i].draws for i in free]) if free else ())
        taken: list[TokenOutput | None] = []
        for row in self.rows:
            if row.waiting:
                taken.append(row.force())
            else:
                new = next(chosen)
                taken.append(row.take(new) if math.isfinite(new.logprob) else None)
        return taken

    def _join(self, row: Row, cache: KVCache, place: int) -> None:
        if not self.rows and not (self.recorder and self.recorder.cuda):
            self.cache = self._new_cache(0, min(row.end, len(row.tokens) + HEADROOM))
        self.cache.add(cache, place)
        self.rows.append(row)

    def _leave(self, i: int) -> None:
        if self.prefixes:
            self.prefixes.keep(
                self.rows[i].tokens[: self.cache.lengths[i]],
                self.cache.row_bytes(i),
                lambda: (self.cache.snapshot(i), None),
            )
        self._remove(i)

    def _remove(self, i: int) -> None:
        """The last row takes this row's place."""
        row, last = self.rows[i], self.rows.pop()
        self.cache.remove(i)
        if row is not last:
            self.rows[i] = last

    def generate(
        self, prompts: Sequence[Sequence[int]], request: Request = REQUEST, seeds: Sequence[int] | None = None
    ) -> Iterator[list[TokenOutput]]:
        """Continue every prompt as `request` says; each step yields one TokenOutput per running row, prompt i being row
        i. A row's last token has `finish`; its tokens are those it would get alone.

        seeds: one per row; without them each row has a stream of its own, made from the request's seed (see
        `row_generators`). Forced tokens count towards `max_tokens` and the sequence length; they never stop a row. Runs
        beside what was added to this engine, not among it. Raises UserError, before anything is computed, for an empty
        or overlong prompt or meaningless settings; on the way for a row that fails.
        """
        requests = [replace(request, prompt=tuple(prompt)) for prompt in prompts]
        for row, one in enumerate(requests):
            one.check(self.limit, row)
        own = Engine(
            self.model,
            self.tokenizer,
            self.runtime,
            max_rows=max(1, len(prompts)),
            prefill_tokens=self.prefill_tokens,
            graphs=False,
        )
        own.prefixes = own.prefill.prefixes = self.prefixes
        for one, generator in zip(requests, row_generators(request.seed if seeds is None else seeds, len(prompts))):
            own._queue(one, generator)
        return own._steps()

    def _steps(self) -> Iterator[list[TokenOutput]]:
        while not self.idle:
            step = self.step()
            self.check()
            if step:
                yield step

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        request: Request = REQUEST,
        seeds: Sequence[int] | None = None,
        stop: Stop = lambda: False,
    ) -> list[list[int]]:
        """`generate` to the end, or until `stop` says so: each row's new tokens, forced ones too, without the stop
        id.
        """
        out: list[list[int]] = [[] for _ in prompts]
        for step in self.generate(prompts, request, seeds):
            if stop():
                break
            for new in step:
                if new.finish != "stop":
                    out[new.row].append(new.token)
        return out
