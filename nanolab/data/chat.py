"""Conversations <-> token ids and loss mask: the one chat template, its inverse, its checks, and readers of JSONL files.

A message is {"role": "system" | "user" | "assistant", "content": text}; an assistant's content may also be a list of parts
{"type": "text" | "python" | "python_output", "text": text}: what it says, what it gives to the tool, what the tool answers.
A conversation is a list of messages: at most one system message, first; then user and assistant in turn. Layout:

    bos [system text] (user_start text user_end assistant_start parts assistant_end)*

Trained on (mask 1): the assistant's text, its tool calls with both marks, and assistant_end. Ordinary text never yields a
special id, whatever it looks like. A prompt ends with assistant_start, or inside the assistant's turn: with the output that
somebody else's tool has given to its call. Imports no torch.
"""

import gzip
import json
import zlib
from pathlib import Path
from typing import Any, Iterable, Iterator, NamedTuple, Sequence

from nanolab.config import UserError, nearest
from nanolab.data.encoding import HEAD, check_utf8
from nanolab.data.tokenizer import Tokenizer

Message = dict[str, Any]  # {"role": str, "content": str or list of Part}
Part = dict[str, str]  # {"type": str, "text": str}


class Mark(NamedTuple):
    start: str  # special token before the part's text; empty: none
    end: str
    trained: int


PARTS = {
    "text":          Mark("", "", 1),
    "python":        Mark("<|python_start|>", "<|python_end|>", 1),
    "python_output": Mark("<|output_start|>", "<|output_end|>", 0),
}  # fmt: skip
ROLES = ("system", "user", "assistant")
# Names of roles in the files that read_conversations knows: ShareGPT's and OpenAI's.
ROLE_NAMES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant",
}  # fmt: skip

# The template above in Jinja, as `transformers` reads it from tokenizer_config.json.
CHAT_TEMPLATE = """
{{- '<|bos|>' -}}
{%- for message in messages -%}
  {%- if message['role'] == 'system' -%}
    {{- message['content'] -}}
  {%- elif message['role'] == 'user' -%}
    {{- '<|user_start|>' + message['content'] + '<|user_end|>' -}}
  {%- else -%}
    {{- '<|assistant_start|>' -}}
    {%- if message['content'] is string -%}
      {{- message['content'] -}}
    {%- else -%}
      {%- for part in message['content'] -%}
        {%- if part['type'] == 'python' -%}
          {{- '<|python_start|>' + part['text'] + '<|python_end|>' -}}
        {%- elif part['type'] == 'python_output' -%}
          {{- '<|output_start|>' + part['text'] + '<|output_end|>' -}}
        {%- else -%}
          {{- part['text'] -}}
        {%- endif -%}
      {%- endfor -%}
    {%- endif -%}
    {%- if not (add_generation_prompt and loop.last) -%}
      {{- '<|assistant_end|>' -}}
    {%- endif -%}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and messages[-1]['role'] != 'assistant' -%}
  {{- '<|assistant_start|>' -}}
{%- endif -%}
""".strip()


def template_of(tokenizer: Tokenizer) -> str:
    """CHAT_TEMPLATE with the name of the token that begins this tokenizer's texts."""
    return CHAT_TEMPLATE.replace("<|bos|>", tokenizer.decode([tokenizer.bos]))


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
    """Ids and loss mask of a whole conversation. `messages` are taken as they are: check_messages is for what people wrote."""
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
    """Whether this is an assistant's turn whose last part is the answer to its call: the assistant goes on from there."""
    content = message["content"]
    return message["role"] == "assistant" and isinstance(content, list) and bool(content) and content[-1]["type"] == "python_output"


def _pieces(tokenizer: Tokenizer, message: Message) -> Iterator[tuple[list[int], int]]:
    role, content, special = message["role"], message["content"], tokenizer.special
    if role == "system":
        yield tokenizer.encode(content), 0
    elif role == "user":
        yield [special("<|user_start|>"), *tokenizer.encode(content), special("<|user_end|>")], 0
    else:
        yield [special("<|assistant_start|>")], 0
        for part in parts_of(content):
            start, end, trained = PARTS[part["type"]]
            ids = tokenizer.encode(part["text"])
            yield ([special(start), *ids, special(end)] if start else ids), trained
        yield [special("<|assistant_end|>")], 1


def parse_reply(tokenizer: Tokenizer, ids: Iterable[int]) -> list[Part]:
    """The parts of one assistant turn from what follows its assistant_start: the inverse of `render`.

    Reads up to assistant_end, bos, or the end of `ids`. A part that was cut off counts as far as it goes; special tokens
    that have no business there are left out.
    """
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
        raise UserError(f"{at}{_shape(messages)} in place of messages; expected a list with at least a user's and an assistant's; mend or delete it")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise UserError(f"{at}message {i + 1} is {_shape(message)}; expected an object with the fields role and content; mend or delete it")
        role, expected = message["role"], _expected(messages, i)
        if role not in ROLES:
            raise UserError(f"{at}message {i + 1} has the role {role!r}; expected one of {', '.join(ROLES)}{nearest(str(role), list(ROLES))}")
        if role not in expected:
            raise UserError(f"{at}message {i + 1} is {role}'s; expected {' or '.join(expected)}: user and assistant take turns; mend the order")
        _check_content(role, message["content"], f"{at}message {i + 1} ({role}'s)")
    if prompt and messages[-1]["role"] != "user" and not awaits_more(messages[-1]):
        raise UserError(f"{at}the last message is {messages[-1]['role']}'s; expected a user's, which the model is to answer; add one")
    if not prompt and all(message["role"] != "assistant" for message in messages):
        raise UserError(f"{at}no assistant turn among {len(messages)} messages; expected one to train on; add it or delete the conversation")


def _expected(messages: list[Message], i: int) -> tuple[str, ...]:
    if i == 0:
        return ("system", "user")
    return ("assistant",) if messages[i - 1]["role"] == "user" else ("user",)


def _check_content(role: str, content: Any, at: str) -> None:
    if isinstance(content, list) and role == "assistant":
        for j, part in enumerate(content):
            if not isinstance(part, dict) or part.keys() != {"type", "text"} or not all(isinstance(v, str) for v in part.values()):
                raise UserError(f"{at}: part {j + 1} is {_shape(part)}; expected an object with the fields type and text, both text; mend it")
            if part["type"] not in PARTS:
                hint = nearest(part["type"], list(PARTS))
                raise UserError(f"{at}: part {j + 1} has the type {part['type']!r}; expected one of {', '.join(PARTS)}{hint}")
            if part["type"] == "python_output" and (j == 0 or content[j - 1]["type"] != "python"):
                raise UserError(f"{at}: part {j + 1} is python_output; expected a python part before it, whose output it is; mend the order")
    elif not isinstance(content, str):
        allowed = "text or a list of parts" if role == "assistant" else "text"
        raise UserError(f"{at} has {_shape(content)} as content; expected {allowed}; mend or delete it")
    if not any(part["text"].strip() for part in parts_of(content)):
        raise UserError(f"{at} is empty; expected text; fill it or delete the conversation")


def _shape(value: Any) -> str:
    """What `value` is, in words short enough for a message."""
    if isinstance(value, dict):
        return f"an object with the fields {', '.join(map(str, value)) or '(none)'}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return "nothing" if value is None else f"the text {value[:40]!r}" if isinstance(value, str) else f"{type(value).__name__} {value!r}"


def read_jsonl(path: Path | str) -> Iterator[tuple[str, Any]]:
    """("file:line", value) of each line that is not blank, of a .jsonl or .jsonl.gz file. Raises UserError naming the line."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"{path} is not a file; expected JSON lines; check the path")
    n = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            for n, line in enumerate(file, 1):
                if n == 1:
                    check_utf8(path, line[:HEAD])
                if line.strip():
                    yield f"{path}:{n}", json.loads(line.decode("utf-8-sig"))
    except UserError:  # which is a ValueError
        raise
    except (ValueError, RecursionError) as error:  # JSONDecodeError, UnicodeDecodeError; brackets nested too deep
        expected = "expected one JSON value per line, in UTF-8"
        raise UserError(f"{path}:{n}: not JSON ({error}); {expected}; mend or delete the line (of one large array: jq -c '.[]' IN > OUT)") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is not a whole gzip file ({error}); expected one; copy or download it again") from None


def read_conversations(path: Path | str) -> list[list[Message]]:
    """The conversations of a JSONL file, each line one: an array of messages, ShareGPT's or OpenAI's object. All are checked.

    ShareGPT: {"conversations": [{"from": "human", "value": ...}, ...]}; OpenAI: {"messages": [{"role": ..., "content": ...}, ...]}.
    A field "system" of such an object is the system message; other fields beside the list are left out.
    Raises UserError naming file and line for anything that is not a conversation, and for a file without any.
    """
    found = []
    for where, value in read_jsonl(path):
        messages = _messages(value, where)
        check_messages(messages, where)
        found.append(messages)
    if not found:
        raise UserError(f"{path} holds no conversation; expected at least one, as a JSON array of messages on a line; check the path")
    return found


def _messages(value: Any, where: str) -> Any:
    system = []
    if isinstance(value, dict):
        lists = [key for key in ("messages", "conversations") if key in value]
        if len(lists) != 1:
            expected = "expected an array of messages, or an object with one of the fields messages and conversations"
            raise UserError(f"{where}: {_shape(value)}; {expected}; rename the field that holds them")
        system = [{"role": "system", "content": value["system"]}] if value.get("system") else []
        value = value[lists[0]]
    if not isinstance(value, list):
        return value
    return system + [_message(message, f"{where}: message {i + 1}") for i, message in enumerate(value)]


def _message(message: Any, at: str) -> Any:
    """One message of a file in our form. A field that we would have to ignore is an error: it may hold a tool call."""
    if not isinstance(message, dict):
        return message
    role_key, content_key = ("from", "value") if "from" in message else ("role", "content")
    extra = [key for key, value in message.items() if key not in (role_key, content_key) and value]
    if extra:
        raise UserError(f"{at} has the field {extra[0]!r}; expected only {role_key} and {content_key}; delete the field or the conversation")
    if role_key not in message or content_key not in message:
        return message
    role, content = ROLE_NAMES.get(str(message[role_key]), message[role_key]), message[content_key]
    plain = isinstance(content, list) and content and all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in content)
    return {"role": role, "content": text_of(content) if plain and role != "assistant" else content}
