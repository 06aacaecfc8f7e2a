"""The exported chat template, rendered by transformers: the ids of the server and of training, and the mask of what is
trained on.
"""

import json

import jinja2
import pytest
import transformers
from histories import HISTORIES, REFUSED, STRICT
from hypothesis import given, settings
from hypothesis import strategies as st

from nanolab.data.chat import render, render_prompt, template_of
from nanolab.data.tokenizer import Tokenizer
from nanolab.interop import export
from nanolab.serving.messages import read_messages as of_the_server

pytestmark = pytest.mark.fault("S12")
TEXT = "the crow saw the cheese and took it. The fox said: three times four is 12, isn't it?\n\tA\u00e9\U0001f600 " * 3
ASK = {"role": "user", "content": "a"}


@pytest.fixture(scope="module")
def ours():
    return Tokenizer.train([TEXT], 285)


@pytest.fixture(scope="module")
def theirs(ours, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    ours.save(folder)
    (folder / "tokenizer_config.json").write_text(
        json.dumps(export.tokenizer_config(ours, export.special_ids(ours, "sft"), 64))
    )
    (folder / "chat_template.jinja").write_text(template_of(ours))
    return transformers.AutoTokenizer.from_pretrained(folder)


def prompt(theirs, messages):
    return theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]


def trained(theirs, messages):
    out = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    return out["input_ids"], out["assistant_masks"]


# transformers reads a special token's name in a message as the token; the card says so
NAMES = {"names of special tokens are text"}


@pytest.mark.parametrize(
    ("name", "given"),
    [case for case in HISTORIES if case[0] not in NAMES],
    ids=[name for name, _ in HISTORIES if name not in NAMES],
)
def test_histories_have_the_ids_of_the_server_and_of_training(ours, theirs, name, given):
    assert prompt(theirs, given) == render_prompt(ours, of_the_server(given)) == render_prompt(ours, STRICT[name])
    assert trained(theirs, STRICT[name]) == tuple(render(ours, STRICT[name]))


@pytest.mark.parametrize("given", [given for _, given, _ in REFUSED], ids=[name for name, *_ in REFUSED])
def test_what_the_server_refuses_is_refused(theirs, given):
    with pytest.raises(jinja2.TemplateError):
        prompt(theirs, given)


said = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(str.strip) | st.sampled_from(
    ["the cheese", " \U0001f600", "\u00e9", "12\n"]
)
part = st.fixed_dictionaries({"type": st.sampled_from(["text", "python", "python_output"]), "text": said})
reply = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": said | st.lists(part, min_size=1, max_size=5)},
    optional={"weight": st.sampled_from([0, 1])},
)
question = st.fixed_dictionaries({"role": st.just("user"), "content": said})
system = st.lists(st.fixed_dictionaries({"role": st.just("system"), "content": said}), max_size=1)
turns = st.lists(st.tuples(question, reply), min_size=1, max_size=4).map(
    lambda pairs: [message for pair in pairs for message in pair]
)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(first=system, rest=turns)
def test_the_mask_is_what_is_trained_on(ours, theirs, first, rest):
    """And the ids those of training; every trained piece may end inside a character's bytes."""
    assert trained(theirs, [*first, *rest]) == tuple(render(ours, [*first, *rest]))


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(
    code=st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
    | st.sampled_from(['say("\\n")', "\\\\", "\U0001f600\\u0041", '"}', "{'a': 1}"]),
    ascii=st.booleans(),
    indent=st.sampled_from([None, 1]),
)
def test_arguments_are_read_as_json_reads_them(ours, theirs, code, ascii, indent):
    """As text, with every escape of JSON, and as an object."""
    want = render_prompt(
        ours,
        [
            ASK,
            {
                "role": "assistant",
                "content": [{"type": "python", "text": code}, {"type": "python_output", "text": "2"}],
            },
        ],
    )
    for arguments in (json.dumps({"code": code}, ensure_ascii=ascii, indent=indent), {"code": code}):
        call = {
            "role": "assistant",
            "tool_calls": [{"id": "c", "type": "function", "function": {"name": "python", "arguments": arguments}}],
        }
        for answer in ({"role": "tool", "tool_call_id": "c", "content": "2"}, {"role": "tool", "content": "2"}):
            assert prompt(theirs, [ASK, call, answer]) == want


@pytest.mark.parametrize(
    "arguments",
    ["", "{}", {}, "[]", '{"a": 1}', {"a": 1}, '{"a": "1", "b": "2"}', {"a": "1", "b": "2"}, '{"a": "1"', '"a"'],
    ids=repr,
)
def test_other_arguments_are_refused(theirs, arguments):
    call = {
        "role": "assistant",
        "tool_calls": [{"id": "c", "type": "function", "function": {"name": "python", "arguments": arguments}}],
    }
    with pytest.raises(jinja2.TemplateError):
        prompt(theirs, [ASK, call, {"role": "tool", "tool_call_id": "c", "content": "2"}])


@pytest.mark.parametrize("role", ["usr", "function", "ipython", ""])
def test_an_unknown_role_is_named(theirs, role):
    with pytest.raises(jinja2.TemplateError, match=f"message 2 has the role {role};"):
        prompt(theirs, [ASK, {"role": role, "content": "x"}])
