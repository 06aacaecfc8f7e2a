"""One request being answered: its rows in the queue, its reply as it grows, and a watch for the client's leaving."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from nanolab.inference import engine
from nanolab.serving.errors import ApiError, as_json, reply
from nanolab.serving.metrics import Metrics
from nanolab.serving.reply import Delta, ResponseBuilder
from nanolab.serving.worker import ModelServer, RowFailed

log = logging.getLogger(__name__)

T = TypeVar("T")
LEFT = 499  # nginx's status for a client that has closed the connection, which never gets it

Step = list[tuple[int, list[Delta], bool]]  # (choice, what became certain of it, whether that is its end)


class Gone(ApiError):
    """The client has left."""

    def __init__(self) -> None:
        super().__init__(LEFT, "the client has closed the connection")


class RequestHandler:
    """Queues the rows when it is made, raising what `ModelServer.submit` raises; `respond` then gives the response.

    Whatever is left of the rows is cancelled when the response has been sent or the client is gone.
    """

    def __init__(
        self,
        served: ModelServer,
        requests: Sequence[engine.Request],
        builder: ResponseBuilder,
        metrics: Metrics,
        request: Request,
        arrived: float,
        log: Callable[[ResponseBuilder], Awaitable[None]],
    ):
        self.served, self.builder, self.metrics = served, builder, metrics
        self.request, self.arrived, self.log, self.status = request, arrived, log, 200
        # holds the rows' max_tokens at most
        self.inbox: asyncio.Queue[tuple[int, engine.TokenOutput | ApiError]] = asyncio.Queue()
        self.pending = served.submit(requests, lambda i, item: self.inbox.put_nowait((i, item)))
        self.watch = asyncio.create_task(self._watch())

    async def respond(self) -> Response:
        """The whole response, or events. The head of a stream waits for the first token: a failure until then has a
        status of its own.
        """
        steps = self._steps()
        try:
            if self.builder.asked.stream:
                first = await anext(steps)
                headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
                return StreamingResponse(self._events(first, steps), media_type="text/event-stream", headers=headers)
            async for _ in steps:
                pass
            return await self._written(lambda: reply(self.builder.whole()))
        except Gone:
            return Response(status_code=LEFT)

    async def _steps(self) -> AsyncIterator[Step]:
        """What has become certain since the last time. Raises ApiError when the engine has failed or the client has
        left.
        """
        while not self.builder.done:
            new = [await self.inbox.get()]
            while not self.inbox.empty():
                new.append(self.inbox.get_nowait())
            for _, item in new:
                if isinstance(item, ApiError):
                    raise self._failure(item)
            if self.arrived:
                self.metrics.first_token.labels(self.served.name).observe(time.perf_counter() - self.arrived)
                self.arrived = 0.0
            yield [self._pushed(i, item) for i, item in new if not isinstance(item, ApiError)]
        await self.log(self.builder)

    def _failure(self, error: ApiError) -> ApiError:
        """What the client is told, if it is there; a failure of this request alone is logged by its id."""
        self.status = error.status
        if isinstance(error, RowFailed):
            error.message += f"; request {self.builder.id}"
            log.error("%s: %s: %s", self.served.name, error.code, error.message)
        return error

    def _pushed(self, i: int, new: engine.TokenOutput) -> tuple[int, list[Delta], bool]:
        choice, going = self.builder.replies[i], not self.builder.replies[i].finish
        return i, choice.push(new), going and bool(choice.finish)

    async def _events(self, first: Step, steps: AsyncIterator[Step]) -> AsyncIterator[bytes]:
        """Server-sent events: who speaks, the text as it comes, how it ended, what it took, [DONE]. A failure is the
        last event.
        """
        builder = self.builder
        try:
            yield b"".join(map(event, builder.first())) + await self._written(lambda: self._chunks(first))
            async for step in steps:
                if out := await self._written(lambda: self._chunks(step)):
                    yield out
            yield b"".join(map(event, builder.usage())) + b"data: [DONE]\n\n"
        except Gone:
            return
        except ApiError as error:
            yield event(error.body)

    async def _written(self, write: Callable[[], T]) -> T:
        """A body. Scores of whole prompts take a while to write, and are written in another thread."""
        return await asyncio.to_thread(write) if self.builder.asked.echo else write()

    def _chunks(self, step: Step) -> bytes:
        out = []
        for i, deltas, ends in step:
            out += [self.builder.chunk(i, *delta) for delta in deltas] + [self.builder.last(i)] * ends
        return b"".join(map(event, out))

    async def _watch(self) -> None:
        while (await self.request.receive())["type"] != "http.disconnect":  # of ASGI: sent, or the connection is closed
            pass
        name, metrics = self.served.name, self.metrics
        if self.served.cancel(self.pending) and self.status == 200 and not self.builder.done:
            self.status = LEFT
            metrics.cancellations.labels(name).inc()
            self.inbox.put_nowait((0, Gone()))
        metrics.requests.labels(name, self.request.url.path, str(self.status)).inc()
        if not self.arrived:  # it has had a token
            used = self.builder.tokens()
            metrics.tokens.labels(name, "prompt").inc(used["prompt_tokens"])
            metrics.tokens.labels(name, "completion").inc(used["completion_tokens"])
            metrics.tokens.labels(name, "cached").inc(used["prompt_tokens_details"]["cached_tokens"])


def event(body: dict[str, Any]) -> bytes:
    return b"data: " + as_json(body) + b"\n\n"
