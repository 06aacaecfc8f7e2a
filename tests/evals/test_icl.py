"""In-context items: prompts letter by letter, where answers begin, decisions against sums over a table."""

import hashlib
import importlib.util
import json
import random
import re
import sys
import zlib
from pathlib import Path

import pytest
import torch

from nanolab.cli import UserError
from nanolab.evals.icl import KINDS, Question, Score, all_greedy, encode_groups, lowest_mean, rendered, shots
from nanolab.evals.likelihood import judge_groups
from nanolab.runtime import Runtime

spec = importlib.util.spec_from_file_location("nanolab_tests_tiny_bundle", Path(__file__).with_name("tiny_bundle.py"))
tiny = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)

CPU = Runtime(torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


def items(kind: str, rows: list[dict]) -> list[Question]:
    return [KINDS[kind].item(row) for row in rows]


def test_a_choice_is_asked_after_solved_ones():
    rows = [
        {"query": " Q0 ", "choices": ["a", "b"], "gold": 1},
        {"query": "Q1", "choices": ["c", "d"], "gold": 0},
        {"query": "Q2", "choices": ["e", "f", 7], "gold": 2},
    ]
    assert shots(0, 3, 2) == [2, 1] and shots(1, 3, 1) == [2]
    assert rendered("multiple_choice", items("multiple_choice", rows), 0, 2, "\nAnswer: ") == [
        "Q2\nAnswer: 7\n\nQ1\nAnswer: c\n\n Q0 \nAnswer: a",
        "Q2\nAnswer: 7\n\nQ1\nAnswer: c\n\n Q0 \nAnswer: b",
    ]


def test_a_schema_tells_one_end_after_each_beginning():
    rows = [
        {"context_options": ["She", "He"], "continuation": "left.", "gold": 1},
        {"context_options": ["A", "B"], "continuation": "c", "gold": 0},
    ]
    assert rendered("schema", items("schema", rows), 0, 1, " ") == ["A c\n\nShe left.", "A c\n\nHe left."]


def test_a_language_item_is_trimmed_before_its_answer_and_stripped_without_it():
    rows = [{"context": " one \n", "continuation": "two "}, {"context": "\tthree", "continuation": " four"}]
    assert rendered("language_modeling", items("language_modeling", rows), 0, 1, " ") == [
        "three  four\n\none two ",
        "three  four\n\none",
    ]
    assert rendered("language_modeling", items("language_modeling", rows), 1, 0, "\nA: ") == [
        "three\nA:  four",
        "three\nA:",
    ]


@pytest.mark.parametrize(("i", "n", "k"), [(0, 2, 1), (3, 9, 8), (8, 9, 3), (500, 1319, 10)])
def test_the_solved_ones_are_drawn_as_the_reference_draws_them(i, n, k):
    assert shots(i, n, k) == random.Random(1234 + i).sample([j for j in range(n) if j != i], k)


@pytest.mark.parametrize(
    ("kind", "rows"), [("multiple_choice", tiny.CHOICES), ("schema", tiny.SCHEMAS), ("language_modeling", tiny.WORDS)]
)
@pytest.mark.parametrize("delimiter", [" ", "\nAnswer: "])
def test_tokens_are_those_of_the_whole_text_and_the_answers_alone_are_scored(tokenizer, kind, rows, delimiter):
    all_items = items(kind, rows)
    groups = list(encode_groups(kind, all_items, range(len(rows)), 2, delimiter, tokenizer))
    for i, group in enumerate(groups):
        texts = rendered(kind, all_items, i, 2, delimiter)
        assert (group.index, group.gold) == (i, rows[i].get("gold", 0))
        assert [list(t.ids) for t in group.texts()] == [
            [tokenizer.bos, *tokenizer.encode(text)] for text in texts[: len(group.tails)]
        ]
        scored = [tokenizer.decode(t.ids[t.start :]) for t in group.texts()]
        if kind == "multiple_choice":  # up to where the choices differ, and not a token less
            before = {tuple(t.ids[: t.start]) for t in group.texts()}
            assert len(before) == 1 and len({t.ids[t.start] for t in group.texts()}) > 1
            assert all(text.endswith(s) for text, s in zip(texts, scored))
        elif kind == "schema":
            assert len(set(scored)) == 1 and scored[0].endswith("was too small.")
            assert len({t.ids[t.start - 1] for t in group.texts()}) > 1
        else:
            assert scored == [f"{' ' if delimiter[-1] == ' ' else ''}{rows[i]['continuation']}"]


def test_a_choice_that_begins_the_others_is_scored_at_its_last_token(tokenizer):
    (group,) = encode_groups("multiple_choice", [Question(("Is it?",), ("no", "no cup"))], [0], 0, " ", tokenizer)
    short, long = group.texts()
    assert short.start == long.start == len(short.ids) - 1


def test_a_token_over_the_seam_is_scored(tokenizer):
    """With no blank between them, what ends the question and what begins the answer may be one token."""
    (group,) = encode_groups("language_modeling", [Question(("the c",), ("up was",))], [0], 0, "", tokenizer)
    (text,) = group.texts()
    assert (
        tokenizer.decode(text.ids[1 : text.start]) == "the" and tokenizer.decode(text.ids[text.start :]) == " cup was"
    )


def scores(*values: tuple[float, int, bool]) -> list[Score]:
    return [Score(nats, n, greedy, 0) for nats, n, greedy in values]


def test_decisions():
    assert lowest_mean(scores((6.0, 3, False), (3.0, 1, True), (2.1, 1, True)), 0), "the mean decides, not the sum"
    assert lowest_mean(scores((4.0, 2, False), (2.0, 1, False)), 0) and not lowest_mean(
        scores((4.0, 2, False), (2.0, 1, False)), 1
    ), "the first of equals"
    assert all_greedy(scores((9.0, 1, True)), 0) and not all_greedy(scores((0.1, 1, False)), 0)


@pytest.mark.parametrize(
    ("kind", "rows"), [("multiple_choice", tiny.CHOICES), ("schema", tiny.SCHEMAS), ("language_modeling", tiny.WORDS)]
)
def test_every_kind_decides_as_sums_over_a_table_do(tokenizer, kind, rows):
    table = tiny.Table(tokenizer.vocab_size)
    if kind == "language_modeling":  # so that some are right
        rows = [
            {"context": "after all the cup", "continuation": answer} for answer in ("and the", "was", "and no", "and")
        ]
        ids = tokenizer.encode("cup and the")
        table.table[ids[:-1], ids[1:]] += 99
    groups = list(encode_groups(kind, items(kind, rows), range(len(rows)), 1, " ", tokenizer))
    found = judge_groups(table, groups[::-1], CPU, lambda s, group: KINDS[kind].right(s, group.gold))
    want = []
    for group in groups:
        if kind == "language_modeling":
            want.append(table.greedy(*group.texts()[0]))
        else:
            means = [table.nats(ids, start) / (len(ids) - start) for ids, start in group.texts()]
            want.append(means.index(min(means)) == group.gold)
    assert found == want and len(set(want)) == 2


def test_a_text_that_cannot_be_scored_is_named(tokenizer):
    table = tiny.Table(tokenizer.vocab_size)
    table.limit = 4
    groups = list(encode_groups("multiple_choice", items("multiple_choice", tiny.CHOICES), range(2), 0, " ", tokenizer))
    with pytest.raises(
        UserError, match="for a model that reads 4; expected at least one scored token, and one before it"
    ):
        judge_groups(table, groups, CPU, lambda s, group: s)


def test_a_group_that_cannot_be_made_is_an_error_of_all_ranks(tokenizer):
    def groups():
        raise UserError("no bos")
        yield

    said = []
    with pytest.raises(UserError, match="no bos"):
        judge_groups(tiny.Table(9), groups(), Gathers(said), lambda s, group: s)
    assert said == [([], "no bos")]


class Gathers:
    def __init__(self, said):
        self.said = said

    def gather_objects(self, obj):
        self.said.append(obj)
        return [obj]


# sha256 of what karpathy/nanochat's (dev/bench/reference_texts.py compares with a checkout of it, by hand)
# render_prompts_* and batch_sequences_* make of the tiny bundle's rows, with two solved ones and the tokens of `words`
GOLDEN = {
    "multiple_choice": ("0afa1adae8873aee", tiny.CHOICES),
    "schema": ("30e930e1a9c78018", tiny.SCHEMAS),
    "language_modeling": ("726059d4d0737808", tiny.WORDS),
}


class Words:
    bos = 5000

    def encode_batch(self, texts):
        return [[zlib.crc32(part.encode()) % 5000 for part in re.findall(r" ?\w+|\s|[^\w\s]", text)] for text in texts]


@pytest.mark.parametrize("kind", GOLDEN)
def test_ids_and_starts_are_those_that_the_reference_made(kind):
    sha256, rows = GOLDEN[kind]
    rows = items(kind, rows)
    random.Random(1337).shuffle(rows)
    both = [
        [
            [[list(t.ids), t.start] for t in group.texts()]
            for group in encode_groups(kind, rows, range(len(rows)), 2, d, Words())
        ]
        for d in (" ", "\nAnswer: ")
    ]
    assert (
        hashlib.sha256(json.dumps([group for pair in zip(*both) for group in pair]).encode()).hexdigest()[:16] == sha256
    )


ROWS = {
    "multiple_choice": {"query": "q", "choices": ["a", "b"], "gold": 0},
    "schema": {"context_options": ["a", "b"], "continuation": "c", "gold": 0},
    "language_modeling": {"context": "a", "continuation": "b"},
}


@pytest.mark.parametrize(
    ("kind", "change", "text"),
    [
        ("multiple_choice", {"query": None}, "query is missing; expected text"),
        ("multiple_choice", {"query": ["x"]}, r"query is \['x'\]; expected text"),
        ("multiple_choice", {"choices": ["a"]}, r"choices is \['a'\]; expected a list of at least 2 texts"),
        ("multiple_choice", {"choices": "ab"}, "choices is 'ab'; expected a list of at least 2 texts"),
        ("multiple_choice", {"gold": 2}, "gold is 2; expected the number of the true one of 2 choices, from 0 to 1"),
        ("multiple_choice", {"gold": -1}, "gold is -1; expected the number"),
        ("multiple_choice", {"gold": "A"}, "gold is 'A'; expected the number"),
        ("multiple_choice", {"choices": ["a", "a"]}, "all 2 choices are the same; expected texts that differ"),
        ("schema", {"context_options": [["a"], "b"]}, "context_options is .*; expected a list of at least 2 texts"),
        ("schema", {"gold": None}, "gold is missing"),
        ("schema", {"continuation": None}, "continuation is missing"),
        ("language_modeling", {"continuation": " \n"}, "continuation is empty; expected text to predict"),
    ],
)
def test_a_row_that_is_no_item_is_named(kind, change, text):
    KINDS[kind].item(ROWS[kind])
    with pytest.raises(UserError, match=text):
        KINDS[kind].item(ROWS[kind] | change)
