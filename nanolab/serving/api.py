"""The HTTP interface: OpenAI's routes, the page, health and metrics, in front of the models' worker threads.

The event loop only carries: generation, and tokenizing what is not short, happen in other threads, so every route
answers at any time."""

import asyncio
import contextlib
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from random import Random
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, PlainTextResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

from nanolab.cli import UserError
from nanolab.data.chat import parts_of, render_prompt
from nanolab.inference import engine
from nanolab.inference.tools import find_tool
from nanolab.serving.config import ServeConfig
from nanolab.serving.conversation_log import ConversationLog
from nanolab.serving.errors import CLOSE, ApiError, reply
from nanolab.serving.metrics import Metrics
from nanolab.serving.reply import Asked, ResponseBuilder
from nanolab.serving.schemas import ROUTES, ChatRequest, read_chat, read_completion
from nanolab.serving.security import SecurityMiddleware, allowed_origins, find_key, has_key, page_headers
from nanolab.serving.stream import LEFT, RequestHandler
from nanolab.serving.worker import ModelServer

PAGE = Path(__file__).parent / "page" / "index.html"
MAX_BODY = 4 << 20  # bytes of a request
BODY_SECONDS = 60.0  # for all of it to arrive
MAX_VALUES = 1 << 18  # of a request, as far as commas tell
SHORT = 1 << 12  # bytes of a request whose prompt is tokenized at once: in less time than another thread takes to begin
AT_ONCE = 1 << 16  # bytes of a request that is read at once, in under a millisecond

log = logging.getLogger(__name__)


class Api:
    """What the routes do. models: by the name that requests give."""

    def __init__(self, models: dict[str, ModelServer], cfg: ServeConfig):
        self.models, self.cfg, self.metrics = models, cfg, Metrics()
        self.tool, self.started = find_tool(cfg.tool), int(time.time())
        # the system's own would be asked for each request, and the interpreter let go of for that
        self.seeds = Random(secrets.randbits(62))
        self.log = ConversationLog(cfg.log_conversations, self.metrics)

    async def generate(self, request: Request, read: Callable[[Any], Asked]) -> Response:
        """Either POST route. What is refused is refused before the first byte, and before any work for it where the
        queue is full.
        """
        arrived, name = time.perf_counter(), ""
        try:
            self.admit_any()
            body = await read_body(request)
            asked = await parsed(body, read)
            served = self.find(asked.model)
            name = served.name
            self.check(asked, served)
            served.admit(asked.prompts * asked.n)
            short = len(body) < SHORT
            prompts, builder = begin(asked, served) if short else await asyncio.to_thread(begin, asked, served)
            rows = self.rows(asked, served, prompts, builder)
            handler = RequestHandler(served, rows, builder, self.metrics, request, arrived, self.log.add)
        except ApiError as error:
            self.metrics.requests.labels(name, request.url.path, str(error.status)).inc()
            raise
        except ClientDisconnect:  # in the middle of its body
            return Response(status_code=LEFT)
        return await handler.respond()

    def admit_any(self) -> None:
        """Raise what every model would for one more row: then the body need not be read."""
        for i, served in enumerate(self.models.values(), 1):
            try:
                return served.admit(1)
            except ApiError:
                if i == len(self.models):
                    raise

    def check(self, asked: Asked, served: ModelServer) -> None:
        """Raise ApiError for a chat with a base model, and for more choices than the server takes."""
        if asked.chat and served.kind == "base":
            raise self.no_chat(served.name)
        rows, n = asked.prompts * asked.n, asked.n
        if served.alive and rows > served.places:
            alone = asked.prompts == 1
            seen = f"n is {n}" if alone else f"{asked.prompts} prompts with n {n} are {rows} choices"
            wanted = f"expected at most {served.places}, the capacity of this server"
            raise ApiError(400, f"{seen}; {wanted}", "n" if alone else "prompt", "invalid_value")

    def find(self, name: str | None) -> ModelServer:
        if name is None and len(self.models) == 1:
            return next(iter(self.models.values()))
        if name is None:
            raise ApiError(
                400, f"field 'model' is missing; expected one of {', '.join(self.models)}", "model", "missing_field"
            )
        if name not in self.models:
            raise ApiError(
                404,
                f"model {name[:80]!r} is not served here; expected one of {', '.join(self.models)}",
                "model",
                "model_not_found",
            )
        return self.models[name]

    def no_chat(self, name: str) -> ApiError:
        chat = [other.name for other in self.models.values() if other.kind != "base"]
        seen = f"{name} is a base model, which continues text and was not trained to chat"
        return ApiError(
            400,
            f"{seen}; expected {' or '.join(chat) or 'a chat model'}; or use /v1/completions",
            "model",
            "base_model",
        )

    def rows(
        self, asked: Asked, served: ModelServer, prompts: list[list[int]], builder: ResponseBuilder
    ) -> list[engine.Request]:
        """The engine's requests, one per choice, n for each prompt: the first of these has the seed itself, the others
        seeds made from it.

        A prompt in a list has the same choices as alone. max_tokens 0 takes a token too, which nobody is shown: it
        costs no pass of the model."""
        cfg, special = self.cfg, served.tokenizer.special
        seed = self.seeds.getrandbits(62) if asked.seed is None else asked.seed
        ends = (served.tokenizer.bos, special("<|assistant_end|>"), special("<|python_end|>")) if asked.tools else None
        budget = cfg.max_tokens if asked.budget is None else max(1, asked.budget)
        return [
            engine.Request(
                tuple(prompt),
                max_tokens=budget,
                temperature=cfg.temperature if asked.temperature is None else asked.temperature,
                top_k=cfg.top_k if asked.top_k is None else asked.top_k,
                top_p=cfg.top_p if asked.top_p is None else asked.top_p,
                repetition_penalty=asked.repetition_penalty or 1.0,
                seed=Random(f"{seed} {i}").getrandbits(62) if i else seed,
                stop_ids=ends,
                stop=tuple(asked.stop),
                logprobs=asked.alternatives,
                prompt_logprobs=asked.alternatives if asked.echo else -1,
                tools=self.tool if asked.chat and not asked.tools else None,
                parse="turn" if asked.chat else "text",
                begun=echo.unfinished if echo else b"",
            )
            for prompt, echo in zip(prompts, builder.echoes)
            for i in range(asked.n)
        ]

    def described(self) -> list[dict[str, Any]]:
        cfg = self.cfg
        sampling = {
            "temperature": cfg.temperature,
            "top_k": cfg.top_k,
            "top_p": cfg.top_p,
            "max_tokens": cfg.max_tokens,
        }
        about = {"object": "model", "created": self.started, "owned_by": "nanolab"}
        return [
            {"id": name, **about, "kind": s.kind, "context": s.limit, "sampling": sampling, "tool": cfg.tool}
            for name, s in self.models.items()
        ]

    def health(self) -> tuple[int, dict[str, Any]]:
        """(HTTP status, body): ok, degraded (of a model's several replicas not all have failed), draining, or
        failed.
        """
        every = self.models.values()
        models = {
            s.name: {"running": s.running, "queued": len(s.queue), "replicas": len(s.replicas), "errors": s.errors}
            for s in every
        }
        status = "degraded" if any(s.errors for s in every) else "ok"
        status = "draining" if any(s.draining for s in every) else status
        status = "failed" if any(not s.alive for s in every) else status
        return 503 if status in ("failed", "draining") else 200, {"status": status, "models": models}


def create_app(models: dict[str, ModelServer], cfg: ServeConfig, page: Path = PAGE) -> FastAPI:
    """The application: starts the models' threads when it starts, ends them when it ends. Raises UserError if the page
    cannot be read.
    """
    try:
        html = page.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(
            f"the page {page} cannot be read ({error}); expected the file that comes with nanolab; install nanolab"
            " again"
        ) from None
    api, headers, key = Api(models, cfg), page_headers(html), find_key(cfg)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        for served in models.values():
            served.start(asyncio.get_running_loop().call_soon_threadsafe)
        yield
        for served in models.values():
            served.stop()
        await asyncio.gather(*(asyncio.to_thread(served.join) for served in models.values()))
        await asyncio.to_thread(api.log.writer.shutdown)

    app = FastAPI(lifespan=lifespan, openapi_url=None)  # no documentation pages: they would load scripts from elsewhere
    app.add_middleware(SecurityMiddleware, cfg=cfg)
    if origins := allowed_origins(cfg):
        app.add_middleware(
            CORSMiddleware, allow_origins=list(origins), allow_methods=["GET", "POST"], allow_headers=["*"]
        )

    # coroutines, since Starlette calls other functions in a thread, which takes longer than all else that a refused
    # request does
    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        return error.response

    @app.exception_handler(HTTPException)
    async def not_routed(request: Request, error: HTTPException) -> Response:
        return no_route(error.status_code, request.method, request.url.path, error.detail).response

    @app.exception_handler(Exception)
    async def crashed(request: Request, error: Exception) -> Response:
        return ApiError(500, f"{type(error).__name__} in the server; its log has the rest").response

    @app.get("/")
    @app.get("/compare")
    async def show_page() -> Response:
        return HTMLResponse(html, headers=headers)

    @app.get("/v1/models")
    @app.get("/v1/models/")
    async def all_models() -> Response:
        return reply({"object": "list", "data": api.described()})

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        api.find(name)
        return reply(next(about for about in api.described() if about["id"] == name))

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await api.generate(request, read_chat)

    @app.post("/v1/completions")
    async def completion(request: Request) -> Response:
        return await api.generate(request, read_completion)

    @app.get("/health")
    async def health(request: Request) -> Response:
        status, body = api.health()
        # the rest names models and quotes errors
        return reply(body if has_key(request.headers, key) else {"status": body["status"]}, status)

    @app.get("/metrics")
    async def metrics() -> Response:
        text = api.metrics.text(
            {s.name: len(s.queue) for s in models.values()}, {s.name: s.running for s in models.values()}
        )
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    return app


def no_route(status: int, method: str, path: str, detail: str) -> ApiError:
    """What a request for no route of ours is told: the route that its path ends like, or all."""
    routes = [*ROUTES, "/v1/models"]
    meant = [route for route in routes if path.rstrip("/").endswith(route.removeprefix("/v1"))][:1] or routes
    hint = f"; expected {' or '.join(meant)}" if status == 404 else ""
    return ApiError(status, f"{method} {path}: {detail}{hint}", code="no_such_route" if status == 404 else None)


async def read_body(request: Request) -> bytes:
    """The body. Raises ApiError for one that is too large, too slow or, by its Content-Type, not JSON."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # the only one of these that a page of another site cannot send without asking first
        wanted = "expected application/json; with curl: -H 'Content-Type: application/json'"
        raise ApiError(415, f"the body's Content-Type is {kind[:100]!r}; {wanted}", code="unsupported_media_type")
    too_large = ApiError(
        413, f"the body has more than {MAX_BODY} bytes; expected at most that; send less", code="request_too_large"
    )
    if int(request.headers.get("content-length", 0)) > MAX_BODY:  # h11 lets only digits through
        raise too_large

    async def read() -> bytes:
        data = bytearray()
        async for part in request.stream():
            data += part
            if len(data) > MAX_BODY:
                raise too_large
        return bytes(data)

    try:
        return await asyncio.wait_for(read(), BODY_SECONDS)
    except asyncio.TimeoutError:
        raise ApiError(
            408,
            f"the body did not arrive within {BODY_SECONDS:g} seconds; send it at once",
            code="body_timeout",
            headers=CLOSE,
        ) from None


async def parsed(body: bytes, read: Callable[[Any], Asked]) -> Asked:
    """What the body asks for; a large one is read in a thread. Raises ApiError.

    json.loads stops every thread of the process until it is done: that takes milliseconds for a long text, but a second
    for as many numbers as fit MAX_BODY, so these are counted first."""
    if (values := body.count(b",")) > MAX_VALUES:
        raise ApiError(
            413, f"the body has {values} commas; expected at most {MAX_VALUES}; send less", code="request_too_large"
        )
    return read(loaded(body)) if len(body) < AT_ONCE else await asyncio.to_thread(lambda: read(loaded(body)))


def loaded(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON ({error}); expected an object") from None


def begin(asked: Asked, served: ModelServer) -> tuple[list[list[int]], ResponseBuilder]:
    """The prompts in tokens, and the response that is to grow. Raises what `prompt_ids` raises."""
    prompts = prompt_ids(asked, served)
    return prompts, ResponseBuilder(asked, served.name, prompts, served.tokenizer)


def prompt_ids(asked: Asked, served: ModelServer) -> list[list[int]]:
    """The tokens of each prompt. Raises ApiError for more than the model reads, and for ids that it does not have."""
    tokenizer, longest = served.tokenizer, served.longest
    if isinstance(asked, ChatRequest):
        size = sum(len(part["text"]) for message in asked.messages for part in parts_of(message["content"]))
        return [
            readable(served, "messages", "messages", size // longest, lambda: render_prompt(tokenizer, asked.messages))
        ]

    def of(i: int, prompt: str | list[int]) -> list[int]:
        name = f"prompt[{i}]" if asked.prompts > 1 else "prompt"
        if isinstance(prompt, list):
            return readable(served, "prompt", name, len(prompt), lambda: prompt)
        least = len(prompt) // longest
        return readable(served, "prompt", name, least, lambda: [tokenizer.bos, *tokenizer.encode(prompt)])

    return [of(i, prompt) for i, prompt in enumerate(asked.prompt)]


def readable(served: ModelServer, param: str, name: str, least: int, encode: Callable[[], list[int]]) -> list[int]:
    """A prompt in tokens. least: how many these are at the least, for what is not worth tokenizing."""
    ids = encode() if least < served.limit else []
    if not 0 < len(ids) < served.limit:
        seen = f"{len(ids)} tokens" if ids else f"at least {least} tokens"
        raise ApiError(
            400,
            f"{name} has {seen}; this model reads at most {served.limit - 1}; shorten it",
            param,
            "context_length_exceeded",
        )
    if max(ids) >= served.tokenizer.vocab_size:
        raise ApiError(
            400,
            f"{name} holds the id {max(ids)}; expected ids below {served.tokenizer.vocab_size}",
            param,
            "invalid_value",
        )
    return ids
