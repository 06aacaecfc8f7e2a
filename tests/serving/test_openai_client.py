"""The official openai client, unchanged, against the real server. Oracles: the answers that the model knows by heart,
and a forward pass.
"""

import json

import openai
import pytest
import torch

from nanolab.data.chat import render_prompt
from nanolab.data.tokenizer import Tokenizer
from nanolab.records.models import load_model
from nanolab.runtime import Runtime

HI = [{"role": "user", "content": "hi"}]
PRODUCT = [{"role": "user", "content": "12*34?"}]
HELLO = "é 🙂 hello"
STEPS = [
    {"type": "python", "text": "12*34"},
    {"type": "python_output", "text": "408"},
    {"type": "text", "text": "It is 408."},
]


def function(name: str, parameter: str = "") -> dict:
    properties = {parameter: {"type": "string"}} if parameter else {}
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}


@pytest.fixture(scope="module")
def client(live):
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=30) as made:
        yield made


@pytest.fixture(scope="module")
def chat(client):
    """A function (messages, **fields) -> the client's answer of the chat model."""
    return lambda messages, **fields: client.chat.completions.create(model="parrot", messages=messages, **fields)


@pytest.fixture(scope="module")
def tok(runs) -> Tokenizer:
    return Tokenizer.load(runs / "runs" / "parrot" / "tokenizer")


def test_a_plain_answer(chat, tok):
    answer = chat(HI)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason, choice.logprobs) == (
        "assistant",
        HELLO,
        "stop",
        None,
    )
    assert not choice.message.tool_calls and choice.message.model_extra == {}
    prompt, made = len(render_prompt(tok, HI)), len(tok.encode(HELLO)) + 1  # and the token that ends the turn
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (prompt, made, prompt + made)
    assert (answer.object, answer.model, answer.id[:9]) == ("chat.completion", "parrot", "chatcmpl-")


def test_a_stream_says_the_same_in_whole_characters(chat):
    chunks = list(chat(HI, stream=True, stream_options={"include_usage": True}))
    *said, usage = chunks
    texts = [c.choices[0].delta.content for c in said]
    assert said[0].choices[0].delta.role == "assistant" and texts[0] == "" and texts[-1] is None
    assert "".join(filter(None, texts)) == HELLO and "\ufffd" not in "".join(filter(None, texts)) and "🙂" in texts
    assert [c.choices[0].finish_reason for c in said] == [None] * (len(said) - 1) + ["stop"]
    assert usage.choices == [] and usage.usage == chat(HI).usage.model_copy(
        update={"prompt_tokens_details": usage.usage.prompt_tokens_details}
    )
    assert {c.id for c in chunks} == {usage.id} and all(c.usage is None for c in said)
    assert all(c.usage is None for c in chat(HI, stream=True))


def test_n_and_seed(client):
    def draw(**fields):
        found = client.completions.create(model="endless", prompt="x", temperature=1, max_tokens=12, **fields).choices
        assert [choice.index for choice in found] == list(range(len(found)))
        return [choice.text for choice in found]

    three = draw(n=3, seed=7)
    assert three == draw(n=3, seed=7) and len(set(three)) == 3
    assert draw(seed=7) == three[:1] and draw(seed=8) != three[:1]
    assert draw() != draw()
    chunks = client.completions.create(
        model="endless", prompt="x", temperature=1, max_tokens=12, n=3, seed=7, stream=True
    )
    streamed = ["", "", ""]
    for chunk in chunks:
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == three


@pytest.mark.parametrize(
    ("stop", "shown"), [("llo", "é 🙂 he"), (["zz", " hel", "lo"], "é 🙂"), (["o!"], HELLO), (["🙂"], "é ")]
)
def test_stop_strings_are_never_shown_not_even_in_part(chat, stop, shown):
    answer = chat(HI, stop=stop).choices[0]
    assert (answer.message.content, answer.finish_reason) == (shown, "stop")
    grown = "".join(chunk.choices[0].delta.content or "" for chunk in chat(HI, stop=stop, stream=True))
    assert grown == shown


@pytest.fixture(scope="module")
def expected(runs, tok):
    """Log probabilities (T, V) after each token of the prompt for HI and its answer, from one forward pass."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOLAB_BASE_DIR", str(runs))
        model, *_ = load_model("parrot", Runtime(torch.device("cpu"), torch.float32))
    prompt, ids = render_prompt(tok, HI), tok.encode(HELLO)
    with torch.no_grad():
        return ids, model(torch.tensor([prompt + ids]))[0, len(prompt) - 1 : -1].log_softmax(-1)


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(chat, tok, expected, stream):
    answer = chat(HI, logprobs=True, top_logprobs=3, stream=stream)
    entries = (
        [e for c in answer if c.choices[0].logprobs for e in c.choices[0].logprobs.content]
        if stream
        else answer.choices[0].logprobs.content
    )
    ids, logprobs = expected
    assert b"".join(bytes(e.bytes) for e in entries) == HELLO.encode() and len(entries) == len(ids)
    for entry, i, row in zip(entries, ids, logprobs):
        best = row.topk(3)
        assert entry.logprob == pytest.approx(row[i].item(), abs=1e-4)
        assert [t.logprob for t in entry.top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert [bytes(t.bytes) for t in entry.top_logprobs] == [tok.decode_bytes([j]) for j in best.indices.tolist()]
    assert all(e.top_logprobs == [] for e in chat(HI, logprobs=True).choices[0].logprobs.content)


def test_tokens_of_a_stop_string_have_no_logprobs(chat):
    entries = chat(HI, logprobs=True, stop="llo").choices[0].logprobs.content
    assert b"".join(bytes(e.bytes) for e in entries) == "é 🙂 he".encode()


def test_the_servers_own_tool_answers_inside_the_reply(chat, tok):
    answer = chat(PRODUCT)
    message = answer.choices[0].message
    assert (message.content, answer.choices[0].finish_reason, message.tool_calls) == ("It is 408.", "stop", None)
    assert message.model_extra == {"parts": STEPS}
    deltas = [chunk.choices[0].delta for chunk in chat(PRODUCT, stream=True)]
    assert [d.model_extra["part"] for d in deltas if d.model_extra] == STEPS[:2]
    assert "".join(d.content or "" for d in deltas) == "It is 408."
    again = [*PRODUCT, message.model_dump(), *HI]  # a message given back as it came keeps its steps
    assert chat(again).usage.prompt_tokens == len(
        render_prompt(tok, [*PRODUCT, {"role": "assistant", "content": STEPS}, *HI])
    )


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("question", "name", "argument", "code", "result", "final"),
    [
        ("12*34?", "calculator", "expression", "12*34", "408", "It is 408."),
        ("say", "python", "code", "print('a')", "a", "Said."),
    ],
)
def test_tools_that_the_client_runs(chat, tok, stream, question, name, argument, code, result, final):
    messages = [{"role": "user", "content": question}]
    tools = [function("calculator"), function("python")]
    if stream:
        *_, called, end = chat(messages, tools=tools, stream=True)
        call, finish = called.choices[0].delta.tool_calls[0], end.choices[0].finish_reason
        message = {"role": "assistant", "content": None, "tool_calls": [call.model_dump(exclude={"index"})]}
    else:
        choice = chat(messages, tools=tools, tool_choice="auto").choices[0]
        message, call, finish = choice.message, choice.message.tool_calls[0], choice.finish_reason
        assert message.content is None and message.model_extra == {}
    assert (call.type, call.function.name, json.loads(call.function.arguments), finish) == (
        "function",
        name,
        {argument: code},
        "tool_calls",
    )
    given = [*messages, message, {"role": "tool", "tool_call_id": call.id, "content": result}]
    answer = chat(given, tools=tools)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (final, "stop")
    turn = [{"type": "python", "text": code}, {"type": "python_output", "text": result}]
    assert answer.usage.prompt_tokens == len(render_prompt(tok, [*messages, {"role": "assistant", "content": turn}]))
    later = [*given, {"role": "assistant", "content": final}, *HI]  # all of it is one turn of the assistant's
    whole = {"role": "assistant", "content": [*turn, {"type": "text", "text": final}]}
    assert chat(later, tools=tools).usage.prompt_tokens == len(render_prompt(tok, [*messages, whole, *HI]))


def test_a_tools_parameter_keeps_its_name(chat):
    call = chat(PRODUCT, tools=[function("calculator", "sum")]).choices[0].message.tool_calls[0]
    assert json.loads(call.function.arguments) == {"sum": "12*34"}
    assert chat(PRODUCT, tools=[function("calculator")], tool_choice="none").choices[0].message.content == "It is 408."


def test_models(client):
    found = {model.id: model for model in client.models.list()}
    assert list(found) == ["parrot", "endless"]
    parrot = found["parrot"]
    assert (parrot.object, parrot.owned_by, parrot.kind, parrot.context) == ("model", "nanolab", "sft", 128)
    assert parrot.sampling["temperature"] == 0.0 and found["endless"].kind == "base"
    assert client.models.retrieve("parrot") == parrot
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("parot")


def test_completions(client, tok):
    answer = client.completions.create(model="endless", prompt="x", max_tokens=5)
    (choice,) = answer.choices
    assert (answer.object, choice.text, choice.finish_reason, choice.logprobs) == (
        "text_completion",
        "\0" * 5,
        "length",
        None,
    )
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, 5)  # with bos
    assert (
        client.completions.create(model="endless", prompt=[tok.bos, *tok.encode("x")], max_tokens=5).usage
        == answer.usage
    )
    full = client.completions.create(model="endless", prompt=[5] * 4090, max_tokens=5000)
    assert (full.usage.total_tokens, full.choices[0].finish_reason) == (4096, "length")
    logprobs = client.completions.create(model="parrot", prompt=render_prompt(tok, HI), logprobs=2).choices[0].logprobs
    assert logprobs.tokens[-6:] == [*"hello", "<|assistant_end|>"] and logprobs.text_offset[-6:] == [4, 5, 6, 7, 8, 9]
    assert all(
        len(top) == 2 and max(top.values()) == pytest.approx(own)
        for top, own in zip(logprobs.top_logprobs[-6:], logprobs.token_logprobs[-6:])
    )


def test_system_and_developer_messages(chat, tok):
    for role in ("system", "developer"):
        used = chat([{"role": role, "content": "Be brief."}, *HI]).usage.prompt_tokens
        assert used == len(render_prompt(tok, [{"role": "system", "content": "Be brief."}, *HI]))


def test_errors_are_the_clients_own(chat, client):
    with pytest.raises(openai.NotFoundError) as error:
        client.chat.completions.create(model="gpt-4", messages=HI)
    assert (error.value.code, error.value.param) == ("model_not_found", "model") and "parrot, endless" in str(
        error.value
    )
    with pytest.raises(openai.BadRequestError) as error:
        chat(HI, logit_bias={"5": 1})
    assert (error.value.param, error.value.code, error.value.type) == (
        "logit_bias",
        "unsupported_value",
        "invalid_request_error",
    )
    with pytest.raises(openai.BadRequestError) as error:
        chat([{"role": "user", "content": "long words " * 30}])
    assert error.value.code == "context_length_exceeded" and "reads at most 127" in str(error.value)


def test_what_other_programs_send(live):
    """lm-evaluation-harness' local-chat-completions, and Open WebUI."""
    harness = {
        "messages": [{"role": "user", "content": "hi", "type": "text"}],
        "model": "parrot",
        "max_tokens": 256,
        "temperature": 0,
        "stop": ["\n\n", "Question:", "</s>"],
        "seed": 1234,
    }
    webui = {
        "model": "parrot",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.0,
        "top_p": 1,
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "max_tokens": 128,
        "user": "u",
        "metadata": None,
    }
    assert live.http.post("/v1/chat/completions", json=harness).json()["choices"][0]["message"]["content"] == HELLO
    lines = live.http.post("/v1/chat/completions", json=webui).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"]) == HELLO
