"""Conversations <-> token ids and loss mask: the one chat template, its inverse, its checks, and readers of JSONL
files.

A message is {"role": "system" | "user" | "assistant", "content": text}; an assistant's content may also be a list of
parts
{"type": "text" | "python" | "python_output", "text": text}: what it says, what it gives to the tool, what the tool
answers.
A conversation is a list of messages: at most one system message, first; then user and assistant in turn. Layout:

    bos [system text] (user_start text user_end assistant_start parts assistant_end)*

Trained on (mask 1): the assistant's text, its tool calls with both marks, and assistant_end; nothing of an assistant's
message with "weight": 0. Ordinary text never yields a special id, whatever it looks like. A prompt ends with
assistant_start, or inside the assistant's turn: with the output that somebody else's tool has given to its call.
Imports no torch."""

import gzip
import json
import shlex
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nanolab.cli import UserError, nearest
from nanolab.data.encoding import HEAD, check_utf8
from nanolab.data.kinds import check_kind
from nanolab.data.tokenizer import Tokenizer

# {"role": str, "content": str or list of Part}; with "weight": 0 where an assistant's is not trained on
Message = dict[str, Any]
Part = dict[str, str]  # {"type": str, "text": str}

MAX_LINE = 64_000_000  # bytes of a line, unpacked


class Mark(NamedTuple):
    start: str  # special token before the part's text; empty: none
    end: str
    trained: int


PARTS = {
    "text": Mark("", "", 1),
    "python": Mark("<|python_start|>", "<|python_end|>", 1),
    "python_output": Mark("<|output_start|>", "<|output_end|>", 0),
}
ROLES = ("system", "user", "assistant")
# Names of roles in the files that read_conversations knows: ShareGPT's and OpenAI's.
ROLE_NAMES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
}

# Fields by which files say whether a turn is trained on: of a message, or beside the messages (a list, or one value for
# all of them).
WEIGHTS = ("weight", "train", "trainable", "loss", "loss_mask")
LISTS = (*WEIGHTS, "weights")
# Fields beside the messages that would change what is learned, and that fine-tuning does not read. `label` only where
# it is not text: true, 0.
OTHER_TRAINING = (
    "label",
    "chosen",
    "rejected",
    "rejected_response",
    "rejected_messages",
    "mask",
    "masks",
    "assistant_masks",
)
READ = ("messages", "conversations", "system")
EMPTY = (None, "", [], {})
SHOWN = 5  # lines of a kind that an error names


def template_of(tokenizer: Tokenizer) -> str:
    """The template above in Jinja, for `transformers`, with the name of the token that begins this tokenizer's
    texts.
    """
    return (
        Path(__file__)
        .with_name("chat_template.jinja")
        .read_text(encoding="utf-8")
        .replace("<|bos|>", tokenizer.decode([tokenizer.bos]))
    )


class Rendered(NamedTuple):
    ids: list[int]
    mask: list[int]  # as long as ids; 1 where the token is trained on, as a target


def parts_of(content: str | Sequence[Part]) -> list[Part]:
    """`content` as parts, neighbouring texts joined (the ids do not show where they met) and empty texts left out."""
    parts: list[Part] = []
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        if part["type"] == "text" and parts and parts[-1]["type"] == "text":
            parts[-1] = {"type": "text", "text": parts[-1]["text"] + part["text"]}
        elif part["type"] != "text" or part["text"]:
            parts.append(part)
    return parts


def text_of(content: str | Sequence[Part]) -> str:
    """What the assistant says: its text parts joined; tool calls and their outputs are left out."""
    return "".join(part["text"] for part in parts_of(content) if part["type"] == "text")


def render(tokenizer: Tokenizer, messages: Sequence[Message]) -> Rendered:
    """Ids and loss mask of a whole conversation. `messages` are taken as they are: check_messages is for what people
    wrote.
    """
    ids, mask = [tokenizer.bos], [0]
    for message in messages:
        for piece, trained in _pieces(tokenizer, message):
            ids += piece
            mask += [trained] * len(piece)
    return Rendered(ids, mask)


def render_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Ids from where a model goes on: up to and with assistant_start, or the output_end of a call that was answered.

    Raises UserError unless the last message is a user's, or an assistant's that ends with a python_output.
    """
    if messages and awaits_more(messages[-1]):
        return render(tokenizer, messages).ids[:-1]  # without assistant_end: the turn is not over
    if not messages or messages[-1]["role"] != "user":
        seen = f"the last message is {messages[-1]['role']}'s" if messages else "there is no message"
        raise UserError(f"{seen}; expected a user's, which the model is to answer; add one")
    return render(tokenizer, messages).ids + [tokenizer.special("<|assistant_start|>")]


def awaits_more(message: Message) -> bool:
    """Whether this is an assistant's turn whose last part is the answer to its call: the assistant goes on from
    there.
    """
    content = message["content"]
    return (
        message["role"] == "assistant"
        and isinstance(content, list)
        and bool(content)
        and content[-1]["type"] == "python_output"
    )


def _pieces(tokenizer: Tokenizer, message: Message) -> Iterator[tuple[list[int], int]]:
    role, content, special = message["role"], message["content"], tokenizer.special
    if role == "system":
        yield tokenizer.encode(content), 0
    elif role == "user":
        yield [special("<|user_start|>"), *tokenizer.encode(content), special("<|user_end|>")], 0
    else:
        weight = message.get("weight", 1)
        yield [special("<|assistant_start|>")], 0
        for part in parts_of(content):
            start, end, trained = PARTS[part["type"]]
            ids = tokenizer.encode(part["text"])
            yield ([special(start), *ids, special(end)] if start else ids), trained * weight
        yield [special("<|assistant_end|>")], weight


def parse_reply(tokenizer: Tokenizer, ids: Iterable[int]) -> list[Part]:
    """The parts of one assistant turn from what follows its assistant_start: the inverse of `render`.

    Reads up to assistant_end, bos, or the end of `ids`. A part that was cut off counts as far as it goes; special
    tokens that have no business there are left out."""
    special, ending = tokenizer.special, {tokenizer.bos, tokenizer.special("<|assistant_end|>")}
    opens = {special(mark.start): kind for kind, mark in PARTS.items() if mark.start}
    closes = {special(mark.end): kind for kind, mark in PARTS.items() if mark.end}
    others = set(tokenizer.specials.values()) - set(opens) - set(closes)
    kind, found = "text", [("text", [])]
    for i in ids:
        if i in ending:
            break
        if i in opens:
            kind = opens[i]
            found.append((kind, []))
        elif closes.get(i) == kind:
            kind = "text"
            found.append((kind, []))
        elif i not in others and i not in closes:
            found[-1][1].append(i)
    return parts_of([{"type": kind, "text": tokenizer.decode(run)} for kind, run in found])


def check_messages(messages: Any, where: str = "", prompt: bool = False) -> None:
    """Raises UserError, headed by `where` (file:line), for what is not a conversation that one can train on.

    prompt: instead of an assistant turn to train on, the last message must be one that a model can go on from.
    """
    at = f"{where}: " if where else ""
    if not isinstance(messages, list) or not messages:
        raise UserError(
            f"{at}{_shape(messages)} in place of messages; expected a list with at least a user's and an assistant's;"
            " mend or delete it",
            "no-messages",
        )
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise UserError(
                f"{at}message {i + 1} is {_shape(message)}; expected an object with the fields role and content; mend"
                " or delete it",
                "not-a-message",
            )
        role, expected = message["role"], _expected(messages, i)
        if role not in ROLES:
            raise UserError(
                f"{at}message {i + 1} has the role {role!r}; expected one of"
                f" {', '.join(ROLES)}{nearest(str(role), list(ROLES))}",
                "unknown-role",
                role=role,
            )
        if role not in expected:
            raise UserError(
                f"{at}message {i + 1} is {role}'s; expected {' or '.join(expected)}: user and assistant take turns;"
                " mend the order",
                "turn-order",
            )
        _check_content(role, message["content"], f"{at}message {i + 1} ({role}'s)")
    if prompt and messages[-1]["role"] != "user" and not awaits_more(messages[-1]):
        raise UserError(
            f"{at}the last message is {messages[-1]['role']}'s; expected a user's, which the model is to answer;"
            " add one",
            "no-question",
        )
    if not prompt and all(message["role"] != "assistant" for message in messages):
        raise UserError(
            f"{at}no assistant turn among {len(messages)} messages; expected one to train on; add it or delete the"
            " conversation",
            "no-assistant-turn",
        )


def _expected(messages: list[Message], i: int) -> tuple[str, ...]:
    if i == 0:
        return ("system", "user")
    return ("assistant",) if messages[i - 1]["role"] == "user" else ("user",)


def _check_content(role: str, content: Any, at: str) -> None:
    if isinstance(content, list) and role == "assistant":
        for j, part in enumerate(content):
            if (
                not isinstance(part, dict)
                or part.keys() != {"type", "text"}
                or not all(isinstance(v, str) for v in part.values())
            ):
                raise UserError(
                    f"{at}: part {j + 1} is {_shape(part)}; expected an object with the fields type and text, both"
                    " text; mend it",
                    "not-a-part",
                )
            if part["type"] not in PARTS:
                hint = nearest(part["type"], list(PARTS))
                raise UserError(
                    f"{at}: part {j + 1} has the type {part['type']!r}; expected one of {', '.join(PARTS)}{hint}",
                    "unknown-part",
                    part=part["type"],
                )
            if part["type"] == "python_output" and (j == 0 or content[j - 1]["type"] != "python"):
                raise UserError(
                    f"{at}: part {j + 1} is python_output; expected a python part before it, whose output it is; mend"
                    " the order",
                    "part-order",
                )
    elif not isinstance(content, str):
        allowed = "text or a list of parts" if role == "assistant" else "text"
        raise UserError(f"{at} has {_shape(content)} as content; expected {allowed}; mend or delete it", "not-text")
    if not any(part["text"].strip() for part in parts_of(content)):
        raise UserError(f"{at} is empty; expected text; fill it or delete the conversation", "empty-message")


def _shape(value: Any) -> str:
    """What `value` is, in words short enough for a message."""
    if isinstance(value, dict):
        return f"an object with the fields {', '.join(map(str, value)) or '(none)'}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return (
        "nothing"
        if value is None
        else f"the text {value[:40]!r}"
        if isinstance(value, str)
        else f"{type(value).__name__} {value!r}"
    )


def read_jsonl(path: Path | str) -> Iterator[tuple[str, Any]]:
    """("file:line", value) of each line that is not blank, of a .jsonl or .jsonl.gz file. Raises UserError naming the
    line.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"{path} is not a file; expected JSON lines; check the path", "no-file", file=str(path))
    if path.suffix != ".gz":
        check_kind(path, ".jsonl", reads_parquet=False)
    n = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            for n, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), 1):
                if len(line) > MAX_LINE:
                    raise UserError(
                        f"{path}:{n} has more than {MAX_LINE:,} bytes; expected at most that; divide or delete the"
                        " line",
                        "line-too-long",
                        file=str(path),
                        line=n,
                    )
                if n == 1:
                    check_utf8(path, line[:HEAD])
                if line.strip():
                    yield f"{path}:{n}", json.loads(line.decode("utf-8-sig"))
    except UserError:  # which is a ValueError
        raise
    except (ValueError, RecursionError) as error:  # JSONDecodeError, UnicodeDecodeError; brackets nested too deep
        if n == 1 and line.lstrip()[:1] == b"[" and line.rstrip()[-1:] in b"[{,":  # spread over several lines
            raise _json_array(path) from None
        expected = "expected one JSON value per line, in UTF-8"
        raise UserError(
            f"{path}:{n}: not JSON ({error}); {expected}; mend or delete the line (of one large array: jq -c '.[]' IN >"
            " OUT)",
            "not-json",
            file=str(path),
            line=n,
        ) from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is not a whole gzip file ({error}); expected one; copy or download it again") from None


def _json_array(path: Path) -> UserError:
    seen, advice = (
        f"{path} is one JSON array of conversations",
        f"type: jq -c '.[]' {shlex.quote(str(path))} > OUT.jsonl",
    )
    return UserError(f"{seen}; expected one conversation per line; {advice}", "json-array", path=str(path))


def read_conversations(path: Path | str, unread: Counter[str] | None = None) -> list[list[Message]]:
    """The conversations of a JSONL file, each line one: an array of messages, ShareGPT's or OpenAI's object. All are
    checked.

    ShareGPT: {"conversations": [{"from": "human", "value": ...}, ...]}; OpenAI: {"messages": [{"role": ..., "content":
    ...}, ...]}. A field "system" of such an object is the system message. A turn that the file marks as one not to
    learn (a field of WEIGHTS that is 0 or false, of the message or in a list beside the messages) has "weight": 0; a
    system's or user's message that it marks as one to learn has "weight": 1, which nothing obeys. Other fields beside
    the list are left out; `unread` counts them by name. Raises UserError naming file and line for anything that is not
    a conversation, all of them at once, and for a file without any."""
    found, bad = [], []
    try:
        for where, value in read_jsonl(path):
            if (
                isinstance(value, list)
                and value
                and (
                    isinstance(value[0], list)
                    or (isinstance(value[0], dict) and {"messages", "conversations"} & value[0].keys())
                )
            ):
                raise _json_array(Path(path).expanduser())
            try:
                messages = _messages(value, where)
                check_messages(messages, where)
                found.append(messages)
                if unread is not None and isinstance(value, dict):
                    unread.update(key for key in value if key not in (*READ, *LISTS) and value[key] not in EMPTY)
            except UserError as error:
                bad.append((where, error))
    except UserError as error:  # the rest of the file cannot be read
        if not bad:
            raise
        bad.append((f"{path}:{error.values.get('line', '')}", error))
    if bad:
        raise _refused(str(path), bad, len(found))
    if not found:
        raise UserError(
            f"{path} holds no conversation; expected at least one, as a JSON array of messages on a line; check the"
            " path",
            "no-conversations",
            file=str(path),
        )
    return found


def _refused(path: str, bad: list[tuple[str, UserError]], n_good: int) -> UserError:
    """The one error of a file's bad lines: the error itself of a single one, else how many there are of each kind and
    the first of them.
    """
    kinds: dict[tuple, list[tuple[int, UserError]]] = {}
    for where, error in bad:
        kinds.setdefault(
            (error.code, *map(repr, error.values.items())) if error.code != "not-json" else (error.code,), []
        ).append((int(where.rpartition(":")[2] or 0), error))
    by_code: dict[str, list[int]] = {}
    for (code, *_), errors in kinds.items():
        by_code.setdefault(code, []).extend(line for line, _ in errors)
    values = {
        "file": path,
        "bad": len(bad),
        "reasons": {code: len(lines) for code, lines in by_code.items()},
        "lines": by_code,
    }
    if len(bad) == 1:
        ((line, error),) = kinds.popitem()[1]
        return UserError(str(error), error.code, **{**error.values, **values, "line": line})
    lines = [
        f"{path}: {len(bad)} of {len(bad) + n_good} lines are no conversations that can be read; expected none; correct"
        " or delete them"
    ]
    for (code, *_), errors in sorted(kinds.items(), key=lambda kind: -len(kind[1])):
        first = ", ".join(str(line) for line, _ in errors[:SHOWN]) + (", ..." if len(errors) > SHOWN else "")
        lines.append(
            f"  {len(errors):,} {code}, line{'s' if len(errors) > 1 else ''} {first}:"
            f" {str(errors[0][1]).partition(f':{errors[0][0]}: ')[2] or errors[0][1]}"
        )
    common = {
        key: value for key, value in bad[0][1].values.items() if all(error.values.get(key) == value for _, error in bad)
    }
    return UserError(
        "\n".join(lines), bad[0][1].code if len(by_code) == 1 else "bad-conversations", **{**common, **values}
    )


def _messages(value: Any, where: str) -> Any:
    system: list[Message] = []
    marks: list[dict[str, Any]] = []
    if isinstance(value, dict):
        names = [key for key in ("messages", "conversations") if key in value]
        if len(names) != 1:
            expected = "expected an array of messages, or an object with one of the fields messages and conversations"
            raise UserError(
                f"{where}: {_shape(value)}; {expected}; rename the field that holds them", "no-messages-field"
            )
        for key in OTHER_TRAINING:
            if (mark := value.get(key)) not in EMPTY and not (key == "label" and isinstance(mark, (str, list, dict))):
                raise UserError(
                    f"{where}: field {key!r} beside the messages; fine-tuning cannot obey it and would learn every"
                    " turn; delete the conversation, or the field where it changes nothing",
                    "field-not-read",
                    field=key,
                )
        system = [{"role": "system", "content": value["system"]}] if value.get("system") else []
        beside, value = value, value[names[0]]
        marks = _beside(beside, value, where) if isinstance(value, list) else []
    if not isinstance(value, list):
        return value
    return system + [
        _message(message, f"{where}: message {i + 1}", marks[i] if marks else {}) for i, message in enumerate(value)
    ]


def _beside(fields: dict[str, Any], messages: list[Any], where: str) -> list[dict[str, Any]]:
    """What the fields beside the messages say of each: from a list with an entry for each message or for each
    assistant's, or from one value for all.
    """
    found: list[dict[str, Any]] = [{} for _ in messages]
    answers = [
        i
        for i, message in enumerate(messages)
        if isinstance(message, dict) and ROLE_NAMES.get(str(message.get("role", message.get("from")))) == "assistant"
    ]
    for key in LISTS:
        if (given := fields.get(key)) in EMPTY:
            continue
        if not isinstance(given, list):
            if _weight(given, f"{where}: field {key!r} beside the messages", key) == 0:
                given = [0] * len(answers)
            else:
                continue  # 1: as without it
        places = range(len(messages)) if len(given) == len(messages) else answers
        if len(given) != len(places):
            raise UserError(
                f"{where}: field {key!r} beside the messages has {len(given)} entries; expected {len(messages)}, one"
                f" for each message, or {len(answers)}, one for each of the assistant's; give as many",
                "turn-weights",
                field=key,
                entries=len(given),
                messages=len(messages),
                assistants=len(answers),
            )
        for i, entry in zip(places, given):
            found[i][f"{key} beside the messages"] = entry
    return found


def _weight(value: Any, at: str, field: str) -> int:
    """Whether to learn: 0 or 1."""
    if type(value) not in (bool, int, float) or value not in (0, 1):
        seen, expected = (
            f"{at} is {json.dumps(value)}",
            "expected 0 or false for what is not to be learned, or 1 or true",
        )
        raise UserError(
            f"{seen}; {expected}; write one of them or delete the field",
            "turn-weight",
            field=field.partition(" ")[0],
            value=value,
        )
    return int(value)


def _message(message: Any, at: str, beside: dict[str, Any]) -> Any:
    """One message of a file in our form. A field that we would have to ignore is an error: it may hold a tool call.
    beside: marks from outside.
    """
    if not isinstance(message, dict):
        return message
    role_key, content_key = ("from", "value") if "from" in message else ("role", "content")
    extra = [
        key for key, value in message.items() if key not in (role_key, content_key, *WEIGHTS) and value not in EMPTY
    ]
    if extra:
        raise UserError(
            f"{at} has the field {extra[0]!r}; expected only {role_key} and {content_key}; delete the conversation, or"
            " the field where it changes nothing",
            "field-not-read",
            field=extra[0],
        )
    marks = {key: message[key] for key in WEIGHTS if key in message} | beside
    weights = {key: _weight(value, f"{at}: field {key!r}", key) for key, value in marks.items() if value not in EMPTY}
    if len(set(weights.values())) > 1:
        seen = " and ".join(f"{key} {weight}" for key, weight in weights.items())
        raise UserError(
            f"{at} has {seen}; expected them to agree on whether it is learned; delete one",
            "turn-weights-differ",
            fields=[key.partition(" ")[0] for key in weights],
        )
    if role_key not in message or content_key not in message:
        return message
    role, content = ROLE_NAMES.get(str(message[role_key]), message[role_key]), message[content_key]
    plain = (
        isinstance(content, list)
        and content
        and all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in content)
    )
    weight = next(iter(weights.values()), None)
    unusual = weight is not None and weight != (role == "assistant")  # other than what is done without a mark
    return {
        "role": role,
        "content": text_of(content) if plain and role != "assistant" else content,
        **({"weight": weight} if unusual else {}),
    }
