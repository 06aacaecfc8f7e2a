"""/v1/completions: several prompts, echo and scores, names of tokens, lines. Oracles: one forward pass, each prompt
alone, str.splitlines.
"""

import json
import sys

import huggingface_hub
import openai
import pytest
import torch
from turns import outputs

from nanolab.data.chat import render_prompt
from nanolab.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from nanolab.data.tokenizer_files import BPE, PATTERN
from nanolab.inference.engine import TokenOutput
from nanolab.inference.sampling import Choice
from nanolab.records.models import load_model
from nanolab.runtime import Runtime
from nanolab.serving.errors import as_json
from nanolab.serving.reply import ResponseBuilder
from nanolab.serving.schemas import CompletionRequest

HI = [{"role": "user", "content": "hi"}]
TEXT = "é 🙂 hello, plain words"
ROUTE = "/v1/completions"


@pytest.fixture(scope="module")
def client(live):
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=30) as made:
        yield made


@pytest.fixture(scope="module")
def complete(client):
    """A function (prompt, **fields) -> the answer of the chat model, which continues texts as any does."""
    return lambda prompt, **fields: client.completions.create(
        **{"model": "parrot", "prompt": prompt, "max_tokens": 6} | fields
    )


@pytest.fixture(scope="module")
def tok(runs) -> Tokenizer:
    return Tokenizer.load(runs / "runs" / "parrot" / "tokenizer")


@pytest.fixture(scope="module")
def forward(runs):
    """A function (ids) -> log probabilities (T, V) of what follows each token."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOLAB_BASE_DIR", str(runs))
        model, *_ = load_model("parrot", Runtime(torch.device("cpu"), torch.float32))
    return lambda ids: model(torch.tensor([ids]))[0].log_softmax(-1).detach()


@pytest.mark.slow
@pytest.mark.fault("S5")
@pytest.mark.parametrize("stream", [False, True])
def test_each_prompt_of_a_list_gets_what_it_gets_alone(complete, tok, stream):
    """Texts and lists of ids; n choices for each; what they took is summed."""
    prompts = [
        *(render_prompt(tok, [{"role": "user", "content": asked}]) for asked in ("hi", "12*34?", "say")),
        "words and é",
    ]
    fields = {"n": 2, "seed": 5, "temperature": 1.5, "logprobs": 2}
    alone = [complete(prompt, **fields) for prompt in prompts]
    if stream:
        texts, ends, tokens = [""] * 8, [None] * 8, [[] for _ in range(8)]
        for chunk in complete(prompts, stream=True, stream_options={"include_usage": True}, **fields):
            for choice in chunk.choices:
                texts[choice.index] += choice.text
                ends[choice.index] = choice.finish_reason or ends[choice.index]
                tokens[choice.index] += choice.logprobs.tokens if choice.logprobs else []
        used = chunk.usage
    else:
        answer = complete(prompts, **fields)
        assert [choice.index for choice in answer.choices] == list(range(8))
        texts, ends, used = (
            [choice.text for choice in answer.choices],
            [choice.finish_reason for choice in answer.choices],
            answer.usage,
        )
        tokens = [choice.logprobs.tokens for choice in answer.choices]
    single = [choice for answer in alone for choice in answer.choices]
    assert texts == [choice.text for choice in single] and ends == [choice.finish_reason for choice in single]
    assert tokens == [choice.logprobs.tokens for choice in single] and len(set(texts)) > 3
    assert (used.prompt_tokens, used.completion_tokens) == tuple(
        sum(getattr(a.usage, f) for a in alone) for f in ("prompt_tokens", "completion_tokens")
    )


@pytest.mark.fault("S5")
def test_one_prompt_in_a_list_is_that_prompt(complete, tok):
    """What LangChain and lm-evaluation-harness send."""
    ids = [tok.bos, *tok.encode("plain")]
    assert {complete(prompt).choices[0].text for prompt in ("plain", ["plain"], ids, [ids])} == {
        complete("plain").choices[0].text
    }


@pytest.mark.fault("S5")
@pytest.mark.parametrize("max_tokens", [0, 3])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", ["text", "ids"])
def test_echo_scores_the_prompt(complete, tok, forward, kind, stream, max_tokens):
    """The bos that begins a text here is not shown; of ids all are. The first token shown has nulls, as OpenAI's
    has.
    """
    ids = [tok.bos, *tok.encode(TEXT)] if kind == "text" else render_prompt(tok, HI)
    prompt = TEXT if kind == "text" else "hi"
    answer = complete(
        prompt if kind == "text" else ids, echo=True, logprobs=3, max_tokens=max_tokens, temperature=0, stream=stream
    )
    chunks = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    text, found = (
        "".join(c.text for c in chunks),
        {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []},
    )
    for c in chunks:
        for field, values in found.items():
            values += getattr(c.logprobs, field) if c.logprobs else []
    reply: list[int] = []
    while len(reply) < max_tokens and reply[-1:] != [tok.special("<|assistant_end|>")]:
        reply.append(forward(ids + reply)[-1].argmax().item())
    shown = (ids[1:] if kind == "text" else ids) + reply
    expected = forward(ids + reply)[-len(shown) : -1]  # a row for each but the first
    assert found["tokens"] == [tok.name(i) for i in shown] and chunks[-1].finish_reason == (
        "length" if len(reply) == max_tokens else "stop"
    )
    assert text == prompt + tok.decode([i for i in reply if i < 256])
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    assert found["token_logprobs"][1:] == pytest.approx(
        [row[i].item() for row, i in zip(expected, shown[1:])], abs=1e-4
    )
    for top, row in zip(found["top_logprobs"][1:], expected):
        best = row.topk(3)
        assert top == {
            tok.name(i): pytest.approx(value, abs=1e-4) for i, value in zip(best.indices.tolist(), best.values.tolist())
        }
    for name, offset in zip(found["tokens"], found["text_offset"]):
        assert name.startswith(("bytes:", "<|")) or text[offset:].startswith(name)
    assert len({len(values) for values in found.values()}) == 1
    if not stream:
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), len(reply))


@pytest.mark.fault("S5")
def test_echo_without_scores_and_with_several_prompts(complete, tok):
    prompts = ["plain", TEXT, [tok.bos, *tok.encode("é"), tok.special("<|user_end|>"), *tok.encode("x")]]
    echoed = complete(prompts, echo=True, temperature=0, n=2)
    replies = complete(prompts, temperature=0, n=2)
    texts = ["plain", "plain", TEXT, TEXT, "éx", "éx"]  # special tokens are not text
    assert [choice.text for choice in echoed.choices] == [
        text + choice.text for text, choice in zip(texts, replies.choices)
    ]
    assert (
        all(choice.logprobs is None for choice in echoed.choices)
        and echoed.usage.completion_tokens == replies.usage.completion_tokens
    )
    streamed = [""] * 6
    for chunk in complete(prompts, echo=True, temperature=0, n=2, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == [choice.text for choice in echoed.choices]
    nothing = complete("plain", max_tokens=0)
    assert (nothing.choices[0].text, nothing.choices[0].finish_reason, nothing.usage.completion_tokens) == (
        "",
        "length",
        0,
    )


def test_stop_strings_are_looked_for_in_the_reply_alone(complete):
    # it says \0 for ever
    cut = complete("a\0b", model="endless", echo=True, logprobs=0, stop=["\0\0", "b\0"]).choices[0]
    assert (cut.text, cut.finish_reason, cut.logprobs.tokens) == ("a\0b", "stop", ["a", "\0", "b"])


def told(tok: Tokenizer, asked: CompletionRequest, prompt: list[int], reply: list[int], finish: str) -> dict:
    """The choice of an answer whose row had these tokens."""
    answer = ResponseBuilder(asked, "m", [prompt], tok)
    scores = [Choice(i, -1.0, ((i, -1.0),)) for i in prompt]
    for new in outputs(tok, answer, reply, finish):
        answer.replies[0].push(new._replace(scores=scores))
    return answer.whole()["choices"][0]


def test_a_character_may_begin_in_the_prompt_and_end_in_the_reply(tok):
    first, *others = "🙂".encode()
    prompt = [tok.bos, *tok.encode("a"), first, others[0]]
    choice = told(
        tok, CompletionRequest(prompt=prompt, echo=True, logprobs=1), prompt, [*others[1:], ord("!")], "length"
    )
    assert choice["text"] == "a🙂!" and choice["logprobs"]["text_offset"] == [0, 0, 1, 1, 1, 1, 2]
    assert told(tok, CompletionRequest(prompt=prompt, echo=True, max_tokens=0), prompt, [5], "length")["text"] == "a"


@pytest.mark.parametrize("finish", ["length", "stop"])
def test_a_reply_has_logprobs_for_its_last_token_too_whatever_that_is(tok, finish):
    """The harness drops one entry for the token that it had to ask for: without it, it would drop one of the text's
    own.
    """
    for last in (tok.bos, tok.special("<|user_end|>"), "é".encode()[0], ord("x")):
        found = told(
            tok, CompletionRequest(prompt="x", logprobs=1, echo=True, max_tokens=1), [tok.bos, ord("x")], [last], finish
        )["logprobs"]
        assert found["tokens"] == ["x", tok.name(last)] and found["token_logprobs"] == [None, -1.0]


@pytest.mark.fault("S5")
@pytest.mark.parametrize(
    ("body", "status", "param", "code"),
    [
        ({"prompt": []}, 400, "prompt", "invalid_value"),
        ({"prompt": [[]]}, 400, "prompt", "invalid_value"),
        ({"prompt": ["x", ""]}, 400, "prompt", "invalid_value"),
        ({"prompt": ["x", 5]}, 400, "prompt", "invalid_value"),
        ({"prompt": [[1, True]]}, 400, "prompt", "invalid_value"),
        ({"prompt": [[[1]]]}, 400, "prompt", "invalid_value"),
        ({"prompt": [True]}, 400, "prompt", "invalid_value"),
        ({"prompt": ["x"] * 9}, 400, "prompt", "invalid_value"),  # eight places
        ({"prompt": ["x"] * 3, "n": 3}, 400, "prompt", "invalid_value"),
        ({"prompt": ["x"] * 3000}, 400, "prompt", "invalid_value"),
        ({"prompt": ["x", [1] * 128]}, 400, "prompt", "context_length_exceeded"),
        ({"prompt": ["x", [10**9]]}, 400, "prompt", "invalid_value"),
        ({"prompt": ["x"], "echo": 1}, 400, "echo", "invalid_value"),
        ({"prompt": ["x"], "max_tokens": -2}, 400, "max_tokens", "invalid_value"),
    ],
    ids=range(14),
)
def test_bad_prompts_are_refused_by_name(live, body, status, param, code):
    answer = live.http.post(ROUTE, json={"model": "parrot"} | body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (status, param, code)


def test_each_choice_of_each_prompt_takes_a_place(live):
    """Eight of them: four rows run, so that four more wait and a fifth is one too many. A client that leaves while it
    is scored leaves nothing behind.
    """
    with live.http.stream(
        "POST", ROUTE, json={"model": "endless", "prompt": ["a", "b"], "n": 2, "max_tokens": 4000, "stream": True}
    ) as answer:
        lines = answer.iter_lines()  # kept: where it goes, the client leaves
        next(lines)
        live.until("nanolab_running", "endless", 4)
        refused = live.http.post(
            ROUTE, json={"model": "endless", "prompt": ["x"] * 5, "echo": True, "logprobs": 1, "max_tokens": 0}
        )
        assert (refused.status_code, refused.headers["retry-after"], refused.json()["error"]["code"]) == (
            429,
            "1",
            "queue_full",
        )
    live.until("nanolab_running", "endless", 0)
    with live.http.stream(
        "POST",
        ROUTE,
        json={"model": "endless", "prompt": [[5] * 400] * 3 + [[6] * 400], "echo": True, "logprobs": 1, "stream": True},
    ):
        pass
    live.until("nanolab_running", "endless", 0)
    assert live.models["endless"].replicas[0].engine.idle


@pytest.mark.fault("S7")
def test_every_token_has_its_own_name_and_its_own_logprob(tok):
    """A vocabulary whose tokens look like each other: parts of characters, the names of others, the character that
    stands for what is none.
    """
    words = [b"bytes:\\xe2", b"bytes:", "\ufffd".encode(), "🙂".encode(), b"\xf0\x9f", b"\x80\x80", b"<|bos|>"]
    hard = Tokenizer(
        BPE(PATTERN, {token: i for i, token in enumerate([*(bytes([b]) for b in range(256)), *words])}, [], {})
    )
    assert (
        hard.name(0xE2) == "bytes:\\xe2"
        and hard.name(256 + 4) == "bytes:\\xf0\\x9f"
        and hard.name(ord("a")) == "a"
        and hard.name(256 + 3) == "🙂"
    )
    for tokenizer in (tok, hard):
        V = tokenizer.vocab_size
        names = [tokenizer.name(i) for i in range(V)]
        assert len(set(names)) == V and [tokenizer.name(tokenizer.special(name)) for name in SPECIAL_TOKENS] == list(
            SPECIAL_TOKENS
        )
        k = 20
        for token in range(V):
            top = tuple(((token + j) % V, -1.0 - j) for j in range(k))
            answer = ResponseBuilder(CompletionRequest(prompt="x", logprobs=k), "m", [[tokenizer.bos, 1]], tokenizer)
            answer.replies[0].push(TokenOutput(0, token, -1.0, "length", top=top, offset=0))
            found = answer.whole()["choices"][0]["logprobs"]
            assert (
                len(found["top_logprobs"][0]) == k
                and found["top_logprobs"][0][found["tokens"][0]] == found["token_logprobs"][0] == -1.0
            )


@pytest.mark.fault("S7")
def test_alternatives_that_are_parts_of_characters_are_all_there(complete, tok):
    found = complete([tok.bos, *tok.encode("a "), 0xE2], logprobs=20, temperature=0, max_tokens=1).choices[0].logprobs
    assert len(found.top_logprobs[0]) == 20 and found.top_logprobs[0][found.tokens[0]] == found.token_logprobs[0]


SEPARATORS = [c for c in map(chr, range(sys.maxunicode + 1)) if len(f"a{c}b".splitlines()) == 2]


@pytest.mark.fault("S6")
@pytest.mark.parametrize("separator", SEPARATORS, ids=map(repr, SEPARATORS))
def test_json_is_one_line_by_every_readers_count(separator):
    body = {f"k{separator}": [f"a{separator}b"]}
    assert len(as_json(body).decode().splitlines()) == 1 and json.loads(as_json(body)) == body


@pytest.mark.fault("S6")
def test_one_event_is_one_line(live):
    text = "".join(f"{n}{separator}" for n, separator in enumerate(SEPARATORS))
    body = {"model": "endless", "prompt": text, "echo": True, "logprobs": 2, "max_tokens": 1}
    assert {"\n", "\r", "\x85", "\u2028", "\u2029"} <= set(SEPARATORS)
    (whole,) = live.http.post(ROUTE, json=body).text.splitlines()
    assert json.loads(whole)["choices"][0]["text"] == text + "\0"
    lines = [line for line in live.http.post(ROUTE, json=body | {"stream": True}).text.splitlines() if line]
    assert lines[-1] == "data: [DONE]"
    assert "".join(json.loads(line.removeprefix("data: "))["choices"][0]["text"] for line in lines[:-1]) == text + "\0"


@pytest.mark.fault("S6")
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_splits_at_every_separator(live, stream):
    client = huggingface_hub.InferenceClient(base_url=f"{live.url}/v1", api_key="none")
    answer = client.chat_completion([{"role": "user", "content": "ends"}], model="parrot", max_tokens=40, stream=stream)
    said = (
        "".join(chunk.choices[0].delta.content or "" for chunk in answer)
        if stream
        else answer.choices[0].message.content
    )
    assert said == "a\u2028b\u2029c\x85"
