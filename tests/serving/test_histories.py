"""What clients send as a history, and what the model reads of it. Oracles: the strict form of each, written by hand;
what the server itself has said.
"""

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from histories import CASES, HISTORIES, REFUSED, STRICT
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from turns import outputs

from nanolab.data.chat import check_messages, render_prompt
from nanolab.data.chat_files import read_conversations
from nanolab.data.tokenizer import Tokenizer
from nanolab.serving.errors import ApiError
from nanolab.serving.messages import read_messages
from nanolab.serving.reply import ResponseBuilder
from nanolab.serving.schemas import read_chat

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def tok(runs) -> Tokenizer:
    return Tokenizer.load(runs / "runs" / "parrot" / "tokenizer")


@pytest.mark.slow
@pytest.mark.fault("S1")
@pytest.mark.fault("S2")
@pytest.mark.fault("S4")
@pytest.mark.parametrize(("name", "given"), HISTORIES, ids=[name for name, _ in HISTORIES])
def test_the_model_reads_what_training_would_render(tok, name, given):
    assert render_prompt(tok, read_messages(given)) == render_prompt(tok, STRICT[name])
    assert read_messages(read_messages(given)) == read_messages(given)


def test_the_strict_forms_are_strict():
    """All but those that no training text has: a greeting first, an output without a call, a call and an output that
    are empty.
    """
    odd = {
        "a greeting first",
        "a system and a greeting first",
        "an empty question first",
        "an output that no call asked for",
        "an empty call and its empty output",
    }
    for name, strict in STRICT.items():
        if name not in odd:
            check_messages(strict, prompt=True)


@pytest.mark.parametrize(("name", "given", "code"), REFUSED, ids=[name for name, *_ in REFUSED])
def test_what_is_refused(name, given, code):
    with pytest.raises(ApiError) as error:
        read_chat({"messages": given})
    assert (error.value.status, error.value.param, error.value.code) == (400, "messages", code)


def test_generation_is_that_of_the_strict_form(live, tok):
    """The same text and log probabilities as from the ids that training would render, given as they are to the other
    route.
    """
    for name, given, strict in CASES[::3]:
        ids = render_prompt(tok, strict)
        chat = live.http.post(
            CHAT, json={"model": "parrot", "messages": given, "max_tokens": 4, "logprobs": True}
        ).json()
        plain = live.http.post(
            "/v1/completions", json={"model": "parrot", "prompt": ids, "max_tokens": 4, "logprobs": 0}
        ).json()
        said, text = chat["choices"][0], plain["choices"][0]
        assert chat["usage"]["prompt_tokens"] == len(ids), name
        if "parts" not in said["message"]:
            assert said["message"]["content"] == text["text"], name
            # without a character that was cut, which the other route shows
            found = [entry["logprob"] for entry in said["logprobs"]["content"]]
            assert found and found == pytest.approx(text["logprobs"]["token_logprobs"][: len(found)], abs=1e-5), name


@pytest.mark.slow
@pytest.mark.fault("S1")
def test_the_server_takes_back_all_that_it_says(start_server):
    """200 random replies of a model that was never trained, each given back as it came and as role and content
    alone.
    """
    live = start_server(model="young", max_rows=8, queue=64)
    question, following = {"role": "user", "content": "What is 3 + 4?"}, {"role": "user", "content": "And 5 + 6?"}

    def ask(history: list[dict], **fields) -> dict:
        answer = live.http.post(CHAT, json={"messages": history, **fields})
        assert answer.status_code == 200, (history, answer.text)
        return answer.json()["choices"][0]["message"]

    def there_and_back(i: int) -> str:
        said = ask([question], max_tokens=1 + i % 8, temperature=2, seed=i)
        for back in (said, {"role": "assistant", "content": said["content"]}):
            ask([question, back, following], max_tokens=1)
        return "blank" if not said["content"].strip() else "parts" if "parts" in said else "text"

    with ThreadPoolExecutor(8) as pool:
        kinds = Counter(pool.map(there_and_back, range(200)))
    assert kinds.total() == 200 and kinds["blank"] >= 10, kinds


special = st.sampled_from(["python_start", "python_end", "output_start", "output_end", "user_start", "assistant_start"])
texts = st.sampled_from(["plain", " ", "\n", "é", "12+30", "a"]).map(lambda text: text.encode())


@pytest.mark.fault("S1")
@settings(max_examples=300, deadline=None)
@drawn(
    found=st.lists(special | special | texts | st.binary(min_size=1, max_size=2), min_size=1, max_size=8),
    tools=st.booleans(),
    finish=st.sampled_from(["stop", "length"]),
)
def test_any_reply_is_taken_back(tok, found, tools, finish):
    ids = [i for piece in found for i in ([tok.special(f"<|{piece}|>")] if isinstance(piece, str) else list(piece))]
    question, following = {"role": "user", "content": "a"}, {"role": "user", "content": "b"}
    offered = [{"type": "function", "function": {"name": "calculator"}}] if tools else []
    answer = ResponseBuilder(read_chat({"messages": [question], "tools": offered}), "m", [[1]], tok)
    for new in outputs(tok, answer, ids, finish):
        answer.replies[0].push(new)
    said = json.loads(json.dumps(answer.whole()["choices"][0]["message"]))
    for back in (said, {"role": "assistant", "content": said["content"]}):
        turns = read_messages([question, back, following])
        assert turns[0]["content"].startswith("a") and turns[-1]["content"].endswith("b") and render_prompt(tok, turns)
    if calls := said.get("tool_calls"):
        assert answer.replies[0].finish == "tool_calls" and len(calls) == 1
        output = {"role": "tool", "tool_call_id": calls[0]["id"], "content": "7"}
        assert read_messages([question, said, output])[-1]["content"][-1] == {"type": "python_output", "text": "7"}


def test_the_log_holds_what_training_reads(start_server, tmp_path, capfd):
    log = tmp_path / "log.jsonl"
    live = start_server(model="parrot", log_conversations=str(log))
    fine = [{"role": "system", "content": ""}, {"role": "user", "content": "hi"}]
    for history in (
        fine,
        [{"role": "assistant", "content": "Hello."}, *fine],
    ):  # no training text begins with a greeting
        assert live.http.post(CHAT, json={"messages": history}).status_code == 200
    assert [turn["role"] for turn in read_conversations(log)[0]] == ["user", "assistant"] and len(
        read_conversations(log)
    ) == 1
    assert "not logged" in capfd.readouterr().err
