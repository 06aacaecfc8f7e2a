"""Who may come in, and what a browser may do with the page: Host and key checks, Content-Security-Policy; and JSON as responses.

A browser can be led to this server by any web page. Other origins cannot read answers (no CORS) nor send JSON; a name that its
owner points at 127.0.0.1 (DNS rebinding) is told apart by the Host header.
"""

import base64
import hashlib
import hmac
import json
import os
import re
from typing import Any
from urllib.parse import urlsplit

from fastapi import Response
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from nanolab.config import ServeConfig
from nanolab.serving.openai import ApiError
from nanolab.serving.worker import Broken, Draining, Overloaded

LOOPBACK = ("127.0.0.1", "localhost", "::1")
RETRY_AFTER = {"Retry-After": "1"}  # seconds


class Gate:
    """ASGI middleware: refuses foreign Host names where the server listens on this machine only, and /v1 without the key."""

    def __init__(self, app: ASGIApp, cfg: ServeConfig):
        self.app = app
        self.hosts = LOOPBACK if cfg.host in LOOPBACK else ()
        self.key = find_key(cfg).encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (error := self.refusal(scope["path"], Headers(scope=scope))):
            return await failed(error)(scope, receive, send)
        await self.app(scope, receive, send)

    def refusal(self, path: str, headers: Headers) -> ApiError | None:
        if self.hosts and host_name(headers.get("host", "")) not in self.hosts:
            wanted = f"expected one of {', '.join(self.hosts)}; to serve others, start it with --host 0.0.0.0"
            return ApiError(403, f"Host is not this machine; {wanted}", code="bad_host")
        given = headers.get("authorization", "").removeprefix("Bearer ").encode("latin-1")  # as the bytes came
        if self.key and path.startswith("/v1/") and not hmac.compare_digest(given, self.key):
            return ApiError(401, "the key is missing or wrong; expected the server's own as Authorization: Bearer KEY", code="invalid_api_key")
        return None


def find_key(cfg: ServeConfig) -> str:
    return cfg.api_key or os.environ.get(cfg.api_key_env, "")


def host_name(host: str) -> str:
    """localhost of localhost:8000, ::1 of [::1]:8000."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def page_headers(html: str) -> dict[str, str]:
    """The page may run its own inline scripts and styles, known by their hashes, and talk to this server; nothing else at all."""
    policy = ["default-src 'none'", "connect-src 'self'", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"]
    for tag in ("script", "style"):
        inside = re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", html, re.DOTALL | re.IGNORECASE)
        hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in inside]
        policy.append(f"{tag}-src " + (" ".join(f"'sha256-{digest}'" for digest in hashes) or "'none'"))
    return {"Content-Security-Policy": "; ".join(policy), "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}


def as_json(body: Any) -> bytes:
    """One line by every reader's count: JSON itself escapes control characters, and these three separators are escaped here."""
    text = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    for separator in "\x85\u2028\u2029":
        text = text.replace(separator, f"\\u{ord(separator):04x}")
    return text.encode("utf-8", "replace")  # a client's half surrogates, quoted in an error, are not UTF-8


def reply(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(as_json(body), status, headers, "application/json")


def failed(error: ApiError) -> Response:
    return reply(error.body, error.status, error.headers)


def refusal(error: Exception) -> ApiError:
    """What a client is told of an error of the workers; an ApiError is told as it is."""
    match error:
        case Overloaded():
            return ApiError(429, "too many requests at once: the queue is full; try again", code="queue_full", headers=RETRY_AFTER)
        case Draining():
            return ApiError(503, "the server is about to leave", code="draining", headers=RETRY_AFTER)
        case Broken():
            return ApiError(500, f"generation has failed ({error}); the server has to be started again", code="engine_failed")
        case ApiError():
            return error
    raise error
