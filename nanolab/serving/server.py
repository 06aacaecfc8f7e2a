"""The process around the application: its port, and its end: after SIGTERM running requests finish and new ones get 503."""

import asyncio
import socket
from collections.abc import Callable, Collection
from types import FrameType

import uvicorn
from fastapi import FastAPI

from nanolab.config import UserError
from nanolab.serving.worker import Served


def bind(host: str, port: int) -> socket.socket:
    """A socket to listen on. Raises UserError for a port that is taken, or an address that is not this machine's."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # not held up by connections that a process before has closed
        listening.bind(address)
        return listening
    except (OSError, OverflowError) as error:
        wanted = "expected an address of this machine, and a port that is free and may be used"
        raise UserError(f"cannot listen on --host {host} --port {port} ({error}); {wanted}; try --port {port + 1 if 1024 <= port < 65535 else 8000}") from None


class Server(uvicorn.Server):
    """Answers until SIGTERM or Ctrl-C, then lets running requests finish for `drain_seconds`; a second signal ends it at once.

    Uvicorn by itself closes the port as soon as it is told to leave: those who come then would not learn why.
    ready: called when it listens.
    """

    def __init__(self, app: FastAPI, models: Collection[Served], drain_seconds: float, ready: Callable[[], None]):
        super().__init__(uvicorn.Config(app, log_level="warning", access_log=False, server_header=False, timeout_keep_alive=65, timeout_graceful_shutdown=1))
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
