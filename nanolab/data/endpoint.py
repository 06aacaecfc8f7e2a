"""An endpoint that speaks OpenAI's chat API, asked by its client until it answers: busy ones are waited for, redirects
are refused, the key stays out of what is shown. Imports no torch."""

import ipaddress
import time
import urllib.parse
from collections.abc import Iterator
from typing import Any, NamedTuple

from nanolab.cli import UserError, nearest
from nanolab.terminal import harmless

try:
    import httpx2
    import openai
except ImportError as error:
    raise UserError(
        "the client of endpoints, openai, is not installed; expected the extra gen; type: bash runs/setup.sh gen"
    ) from error

ASK = (
    'Write the conversation now. Answer with one JSON object and nothing else: {"messages": [{"role": "user",'
    ' "content": "..."}, {"role": "assistant", "content": "..."}, ...]}. The user begins, the two take turns, and the'
    " assistant has the last word."
)


TRIES = 11  # requests for one answer, when the endpoint is busy or out of reach: about a minute of the client's waits
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


class Bounded(httpx2.SyncByteStream):
    """The body of an answer, bounded in time and size: the client's own timeout is one of silence."""

    def __init__(self, parts: Any, seconds: float) -> None:
        self.parts, self.seconds, self.deadline = parts, seconds, time.monotonic() + seconds

    def __iter__(self) -> Iterator[bytes]:
        size = 0
        for part in self.parts:
            size += len(part)
            if time.monotonic() > self.deadline:
                raise httpx2.ReadTimeout(f"no whole answer within {self.seconds:g} seconds")
            if size > MAX_BODY:
                raise Refused(f"an answer of more than {MAX_BODY} bytes")
            yield part

    def close(self) -> None:
        self.parts.close()


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
        self.url, self._key = url.rstrip("/") + "/chat/completions", key.strip()
        self.fields: dict[str, Any] = {
            "model": model,
            "temperature": temperature,
            **({"max_tokens": max_tokens} if max_tokens else {}),
            **RESPONSE_FORMATS[response_format],
            **({} if self._key else {"extra_headers": {"Authorization": openai.omit}}),
        }

        def bound(response: httpx2.Response) -> None:
            response.stream = Bounded(response.stream, timeout)

        self._client = openai.OpenAI(
            base_url=url,
            api_key=self._key or "none",
            timeout=timeout,
            max_retries=TRIES - 1,
            # a redirect is an error: it might lead the request to anybody
            http_client=openai.DefaultHttpxClient(follow_redirects=False, event_hooks={"response": [bound]}),
        )

    def ask(self, instructions: str, seed: int) -> Answer:
        """One answer. The client waits and asks again while the endpoint is busy (429, 5xx) or out of reach.

        Raises Refused for an answer without a text, UserError where asking again would not help.
        """
        messages: list[Any] = [{"role": "system", "content": instructions}, {"role": "user", "content": ASK}]
        busy = "type the same command later, with fewer --workers if it is busy"
        try:
            return answer_of(self._client.chat.completions.create(messages=messages, seed=seed, **self.fields))
        except openai.APIConnectionError as error:  # out of reach, reset, timed out, cut short
            problem, remedy = str(error.__cause__ or error), busy
        except openai.APIStatusError as error:
            code, location = error.status_code, error.response.headers.get("Location")
            said = f"a redirect to {location}, which is not followed" if location else error.response.text
            problem = f"status {code}: {' '.join(said.split())}"
            again = code in (408, 409, 429) or code >= 500
            remedy = busy if again else "see --url, --model, --response-format and --api-key-env's key"
        except (ValueError, RecursionError, openai.APIError) as error:
            raise Refused(f"the endpoint's answer is not what its API promises ({error})") from None
        tries = f" in {TRIES} tries" if remedy is busy else ""
        problem = harmless(problem.replace(self._key, "[key]") if self._key else problem)[:320]
        raise UserError(f"{self.url} gives no answer{tries} ({problem}); expected a conversation; {remedy}")


def answer_of(found: Any) -> Answer:
    """Raises ValueError for what is not a ChatCompletion (the client checks no types), Refused for one without a whole
    text."""
    try:
        choice, usage = found.choices[0], found.usage
        text, finish, tokens = (
            choice.message.content,
            choice.finish_reason,
            int(usage.total_tokens or 0) if usage else 0,
        )
    except (IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    if finish == "length":
        raise Refused("cut for length; raise --max-tokens")
    if not isinstance(text, str) or not text.strip():
        raise Refused("an answer without text")
    return Answer(text, tokens)
