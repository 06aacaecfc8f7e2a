"""The process around the application: its models, its port, and its end: after SIGTERM running requests finish and new
ones get 503.
"""

import asyncio
import resource
import socket
import sys
from collections.abc import Callable, Collection
from dataclasses import replace
from types import FrameType

import h11
import torch
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from nanolab import runtime
from nanolab.cli import UserError, check_bounds
from nanolab.inference.engine import Engine
from nanolab.inference.prepare import prepare_for_inference
from nanolab.inference.sampling import check_settings
from nanolab.inference.sandbox import walls
from nanolab.records.models import find_model, load_model
from nanolab.serving.api import create_app
from nanolab.serving.config import ServeConfig
from nanolab.serving.errors import CLOSE, RETRY_AFTER, ApiError
from nanolab.serving.security import LOOPBACK, find_key, own_names
from nanolab.serving.worker import ModelServer

MAX_CONNECTIONS = 512  # at once, or half of the files that the process may open if that is less; those beyond get 503
TOOL_THREADS = 4  # programs of `--tool python` that run at once beside each replica
HEAD_SECONDS = 20.0  # for the head of a request to arrive; a connection that takes longer, or sends nothing, is closed


def serve(cfg: ServeConfig) -> None:
    """Load the models and answer until SIGTERM or Ctrl-C. Raises UserError for flags, ports and models that do not
    fit.
    """
    check_settings(cfg.temperature, cfg.top_k, cfg.top_p)
    check_bounds(type(cfg), vars(cfg))
    for line in walls(cfg, cfg.tool == "python"):
        print(line, flush=True)
    listening = bind(cfg.host, cfg.port)  # before the models are loaded, which takes longer
    models = load_models(cfg, runtime.start(cfg.device_type))
    app = create_app(models, cfg)
    print(memory_line([replica.engine for served in models.values() for replica in served.replicas], cfg))
    if cfg.host not in LOOPBACK:
        known = ", ".join(sorted({*LOOPBACK, *own_names(cfg.host)} | {*filter(None, cfg.allowed_hosts.split(","))}))
        print(
            f"note: answers to any IP address of this machine and to the names {known}; another name needs"
            " --allowed-hosts NAME",
            file=sys.stderr,
        )
    if cfg.host not in LOOPBACK and not find_key(cfg):
        print(
            f"warning: no API key is set; anyone who can reach {cfg.host} can use this server; set"
            f" {cfg.api_key_env}=SECRET in the environment",
            file=sys.stderr,
        )

    def ready() -> None:
        host, port = listening.getsockname()[:2]
        place = f"[{host}]" if ":" in host else host
        print(f"nanolab serves {', '.join(models)} at http://{place}:{port} (page), /v1 (OpenAI API)", flush=True)

    Server(app, models.values(), cfg.drain_seconds, ready).run([listening])


def load_models(cfg: ServeConfig, rt: runtime.Runtime) -> dict[str, ModelServer]:
    """Name -> each model of --model, with its replicas. On a CPU replicas share the weights and the cores."""
    cuda = rt.device.type == "cuda"
    if cuda and cfg.replicas > torch.cuda.device_count():
        raise UserError(
            f"--replicas {cfg.replicas}, but there are {torch.cuda.device_count()} devices; expected at most one"
            " replica each"
        )
    if not cuda:
        torch.set_num_threads(max(1, torch.get_num_threads() // cfg.replicas))
    models: dict[str, ModelServer] = {}
    for ref in map(str.strip, cfg.model.split(",")):
        found = find_model(ref)
        name = ref if "@" in ref else found.name
        if name in models:
            print(f"note: --model names {name} more than once; it is served once", file=sys.stderr)
            continue
        engines: list[Engine] = []
        for i in range(cfg.replicas):
            place = replace(rt, device=torch.device("cuda", i)) if cuda else rt
            if cuda or not engines:
                model, tokenizer, meta = load_model(found, place)
                model = prepare_for_inference(model, int8=cfg.int8)
            engines.append(
                Engine(
                    model,
                    tokenizer,
                    place,
                    max_rows=cfg.max_rows,
                    prefix_bytes=cfg.prefix_mb << 20,
                    graphs=True,
                    tool_threads=TOOL_THREADS if cfg.tool == "python" else 0,
                )
            )
        models[name] = ModelServer(name, engines, cfg.queue, meta.get("kind", "base"))
    return models


def memory_line(engines: list[Engine], cfg: ServeConfig) -> str:
    """What full batches take beside the weights, and whether that is free now. On CUDA replicas have a device each."""
    device = engines[0].runtime.device
    shared = [engine for engine in engines if engine.runtime.device == device]
    full, snapshots = sum(engine.most_bytes for engine in shared), (cfg.prefix_mb << 20) * len(shared)
    free = runtime.free_bytes(device)
    line = (
        f"memory: up to {full / 2**30:.2f} GiB for keys and values (--max-rows {cfg.max_rows}), {snapshots / 2**30:.2f}"
        " GiB for snapshots (--prefix-mb)"
    )
    if free:
        line += f"; {free / 2**30:.2f} GiB free" + ", which is less: replies may fail with 503; lower --max-rows" * (
            full + snapshots > free
        )
    return line


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
