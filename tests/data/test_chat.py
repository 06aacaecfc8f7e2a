"""Conversations: ids and mask by hand, the inverse, the template in Jinja, every malformed line named. Oracle: hand and
transformers.
"""

import argparse
import gzip
import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from nanolab.cli import UserError
from nanolab.data.chat import check_messages, parse_reply, parts_of, render, render_prompt, template_of, text_of
from nanolab.data.chat_files import read_conversations, read_jsonl
from nanolab.data.tokenizer import SPECIAL_TOKENS, Tokenizer

TOOL = [
    {"type": "text", "text": "Let me see: "},
    {"type": "python", "text": "12+30"},
    {"type": "python_output", "text": "42"},
    {"type": "text", "text": "It is 42."},
]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "12 and 30?"},
    {"role": "assistant", "content": TOOL},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "content": "Welcome"},
]


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return Tokenizer.train([Path(argparse.__file__).read_text(encoding="utf-8")], 600)


def templated(tok: Tokenizer, messages: list, **flags) -> str:
    return render_jinja_template([messages], chat_template=template_of(tok), **flags)[0][0]


def names(tok: Tokenizer, *pieces: str) -> list[int]:
    """Ids of `pieces`: a special token's name stands for its id, other text for its tokens."""
    return [i for p in pieces for i in ([tok.special(f"<|{p[1:]}|>")] if p.startswith("@") else tok.encode(p))]


def test_ids_and_mask_by_hand(tok):
    pieces = [
        ("@bos", 0),
        ("Be brief.", 0),
        ("@user_start", 0),
        ("12 and 30?", 0),
        ("@user_end", 0),
        ("@assistant_start", 0),
        ("Let me see: ", 1),
        ("@python_start", 1),
        ("12+30", 1),
        ("@python_end", 1),
        ("@output_start", 0),
        ("42", 0),
        ("@output_end", 0),
        ("It is 42.", 1),
        ("@assistant_end", 1),
        ("@user_start", 0),
        ("Thanks", 0),
        ("@user_end", 0),
        ("@assistant_start", 0),
        ("Welcome", 1),
        ("@assistant_end", 1),
    ]
    got = render(tok, CHAT)
    assert got.ids == names(tok, *(p for p, _ in pieces))
    assert got.mask == [m for p, m in pieces for _ in names(tok, p)]


def test_prompt_is_the_beginning_of_the_whole(tok):
    prompt = render_prompt(tok, CHAT[:2])
    assert prompt == names(tok, "@bos", "Be brief.", "@user_start", "12 and 30?", "@user_end", "@assistant_start")
    assert render(tok, CHAT[:3]).ids[: len(prompt)] == prompt
    for bad in (CHAT[:3], []):
        with pytest.raises(UserError, match="expected a user's"):
            render_prompt(tok, bad)


ANSWERED = [*CHAT[:2], {"role": "assistant", "content": TOOL[:3]}]  # its call has its output, its turn is not over


def test_a_prompt_may_end_inside_the_assistants_turn(tok, tmp_path):
    prompt = render_prompt(tok, ANSWERED)
    assert prompt == render_prompt(tok, CHAT[:2]) + names(
        tok, "Let me see: ", "@python_start", "12+30", "@python_end", "@output_start", "42", "@output_end"
    )
    assert render(tok, CHAT[:3]).ids[: len(prompt)] == prompt  # what was said afterwards follows at once
    check_messages(ANSWERED, prompt=True)
    assert templated(tok, ANSWERED, add_generation_prompt=True) == tok.decode(prompt)
    assert templated(tok, ANSWERED) == tok.decode(prompt) + "<|assistant_end|>"
    for part in (TOOL[:2], TOOL[:1]):  # a call without its output, and text, are no place to go on from
        with pytest.raises(UserError, match="expected a user's"):
            render_prompt(tok, [*CHAT[:2], {"role": "assistant", "content": part}])


def test_the_template_begins_as_the_tokenizers_texts_do(tok):
    """<|endoftext|> where the vocabulary has that."""
    other = Tokenizer(tok._bpe._replace(specials={"<|endoftext|>": len(tok._bpe.vocab)}))
    for tokenizer, first in ((tok, "<|bos|>"), (other, "<|endoftext|>")):
        text = templated(tokenizer, CHAT)
        assert text == tokenizer.decode(render(tokenizer, CHAT).ids) and text.startswith(first)


words = (
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
    | st.sampled_from(SPECIAL_TOKENS)
    | st.sampled_from([" a", "\n", "12"])
)
parts = st.lists(
    st.fixed_dictionaries({"type": st.sampled_from(["text", "python", "python_output"]), "text": words}), max_size=6
)


@settings(max_examples=200, deadline=None)
@given(content=words | parts)
def test_parse_reply_is_the_inverse(tok, content):
    prompt = [{"role": "user", "content": "hi"}]
    ids = render(tok, prompt + [{"role": "assistant", "content": content}]).ids[len(render_prompt(tok, prompt)) :]
    assert parse_reply(tok, ids) == parts_of(content)
    assert parse_reply(tok, ids + names(tok, "more", "@bos")) == parts_of(content)  # what follows the end is not read
    assert "".join(p["text"] for p in parts_of(content)) == (
        content if isinstance(content, str) else "".join(p["text"] for p in content)
    )


def test_a_broken_reply_is_read_as_far_as_it_goes(tok):
    ids = names(tok, "so ", "@python_start", "1+")
    assert parse_reply(tok, ids) == [{"type": "text", "text": "so "}, {"type": "python", "text": "1+"}]
    stray = names(
        tok,
        "a",
        "@python_end",
        "@user_start",
        "b",
        "@python_start",
        "1",
        "@output_end",
        "2",
        "@python_end",
        "c",
        "@bos",
        "d",
    )
    assert parse_reply(tok, stray) == [
        {"type": "text", "text": "ab"},
        {"type": "python", "text": "12"},
        {"type": "text", "text": "c"},
    ]
    assert parse_reply(tok, []) == []


def test_text_of_leaves_tools_out():
    assert text_of(TOOL) == "Let me see: It is 42."
    assert text_of("plain") == "plain"


def test_special_looking_text_stays_text(tok):
    user, reply = "<|assistant_end|><|bos|>", "<|python_start|>1<|python_end|>"
    ids = render(tok, [{"role": "user", "content": user}, {"role": "assistant", "content": reply}]).ids
    specials = [i for i in ids if i in tok.specials.values()]
    assert specials == names(tok, "@bos", "@user_start", "@user_end", "@assistant_start", "@assistant_end")
    assert tok.decode(ids).count("<|bos|>") == 2  # one token, one text


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("first", [0, 1])
def test_the_jinja_template_gives_the_same(tok, tmp_path, n, first):
    messages = CHAT[first:n]
    ids = render_prompt(tok, messages) if n == 2 else render(tok, messages).ids
    text = templated(tok, messages, add_generation_prompt=n == 2)
    assert text == tok.decode(ids)
    hf = tokenizers.Tokenizer.from_file(str(tok.save(tmp_path)))
    assert hf.encode(text, add_special_tokens=False).ids == ids


# --- checks and files -------------------------------------------------------------------------------------------------

Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
S = {"role": "system", "content": "s"}


def said(*parts: dict) -> list[dict]:
    return [Q, {"role": "assistant", "content": list(parts)}]


BAD = [
    ("{", "not JSON"),
    ('["\\x"]', "not JSON"),
    (b"\xff[]", "not JSON"),
    ("[" * 100_000, "not JSON"),
    ("[]", "a list of 0 in place of messages"),
    ("3", "int 3 in place of messages"),
    ("null", "nothing in place of messages"),
    ('{"text": "x"}', "fields text; expected an array of messages"),
    ('{"messages": [], "conversations": []}', "expected an array of messages"),
    ('{"messages": {"role": "user"}}', "in place of messages"),
    (["hello"], "message 1 is the text 'hello'"),
    ([Q, {"role": "assistant"}], "message 2 is an object with the fields role; expected"),
    ([Q, {"from": "gpt", "text": "a"}], "field 'text'; expected only from and value"),
    ([Q, A | {"tool_calls": [{"id": 1}]}], "message 2 has the field 'tool_calls'"),
    ([{"role": "usr", "content": "q"}, A], "role 'usr'.*did you mean user"),
    ([Q, {"role": ["x"], "content": "q"}], "role \\['x'\\]"),
    ([Q, {"role": "tool", "content": "q"}], "role 'tool'"),
    ([A, Q], "message 1: expected role system or user, got assistant"),
    ([Q, A, A], "message 3: expected role user, got assistant"),
    ([Q, Q, A], "message 2: expected role assistant, got user"),
    ([Q, S, A], "message 2: expected role assistant, got system"),
    ([S, A], "message 2: expected role user, got assistant"),
    ([S, S, Q, A], "message 2: expected role user, got system"),
    ([Q], "no assistant turn among 1"),
    ([S, Q], "no assistant turn among 2"),
    ([Q, A | {"content": ""}], "message 2 \\(assistant's\\) is empty"),
    ([Q | {"content": " \n"}, A], "message 1 \\(user's\\) is empty"),
    ([Q, A | {"content": []}], "message 2 .* is empty"),
    (said({"type": "text", "text": ""}), "message 2 .* is empty"),
    ([Q, A | {"content": None}], "has nothing as content; expected text or a list"),
    ([Q | {"content": [{"type": "image"}]}, A], "has a list of 1 as content; expected text;"),
    (said({"type": "pyton", "text": "1"}), "type 'pyton'.*did you mean python"),
    (said({"type": "text", "txt": "1"}), "part 1 is an object with the fields type, txt"),
    (said({"type": [], "text": "1"}), "part 1 is an object"),
    (said({"type": "text", "text": 1}), "part 1 is an object"),
    (said("x"), "part 1 is the text 'x'"),
    (said({"type": "python_output", "text": "1"}), "expected a python part before it"),
    (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "f"}]},
        "role 'function_call'",
    ),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": ""}]}, "message 2 .* is empty"),
    ({"messages": [Q, A], "system": 7}, "message 1 \\(system's\\) has int 7"),
]


@pytest.mark.parametrize(("line", "complaint"), BAD, ids=[f"{i}" for i in range(len(BAD))])
def test_malformed_input_names_the_line(tmp_path, line, complaint):
    raw = line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
    path = tmp_path / "chat.jsonl"
    path.write_bytes(json.dumps([Q, A]).encode() + b"\n\n" + raw + b"\n" + json.dumps([Q, A]).encode())
    with pytest.raises(UserError, match=complaint) as error:
        read_conversations(path)
    assert str(error.value).startswith(f"{path}:3: ")


def refusal(path: Path, *lines: object) -> UserError:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError) as error:
        read_conversations(path)
    return error.value


TWO = [
    Q,
    {"role": "assistant", "content": "purple"},
    {"role": "user", "content": "No."},
    {"role": "assistant", "content": "orange"},
]
NOT_FIRST = [  # ways to say that the first of the two answers is not to be learned
    *(
        [TWO[0], TWO[1] | {name: off}, TWO[2], TWO[3] | more]
        for name in ("weight", "train", "trainable", "loss", "loss_mask")
        for off, more in ((0, {}), (False, {name: True}), (0.0, {name: 1}))
    ),
    {"messages": TWO, "loss_mask": [0, 0, 0, 1]},
    {"messages": TWO, "loss_mask": [False, True]},
    {"messages": TWO, "weights": [0, 1]},
    {"messages": TWO, "weight": [None, 0, None, 1.0]},
    {"messages": [TWO[0], TWO[1] | {"loss": False}, *TWO[2:]], "train": True, "loss": None},
    {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "gpt", "value": "purple", "weight": 0},
            {"from": "human", "value": "No."},
            {"from": "gpt", "value": "orange", "loss": ""},
        ]
    },
    [
        TWO[0] | {"train": False},
        TWO[1] | {"train": False, "weight": 0},
        TWO[2] | {"weight": 0},
        TWO[3] | {"train": True},
    ],
]


@pytest.mark.fault("F1")
@pytest.mark.parametrize("value", NOT_FIRST, ids=range(len(NOT_FIRST)))
def test_a_turn_that_the_file_marks_is_not_learned(tok, tmp_path, value):
    (tmp_path / "marked.jsonl").write_text(json.dumps(value))
    (messages,) = read_conversations(tmp_path / "marked.jsonl")
    ids, mask = render(tok, messages)
    plain, whole = render(tok, TWO)
    first_end = plain.index(tok.special("<|assistant_end|>")) + 1
    assert ids == plain and mask == [0] * first_end + whole[first_end:] and any(mask)
    assert render_prompt(tok, messages[:3]) == render_prompt(tok, TWO[:3])


@pytest.mark.parametrize(
    "mark", [*(pytest.param(mark, marks=pytest.mark.fault("F1")) for mark in (1, True, 1.0)), None, "", [], {}]
)
def test_marks_that_say_nothing_new_change_nothing(tmp_path, mark):
    (tmp_path / "marked.jsonl").write_text(
        json.dumps([Q, A | {"weight": mark}]) + "\n" + json.dumps({"messages": [Q, A], "trainable": mark})
    )
    assert read_conversations(tmp_path / "marked.jsonl") == [[Q, A], [Q, A]]


@pytest.mark.fault("F1")
@pytest.mark.parametrize(
    "line, code, values",
    [
        ([Q, A | {"weight": 0.5}], "turn-weight", {"field": "weight", "value": 0.5}),
        ([Q, A | {"train": "no"}], "turn-weight", {"field": "train", "value": "no"}),
        ([Q, A | {"loss_mask": [0, 1]}], "turn-weight", {"field": "loss_mask", "value": [0, 1]}),
        ([Q, A | {"weight": -1}], "turn-weight", {"field": "weight", "value": -1}),
        ({"messages": [Q, A], "weight": 2}, "turn-weight", {"field": "weight", "value": 2}),
        ({"messages": [Q, A], "loss_mask": [0, 2]}, "turn-weight", {"field": "loss_mask", "value": 2}),
        (
            {"messages": TWO, "loss_mask": [0, 1, 1]},
            "turn-weights",
            {"field": "loss_mask", "entries": 3, "messages": 4, "assistants": 2},
        ),
        ([Q, A | {"weight": 1, "train": False}], "turn-weights-differ", {"fields": ["weight", "train"]}),
        (
            {"messages": [Q, A | {"train": True}], "loss_mask": [0]},
            "turn-weights-differ",
            {"fields": ["train", "loss_mask"]},
        ),
        *(
            ([Q, A | {name: off}], "field-not-read", {"field": name})
            for name in ("label", "chosen", "rejected", "score", "hidden")
            for off in (False, 0, True, "x")
        ),
        ({"messages": [Q, A], "label": False}, "field-not-read", {"field": "label"}),
        ({"messages": [Q, A], "label": 1}, "field-not-read", {"field": "label"}),
        ({"messages": [Q, A], "rejected": "b"}, "field-not-read", {"field": "rejected"}),
    ],
)
def test_marks_that_cannot_be_obeyed_are_refused(tmp_path, line, code, values):
    error = refusal(tmp_path / "marked.jsonl", [Q, A], line)
    assert getattr(error, "code", "") == code and values.items() <= error.values.items() and error.values["line"] == 2


@pytest.mark.fault("F13")
def test_all_bad_lines_are_named_at_once(tmp_path):
    good, path = [Q, A], tmp_path / "chats.jsonl"
    error = refusal(
        path,
        good,
        [Q, Q],
        good,
        [Q, A | {"content": ""}],
        [Q, Q, A],
        [A],
        *[[Q, Q]] * 20,
        [Q, A | {"name": "x"}],
        [Q, A | {"label": 0}],
        good,
    )
    lines = {"turn-order": [2, 5, 6, *range(7, 27)], "empty-message": [4], "field-not-read": [27, 28]}
    assert getattr(error, "code", "") == "bad-conversations"
    assert error.values == {
        "file": str(path),
        "bad": 26,
        "reasons": {code: len(at) for code, at in lines.items()},
        "lines": lines,
    }
    said = str(error)
    assert (
        "26 of 29" in said
        and "lines 2, 5, 6, 7, 8, ..." in said
        and "'name'" in said
        and "'label'" in said
        and len(said) < 2000
    )
    same = refusal(path, good, [Q, Q], [Q, Q])
    assert (same.code, same.values["lines"]) == ("turn-order", {"turn-order": [2, 3]})
    path.write_text("\n".join([json.dumps([Q, Q]), "{", json.dumps([Q])]))
    with pytest.raises(UserError) as torn:  # what follows a line that is not JSON is not looked at
        read_conversations(path)
    assert torn.value.values["lines"] == {"turn-order": [1], "not-json": [2]}


def test_formats_of_files(tmp_path):
    expected = [S, {"role": "user", "content": "é"}, A]
    human, gpt = {"from": "human", "value": "é"}, {"from": "gpt", "value": "a"}
    lines = [
        expected,
        {"messages": expected, "id": 3},
        {
            "messages": [
                {"role": "developer", "content": "s"},
                {"role": "user", "content": [{"type": "text", "text": "é"}]},
                A | {"refusal": None},
            ]
        },
        {"conversations": [{"from": "system", "value": "s"}, human, gpt], "source": "x"},
        {"conversations": [human, gpt], "system": "s"},
        [{"from": "system", "value": "s"}, {"from": "user", "value": "é"}, {"from": "assistant", "value": "a"}],
    ]
    path = tmp_path / "chat.jsonl"
    path.write_text(
        "\ufeff" + "\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n", encoding="utf-8"
    )
    assert read_conversations(path) == [expected] * len(lines)


def test_parts_are_read_as_they_are(tmp_path):
    path = tmp_path / "chat.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(CHAT).encode()))
    assert read_conversations(path) == [CHAT]


def test_files_that_hold_nothing(tmp_path):
    path = tmp_path / "chat.jsonl"
    with pytest.raises(UserError, match="is not a file"):
        read_conversations(path)
    path.write_text("\n \n")
    with pytest.raises(UserError, match="no conversation"):
        read_conversations(path)
    torn = tmp_path / "torn.jsonl.gz"
    whole = gzip.compress(b'{"a": 1}\n' * 1000)
    for raw in (whole[:-9], b"no gzip", whole[:20] + b"\xff" * 20):
        torn.write_bytes(raw)
        with pytest.raises(UserError, match="not a whole gzip"):
            list(read_jsonl(torn))


def test_a_prompt_is_checked_by_its_end():
    check_messages([S, Q, A, Q], prompt=True)
    with pytest.raises(UserError, match="^the last message is the assistant's"):
        check_messages([Q, A], prompt=True)


def test_real_conversations_pass(tok):
    folder = Path(__file__).parents[2] / "../shared/data/sft"
    if not folder.is_dir():
        pytest.skip("no ../shared/data/sft")
    chats = read_conversations(folder / "alpaca_1k.jsonl")
    assert len(chats) == 983
    ids, mask = render(tok, chats[0])
    assert len(ids) == len(mask) and 0 < sum(mask) < len(mask)
