"""Conversations of JSONL files: ShareGPT's and OpenAI's lines in the form of data/chat.py, all checked, with what they
say of which turns are trained on. Imports no torch.
"""

import gzip
import json
import shlex
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanolab.cli import UserError
from nanolab.data.chat import Message, check_messages, shape_of, text_of
from nanolab.data.kinds import HEAD, check_kind, check_utf8

MAX_LINE = 64_000_000  # bytes of a line, unpacked
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
            f"{path}:{n}: not JSON ({error}); {expected}; fix or delete the line (of one large array: jq -c '.[]' IN >"
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
                f"{where}: {shape_of(value)}; {expected}; rename the field that holds them", "no-messages-field"
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
