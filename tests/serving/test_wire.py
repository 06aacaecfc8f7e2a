"""Bytes on the wire, as curl would see them: transcripts of streams, errors by name, limits, headers. Oracle: written
by hand.
"""

import base64
import hashlib
import json
import re
import socket

import httpx
import openai
import pytest

from nanolab.serving.api import MAX_BODY
from nanolab.serving.errors import ApiError
from nanolab.serving.schemas import ChatRequest, fields, read_chat, read_completion

HI = [{"role": "user", "content": "hi"}]
CHAT = "/v1/chat/completions"


def transcript(live, path: str, **body) -> list[str]:
    """The events of a stream without what differs from time to time."""
    answer = live.http.post(path, json=body | {"stream": True})
    assert (
        answer.headers["content-type"].startswith("text/event-stream") and answer.headers["cache-control"] == "no-cache"
    )
    assert answer.text.endswith("\n\n")
    clean = re.sub(r'"id":"(chatcmpl|cmpl)-[0-9a-f]{24}",|"created":[0-9]{10},', "", answer.text)
    return clean.removesuffix("\n\n").split("\n\n")


def test_the_transcript_of_a_chat(live):
    def chunk(choices: str, usage: str = "") -> str:
        return (
            "data:"
            f' {{"object":"chat.completion.chunk","model":"parrot","choices":[{choices}],"usage":{usage or "null"}}}'
        )

    def choice(delta: str, finish: str = "null") -> str:
        return chunk(f'{{"index":0,"delta":{{{delta}}},"logprobs":null,"finish_reason":{finish}}}')

    got = transcript(
        live,
        CHAT,
        model="parrot",
        messages=[{"role": "user", "content": "12*34?"}],
        stream_options={"include_usage": True},
    )
    cached = re.search(r'"cached_tokens":([0-9]+)', got[-2])[1]
    details = f'{{"cached_tokens":{cached}}}'
    usage = '{"prompt_tokens":10,"completion_tokens":23,"total_tokens":33,"prompt_tokens_details":' + details + "}"
    assert got == [
        choice('"role":"assistant","content":""'),
        choice('"part":{"type":"python","text":"12*34"}'),
        choice('"part":{"type":"python_output","text":"408"}'),
        *(choice(f'"content":"{letter}"') for letter in "It is 408."),
        choice("", '"stop"'),
        chunk("", usage),
        "data: [DONE]",
    ]


def test_the_transcript_of_a_completion(live):
    start = 'data: {"object":"text_completion","model":"endless","choices":[{"index":0,'
    assert transcript(live, "/v1/completions", model="endless", prompt="x", max_tokens=2) == [
        start + '"text":"\\u0000","logprobs":null,"finish_reason":null}]}',
        start + '"text":"\\u0000","logprobs":null,"finish_reason":null}]}',
        start + '"text":"","logprobs":null,"finish_reason":"length"}]}',
        "data: [DONE]",
    ]


def chat(**fields) -> dict:
    return {"model": "parrot", "messages": HI} | fields


def said(**message) -> dict:
    return chat(messages=[*HI, message])


def calls(arguments: str = '{"expression": "1"}', **call) -> dict:
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "c", "type": "function", "function": {"name": "calculator", "arguments": arguments}} | call
        ],
    }


def tool(**fields) -> dict:
    return chat(tools=[{"type": "function", "function": fields}])


BAD = [  # (body, param, words of the message)
    (chat(best_of=2), "best_of", "not supported"),
    (chat(temprature=1), "temprature", "did you mean temperature"),
    (chat(frequency_penalty=0.5), "frequency_penalty", "0.5 is not supported: expected 0"),
    (chat(presence_penalty=-1), "presence_penalty", "expected 0"),
    (chat(temperature=3), "temperature", "from 0 to 2"),
    (chat(temperature="hot"), "temperature", "'hot'; expected a number"),
    (chat(temperature=True), "temperature", "expected a number"),
    (chat(top_p=1.5), "top_p", "from 0 to 1"),
    (chat(top_k=-2), "top_k", "-1 for no limit"),
    (chat(top_k=1.5), "top_k", "whole number"),
    (chat(repetition_penalty=0), "repetition_penalty", "from 0.1 to 10"),
    (chat(n=0), "n", "from 1 to 128"),
    (chat(seed="7"), "seed", "whole number"),
    (chat(seed=2**63), "seed", "whole number"),
    (chat(max_tokens=0), "max_tokens", "from 1"),
    (chat(max_tokens=-2), "max_tokens", "-1 for no limit"),
    (chat(max_completion_tokens=0), "max_completion_tokens", "from 1"),
    (chat(stream="yes"), "stream", "true or false"),
    (chat(stream_options={"x": 1}), "stream_options", "include_usage"),
    (chat(stop=""), "stop", "string of 1 to"),
    (chat(stop=["a"] * 17), "stop", "at most 16"),
    (chat(stop=[1]), "stop", "string"),
    (chat(logprobs=2), "logprobs", "true or false"),
    (chat(top_logprobs=2), "top_logprobs", "logprobs true"),
    (chat(logprobs=True, top_logprobs=21), "top_logprobs", "from 0 to 20"),
    (chat(tool_choice="required"), "tool_choice", "forced"),
    (
        tool(name="search"),
        "tools",
        "than calculator and python, the only ones that models here can call, found the function 'search'",
    ),
    (
        tool(name="calculator", parameters={"properties": {"a": {"type": "string"}, "b": {"type": "string"}}}),
        "tools",
        "one parameter",
    ),
    (tool(name="python", parameters={"properties": {"a": {"type": "number"}}}), "tools", "one parameter, a string"),
    (chat(tools=[{"type": "retrieval"}]), "tools", "calculator and python"),
    (chat(tools={}), "tools", "a list"),
    ({"model": "parrot"}, "messages", "missing"),
    (chat(messages=[]), "messages", "found 0"),
    (chat(messages=HI * 501), "messages", "found 501"),
    (chat(messages="hi"), "messages", "list of 1 to 500"),
    (chat(messages=["hi"]), "messages", "message 1 to be an object"),
    (chat(messages=[{"role": "usr", "content": "x"}]), "messages", "did you mean user"),
    (chat(messages=[{"role": "user"}]), "messages", "message with text"),
    (chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]), "messages", "images"),
    (said(role="assistant", content=[{"type": "text", "text": 1}]), "messages", "expected message 2 to"),
    (said(role="assistant", content="x"), "messages", "does not continue"),
    (said(role="tool", content="1", tool_call_id="c"), "messages", "to follow"),
    (chat(messages=[*HI, calls(), {"role": "tool", "content": "1", "tool_call_id": "d"}]), "messages", "with its id"),
    (
        chat(messages=[*HI, calls(), *HI, {"role": "tool", "content": "1", "tool_call_id": "c"}]),
        "messages",
        "to follow",
    ),
    (said(**calls("1+1")), "messages", "one tool call"),
    (said(**calls('{"a": "1", "b": "2"}')), "messages", "one tool call"),
    (said(**calls('{"a": 1}')), "messages", "one tool call"),
    (said(**calls("[" * 100_000)), "messages", "one tool call"),
    (said(**calls(id=None)), "messages", "one tool call"),
    (said(role="assistant", content=7), "messages", "found int"),
    ({"messages": HI}, "model", "parrot, endless"),
    (chat(model=7), "model", "expected a string"),
]


@pytest.mark.parametrize(("body", "param", "words"), BAD, ids=range(len(BAD)))
def test_a_bad_field_is_refused_by_name(live, body, param, words):
    answer = live.http.post(CHAT, json=body)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error.keys() == {"message", "type", "param", "code"}
    assert (error["param"], error["type"]) == (param, "invalid_request_error") and words in error["message"]


# What asks for nothing, by name: each of these values is taken, and so is null; the other value is refused for what it
# is, and nothing is guessed.
NOTHING = {
    "response_format": ([{"type": "text"}], {"type": "json_object"}),
    "parallel_tool_calls": ([True, False], "yes"),
    "logit_bias": ([{}], {"5": 1}),
    "service_tier": (["auto", "default"], "priority"),
    "reasoning_effort": (["none"], "high"),
    "verbosity": (["medium"], "low"),
    "modalities": ([["text"]], ["text", "audio"]),
    "audio": ([], {"voice": "alloy"}),
    "prediction": ([], {"type": "content", "content": "x"}),
    "web_search_options": ([], {}),
    "functions": ([[]], [{"name": "f"}]),
    "function_call": (["none", "auto"], {"name": "f"}),
    "tool_choice": (["none", "auto"], "required"),
    "frequency_penalty": ([0, 0.0], 0.1),
    "presence_penalty": ([0, 0.0], -1),
    "min_p": ([0], 0.1),
    "repeat_penalty": ([1, 1.0], 1.1),
    "best_of": ([1], 2),
}
# about who asks, not about the reply
ANYTHING = ("user", "metadata", "store", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")


@pytest.mark.fault("S3")
@pytest.mark.parametrize("name", NOTHING)
def test_a_value_that_asks_for_nothing_is_taken_and_another_refused_for_what_it_is(name):
    taken, other = NOTHING[name]
    for read, body in ((read_chat, chat()), (read_completion, {"prompt": "x"})):
        for value in (None, *taken):
            assert read(body | {name: value}) == read(body)
        with pytest.raises(ApiError) as error:
            read(body | {name: other})
        assert (error.value.status, error.value.param, error.value.code) == (400, name, "unsupported_value")
        assert f"{name} " in error.value.message and "did you mean" not in error.value.message


@pytest.mark.fault("S3")
@pytest.mark.parametrize("name", [*ANYTHING, *fields(ChatRequest), "temprature"])
def test_null_is_a_field_left_out(name):
    body = chat()
    if name not in ("model", "messages"):
        assert read_chat(body | {name: None}) == read_chat(body)
    if name in ANYTHING:
        assert read_chat(body | {name: "x"}) == read_chat(body)


@pytest.mark.fault("S3")
@pytest.mark.parametrize(
    "body",
    [
        {"messages": HI, "stream": True},
        {"messages": HI, "stream": False},
        {"messages": HI, "stream": True, "stream_options": {"include_usage": True}},
        {"messages": HI, "stream": True, "stream_options": {"include_usage": None, "include_obfuscation": False}},
        {"messages": HI, "logprobs": False, "top_logprobs": 0},
        {
            "messages": [
                {"content": "", "role": "system"},
                {"content": "hi", "role": "user"},
                {"content": "", "role": "assistant"},
                {"content": "b", "role": "user"},
            ],
            "stream": False,
        },
        {
            "messages": [{"role": "system", "content": "brief"}, {"role": "system", "content": "be"}, *HI],
            "stream": False,
        },
        {"messages": HI, "tools": [{"type": "function", "function": {"name": "weather"}}], "tool_choice": "none"},
        {"messages": HI, "max_tokens": -1, "top_k": -1},
        {"messages": HI, "max_completion_tokens": -1.0},
    ],
    ids=str,
)
def test_what_clients_send_by_default(live, body):
    """openai, LangChain, pydantic-ai, the ai SDK and LM Studio's sample; an empty system prompt is theirs."""
    answer = live.http.post(CHAT, json={"model": "parrot"} | body)
    assert answer.status_code == 200, answer.text


def test_minus_one_is_no_limit():
    for name in ("max_tokens", "max_completion_tokens"):
        assert read_chat(chat(**{name: -1})).budget == 2**31 - 1
    assert read_chat(chat(top_k=-1)) == read_chat(chat(top_k=0)) != read_chat(chat())


@pytest.mark.parametrize(
    ("read", "body", "route"),
    [
        (read_chat, {"messages": HI, "prompt": "x"}, "/v1/completions"),
        (read_completion, {"prompt": "x", "messages": HI}, "/v1/chat/completions"),
        (read_completion, {"prompt": "x", "max_completion_tokens": 5}, "/v1/chat/completions"),
    ],
)
def test_a_field_of_the_other_route_is_named_as_such(read, body, route):
    with pytest.raises(ApiError) as error:
        read(body)
    assert error.value.code == "unsupported_parameter" and error.value.message.endswith(f"it is a field of {route}")


@pytest.mark.fault("S15")
def test_a_base_model_does_not_chat(live, start_server):
    answer = live.http.post(CHAT, json=chat(model="endless"))
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "base_model", "model")
    assert "endless" in error["message"] and "parrot" in error["message"] and "/v1/completions" in error["message"]
    assert (
        live.http.post("/v1/completions", json={"model": "endless", "prompt": "x", "max_tokens": 1}).status_code == 200
    )
    alone = start_server(model="endless").http.post(CHAT, json={"messages": HI}).json()["error"]
    assert alone["code"] == "base_model" and "parrot" not in alone["message"]


@pytest.mark.fault("S17")
@pytest.mark.parametrize(
    ("method", "path", "named"),
    [
        ("POST", "/chat/completions", "/v1/chat/completions"),
        ("POST", "/completions", "/v1/completions"),
        ("GET", "/models", "/v1/models"),
        ("POST", "/v1/v1/chat/completions", "/v1/chat/completions"),
        ("POST", "/v1/responses", "/v1/chat/completions"),
    ],
)
def test_another_route_is_told_ours(live, method, path, named):
    answer = live.http.request(method, path, json=chat())
    assert (answer.status_code, answer.json()["error"]["code"]) == (
        404,
        "no_such_route",
    ) and f"expected {named}" in answer.json()["error"]["message"]


@pytest.mark.fault("S17")
def test_models_with_a_slash_at_the_end(live):
    assert live.http.get("/v1/models/").json() == live.http.get("/v1/models").json()


@pytest.mark.parametrize(
    "field",
    [
        {"seed": -(2**63)},
        {"seed": 2**63 - 1},
        {"seed": 0},
        {"top_p": 0},
        {"top_k": 2**31 - 1},
        {"temperature": 2},
        {"temperature": 1e-300},
        {"repetition_penalty": 10},
        {"max_tokens": 2**31 - 1},
        {"stop": ["a" * 256] * 16},
        {"stop": []},
        {"n": 8.0},
        {"top_logprobs": 20, "logprobs": True},
        {"tools": []},
        {"stream_options": {}},
        {
            "n": None,
            "seed": None,
            "stop": None,
            "temperature": None,
            "tools": None,
            "logprobs": None,
            "metadata": {"a": "b"},
            "store": True,
        },
    ],
    ids=str,
)
def test_a_field_at_its_limit_is_taken(live, field):
    answer = live.http.post(CHAT, json=chat(temperature=1) | field)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ({"echo": 1}, "true or false"),
        ({"suffix": "x"}, "suffix"),
        ({"messages": HI}, "messages"),
        ({"prompt": ["a", 5]}, "list of token ids"),
        ({"prompt": ""}, "not empty"),
        ({"prompt": []}, "not empty"),
        ({"prompt": [5, 275]}, "ids below 275"),
        ({"prompt": [1] * 4096}, "reads at most 4095"),
        ({"logprobs": True}, "whole number"),
        ({"prompt": None}, "missing"),
        ({"tools": []}, "not supported"),
    ],
)
def test_what_completions_refuse(live, field, words):
    answer = live.http.post("/v1/completions", json={"model": "endless", "prompt": "x", "max_tokens": 1} | field)
    assert (
        answer.status_code == 400
        and words in answer.json()["error"]["message"]
        and answer.json()["error"]["param"] == next(iter(field))
    )


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "list; expected a JSON object"),
        (b"null", "NoneType"),
        (b"\xff", "not JSON"),
        (b'{"model": "parrot", "messages": [], "n": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"model":"parrot","messages":[],"temperature":NaN}', "a list of 1"),
        (b'{"model": "parrot", "temperature": Infinity}', "inf; expected a number"),
        (b'{"\\ud800": 1}', "not supported"),
        (b'{"model": "\\ud800", "prompt": "x"}', "not served"),
    ],
)
def test_a_body_that_is_none(live, data, words):
    answer = live.http.post(
        "/v1/completions" if b"prompt" in data else CHAT, content=data, headers={"content-type": "application/json"}
    )
    assert answer.status_code in (400, 404) and words in answer.json()["error"]["message"]


def test_half_a_surrogate_in_a_message_does_no_harm(live):
    body = b'{"model": "parrot", "max_tokens": 1, "messages": [{"role": "user", "content": "\\ud800"}]}'
    assert live.http.post(CHAT, content=body, headers={"content-type": "application/json"}).status_code == 200


def test_limits_of_size(live):
    answer = live.http.post(CHAT, json=chat(messages=[{"role": "user", "content": "x" * MAX_BODY}]))
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
    # not even tokenized
    answer = live.http.post(CHAT, json=chat(messages=[{"role": "user", "content": "x" * (MAX_BODY - 200)}]))
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
    words = "plain words " * 70
    for body, field in (
        (chat(messages=[{"role": "user", "content": words}]), "messages"),
        ({"model": "parrot", "prompt": words * 2}, "prompt"),
    ):
        error = live.http.post(CHAT if field == "messages" else "/v1/completions", json=body | {"stream": True}).json()[
            "error"
        ]
        assert (error["code"], error["param"]) == ("context_length_exceeded", field) and "reads at most 127" in error[
            "message"
        ]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", CHAT, 405),
        ("GET", "/docs", 404),
        ("GET", "/openapi.json", 404),
        ("POST", "/", 405),
    ],
)
def test_other_routes_answer_in_the_same_form(live, method, path, status):
    answer = live.http.request(method, path)
    assert answer.status_code == status and path in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:1", 200),
        ("localhost", 200),
        ("LOCALHOST:8000", 200),
        ("[::1]:8000", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example:80", 403),
        ("[", 403),
        ("evil@localhost.example", 403),
    ],
)
def test_names_that_were_pointed_at_this_machine_are_refused(live, host, status):
    for path in ("/health", "/", "/v1/models"):
        answer = live.http.get(path, headers={"host": host})
        assert answer.status_code == status and (status == 200 or answer.json()["error"]["code"] == "bad_host")


def test_no_other_origin_is_invited(live):
    for answer in (
        live.http.get("/v1/models", headers={"origin": "http://evil.example"}),
        live.http.options(CHAT, headers={"origin": "http://evil.example"}),
    ):
        assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize("path", ["/", "/compare"])
def test_the_page_and_what_it_may_do(live, path):
    answer = live.http.get(path)
    assert answer.text.startswith("<!doctype html>") and answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert {
        name: policy[name] for name in ("default-src", "connect-src", "base-uri", "form-action", "frame-ancestors")
    } == {
        "default-src": "'none'",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    assert policy.keys() == {
        "default-src",
        "connect-src",
        "base-uri",
        "form-action",
        "frame-ancestors",
        "script-src",
        "style-src",
    }
    for tag in ("script", "style"):
        text = answer.text.split(f"<{tag}>", 1)[1].split(f"</{tag}>", 1)[0]
        assert policy[f"{tag}-src"] == f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_a_key_and_an_origin(start_server, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "sesame-42")
    live = start_server(model="parrot", api_key_env="SOME_KEY", cors="http://ours.example")
    for given in (
        b"",
        b"Bearer x",
        b"Bearer sesame-4",
        b"Basic sesame-42",
        b"Bearer sesame-422",
        "Bearer sésame-42".encode(),
    ):
        for answer in (
            live.http.get("/v1/models", headers={"authorization": given}),
            live.http.post(CHAT, json=chat(), headers={"authorization": given}),
        ):
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    with (
        openai.OpenAI(base_url=f"{live.url}/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()
    key = {"authorization": "Bearer sesame-42", "origin": "http://ours.example"}
    answer = live.http.post(CHAT, json={"messages": HI}, headers=key)  # one model: it need not be named
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "http://ours.example"
    for path in ("/", "/health"):
        assert live.http.get(path).status_code == 200
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    assert live.http.options(CHAT, headers={"origin": "http://ours.example"} | asked).status_code == 200
    other = live.http.options(CHAT, headers={"origin": "http://evil.example"} | asked)
    assert other.status_code == 400 and "access-control-allow-origin" not in other.headers


def test_pipelining_keeps_the_order(live):
    """Two requests on one connection, the second sent before the first is answered."""
    one = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n".encode()
    body = json.dumps(chat()).encode()
    with socket.create_connection(("127.0.0.1", httpx.URL(live.url).port), timeout=20) as s:
        s.sendall(
            (one + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
            + b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        )
        got = b"".join(iter(lambda: s.recv(65536), b""))
    assert got.count(b"HTTP/1.1 200") == 2 and got.index(b"chatcmpl") < got.index(b'"status"')
