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
import json
import os
import queue
import random
import re
import threading
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from nanolab.cli import UserError, check_bounds, nearest, read_toml
from nanolab.data.chat import Message, check_messages, text_of
from nanolab.data.config import GenChatConfig
from nanolab.data.endpoint import Answer, Endpoint, Refused, exposed_to
from nanolab.files import key_seed
from nanolab.terminal import harmless

# field -> its placeholder
AXES = {"topics": "topic", "personas": "persona", "openings": "opening", "dynamics": "dynamic"}
ATTEMPTS = 3  # answers that are asked for, for one conversation, when they are malformed or duplicates
HOPELESS = 10  # conversations given up in a row, with none kept, that end the command
SHINGLE = 5  # words
NEAR = 0.6  # two conversations that share so much of their shingles (Jaccard) are the same one


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
            raise UserError(f"{path}: {name} is {fields.get(name)!r}; expected a list of texts, at least one; fix it")
        axes[placeholder] = entries
    instructions = fields.get("instructions", "")
    lacking = [f"{{{p}}}" for p in AXES.values() if not isinstance(instructions, str) or f"{{{p}}}" not in instructions]
    if lacking:
        raise UserError(
            f"{path}: instructions without {', '.join(lacking)}; expected every axis to have its place there; add it"
        )
    return Spec(axes, instructions, hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16])


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


class Progress(NamedTuple):
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
) -> Iterator[Progress]:
    """Fill the collection up to conversations 0 ... num - 1, `workers` requests at a time; yields what becomes of each
    answer.

    Raises UserError when the endpoint cannot be used, and when nothing that it writes is of use. What is kept is on
    disk."""
    jobs: queue.Queue[Job | None] = queue.Queue()
    results: queue.Queue[tuple[Job, Answer | Exception]] = queue.Queue()

    def work() -> None:
        while job := jobs.get():
            try:
                results.put(
                    (job, endpoint.ask(spec.filled(spec.drawn(seed, job.index)), key_seed(seed, *job, bits=31)))
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
            event = outcome_of(spec, collection, endpoint, seed, job, outcome)
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
        for _ in threads:
            jobs.put(None)


def outcome_of(
    spec: Spec, collection: Collection, endpoint: Endpoint, seed: int, job: Job, outcome: Answer | Exception
) -> Progress:
    """Keep the answer if it is of use. Raises what is no matter of one answer."""
    tokens = outcome.tokens if isinstance(outcome, Answer) else 0
    try:
        if isinstance(outcome, Exception):
            raise outcome
        messages = messages_of(outcome.text)
        if like := collection.seen.like(messages):
            raise Refused(like)
    except Refused as reason:
        return Progress("again" if job.attempt + 1 < ATTEMPTS else "given up", job.index, str(reason), 0, tokens)
    collection.add(job.index, messages, spec.drawn(seed, job.index), endpoint.fields["model"])
    return Progress("kept", job.index, "", len(messages), tokens)


def write_conversations(cfg: GenChatConfig) -> dict[str, Any]:
    """Have --model write --num conversations into --output, and print what becomes of each answer; returns how many
    there are, and what they took.

    Raises UserError for flags and files that do not fit, and as `generate` does.
    """
    if not cfg.spec or not cfg.output:
        raise UserError(
            "--spec or --output is not given; expected a TOML file and a JSONL file; type --spec runs/gen_chat.toml"
            " --output chats.jsonl"
        )
    check_bounds(type(cfg), vars(cfg))
    spec, key = read_spec(cfg.spec), os.environ.get(cfg.api_key_env, "")
    of_endpoint = {name: getattr(cfg, name) for name in ("temperature", "max_tokens", "response_format", "timeout")}
    endpoint = Endpoint(cfg.url, cfg.model, key, **of_endpoint)
    collection = Collection(cfg.output, spec, cfg.seed)

    def tell(line: str) -> None:
        print(harmless(line), flush=True)  # some of it is the endpoint's

    combinations = " x ".join(f"{len(entries)} {name}s" for name, entries in spec.axes.items())
    before = sum(i < cfg.num for i in collection.done)
    tell(
        f"{cfg.num} conversations of {cfg.model} at {endpoint.url}, {before} of them in {cfg.output} already;"
        f" {combinations}"
    )
    if key and (host := exposed_to(cfg.url)):
        tell(
            f"warning: the key goes to {host} over plain http, where everybody on the way can read it; type --url"
            " https://... if the endpoint has it"
        )
    if not key:
        tell(f"note: no key is sent: {cfg.api_key_env or '--api-key-env'} is not set")
    counts, tokens = {"kept": 0, "again": 0, "given up": 0}, 0
    try:
        for event in generate(spec, collection, endpoint, num=cfg.num, workers=cfg.workers, seed=cfg.seed):
            counts[event.kind] += 1
            tokens += event.tokens
            what = f"{event.messages} messages" if event.kind == "kept" else event.reason
            tell(
                f"conversation {event.index:05d} | {event.kind:<8} | {before + counts['kept']:5d}/{cfg.num} |"
                f" {tokens:9,} tokens | {what}"
            )
    finally:
        collection.close()
        found = before + counts["kept"]
        more = "; the same command continues" if found < cfg.num else ""
        tell(f"{found} of {cfg.num} conversations are in {cfg.output}{more}")
    return {"output": cfg.output, "conversations": found, "tokens": tokens, **counts}
