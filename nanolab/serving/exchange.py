"""One request at work: its rows among the workers, its answer as it grows, and an eye on whether the client is still
there.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from nanolab.inference import engine
from nanolab.serving.gate import as_json, refusal, reply
from nanolab.serving.metrics import Metrics
from nanolab.serving.openai import ApiError
from nanolab.serving.reply import Delta, ResponseBuilder
from nanolab.serving.worker import ModelServer, RowFailed

log = logging.getLogger(__name__)

T = TypeVar("T")
LEFT = 499  # nginx's status for a client that has closed the connection, which never gets it

Step = list[tuple[int, list[Delta], bool]]  # (choice, what became certain of it, whether that is its end)


class Gone(Exception):
    """The client has left."""


class Exchange:
    """Queues the rows when it is made, raising what `ModelServer.submit` raises; `respond` then gives the response.

    Whatever is left of the rows is cancelled when the response has been sent or the client is gone.
    """

    def __init__(
        self,
        served: ModelServer,
        requests: Sequence[engine.Request],
        answer: ResponseBuilder,
        metrics: Metrics,
        request: Request,
        arrived: float,
        log: Callable[[ResponseBuilder], Awaitable[None]],
    ):
        self.served, self.answer, self.metrics = served, answer, metrics
        self.request, self.arrived, self.log, self.status = request, arrived, log, 200
        # holds the rows' max_tokens at most
        self.inbox: asyncio.Queue[tuple[int, engine.TokenOutput | Exception]] = asyncio.Queue()
        self.jobs = served.submit(requests, lambda i, item: self.inbox.put_nowait((i, item)))
        self.watch = asyncio.create_task(self._watch())

    async def respond(self) -> Response:
        """The whole answer, or events. The head of a stream waits for the first token: a failure until then has a
        status of its own.
        """
        steps = self._steps()
        try:
            if self.answer.ask.stream:
                first = await anext(steps)
                headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
                return StreamingResponse(self._events(first, steps), media_type="text/event-stream", headers=headers)
            async for _ in steps:
                pass
            return await self._written(lambda: reply(self.answer.whole()))
        except Gone:
            return Response(status_code=LEFT)

    async def _steps(self) -> AsyncIterator[Step]:
        """What has become certain since the last time. Raises Gone, and ApiError when the engine has failed."""
        while not self.answer.done:
            new = [await self.inbox.get()]
            while not self.inbox.empty():
                new.append(self.inbox.get_nowait())
            for _, item in new:
                if isinstance(item, Exception):
                    raise self._failure(item)
            if self.arrived:
                self.metrics.first_token.observe(time.perf_counter() - self.arrived, self.served.name)
                self.arrived = 0.0
            yield [self._take(i, item) for i, item in new]
        await self.log(self.answer)

    def _failure(self, error: Exception) -> Exception:
        """What the client is told, if it is there; a failure of this request alone is logged by its id."""
        if isinstance(error, Gone):
            self.status = LEFT
            return error
        if isinstance(error, RowFailed):
            error = RowFailed(error.code, f"{error}; request {self.answer.id}")
            log.error("%s: %s: %s", self.served.name, error.code, error)
        refused = refusal(error)
        self.status = refused.status
        return refused

    def _take(self, i: int, new: engine.TokenOutput) -> tuple[int, list[Delta], bool]:
        reply, going = self.answer.replies[i], not self.answer.replies[i].finish
        return i, reply.push(new), going and bool(reply.finish)

    async def _events(self, first: Step, steps: AsyncIterator[Step]) -> AsyncIterator[bytes]:
        """Server-sent events: who speaks, the text as it comes, how it ended, what it took, [DONE]. A failure is the
        last event.
        """
        answer = self.answer
        try:
            yield b"".join(map(event, answer.first())) + await self._written(lambda: self._chunks(first))
            async for step in steps:
                if out := await self._written(lambda: self._chunks(step)):
                    yield out
            yield b"".join(map(event, answer.usage())) + b"data: [DONE]\n\n"
        except ApiError as error:
            yield event(error.body)
        except Gone:
            return

    async def _written(self, write: Callable[[], T]) -> T:
        """A body. Scores of whole prompts take a while to write, and are written in another thread."""
        return await asyncio.to_thread(write) if self.answer.ask.echo else write()

    def _chunks(self, step: Step) -> bytes:
        out = []
        for i, deltas, ends in step:
            out += [self.answer.chunk(i, *delta) for delta in deltas] + [self.answer.last(i)] * ends
        return b"".join(map(event, out))

    async def _watch(self) -> None:
        while (await self.request.receive())["type"] != "http.disconnect":  # of ASGI: sent, or the connection is closed
            pass
        if self.served.cancel(self.jobs) and self.status == 200 and not self.answer.done:
            self.status = LEFT
            self.metrics.cancellations.add(1, self.served.name)
            self.inbox.put_nowait((0, Gone()))
        self.metrics.requests.add(1, self.served.name, self.request.url.path, str(self.status))
        if not self.arrived:  # it has had a token
            used = self.answer.tokens()
            cached = used["prompt_tokens_details"]["cached_tokens"]
            for kind, n in (
                ("prompt", used["prompt_tokens"]),
                ("completion", used["completion_tokens"]),
                ("cached", cached),
            ):
                self.metrics.tokens.add(n, self.served.name, kind)


def event(body: dict[str, Any]) -> bytes:
    return b"data: " + as_json(body) + b"\n\n"
