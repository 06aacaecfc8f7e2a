"""Synthetic conversations: another model writes them, through any endpoint that speaks OpenAI's chat API. Imports no
torch.

A TOML file says what they are to differ in. For conversation i one entry of each axis is drawn, from the seed and i
alone, and put into the instructions, which go to the endpoint as its system message:

    topics = [...]        what it is about; a table of lists, [topics] with a list for each group, does as well
    personas = [...]      who asks
    openings = [...]      how the first message is written
    dynamics = [...]      how the conversation goes
    instructions = "..."  with {topic}, {persona}, {opening} and {dynamic} where they belong

Answers are checked (`messages_of`), compared with those that are there (`Seen`) and appended to a JSONL file that
chat.read_conversations reads. What is in the file already is not asked for again.
"""

import fcntl
import hashlib
import http.client
import ipaddress
import json
import os
import queue
import random
import re
import threading
import time
import unicodedata
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from nanolab.cli import UserError, nearest, read_toml
from nanolab.data.chat import Message, check_messages, text_of
from nanolab.terminal import harmless

# field -> its placeholder
AXES = {"topics": "topic", "personas": "persona", "openings": "opening", "dynamics": "dynamic"}
ASK = (
    'Write the conversation now. Answer with one JSON object and nothing else: {"messages": [{"role": "user",'
    ' "content": "..."}, {"role": "assistant", "content": "..."}, ...]}. The user begins, the two take turns, and the'
    " assistant has the last word."
)
ATTEMPTS = 3  # answers that are asked for, for one conversation, when they are malformed or duplicates
TRIES = 7  # requests for one answer, when the endpoint is busy or out of reach
BACK_OFF = 1.0  # seconds before the second request; doubles
LONGEST_WAIT = 60.0
HOPELESS = 10  # conversations given up in a row, with none kept, that end the command
MAX_BODY = 8 << 20  # bytes of an answer
SHINGLE = 5  # words
NEAR = 0.6  # two conversations that share so much of their shingles (Jaccard) are the same one
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


@dataclass(frozen=True)
class Spec:
    axes: dict[str, list[str]]  # placeholder -> its entries
    instructions: str
    hash: str  # of all that is in the file

    def drawn(self, seed: int, index: int) -> dict[str, str]:
        """The entries of conversation `index`."""
        draw = random.Random(repr((seed, index))).random  # Python promises to keep random()'s sequence, not choice()'s
        return {name: entries[int(draw() * len(entries))] for name, entries in self.axes.items()}

    def filled(self, entries: dict[str, str]) -> str:
        return re.sub(r"\{(\w+)\}", lambda m: entries.get(m[1], m[0]), self.instructions)


def read_spec(path: Path | str) -> Spec:
    """Raises UserError for a file that is not as the module's docstring says."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(
            f"{path} is not a file; expected a TOML with {', '.join(AXES)} and instructions; copy runs/gen_chat.toml"
            " and change it"
        )
    fields = read_toml(path)
    known = [*AXES, "instructions"]
    for name in fields:
        if name not in known:
            raise UserError(f"{path} has the field {name!r}; expected {', '.join(known)}{nearest(name, known)}")
    axes = {}
    for name, placeholder in AXES.items():
        entries = fields.get(name, [])
        if isinstance(entries, dict):
            entries = [entry for group in entries.values() for entry in (group if isinstance(group, list) else [None])]
        if not isinstance(entries, list) or not entries or not all(isinstance(e, str) and e.strip() for e in entries):
            raise UserError(f"{path}: {name} is {fields.get(name)!r}; expected a list of texts, at least one; mend it")
        axes[placeholder] = entries
    instructions = fields.get("instructions", "")
    lacking = [f"{{{p}}}" for p in AXES.values() if not isinstance(instructions, str) or f"{{{p}}}" not in instructions]
    if lacking:
        raise UserError(
            f"{path}: instructions without {', '.join(lacking)}; expected every axis to have its place there; add it"
        )
    return Spec(axes, instructions, hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16])


# --- the endpoint -----------------------------------------------------------------------------------------------------


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


def messages_of(text: str) -> list[Message]:
    """The conversation in an answer: one JSON object as ASK describes it, a code fence around it or not. Raises
    Refused.
    """
    text = re.sub(r"\A\s*```\w*\n(.*)\n\s*```\s*\Z", r"\1", text, flags=re.DOTALL)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Refused(f"not JSON ({error})") from None
    if not isinstance(found, dict) or list(found) != ["messages"] or not isinstance(found["messages"], list):
        raise Refused("no object with the one field messages, a list")
    messages = []
    for n, message in enumerate(found["messages"], 1):
        if (
            not isinstance(message, dict)
            or set(message) != {"role", "content"}
            or not all(isinstance(v, str) for v in message.values())
        ):
            raise Refused(f"message {n} is not an object with the texts role and content")
        messages.append({"role": message["role"], "content": message["content"].strip()})
    try:
        check_messages(messages)
    except UserError as error:
        raise Refused(str(error).split(";")[0]) from None
    if messages[0]["role"] != "user" or messages[-1]["role"] != "assistant":
        raise Refused("it does not begin with the user and end with the assistant")
    return messages


# --- duplicates -------------------------------------------------------------------------------------------------------


class Seen:
    """The conversations so far; finds those that say the same in the same words."""

    def __init__(self) -> None:
        self._sizes: list[int] = []  # shingles of each
        self._places: dict[tuple[str, ...], list[int]] = {}  # shingle -> which have it
        self._names: list[str] = []

    def like(self, messages: list[Message]) -> str | None:
        """What there is like it already, in words; None if nothing is."""
        found = shingles(messages)
        shared = Counter(i for shingle in found for i in self._places.get(shingle, ()))
        for i, n in shared.most_common(1):
            alike = n / (len(found) + self._sizes[i] - n)
            if alike >= NEAR:
                return f"{alike:.0%} the same as {self._names[i]}"
        return None

    def add(self, messages: list[Message], name: str) -> None:
        found = shingles(messages)
        for shingle in found:
            self._places.setdefault(shingle, []).append(len(self._sizes))
        self._sizes.append(len(found))
        self._names.append(name)


def shingles(messages: list[Message]) -> set[tuple[str, ...]]:
    """All runs of SHINGLE words, whatever their case, width, accents' encoding and punctuation; of fewer words, all of
    them.
    """
    text = unicodedata.normalize("NFKC", " ".join(text_of(m["content"]) for m in messages)).casefold()
    words = re.findall(r"\w+", text) or list(text)
    return {tuple(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))}


# --- the file ---------------------------------------------------------------------------------------------------------


class Collection:
    """The JSONL file: what is in it, and appending to it. One process at a time works on it."""

    def __init__(self, path: Path | str, spec: Spec, seed: int) -> None:
        """Raises UserError where the file is another command's work, or was begun with another spec or seed."""
        self.path, self.about = Path(path).expanduser(), {"spec": spec.hash, "seed": seed}
        self.done: set[int] = set()  # indices of conversations
        self.seen = Seen()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a+b", buffering=0)
        except OSError as error:
            raise UserError(
                f"{path} cannot be written: {error.strerror}; expected a file to append to; try another --output"
            ) from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"{path} is being written by another process; expected none; wait for it, or name another --output"
            ) from None
        self._read()

    def _read(self) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        self._file.truncate(whole)  # what a kill left of the last line
        for n, line in enumerate(content[:whole].splitlines(), 1):
            try:
                row = json.loads(line)
                index, messages, about = row["index"], row["messages"], {key: row[key] for key in self.about}
                check_messages(messages)
            except (ValueError, KeyError, TypeError, RecursionError):
                raise UserError(
                    f"{self.path}:{n} is not a line of this command; expected a file that it wrote, or none; name"
                    " another --output"
                ) from None
            if about != self.about:
                seen = f"{self.path}:{n} was made with another spec file or --seed ({about}, now {self.about})"
                raise UserError(f"{seen}; expected the same; name another --output, or put them back")
            self.done.add(index)
            self.seen.add(messages, f"conversation {index}")

    def add(self, index: int, messages: list[Message], entries: dict[str, str], model: str) -> None:
        row = {"index": index, "messages": messages, **entries, "model": model, **self.about}
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "replace")
        try:
            if self._file.write(line) != len(line):
                raise OSError(None, "no space left")
            os.fsync(self._file.fileno())
        except OSError as error:
            raise UserError(
                f"{self.path} could not be written: {error.strerror}; make room there and type the same command again"
            ) from None
        self.done.add(index)
        self.seen.add(messages, f"conversation {index}")

    def close(self) -> None:
        self._file.close()


# --- all together -----------------------------------------------------------------------------------------------------


class Event(NamedTuple):
    """What became of an answer. kind: kept | again (another one is asked for) | given up."""

    kind: str
    index: int
    reason: str
    messages: int
    tokens: int


class Job(NamedTuple):
    index: int
    attempt: int


def generate(
    spec: Spec, collection: Collection, endpoint: Endpoint, *, num: int, workers: int, seed: int
) -> Iterator[Event]:
    """Fill the collection up to conversations 0 ... num - 1, `workers` requests at a time; yields what becomes of each
    answer.

    Raises UserError when the endpoint cannot be used, and when nothing that it writes is of use. What is kept is on
    disk."""
    jobs: queue.Queue[Job | None] = queue.Queue()
    results: queue.Queue[tuple[Job, Answer | Exception]] = queue.Queue()
    stop = threading.Event()

    def work() -> None:
        while job := jobs.get():
            try:
                results.put(
                    (job, endpoint.ask(spec.filled(spec.drawn(seed, job.index)), request_seed(seed, job), stop))
                )
            except Exception as error:  # handed to the caller's thread
                results.put((job, error))

    todo = iter([i for i in range(num) if i not in collection.done])
    # daemons: Ctrl-C does not wait for answers
    threads = [threading.Thread(target=work, daemon=True) for _ in range(workers)]
    open_jobs = hopeless = 0
    try:
        for thread, index in zip(threads, todo):
            thread.start()
            jobs.put(Job(index, 0))
            open_jobs += 1
        while open_jobs:
            job, outcome = results.get()
            event = judged(spec, collection, endpoint, seed, job, outcome)
            again = event.kind == "again"
            following = job.index if again else next(todo, None)
            if following is None:
                open_jobs -= 1
            else:
                jobs.put(Job(following, job.attempt + 1 if again else 0))
            hopeless = 0 if event.kind == "kept" else hopeless + (event.kind == "given up")
            yield event
            if hopeless >= HOPELESS:
                seen = f"{hopeless} conversations in a row came to nothing, the last one because: {event.reason}"
                raise UserError(f"{seen}; expected some of use; try another --model or other instructions")
    finally:
        stop.set()
        for _ in threads:
            jobs.put(None)


def judged(
    spec: Spec, collection: Collection, endpoint: Endpoint, seed: int, job: Job, outcome: Answer | Exception
) -> Event:
    """Keep the answer if it is of use. Raises what is no matter of one answer."""
    tokens = outcome.tokens if isinstance(outcome, Answer) else 0
    try:
        if isinstance(outcome, Exception):
            raise outcome
        messages = messages_of(outcome.text)
        if like := collection.seen.like(messages):
            raise Refused(like)
    except Refused as reason:
        return Event("again" if job.attempt + 1 < ATTEMPTS else "given up", job.index, str(reason), 0, tokens)
    collection.add(job.index, messages, spec.drawn(seed, job.index), endpoint.fields["model"])
    return Event("kept", job.index, "", len(messages), tokens)


def request_seed(seed: int, job: Job) -> int:
    """What the endpoint is asked to seed its sampling with: another number for each attempt."""
    return int.from_bytes(hashlib.sha256(repr((seed, *job)).encode()).digest()[:4], "big") >> 1
