"""Reply token by token against parse_reply on the whole, and against the definition of a stop string. Oracle:
nanolab.data.chat, str.find.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from turns import outputs

from nanolab.data.chat import parse_reply, parts_of
from nanolab.data.tokenizer import Tokenizer
from nanolab.inference.request import TokenOutput
from nanolab.serving.reply import Asked, Reply, ResponseBuilder
from nanolab.serving.schemas import ChatRequest, CompletionRequest

HI = [{"role": "user", "content": "hi"}]
CHAT, TEXT = ChatRequest(messages=HI), CompletionRequest(prompt="x")


def chatting(tools: dict[str, str]) -> ChatRequest:
    return CHAT.model_copy(update={"tools": tools})


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return Tokenizer.train(["plain words and plain words only " * 20], 275)


def fed(tok: Tokenizer, asked: Asked, ids: list[int], finish: str | None = None) -> tuple[Reply, list[dict]]:
    """A reply that was told `ids` one by one, the last with `finish`; and the deltas of all that it handed out."""
    answer = ResponseBuilder(asked, "m", [[tok.bos]], tok)
    (reply,) = answer.replies
    return reply, [delta for new in outputs(tok, answer, ids, finish) for delta, _ in reply.push(new)]


def as_part(delta: dict) -> dict:
    return delta.get("part") or {"type": "text", "text": delta["content"]}


special = st.sampled_from(["python_start", "python_end", "output_start", "output_end", "user_start", "assistant_start"])
texts = st.sampled_from(["plain", " words", "é", "🙂", "12+30", "a"]).map(lambda text: text.encode())


@settings(max_examples=300, deadline=None)
@given(found=st.lists(special | texts | texts | st.binary(min_size=1, max_size=2), max_size=15))
def test_what_is_handed_out_is_the_parsed_reply(tok, found):
    ids = [i for piece in found for i in ([tok.special(f"<|{piece}|>")] if isinstance(piece, str) else list(piece))]
    reply, deltas = fed(tok, CHAT, [*ids, tok.special("<|assistant_end|>")], "stop")
    assert parts_of([as_part(delta) for delta in deltas]) == reply.parts == parse_reply(tok, ids)
    assert (reply.finish, reply.count) == ("stop", len(ids) + 1)
    plain, _ = fed(tok, TEXT, [*ids, tok.bos], "stop")  # to text that is only continued, marks mean nothing
    specials = set(tok.specials.values())
    assert plain.text == tok.decode([i for i in ids if i not in specials])


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("abé🙂", max_size=12), stops=st.lists(st.text("abé🙂", min_size=1, max_size=3), min_size=1, max_size=3)
)
def test_stop_strings_by_their_definition(tok, text, stops):
    ends = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
    expected = text[: min(ends)[1]] if ends else text
    reply, deltas = fed(
        tok,
        ChatRequest(messages=HI, stop=stops, logprobs=True),
        tok.encode(text) + [tok.special("<|assistant_end|>")],
        "stop",
    )
    assert reply.text == "".join(delta["content"] for delta in deltas) == expected and reply.finish == "stop"
    assert tok.decode(token.token for token in reply.tokens)[: len(expected)] == expected
    assert [token.offset for token in reply.tokens if token.token < 128] == [
        i for i, letter in enumerate(expected) if letter < "\x80"
    ]


def test_a_reply_that_is_cut_short(tok):
    reply, deltas = fed(tok, CHAT, list("é🙂".encode())[:-1], "length")  # in the middle of a character
    assert ([delta["content"] for delta in deltas], reply.text, reply.finish) == (["é"], "é", "length")
    # what could have become a stop string is shown after all
    reply, _ = fed(tok, ChatRequest(messages=HI, stop=["ab!"]), tok.encode("xab"), "length")
    assert (reply.text, reply.finish) == ("xab", "length")
    call = [tok.special("<|python_start|>"), *tok.encode("1+")]
    reply, _ = fed(tok, CHAT, call, "length")
    assert (reply.parts, reply.finish) == ([{"type": "python", "text": "1+"}], "length")
    reply, deltas = fed(tok, chatting({"calculator": "expression"}), call, "length")  # half a call is none
    assert (deltas, reply.calls, reply.finish) == ([], [], "length")


def test_a_call_with_text_before_it(tok):
    ids = [*tok.encode("so "), tok.special("<|python_start|>"), *tok.encode("1+1"), tok.special("<|python_end|>")]
    asked = chatting({"calculator": "expression"})
    answer = ResponseBuilder(asked, "m", [[5] * 5], tok)
    for new in outputs(tok, answer, ids, "stop"):
        answer.replies[0].push(new)
    (choice,) = answer.whole()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("so ", "tool_calls")
    (call,) = choice["message"]["tool_calls"]
    assert (
        call["function"] == {"name": "calculator", "arguments": '{"expression": "1+1"}'}
        and "parts" not in choice["message"]
    )
    assert answer.replies[0].push(TokenOutput(0, 5, -1.0, None)) == []  # nothing follows


@pytest.mark.parametrize(
    ("code", "offered", "name"),
    [
        ("1+1", {"calculator": "e", "python": "c"}, "calculator"),
        ("print(1)", {"calculator": "e", "python": "c"}, "python"),
        ("print(1)", {"calculator": "e"}, "calculator"),
        ("1+1", {"python": "c"}, "python"),
    ],
)
def test_which_function_a_call_is(tok, code, offered, name):
    ids = [tok.special("<|python_start|>"), *tok.encode(code), tok.special("<|python_end|>")]
    reply, _ = fed(tok, chatting(offered), ids, "stop")
    assert reply.calls[0]["function"]["name"] == name and reply.finish == "tool_calls"
