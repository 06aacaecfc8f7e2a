"""Clients that people have, unchanged, against the real server: two turns each, streaming and not, and what they send
where people leave something out.

Oracles: the answers that the model knows by heart; the ids that it is given, which are those of the history as training
renders it; SENT, the requests as these clients write them. All are slow but openai's and huggingface_hub's: importing
the others takes seconds."""

import json
import re
import shutil
import subprocess
from functools import partial
from pathlib import Path

import openai
import pytest
from histories import bot, system, user

from nanolab.data.chat import render_prompt
from nanolab.data.tokenizer import Tokenizer
from nanolab.serving import api
from nanolab.serving.worker import ModelServer

NPM = Path(__file__).parent / "npm"
HELLO, IT_IS, LINES = "é 🙂 hello", "It is 408.", "a\u2028b\u2029c\x85"
# What else than model, messages, prompt and `stream: false` each client sends with its defaults, and the message keys
# of a reply given back
TEXT = {"frequency_penalty": 0, "logprobs": None, "n": 1, "presence_penalty": 0, "seed": None, "top_p": 1}
USAGE = {"stream": True, "stream_options": {"include_usage": True}}
SENT = {
    "openai": [{}, {"stream": True}, {"response_format": {"type": "text"}}],
    "litellm": [{}, {"stream": True}, {"response_format": {"type": "text"}}],
    "llm": [{}, USAGE, USAGE | {"max_tokens": 1}, USAGE | {"max_tokens": 5, "temperature": 0.0}],
    "langchain-openai": [{}, {"stream": True}, TEXT | {"max_tokens": 256, "temperature": 0.7}],
    "pydantic-ai": [{}, USAGE],
    "huggingface_hub": [{}, {"stream": True}],
    "npm": [{}, {"stream": True}, {"max_tokens": 5, "stop": ["\nuser:"]}],
}


HI, PRODUCT = user("hi"), user("12*34?")
SECOND = [HI, bot(HELLO), PRODUCT]
BOTH = user("12*34?\n\nhi")  # two questions, the reply between them being blank


class Wire:
    """What a client sent, and what the models were given. history: the strict form of a conversation -> its ids."""

    def __init__(self, url: str, tok: Tokenizer):
        self.root, self.url, self.bodies, self.prompts = url, f"{url}/v1", [], []
        self.history = lambda *messages: tuple(render_prompt(tok, messages))

    def check(self, client: str, *histories: list[dict]) -> None:
        """The models have read these histories and nothing else, and the client has sent nothing that SENT does not
        hold.
        """
        assert self.prompts == [self.history(*messages) for messages in histories]
        self.check_fields(client)

    def check_fields(self, client: str) -> None:
        for body in self.bodies:
            beside = {
                key: value
                for key, value in body.items()
                if key not in ("model", "messages", "prompt") and (key, value) != ("stream", False)
            }
            assert beside in SENT[client]
        self.bodies.clear()
        self.prompts.clear()


@pytest.fixture
def wire(live, runs, monkeypatch) -> Wire:
    found = Wire(live.url, Tokenizer.load(runs / "runs" / "parrot" / "tokenizer"))
    read_body, submit = api.read_body, ModelServer.submit

    async def read(*arguments, **named):
        body = await read_body(*arguments, **named)
        found.bodies.append(json.loads(body))
        return body

    def take(served, requests, *arguments, **named):
        found.prompts += [tuple(request.prompt) for request in requests]
        return submit(served, requests, *arguments, **named)

    monkeypatch.setattr(api, "read_body", read)
    monkeypatch.setattr(ModelServer, "submit", take)
    return found


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """No client asks anybody else, or reads this user's settings."""
    names = ("LANGSMITH_TRACING", "LANGCHAIN_TRACING_V2", "LITELLM_TELEMETRY", "AI_SDK_LOG_WARNINGS")
    quiet = dict.fromkeys(names, "false") | {
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
    }
    for name, value in (quiet | {"OPENAI_API_KEY": "none", "LLM_USER_PATH": str(tmp_path)}).items():
        monkeypatch.setenv(name, value)
    for name in ("OPENAI_BASE_URL", "OPENAI_API_BASE", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.slow
@pytest.mark.fault("S3", "S5")
@pytest.mark.parametrize(("client", "fields"), [(client, fields) for client, sent in SENT.items() for fields in sent])
def test_what_clients_send(live, client, fields):
    """Recorded: the tests below see that the clients still send this. A reply given back has huggingface_hub's nulls; a
    list of prompts is LangChain's.
    """
    message = bot(HELLO) | {"reasoning": None, "tool_call_id": None, "tool_calls": None}
    if "logprobs" in fields or "stop" in fields:
        path, prompt = "completions", {"model": "endless", "prompt": ["x"] if "logprobs" in fields else "x"}
    else:
        path, prompt = "chat/completions", {"model": "parrot", "messages": [HI, message, PRODUCT]}
    assert live.http.post(f"/v1/{path}", json=prompt | fields).status_code == 200


# Python: two turns


def test_openai(wire):
    with openai.OpenAI(base_url=wire.url, max_retries=0) as client:
        ask = partial(client.chat.completions.create, model="parrot")
        first = ask(messages=[HI]).choices[0].message
        second = ask(messages=[HI, first, PRODUCT])
        assert (first.content, second.choices[0].message.content) == (HELLO, IT_IS)
        assert second.usage.prompt_tokens == len(wire.history(*SECOND))
        wire.check("openai", [HI], SECOND)
        said = "".join(chunk.choices[0].delta.content or "" for chunk in ask(messages=[HI], stream=True))
        with client.chat.completions.stream(model="parrot", messages=[HI, bot(said), PRODUCT]) as stream:
            assert (said, stream.get_final_completion().choices[0].message.content) == (HELLO, IT_IS)
        wire.check("openai", [HI], SECOND)


@pytest.mark.fault("S1", "S2", "S3")
def test_openai_leaves_blanks(wire):
    with openai.OpenAI(base_url=wire.url, max_retries=0) as client:
        ask = partial(client.chat.completions.create, model="parrot")
        blank = ask(messages=[PRODUCT], max_tokens=1).choices[0].message
        assert blank.content == ""
        wire.prompts.clear(), wire.bodies.clear()
        ask(messages=[PRODUCT, blank, HI])
        ask(messages=[PRODUCT, bot(blank.content), HI])
        wire.check("openai", [BOTH], [BOTH])
        assert ask(messages=[system(""), HI], response_format={"type": "text"}).choices[0].message.content == HELLO
        ask(messages=[system("a"), system("b"), HI])
        ask(messages=[HI, HI])
        wire.check("openai", [HI], [system("a\n\nb"), HI], [user("hi\n\nhi")])


@pytest.mark.slow
@pytest.mark.parametrize("provider", ["openai", "hosted_vllm", "custom_openai"])
def test_litellm(wire, provider):
    import litellm

    ask = partial(litellm.completion, f"{provider}/parrot", api_base=wire.url, api_key="none")
    first = ask([HI]).choices[0].message
    second = ask([HI, first, PRODUCT])
    assert (first.content, second.choices[0].message.content, second.usage.prompt_tokens) == (
        HELLO,
        IT_IS,
        len(wire.history(*SECOND)),
    )
    wire.check("litellm", [HI], SECOND)
    said = "".join(chunk.choices[0].delta.content or "" for chunk in ask([HI], stream=True))
    again = "".join(chunk.choices[0].delta.content or "" for chunk in ask([HI, bot(said), PRODUCT], stream=True))
    assert (said, again) == (HELLO, IT_IS)
    wire.check("litellm", [HI], SECOND)


@pytest.mark.slow
@pytest.mark.fault("S1", "S2", "S3", "S5")
def test_litellm_leaves_blanks(wire):
    import litellm

    to = {"api_base": wire.url, "api_key": "none"}
    ask = partial(litellm.completion, "openai/parrot", **to)
    blank = ask([PRODUCT], max_tokens=1).choices[0].message
    assert not blank.content
    wire.prompts.clear(), wire.bodies.clear()
    ask([PRODUCT, blank, HI])
    assert ask([system(""), HI], response_format={"type": "text"}).choices[0].message.content == HELLO
    wire.check("litellm", [BOTH], [HI])
    two = litellm.text_completion(["x", "y"], "text-completion-openai/endless", max_tokens=5, **to)
    assert [choice.text for choice in two.choices] == ["\0" * 5] * 2


@pytest.fixture
def llm(wire, tmp_path):
    """A function (arguments of the command line) -> what it prints. The models are declared as its documentation
    says.
    """
    from click.testing import CliRunner
    from llm.cli import cli

    models = [
        {"model_id": "chat", "model_name": "parrot"},
        {"model_id": "text", "model_name": "endless", "completion": True},
    ]
    # JSON is YAML
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([model | {"api_base": wire.url} for model in models]))

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    return run


@pytest.mark.slow
@pytest.mark.parametrize("plain", [[], ["--no-stream"]])
def test_llm(wire, llm, plain):
    assert llm("-m", "chat", *plain, "hi") == HELLO + "\n"
    assert llm("-c", *plain, "12*34?") == IT_IS + "\n"
    wire.check("llm", [HI], SECOND)
    assert llm("-m", "text", *plain, "x", "-o", "max_tokens", "5", "-o", "temperature", "0") == "\0" * 5 + "\n"


@pytest.mark.slow
@pytest.mark.fault("S1")
def test_llm_goes_on_after_a_blank_reply(wire, llm):
    assert llm("-m", "chat", "-o", "max_tokens", "1", "12*34?") == "\n"
    llm("-c", "hi")
    llm("-m", "chat", "-s", "", "hi")
    wire.check("llm", [PRODUCT], [BOTH], [HI])


@pytest.mark.slow
def test_langchain(wire):
    from langchain_core.messages import AIMessage, HumanMessage
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(base_url=wire.url, model="parrot", max_retries=0)
    first = model.invoke("hi")
    second = model.invoke([HumanMessage("hi"), first, HumanMessage("12*34?")])
    assert (first.content, second.content, second.usage_metadata["input_tokens"]) == (
        HELLO,
        IT_IS,
        len(wire.history(*SECOND)),
    )
    wire.check("langchain-openai", [HI], SECOND)
    said = "".join(chunk.content for chunk in model.stream("hi"))
    again = "".join(
        chunk.content for chunk in model.stream([HumanMessage("hi"), AIMessage(said), HumanMessage("12*34?")])
    )
    assert (said, again) == (HELLO, IT_IS)
    wire.check("langchain-openai", [HI], SECOND)
    assert [answer.content for answer in model.batch(["hi", "12*34?"])] == [HELLO, IT_IS]


@pytest.mark.slow
@pytest.mark.fault("S1", "S2")
def test_langchain_leaves_blanks(wire):
    from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(base_url=wire.url, model="parrot", max_retries=0)
    blank = ChatOpenAI(base_url=wire.url, model="parrot", max_completion_tokens=1).invoke("12*34?")
    assert blank.content == ""
    wire.prompts.clear(), wire.bodies.clear()
    model.invoke([HumanMessage("12*34?"), blank, HumanMessage("hi")])
    model.invoke([HumanMessage("12*34?"), AIMessage(""), HumanMessage("hi")])
    model.invoke([HumanMessage("12*34?"), HumanMessage("hi")])
    assert model.invoke([SystemMessage(""), HumanMessage("hi")]).content == HELLO
    model.invoke([SystemMessage("a"), SystemMessage("b"), HumanMessage("hi")])
    wire.check("langchain-openai", [BOTH], [BOTH], [BOTH], [HI], [system("a\n\nb"), HI])


@pytest.mark.slow
@pytest.mark.fault("S5")
def test_langchain_completions(wire):
    from langchain_openai import OpenAI

    model = partial(OpenAI, base_url=wire.url, model="endless", max_retries=0)
    assert len(model().invoke("x").encode()) > 0
    wire.check_fields("langchain-openai")
    made = model(temperature=0, max_tokens=5)
    assert (made.invoke("x"), made.batch(["x", "yy"]), "".join(made.stream("x"))) == (
        "\0" * 5,
        ["\0" * 5] * 2,
        "\0" * 5,
    )


@pytest.fixture
def agent(wire):
    """A function (instructions and the like) -> an agent of pydantic-ai."""
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    return partial(Agent, OpenAIChatModel("parrot", provider=OpenAIProvider(base_url=wire.url, api_key="none")))


@pytest.mark.slow
def test_pydantic_ai(wire, agent):
    first = agent().run_sync("hi")
    second = agent().run_sync("12*34?", message_history=first.all_messages())
    assert (first.output, second.output) == (HELLO, IT_IS)
    wire.check("pydantic-ai", [HI], SECOND)
    first = agent().run_stream_sync("hi")
    said = list(first.stream_text(delta=True))
    second = agent().run_stream_sync("12*34?", message_history=first.all_messages())
    assert ("".join(said), second.get_output()) == (HELLO, IT_IS)
    wire.check("pydantic-ai", [HI], SECOND)


@pytest.mark.slow
@pytest.mark.fault("S1")
def test_pydantic_ai_with_two_systems(wire, agent):
    both = agent(instructions="a", system_prompt="b")
    first = both.run_sync("hi")
    both.run_sync("12*34?", message_history=first.all_messages())
    agent(system_prompt=("a", "b")).run_sync("hi")
    wire.check(
        "pydantic-ai",
        [system("b\n\na"), HI],
        [system("b\n\na"), HI, bot(first.output), PRODUCT],
        [system("a\n\nb"), HI],
    )


@pytest.mark.parametrize("path", ["", "/v1", "/v1/chat/completions"])
def test_huggingface_hub(wire, path):
    from huggingface_hub import InferenceClient

    ask = partial(InferenceClient(base_url=wire.root + path).chat_completion, model="parrot")
    first = ask([HI]).choices[0].message
    second = ask([HI, first, PRODUCT])
    assert (first.content, second.choices[0].message.content, second.usage.prompt_tokens) == (
        HELLO,
        IT_IS,
        len(wire.history(*SECOND)),
    )
    wire.check("huggingface_hub", [HI], SECOND)
    said = "".join(chunk.choices[0].delta.content or "" for chunk in ask([HI], stream=True))
    again = "".join(chunk.choices[0].delta.content or "" for chunk in ask([HI, bot(said), PRODUCT], stream=True))
    assert (said, again) == (HELLO, IT_IS)
    wire.check("huggingface_hub", [HI], SECOND)


@pytest.mark.fault("S6")
def test_huggingface_hub_streams_lines(wire):
    from huggingface_hub import InferenceClient

    ask = partial(InferenceClient(base_url=wire.url).chat_completion, [user("ends")], model="parrot")
    assert ask().choices[0].message.content == LINES
    assert "".join(chunk.choices[0].delta.content or "" for chunk in ask(stream=True)) == LINES


# JavaScript


@pytest.fixture(scope="module")
def node(tmp_path_factory):
    """A function (scenario, URL) -> the JSON that npm/clients.mjs prints: the packages of npm/package-lock.json."""
    commands = shutil.which("node"), shutil.which("npm")
    if not all(commands):
        pytest.skip("node and npm are not here; these clients need node 18 or newer")
    version = subprocess.check_output(["node", "--version"], text=True).strip()
    if int(re.match(r"v(\d+)", version)[1]) < 18:
        pytest.skip(f"node is {version}; these clients need 18 or newer")
    folder = shutil.copytree(NPM, tmp_path_factory.mktemp("npm") / "npm")
    install = (
        "npm ci --no-audit --no-fund --ignore-scripts --no-update-notifier --prefer-offline --fetch-retries=1"
        " --fetch-timeout=60000"
    )
    done = subprocess.run(install.split(), cwd=folder, capture_output=True, text=True, timeout=500)
    if done.returncode and (
        why := re.search(
            "ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ECONNRESET|ENETUNREACH|EHOSTUNREACH|ETIMEDOUT|ERR_SOCKET_TIMEOUT",
            done.stderr,
        )
    ):
        pytest.skip(f"npm does not reach its registry ({why[0]})")
    assert done.returncode == 0, done.stderr

    def run(scenario: str, url: str) -> list:
        done = subprocess.run(
            ["node", "clients.mjs", scenario, url], cwd=folder, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["openai", "ai"])
def test_npm(wire, node, scenario):
    said = node(scenario, wire.url)
    used = len(wire.history(*SECOND))
    assert said == [[HELLO, IT_IS, used], [HELLO, IT_IS]]
    wire.check("npm", [HI], SECOND, [HI], SECOND)


@pytest.mark.slow
@pytest.mark.fault("S1", "S2")
@pytest.mark.parametrize("scenario", ["openai blanks", "ai blanks"])
def test_npm_leaves_blanks(wire, node, scenario):
    blank, said = node(scenario, wire.url)
    assert (blank, said) == ("", HELLO)
    assert wire.prompts == [wire.history(*messages) for messages in ([PRODUCT], [BOTH], [HI], [system("a\n\nb"), HI])]


@pytest.mark.slow
def test_npm_completions(wire, node):
    assert node("completions", wire.url) == ["\0" * 5] * 4
