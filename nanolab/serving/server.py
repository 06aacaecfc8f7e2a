"""The process around the application: its port, and its end: after SIGTERM running requests finish and new ones get
503.
"""

import asyncio
import resource
import socket
from collections.abc import Callable, Collection
from types import FrameType

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from nanolab.cli import UserError
from nanolab.serving.errors import CLOSE, RETRY_AFTER, ApiError
from nanolab.serving.worker import ModelServer

MAX_CONNECTIONS = 512  # at once, or half of the files that the process may open if that is less; those beyond get 503
HEAD_SECONDS = 20.0  # for the head of a request to arrive; a connection that takes longer, or sends nothing, is closed


def bind(host: str, port: int) -> socket.socket:
    """A socket to listen on. Raises UserError for a port that is taken, or an address that is not this machine's."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        # not held up by connections that a process before has closed
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        return listening
    except (OSError, OverflowError) as error:
        wanted = "expected an address of this machine, and a port that is free and may be used"
        raise UserError(
            f"cannot listen on --host {host} --port {port} ({error}); {wanted}; try --port"
            f" {port + 1 if 1024 <= port < 65535 else 8000}"
        ) from None


def most_connections() -> int:
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MAX_CONNECTIONS if files == resource.RLIM_INFINITY else min(MAX_CONNECTIONS, files // 2)


class Connection(H11Protocol):
    """A client's connection: heads of requests have HEAD_SECONDS to arrive, and one connection too many is told so and
    closed.
    """

    late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > most_connections():
            full = "too many connections at once; try again"
            self.app = ApiError(503, full, code="too_many_connections", headers=RETRY_AFTER | CLOSE).response
        self.wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.wait()

    def wait(self) -> None:
        """Start the clock while a head, or the unread rest of a body, is awaited; an idle connection between requests
        has uvicorn's own clock.
        """
        awaited = self.conn.our_state in (h11.IDLE, h11.DONE) and self.timeout_keep_alive_task is None
        if awaited and self.late is None:
            self.late = self.loop.call_later(HEAD_SECONDS, self.transport.close)
        elif not awaited:
            self.stop_clock()

    def stop_clock(self) -> None:
        if self.late is not None:
            self.late.cancel()
            self.late = None

    def connection_lost(self, exc: Exception | None) -> None:
        self.stop_clock()
        super().connection_lost(exc)


class Server(uvicorn.Server):
    """Answers until SIGTERM or Ctrl-C, then lets running requests finish for `drain_seconds`; a second signal ends it
    at once.

    Uvicorn by itself closes the port as soon as it is told to leave: those who come then would not learn why.
    ready: called when it listens.
    """

    def __init__(self, app: FastAPI, models: Collection[ModelServer], drain_seconds: float, ready: Callable[[], None]):
        settings = {
            "log_level": "warning",
            "access_log": False,
            "server_header": False,
            "timeout_keep_alive": 65,
            "timeout_graceful_shutdown": 1,
        }
        super().__init__(uvicorn.Config(app, http=Connection, ws="none", **settings))
        self.models, self.drain_seconds, self.ready = models, drain_seconds, ready

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        await super().serve(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.should_exit = any(served.draining for served in self.models)
        for served in self.models:
            served.draining = True
        self.loop.call_soon_threadsafe(lambda: self.loop.create_task(self._drain()))

    async def _drain(self) -> None:
        end = self.loop.time() + self.drain_seconds
        while any(served.busy for served in self.models) and self.loop.time() < end:
            await asyncio.sleep(0.05)
        for served in self.models:
            served.stop()
        self.should_exit = True
