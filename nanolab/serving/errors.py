"""What a client is told in place of a reply: one exception for everything, and JSON as bytes. Imports no torch."""

import json
from typing import Any

from fastapi import Response

RETRY_AFTER = {"Retry-After": "1"}  # seconds
CLOSE = {"Connection": "close"}  # the rest of what the client sends is not read
KINDS = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


class ApiError(Exception):
    """A response other than 200, in OpenAI's form. headers: beside those of JSON."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers or {}

    @property
    def body(self) -> dict[str, Any]:
        kind = KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> Response:
        return reply(self.body, self.status, self.headers)


def overloaded() -> ApiError:
    return ApiError(429, "the queue is full; try again", code="queue_full", headers=RETRY_AFTER)


def draining() -> ApiError:
    return ApiError(503, "the server is shutting down", code="draining", headers=RETRY_AFTER)


def broken(why: str) -> ApiError:
    """The engine is lost for good."""
    return ApiError(500, f"generation has failed ({why}); the server has to be started again", code="engine_failed")


def as_json(body: Any) -> bytes:
    """One line by every reader's count: JSON itself escapes control characters, and these three separators are escaped
    here.
    """
    text = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    for separator in "\x85\u2028\u2029":
        text = text.replace(separator, f"\\u{ord(separator):04x}")
    return text.encode("utf-8", "replace")  # a client's half surrogates, quoted in an error, are not UTF-8


def reply(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(as_json(body), status, headers, "application/json")
