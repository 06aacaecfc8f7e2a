"""What clients send as a history, and what the model reads of it. Oracles: the strict form of each, written by hand; what the server itself has said."""

import pytest
from histories import HISTORIES, REFUSED, STRICT

from nanolab.data.chat import check_messages, render_prompt
from nanolab.data.tokenizer import Tokenizer
from nanolab.serving.openai import ApiError, messages, read_chat

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def tok(runs) -> Tokenizer:
    return Tokenizer.load(runs / "runs" / "parrot" / "tokenizer")


@pytest.mark.fault("S1")
@pytest.mark.fault("S2")
@pytest.mark.fault("S4")
@pytest.mark.parametrize(("name", "given"), HISTORIES, ids=[name for name, _ in HISTORIES])
def test_the_model_reads_what_training_would_render(tok, name, given):
    assert render_prompt(tok, messages(given)) == render_prompt(tok, STRICT[name])
    assert messages(messages(given)) == messages(given)


def test_the_strict_forms_are_strict():
    """All but those that no training text has: a greeting first, an output without a call, a call and an output that are empty."""
    odd = {"a greeting first", "a system and a greeting first", "an empty question first", "an output that no call asked for", "an empty call and its empty output"}
    for name, strict in STRICT.items():
        if name not in odd:
            check_messages(strict, prompt=True)


@pytest.mark.parametrize(("name", "given", "code"), REFUSED, ids=[name for name, *_ in REFUSED])
def test_what_is_refused(name, given, code):
    with pytest.raises(ApiError) as error:
        read_chat({"messages": given})
    assert (error.value.status, error.value.param, error.value.code) == (400, "messages", code)
