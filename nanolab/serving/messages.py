"""Messages of OpenAI's form -> those of data/chat.py. Imports no torch."""

import json
from collections.abc import Container
from typing import Any

from nanolab.cli import nearest
from nanolab.data.chat import Message, awaits_more, parts_of, text_of
from nanolab.data.turn import PARTS, Part

MAX_MESSAGES = 500
ROLES = ("system", "developer", "user", "assistant", "tool")
TEXTS = ("text", "input_text", "output_text")  # OpenAI's names for a part that is text


class Unfit(ValueError):
    """A value that a field cannot have; the text is what was expected."""

    def __init__(self, expected: str, code: str = "invalid_value"):
        super().__init__(expected)
        self.code = code


def read_messages(value: Any) -> list[Message]:
    """Messages of OpenAI's form in that of nanolab.data.chat, one that a model can go on from.

    Blank messages are skipped, all system and developer messages become the first, neighbours of one role are joined
    with a blank line, a call and its output become parts of one assistant turn. So a reply of this server is accepted
    back, whatever it was. Other keys say nothing to the model and are ignored. Raises Unfit."""
    if not isinstance(value, list) or not 0 < len(value) <= MAX_MESSAGES:
        seen = f"{len(value)} messages" if isinstance(value, list) else type(value).__name__
        raise Unfit(f"a list of 1 to {MAX_MESSAGES} messages, found {seen}")
    system: list[str] = []
    turns: list[Message] = []
    call = None  # the id of the call that the last turn ends with
    for i, message in enumerate(value, 1):
        at = f"message {i}"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise Unfit(f"{at} to be an object with a role and content")
        role, last = message["role"], turns[-1] if turns else {"role": ""}
        if role not in ROLES:
            raise Unfit(
                f"{at} to have one of the roles {', '.join(ROLES)}, found"
                f" {role[:40]!r}{nearest(role[:40], list(ROLES))}"
            )
        if role == "tool":
            if call is None or message.get("tool_call_id") != call:
                raise Unfit(f"{at}, a tool's, to follow the assistant's call with its id as tool_call_id")
            last["content"].append({"type": "python_output", "text": text_of(parts(message.get("content"), at))})
            call = None
        elif role == "assistant":
            found, made = said(message, at)
            if made is None and blank(found):
                continue
            if last["role"] == role:
                last["content"] = parts_of(
                    [*last["content"], *([] if awaits_more(last) else [{"type": "text", "text": "\n\n"}]), *found]
                )
            else:
                turns.append({"role": role, "content": found})
            call = made
        elif not blank(found := parts(message.get("content"), at)):
            if role != "user":
                system.append(text_of(found))
            elif last["role"] == role:
                last["content"] += "\n\n" + text_of(found)
            else:
                turns.append({"role": role, "content": text_of(found)})
                call = None
    if all(turn["role"] != "user" for turn in turns):
        raise Unfit("at least one user's message with text", "no_user_text")
    if turns[-1]["role"] == "assistant" and not awaits_more(turns[-1]):
        raise Unfit(
            "a user's message after the assistant's last one, which this server does not continue", "assistant_last"
        )
    return [{"role": "system", "content": "\n\n".join(system)}] * bool(system) + turns


def blank(found: list[Part]) -> bool:
    """Whether a message says nothing. One with a tool's output does, even if that is empty."""
    return not any(part["text"].strip() or part["type"] == "python_output" for part in found)


def parts(content: Any, at: str, kinds: Container[str] = ("text",)) -> list[Part]:
    """The parts of a message's content, of these kinds; none of null. Only type and text of a part are read."""
    found: list[Part] = []
    if content is None or isinstance(content, str):
        return parts_of(content or "")
    for j, part in enumerate(content if isinstance(content, list) else [content], 1):
        kind = part.get("type") if isinstance(part, dict) and isinstance(content, list) else type(part).__name__
        kind = "text" if kind in TEXTS else kind
        if kind not in kinds or not isinstance(part.get("text"), str):
            seen = f"part {j} is of type {str(kind)[:40]!r}" if isinstance(content, list) else str(kind)
            raise Unfit(
                f"{at} to have text as content, or a list of text parts, found {seen}; images and the like are not"
                " supported"
            )
        found.append({"type": kind, "text": part["text"]})
    return parts_of(found)


def said(message: dict[str, Any], at: str) -> tuple[list[Part], str | None]:
    """An assistant message's parts, and the id of the call that it ends with. `parts`, in full as our own replies have
    them, go before content.
    """
    found, calls = parts(message.get("parts") or message.get("content"), at, PARTS), message.get("tool_calls") or []
    if not calls:
        return found, None
    try:
        (call,) = calls
        (code,) = json.loads(call["function"]["arguments"]).values()
        if not (isinstance(code, str) and isinstance(call["id"], str)):
            raise TypeError
        return [*found, {"type": "python", "text": code}], call["id"]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise Unfit(f"{at} to have one tool call, with an id and one string among its arguments") from None
