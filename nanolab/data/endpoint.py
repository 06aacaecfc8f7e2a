"""An endpoint that speaks OpenAI's chat API, asked until it answers: busy ones are waited for, redirects are refused,
the key stays out of what is shown. Imports no torch."""

import http.client
import ipaddress
import json
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any, NamedTuple

from nanolab.cli import UserError, nearest
from nanolab.terminal import harmless

ASK = (
    'Write the conversation now. Answer with one JSON object and nothing else: {"messages": [{"role": "user",'
    ' "content": "..."}, {"role": "assistant", "content": "..."}, ...]}. The user begins, the two take turns, and the'
    " assistant has the last word."
)


TRIES = 7  # requests for one answer, when the endpoint is busy or out of reach
BACK_OFF = 1.0  # seconds before the second request; doubles
LONGEST_WAIT = 60.0
MAX_BODY = 8 << 20  # bytes of an answer
_MESSAGE = {
    "type": "object",
    "additionalProperties": False,
    "required": ["role", "content"],
    "properties": {"role": {"type": "string", "enum": ["user", "assistant"]}, "content": {"type": "string"}},
}


_SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["messages"],
    "properties": {"messages": {"type": "array", "items": _MESSAGE}},
}


RESPONSE_FORMATS: dict[str, dict[str, Any]] = {  # fields of the request
    "json_schema": {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "conversation", "strict": True, "schema": _SCHEMA},
        }
    },
    "json_object": {"response_format": {"type": "json_object"}},
    "none": {},
}


class Refused(Exception):
    """An answer that is no conversation we want; another one may be."""


class Answer(NamedTuple):
    text: str
    tokens: int  # of prompt and answer, as the endpoint counts them; 0 where it does not say


def exposed_to(url: str) -> str:
    """The host that is asked over plain http, if that is not this machine; else ""."""
    parts = urllib.parse.urlsplit(url)
    host = parts.hostname or ""
    try:
        here = ipaddress.ip_address(host).is_loopback
    except ValueError:
        here = host == "localhost" or host.endswith(".localhost")
    return "" if here or parts.scheme != "http" else host


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: urllib would hand the key to wherever it leads."""

    def redirect_request(self, *args: Any) -> None:
        return None


class Endpoint:
    """A chat endpoint. The key comes from the environment, goes into one header, and is cut out of what is shown of a
    reply.
    """

    def __init__(
        self,
        url: str,
        model: str,
        key: str = "",
        *,
        temperature: float = 1.0,
        max_tokens: int = 4096,
        response_format: str = "json_schema",
        timeout: float = 120.0,
    ) -> None:
        """The arguments are GenChatConfig's. Raises UserError for those that cannot be meant."""
        if not url.startswith(("http://", "https://")):
            raise UserError(
                f"--url is {url!r}; expected the address of an OpenAI-compatible endpoint; try --url"
                " http://127.0.0.1:8000/v1"
            )
        if not model:
            raise UserError("no model is named; expected the endpoint's name of one; type --model NAME")
        if response_format not in RESPONSE_FORMATS:
            hint = nearest(response_format, list(RESPONSE_FORMATS), prefix="--response-format ")
            raise UserError(
                f"--response-format is {response_format!r}; expected one of {', '.join(RESPONSE_FORMATS)}{hint}"
            )
        if not all(33 <= ord(c) <= 126 for c in key.strip()):
            raise UserError(
                "the key holds blanks, line ends or letters beyond ASCII; expected one word; set the variable that"
                " --api-key-env names again"
            )
        self.url, self.timeout, self._key = url.rstrip("/") + "/chat/completions", timeout, key.strip()
        self.fields = {
            "model": model,
            "temperature": temperature,
            **({"max_tokens": max_tokens} if max_tokens else {}),
            **RESPONSE_FORMATS[response_format],
        }
        self._opener = urllib.request.build_opener(NoRedirect)

    def ask(self, instructions: str, seed: int, stop: threading.Event) -> Answer:
        """One answer. Waits and asks again while the endpoint is busy (429, 5xx) or out of reach, unless `stop` is set.

        Raises Refused for an answer without a text, UserError where asking again would not help.
        """
        messages = [{"role": "system", "content": instructions}, {"role": "user", "content": ASK}]
        body = json.dumps({**self.fields, "messages": messages, "seed": seed}).encode()
        jitter = random.Random(seed)
        for n in range(TRIES):
            try:
                return answer_of(self._post(body))
            except urllib.error.HTTPError as error:
                problem = f"status {error.code}: {self._shown(error)}"
                if error.code not in (408, 429) and error.code < 500:
                    remedy = (
                        "set the key in the variable that --api-key-env names"
                        if error.code in (401, 403)
                        else "see --url, --model and --response-format"
                    )
                    raise UserError(f"{self.url} answers with {problem}; expected a conversation; {remedy}") from None
                wait = error.headers.get("Retry-After", "")
            except (OSError, http.client.HTTPException) as error:  # out of reach, reset, timed out, cut short
                problem, wait = self._hidden(str(getattr(error, "reason", error)) or type(error).__name__), ""
            except ValueError as error:
                raise Refused(f"the endpoint's answer is not what its API promises ({error})") from None
            delay = float(wait) if wait.isdecimal() else BACK_OFF * 2**n * (0.5 + jitter.random())
            if n + 1 < TRIES and stop.wait(min(delay, LONGEST_WAIT)):
                raise Refused("stopped")
        remedy = "type the same command later, with fewer --workers if it is busy"
        raise UserError(f"{self.url} did not answer {TRIES} times in a row ({problem}); expected an answer; {remedy}")

    def _post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json", "User-Agent": "nanolab"} | (
            {"Authorization": f"Bearer {self._key}"} if self._key else {}
        )
        deadline, parts = time.monotonic() + self.timeout, []
        with self._opener.open(urllib.request.Request(self.url, body, headers), timeout=self.timeout) as response:
            while part := response.read1(1 << 16):
                parts.append(part)
                if time.monotonic() > deadline:
                    raise TimeoutError(f"no whole answer within {self.timeout:g} seconds")
                if sum(map(len, parts)) > MAX_BODY:
                    raise ValueError(f"more than {MAX_BODY} bytes")
            if response.length:  # read1 does not mind a connection that ends early
                raise http.client.IncompleteRead(b"".join(parts), response.length)
        return b"".join(parts)

    def _shown(self, error: urllib.error.HTTPError) -> str:
        """The beginning of an error's body, or where it redirects, as a terminal may be shown it."""
        if location := error.headers.get("Location"):
            return self._hidden(f"a redirect to {location}, which is not followed")
        return self._hidden(" ".join(error.read(2000).decode(errors="replace").split()))[:300]

    def _hidden(self, text: str) -> str:
        return harmless(text.replace(self._key, "[key]") if self._key else text)


def answer_of(body: bytes) -> Answer:
    """Raises ValueError for a body that is not an answer, Refused for an answer without a whole text."""
    try:
        found = json.loads(body)
        choice = found["choices"][0]
        text, finish, usage = choice["message"].get("content"), choice.get("finish_reason"), found.get("usage") or {}
        tokens = sum(int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens"))
    except (KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    if finish == "length":
        raise Refused("cut for length; raise --max-tokens")
    if not isinstance(text, str) or not text.strip():
        raise Refused("an answer without text")
    return Answer(text, tokens)
