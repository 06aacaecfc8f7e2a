"""Conversations <-> token ids and loss mask: the one chat template, its inverse, its checks.

A message is {"role": "system" | "user" | "assistant", "content": text}; an assistant's content may also be a list of
parts {"type": "text" | "python" | "python_output", "text": text}: text, a call of a tool, the tool's output. A
conversation is a list of messages: at most one system message, first; then user and assistant in turn. Layout:

    bos [system text] (user_start text user_end assistant_start parts assistant_end)*

Trained on (mask 1): the assistant's text, its tool calls with both marks, and assistant_end; nothing of an assistant's
message with "weight": 0. Ordinary text never yields a special id, whatever it looks like. A prompt ends with
assistant_start, or inside the assistant's turn, with the output of a call. Imports no torch."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from nanolab.cli import UserError, nearest
from nanolab.data.tokenizer import Tokenizer
from nanolab.data.turn import PARTS, Part, TurnParser

# {"role": str, "content": str or list of Part}; with "weight": 0 where an assistant's is not trained on
Message = dict[str, Any]
ROLES = ("system", "user", "assistant")


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

    Reads up to assistant_end, bos, or the end of `ids`. A part that was cut off counts as far as it goes."""
    parser, ends = TurnParser(tokenizer), (tokenizer.bos, tokenizer.special("<|assistant_end|>"))
    events = [event for i in takewhile(lambda i: i not in ends, ids) for event in parser.push(i)]
    return parts_of([{"type": e.kind, "text": e.part} for e in (*events, *parser.end()) if e.part is not None])


def check_messages(messages: Any, where: str = "", prompt: bool = False) -> None:
    """Raises UserError, headed by `where` (file:line), for what is not a conversation that one can train on.

    prompt: instead of an assistant turn to train on, the last message must be one that a model can go on from.
    """
    at = f"{where}: " if where else ""
    if not isinstance(messages, list) or not messages:
        raise UserError(
            f"{at}{shape_of(messages)} in place of messages; expected a list with at least one user and one assistant"
            " message; fix or delete it",
            "no-messages",
        )
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise UserError(
                f"{at}message {i + 1} is {shape_of(message)}; expected an object with the fields role and content; fix"
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
                f"{at}message {i + 1}: expected role {' or '.join(expected)}, got {role} (user and assistant"
                " alternate); fix the order",
                "turn-order",
            )
        _check_content(role, message["content"], f"{at}message {i + 1} ({role}'s)")
    if prompt and messages[-1]["role"] != "user" and not awaits_more(messages[-1]):
        raise UserError(
            f"{at}the last message is the {messages[-1]['role']}'s; expected a user message to answer; add one",
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
                    f"{at}: part {j + 1} is {shape_of(part)}; expected an object with the fields type and text, both"
                    " text; fix it",
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
                    f"{at}: part {j + 1} is python_output; expected a python part before it, whose output it is; fix"
                    " the order",
                    "part-order",
                )
    elif not isinstance(content, str):
        allowed = "text or a list of parts" if role == "assistant" else "text"
        raise UserError(f"{at} has {shape_of(content)} as content; expected {allowed}; fix or delete it", "not-text")
    if not any(part["text"].strip() for part in parts_of(content)):
        raise UserError(f"{at} is empty; expected text; fill it or delete the conversation", "empty-message")


def shape_of(value: Any) -> str:
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
