"""OpenAI's request bodies, by pydantic; an error names its field. Imports no torch.

https://platform.openai.com/docs/api-reference/chat, and .../completions for the older route.
"""

import json
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError
from pydantic_core import ErrorDetails

from nanolab.cli import nearest
from nanolab.data.chat import Message
from nanolab.inference.tools import TOOLS
from nanolab.serving.errors import ApiError
from nanolab.serving.messages import Unfit, read_messages

ROUTES = ("/v1/chat/completions", "/v1/completions")
MAX_ROWS = 128  # n, and OpenAI's own limit
MAX_PROMPTS = 2048  # of one request, and OpenAI's own limit
MAX_STOPS, MAX_STOP_LENGTH = 16, 256
MAX_TOP = 20  # alternatives per token
WHOLE = 2**31 - 1
# the tools that a client may run, and their parameter's name where it declares none
ARGUMENTS = {"calculator": "expression", "python": "code"}


def as_whole(value: Any) -> Any:
    """2.0 as 2: some JSON writers have no whole numbers."""
    return int(value) if type(value) is float and value.is_integer() else value


def as_limit(none: int) -> BeforeValidator:
    """-1 as `none`, which is no limit."""
    return BeforeValidator(lambda value: none if type(value) in (int, float) and value == -1 else as_whole(value))


def in_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def several(value: Any) -> Any:
    """One prompt or several, as a list."""
    return value if isinstance(value, list) and value and isinstance(value[0], (str, list)) else [value]


def stream_options(value: Any) -> bool:
    if (
        not isinstance(value, dict)
        or any(value[key] for key in value if key != "include_usage")
        or type(value.get("include_usage") or False) is not bool
    ):
        raise Unfit("an object with include_usage true or false, and no other that asks for something")
    return value.get("include_usage") or False


def offered(value: Any) -> dict[str, str]:
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
        or not all(isinstance(p, dict) and p.get("type", "string") == "string" for p in properties.values())
    ):
        raise Unfit(f"the function {name} to have one parameter, a string")
    return name, next(iter(properties))


# The description of a field is what an error says was expected.
def number(low: float, high: float) -> Any:
    return Field(None, ge=low, le=high, description=f"a number from {low:g} to {high:g}")


def whole(low: int, high: int, default: int | None = None, or_else: str = "") -> Any:
    return Field(default, ge=low, le=high, description=f"a whole number from {low} to {high}{or_else}")


def flag() -> Any:
    return Field(False, description="true or false")


Whole = Annotated[int, BeforeValidator(as_whole)]
Limit = Annotated[int, as_limit(WHOLE)]
UNLIMITED = ", or -1 for no limit"


class GenerationRequest(BaseModel):
    """What both routes take. None: not said, so the server's default. `prompts`, `alternatives` (-1: no logprobs; else
    each token's own and that many others), `budget` (tokens of a reply), `echo` and `tools` are those of both.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    model: str | None = Field(None, description="a string")
    stream: bool = flag()
    include_usage: Annotated[bool, PlainValidator(stream_options)] = Field(False, alias="stream_options")
    n: Whole = whole(1, MAX_ROWS, 1)
    seed: Whole | None = whole(-(2**63), 2**63 - 1)
    stop: Annotated[list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]], BeforeValidator(in_list)] = (
        Field(
            [],
            max_length=MAX_STOPS,
            description=f"a string of 1 to {MAX_STOP_LENGTH} characters, or a list of at most {MAX_STOPS} such strings",
        )
    )
    max_tokens: Limit | None = whole(1, WHOLE, None, UNLIMITED)
    temperature: float | None = number(0, 2)
    top_p: float | None = number(0, 1)
    top_k: Annotated[int, as_limit(0)] | None = whole(0, WHOLE, None, UNLIMITED)
    repetition_penalty: float | None = number(0.1, 10)


class ChatRequest(GenerationRequest):
    chat: ClassVar = True
    echo: ClassVar = False
    prompts: ClassVar = 1

    messages: Annotated[list[Message], PlainValidator(read_messages)]
    max_completion_tokens: Limit | None = whole(1, WHOLE, None, UNLIMITED)
    logprobs: bool = flag()
    top_logprobs: Whole = whole(0, MAX_TOP, 0)
    # those that the client runs -> the name of their parameter
    tools: Annotated[dict[str, str], PlainValidator(offered)] = {}

    @property
    def alternatives(self) -> int:
        return self.top_logprobs if self.logprobs else -1

    @property
    def budget(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(GenerationRequest):
    """max_tokens 0: nothing is generated; with echo and logprobs the prompts are scored."""

    chat: ClassVar = False
    tools: ClassVar[dict[str, str]] = {}

    prompt: Annotated[
        list[
            Annotated[str, Field(min_length=1)]
            | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True)]
        ],
        Field(fail_fast=True),
        BeforeValidator(several),
    ] = Field(
        max_length=MAX_PROMPTS,
        description=(
            f"a string that is not empty, a list of token ids, or a list of at most {MAX_PROMPTS} such prompts"
        ),
    )
    logprobs: Whole | None = whole(0, MAX_TOP)
    echo: bool = Field(False, description="true or false")  # the prompt comes before its reply, with its logprobs
    max_tokens: Limit | None = whole(0, WHOLE, None, UNLIMITED)

    @property
    def prompts(self) -> int:
        return len(self.prompt)

    @property
    def alternatives(self) -> int:
        return -1 if self.logprobs is None else self.logprobs

    @property
    def budget(self) -> int | None:
        return self.max_tokens


# Fields of OpenAI's reference, and two of other servers, that nothing here obeys: why, and the values that ask for
# nothing, which are taken.
NOTHING: dict[str, tuple[str, list[Any]]] = {
    "response_format": ("replies cannot be constrained", [{"type": "text"}]),
    "tool_choice": ("calls cannot be forced", ["auto", "none"]),
    "parallel_tool_calls": ("expected true or false; models here make one call at a time", [True, False]),
    "functions": ("expected tools instead", [[]]),
    "function_call": ("expected tools instead", ["auto", "none"]),
    "logit_bias": ("the probabilities of single tokens cannot be changed", [{}]),
    "presence_penalty": ("expected 0; repetition_penalty is what there is", [0]),
    "frequency_penalty": ("expected 0; repetition_penalty is what there is", [0]),
    "repeat_penalty": ("its name here is repetition_penalty", [1]),
    "min_p": ("expected 0; top_p and top_k are what there is", [0]),
    "reasoning_effort": ("models here do not reason apart from their reply", ["none"]),
    "verbosity": ("the length of replies cannot be chosen", ["medium"]),
    "modalities": ("models here read and write text", [["text"]]),
    "audio": ("models here read and write text", []),
    "prediction": ("replies are always generated token by token", []),
    "web_search_options": ("models here cannot search", []),
    "service_tier": ("there is one tier", ["auto", "default"]),
    "best_of": ("expected 1; n gives several replies", [1]),
    "echo": ("a chat has no prompt to repeat", [False]),
    "suffix": ("models here continue a text, they do not fill one in", [""]),
}
# about who asks, which changes nothing here
IGNORED = {"user", "metadata", "store", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
Schema = TypeVar("Schema", bound=GenerationRequest)


def read_chat(body: Any) -> ChatRequest:
    """The body of /v1/chat/completions. Raises ApiError, naming the field."""
    if isinstance(body, dict) and body.get("tool_choice") == "none":
        body = body | {"tools": None}
    request = read(body, ChatRequest, "messages")
    if request.top_logprobs and not request.logprobs:
        raise ApiError(
            400, "top_logprobs without logprobs; expected logprobs true beside it", "top_logprobs", "invalid_value"
        )
    return request


def read_completion(body: Any) -> CompletionRequest:
    """The body of /v1/completions. Raises ApiError, naming the field."""
    return read(body, CompletionRequest, "prompt")


def fields(schema: type[BaseModel]) -> list[str]:
    """The names that a client uses."""
    return [field.alias or name for name, field in schema.model_fields.items()]


def read(body: Any, schema: type[Schema], needed: str) -> Schema:
    """A null is a field that was left out, whatever its name."""
    if not isinstance(body, dict):
        raise ApiError(400, f"the body is {type(body).__name__}; expected a JSON object with the field {needed}")
    given, names = {}, fields(schema)
    for name, value in body.items():
        if name in names:
            given |= {} if value is None else {name: value}
        elif value is not None and name not in IGNORED and not asks_for_nothing(name, value):
            elsewhere = name in fields(ChatRequest) or name in fields(CompletionRequest)
            known = [*names, *NOTHING, *IGNORED]
            hint = f": it is a field of {ROUTES[needed == 'messages']}" if elsewhere else nearest(name[:40], known)
            raise ApiError(400, f"field {name[:40]!r} is not supported here{hint}", name[:40], "unsupported_parameter")
    try:
        return schema.model_validate(given)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
    order = [*given, needed]
    raise of_field(schema, min(found, key=lambda one: order.index(str(one["loc"][0]))), given)


def asks_for_nothing(name: str, value: Any) -> bool:
    """Whether this is a field of NOTHING. Raises ApiError where its value asks for something."""
    if name not in NOTHING:
        return False
    why, taken = NOTHING[name]
    if value not in taken:
        shown = value.get("type") if isinstance(value, dict) else value
        short = isinstance(shown, (str, int, float)) and len(str(shown)) < 40
        shown = f" {shown if isinstance(shown, str) else json.dumps(shown)}" if short else ""
        raise ApiError(400, f"{name}{shown} is not supported: {why}", name, "unsupported_value")
    return True


def of_field(schema: type[BaseModel], error: ErrorDetails, given: dict[str, Any]) -> ApiError:
    """The one place in which pydantic's errors become ours."""
    name = str(error["loc"][0])
    if error["type"] == "missing":
        what = "a list of messages" if name == "messages" else "text to continue"
        return ApiError(400, f"field {name!r} is missing; expected {what}", name, "missing_field")
    cause = error.get("ctx", {}).get("error")
    expected = cause if isinstance(cause, Unfit) else schema.model_fields[name].description
    value = given[name]
    short = value if len(str(value)) < 40 else type(value).__name__
    shown = "" if isinstance(value, (dict, list)) else f" is {short!r}"
    code = cause.code if isinstance(cause, Unfit) else "invalid_value"
    return ApiError(400, f"{name}{shown}; expected {expected}", name, code)
