"""OpenAI's wire format, read: request bodies -> Ask, every field checked by name; and the error that everything else
becomes.

https://platform.openai.com/docs/api-reference/chat, and .../completions for the older route. Imports no torch.
"""

import json
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import Any

from nanolab.cli import nearest
from nanolab.data.chat import Message, awaits_more, parts_of, text_of
from nanolab.data.turn import PARTS, Part
from nanolab.inference.tools import TOOLS

ROUTES = ("/v1/chat/completions", "/v1/completions")
MAX_MESSAGES = 500
MAX_ROWS = 128  # n, and OpenAI's own limit
MAX_PROMPTS = 2048  # of one request, and OpenAI's own limit
MAX_STOPS, MAX_STOP_LENGTH = 16, 256
MAX_TOP = 20  # alternatives per token
WHOLE = 2**31 - 1
KINDS = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}
# the tools that a client may run, and their parameter's name where it declares none
ARGUMENTS = {"calculator": "expression", "python": "code"}


class ApiError(Exception):
    """An answer other than 200. headers: beside those of JSON."""

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


@dataclass(frozen=True)
class Ask:
    """What a request wants. None: not said, so the server's default."""

    # messages of the chat route; texts and lists of ids, each to be continued, of the other
    prompt: list[Message] | list[str | list[int]]
    model: str | None = None
    stream: bool = False
    include_usage: bool = False
    n: int = 1
    seed: int | None = None
    stop: tuple[str, ...] = ()
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    logprobs: int = -1  # -1: none; else each token's own and that many alternatives
    echo: bool = False  # the prompt comes before its reply, and has logprobs where these are wanted
    tools: dict[str, str] = field(default_factory=dict)  # those that the client runs -> the name of their parameter

    @property
    def chat(self) -> bool:
        """Whether this is a conversation rather than text to continue."""
        return isinstance(self.prompt[0], dict)

    @property
    def prompts(self) -> int:
        return 1 if self.chat else len(self.prompt)


class Unfit(Exception):
    """A value that a field cannot have; the text is what was expected."""

    def __init__(self, expected: str, code: str = "invalid_value"):
        super().__init__(expected)
        self.code = code


class Unsupported(Exception):
    """A value that a known field can have elsewhere, but not here; the text is why."""


Check = Callable[[Any], Any]  # the value in our form; raises Unfit


def number(low: float, high: float) -> Check:
    def check(value: Any) -> float:
        if type(value) not in (int, float) or not low <= value <= high:
            raise Unfit(f"{low:g}" if low == high else f"a number from {low:g} to {high:g}")
        return float(value)

    return check


def whole(low: int, high: int) -> Check:
    def check(value: Any) -> int:
        if type(value) is float and value.is_integer():  # JSON writers without whole numbers
            value = int(value)
        if type(value) is not int or not low <= value <= high:
            raise Unfit(f"a whole number from {low} to {high}")
        return value

    return check


def flag(value: Any) -> bool:
    if type(value) is not bool:
        raise Unfit("true or false")
    return value


def text(value: Any) -> str:
    if not isinstance(value, str):
        raise Unfit("a string")
    return value


def limit(low: int, none: int) -> Check:
    """A whole number from `low`, or -1, which is no limit: `none`."""

    def check(value: Any) -> int:
        try:
            return none if type(value) in (int, float) and value == -1 else whole(low, WHOLE)(value)
        except Unfit as error:
            raise Unfit(f"{error}, or -1 for no limit") from None

    return check


def ignored(value: Any) -> None:
    """A field about who asks, which changes nothing here."""


def only(why: str, *nothing: Any) -> Check:
    """A field of which only the values `nothing` are taken, since they ask for nothing."""

    def check(value: Any) -> None:
        if value not in nothing:
            raise Unsupported(why)

    return check


def stops(value: Any) -> tuple[str, ...]:
    found = [value] if isinstance(value, str) else value
    if (
        not isinstance(found, list)
        or len(found) > MAX_STOPS
        or not all(isinstance(s, str) and 0 < len(s) <= MAX_STOP_LENGTH for s in found)
    ):
        raise Unfit(f"a string of 1 to {MAX_STOP_LENGTH} characters, or a list of at most {MAX_STOPS} such strings")
    return tuple(found)


def stream_options(value: Any) -> bool:
    if not isinstance(value, dict) or any(value[key] for key in value if key != "include_usage"):
        raise Unfit("an object with include_usage, and no other that asks for something")
    return flag(value.get("include_usage") or False)


def prompt(value: Any) -> list[str | list[int]]:
    """One prompt or several, as a list."""
    several = value if isinstance(value, list) and value and isinstance(value[0], (str, list)) else [value]
    if len(several) > MAX_PROMPTS or not all(map(continuable, several)):
        raise Unfit(f"a string that is not empty, a list of token ids, or a list of at most {MAX_PROMPTS} such prompts")
    return several


def continuable(value: Any) -> bool:
    return (
        isinstance(value, (str, list))
        and len(value) > 0
        and (isinstance(value, str) or all(type(i) is int and i >= 0 for i in value))
    )


def tools(value: Any) -> dict[str, str]:
    if not isinstance(value, list):
        raise Unfit("a list of tools")
    return dict(tool(entry) for entry in value)


def tool(entry: Any) -> tuple[str, str]:
    """(name, parameter) of a declared function: those that a model of ours can call, with the one string that it can
    give them.
    """
    function = entry.get("function") if isinstance(entry, dict) and entry.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or name not in TOOLS:
        seen = f"the function {name[:40]!r}" if isinstance(name, str) else "an entry that is not a function with a name"
        raise Unfit(
            f"no other functions than {' and '.join(TOOLS)}, the only ones that models here can call, found {seen}",
            "unsupported_tool",
        )
    schema = function.get("parameters") or {}
    properties = schema.get("properties", {}) if isinstance(schema, dict) else None
    if properties == {}:
        return name, ARGUMENTS[name]
    if (
        not isinstance(properties, dict)
        or len(properties) != 1
        or not all(isinstance(p, dict) and p.get("type") == "string" for p in properties.values())
    ):
        raise Unfit(f"the function {name} to have one parameter, a string")
    return name, *properties  # type: ignore[return-value]


def messages(value: Any) -> list[Message]:
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


ROLES = ("system", "developer", "user", "assistant", "tool")
TEXTS = ("text", "input_text", "output_text")  # OpenAI's names for a part that is text


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
        return [*found, {"type": "python", "text": text(code)}], text(call["id"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, Unfit):
        raise Unfit(f"{at} to have one tool call, with an id and one string among its arguments") from None


# Fields of OpenAI's reference, and two of other servers, that nothing here obeys: the values that ask for nothing are
# taken.
NOTHING: dict[str, Check] = {
    "response_format": only("replies cannot be constrained", {"type": "text"}),
    "tool_choice": only("calls cannot be forced", "auto", "none"),
    "parallel_tool_calls": only("expected true or false; models here make one call at a time", True, False),
    "functions": only("expected tools instead", []),
    "function_call": only("expected tools instead", "auto", "none"),
    "logit_bias": only("the probabilities of single tokens cannot be changed", {}),
    "presence_penalty": only("expected 0; repetition_penalty is what there is", 0),
    "frequency_penalty": only("expected 0; repetition_penalty is what there is", 0),
    "repeat_penalty": only("its name here is repetition_penalty", 1),
    "min_p": only("expected 0; top_p and top_k are what there is", 0),
    "reasoning_effort": only("models here do not reason apart from their reply", "none"),
    "verbosity": only("the length of replies cannot be chosen", "medium"),
    "modalities": only("models here read and write text", ["text"]),
    "audio": only("models here read and write text"),
    "prediction": only("replies are always generated token by token"),
    "web_search_options": only("models here cannot search"),
    "service_tier": only("there is one tier", "auto", "default"),
    "best_of": only("expected 1; n gives several replies", 1),
    "echo": only("a chat has no prompt to repeat", False),
    "suffix": only("models here continue a text, they do not fill one in", ""),
} | dict.fromkeys(
    ("user", "metadata", "store", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"), ignored
)
SHARED: dict[str, Check] = NOTHING | {
    "model": text,
    "stream": flag,
    "stream_options": stream_options,
    "n": whole(1, MAX_ROWS),
    "seed": whole(-(2**63), 2**63 - 1),
    "stop": stops,
    "max_tokens": limit(1, WHOLE),
    "temperature": number(0, 2),
    "top_p": number(0, 1),
    "top_k": limit(0, 0),
    "repetition_penalty": number(0.1, 10),
}
CHAT: dict[str, Check] = SHARED | {
    "messages": messages,
    "max_completion_tokens": limit(1, WHOLE),
    "logprobs": flag,
    "top_logprobs": whole(0, MAX_TOP),
    "tools": tools,
}
COMPLETION: dict[str, Check] = SHARED | {
    "prompt": prompt,
    "logprobs": whole(0, MAX_TOP),
    "echo": flag,
    "max_tokens": limit(0, WHOLE),
}


def read_chat(body: Any) -> Ask:
    """The body of /v1/chat/completions. Raises ApiError, naming the field."""
    if isinstance(body, dict) and body.get("tool_choice") == "none":
        body = body | {"tools": None}
    given = read(body, CHAT, "messages")
    wanted, top = given.pop("logprobs", False), given.pop("top_logprobs", 0)
    if top and not wanted:
        raise ApiError(
            400, "top_logprobs without logprobs; expected logprobs true beside it", "top_logprobs", "invalid_value"
        )
    if "max_completion_tokens" in given:
        given["max_tokens"] = given.pop("max_completion_tokens")
    return Ask(prompt=given.pop("messages"), logprobs=top if wanted else -1, **given)


def read_completion(body: Any) -> Ask:
    """The body of /v1/completions. Raises ApiError, naming the field. max_tokens 0: nothing is generated; with echo and
    logprobs the prompts are scored.
    """
    return Ask(**read(body, COMPLETION, "prompt"))


def read(body: Any, checks: dict[str, Check], needed: str) -> dict[str, Any]:
    """The fields of Ask that `body` sets; a null is a field that was left out, whatever its name."""
    if not isinstance(body, dict):
        raise ApiError(400, f"the body is {type(body).__name__}; expected a JSON object with the field {needed}")
    given = {}
    for name, value in body.items():
        if value is None:
            continue
        if name not in checks:
            hint = (
                f": it is a field of {ROUTES[needed == 'messages']}"
                if name in CHAT or name in COMPLETION
                else nearest(name[:40], list(checks))
            )
            raise ApiError(400, f"field {name[:40]!r} is not supported here{hint}", name[:40], "unsupported_parameter")
        try:
            fit = checks[name](value)
        except Unfit as error:
            shown = (
                ""
                if isinstance(value, (dict, list))
                else f" is {value if len(str(value)) < 40 else type(value).__name__!r}"
            )
            raise ApiError(400, f"{name}{shown}; expected {error}", name, error.code) from None
        except Unsupported as why:
            shown = value.get("type") if isinstance(value, dict) else value
            shown = (
                f" {shown if isinstance(shown, str) else json.dumps(shown)}"
                if isinstance(shown, (str, int, float)) and len(str(shown)) < 40
                else ""
            )
            raise ApiError(400, f"{name}{shown} is not supported: {why}", name, "unsupported_value") from None
        if fit is not None:
            given[name] = fit
    if needed not in given:
        raise ApiError(
            400,
            f"field {needed!r} is missing; expected"
            f" {'a list of messages' if needed == 'messages' else 'text to continue'}",
            needed,
            "missing_field",
        )
    given["include_usage"] = given.pop("stream_options", False)
    return given
