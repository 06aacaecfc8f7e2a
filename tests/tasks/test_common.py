"""The task table, specs, mixtures, draws, options with letters, conversation files. Oracle: hand, and the tokenizer."""

import argparse
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tasks
from nanolab.cli import UserError
from nanolab.data.chat import render_prompt
from nanolab.data.tokenizer import Tokenizer
from tasks.common import Draws, RowReader, hold_out, multiple_choice, permutation, same_letter, share


def chats(path: Path, n: int) -> Path:
    lines = [[{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}] for i in range(n)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_every_task_says_what_it_is():
    for name, cls in tasks.TASKS.items():
        assert cls.kind in ("letters", "generate", "likelihood"), name
        assert 0 <= cls.baseline < 1 and cls.version >= 1 and cls.splits, name
        assert (cls.kind == "likelihood") == (cls.correct is tasks.Task.correct), (
            f"{name}: what is graded has another kind than likelihood"
        )
    assert {n: c.baseline for n, c in tasks.TASKS.items() if c.kind == "letters"} == dict.fromkeys(
        ("arc-easy", "arc-challenge", "mmlu", "hellaswag"), 0.25
    )


def test_draws_are_pinned():
    """These numbers must never change: every generated example hangs on them."""
    draws = Draws("a", 1)
    assert [draws.below(1000) for _ in range(5)] == [971, 408, 942, 840, 41]
    assert permutation(8, "a", 1).tolist() == [0, 7, 5, 1, 4, 6, 3, 2]
    assert round(share("word", "apple"), 6) == 0.617762
    assert {draws.between(2, 4) for _ in range(100)} == {2, 3, 4}


def test_hold_out_is_stable_when_items_come():
    items = [f"item {i}" for i in range(40)]
    kept, held = hold_out(items, 8)
    assert len(held) == 8 and sorted(kept + held, key=items.index) == items
    assert len(set(held) - set(hold_out(items + ["another"], 8)[1])) <= 1


@pytest.mark.parametrize(
    "text",
    ["(A) (B) (C) (D) =A =B .A\n" * 50 + " A B C D A. B)" * 20, Path(argparse.__file__).read_text(encoding="utf-8")],
)
def test_the_letters_of_a_question_are_the_tokens_of_the_answers(text):
    tok = Tokenizer.train([text], 273)
    choices = ["one", "two.", "3", "a (b)"]
    example = multiple_choice(RowReader({}, "x:1"), "Which?", choices, 1, "Choose.")
    ids = render_prompt(tok, example.messages[:1])
    for choice, letter in zip(choices, example.letters):
        (token,) = tok.encode(letter)
        around = tok.encode(f"- {choice} ("), tok.encode(")\n")
        start = next(i for i in range(len(ids)) if ids[i : i + len(around[0])] == around[0])
        assert ids[start + len(around[0])] == token, f"{letter} is split otherwise"
    assert (example.answer, example.letters) == ("B", ("A", "B", "C", "D"))
    assert example.messages[1] == {"role": "assistant", "content": "B"}


@pytest.mark.parametrize(
    ("reply", "right"), [("B", 1), (" (B).", 1), ("**B**", 1), ("A", 0), ("", 0), ("AB", 0), ("b", 0), ("B or A", 0)]
)
def test_letters_are_compared(reply, right):
    example = multiple_choice(RowReader({}, "x:1"), "Which?", ["a", "b"], 1, "Choose.")
    assert same_letter(example, reply) == bool(right)


@pytest.mark.parametrize(
    ("choices", "answer"),
    [(["a"], 0), (["a", 3], 0), (["a", " "], 0), (["a", "b"], 2), (["a", "b"], -1), ([str(i) for i in range(27)], 0)],
)
def test_options_that_do_not_fit_name_the_row(choices, answer):
    with pytest.raises(UserError, match="^x:1: "):
        multiple_choice(RowReader({}, "x:1"), "Which?", choices, answer, "Choose.")


@pytest.mark.parametrize(
    ("spec", "split", "complaint"),
    [
        ("gsm9k", "test", "unknown.*did you mean gsm8k"),
        ("arithmetic", "tset", "no split 'tset'.*did you mean test"),
        ("arithmetic=x", "test", "takes nothing after '='"),
        ("jsonl", "train", "expected jsonl=FILE.jsonl"),
        ("jsonl=", "train", "expected jsonl=FILE.jsonl"),
        ("jsonl=nowhere.jsonl", "train", "nowhere.jsonl is not a file"),
        ("humaneval", "train", "no split 'train'.*expected one of test"),
    ],
)
def test_specs_that_cannot_be(spec, split, complaint):
    with pytest.raises(UserError, match=complaint):
        tasks.build(spec, split)


def test_counts_and_limits():
    assert len(tasks.build("arithmetic", "test")) == 1000
    assert len(tasks.build("arithmetic@7", "test")) == 7
    assert len(tasks.build("arithmetic@7", "test", limit=3)) == 3
    assert len(tasks.build("arithmetic", "test", limit=5000)) == 5000  # generated: as many as asked for
    few, many = tasks.build("arithmetic", "test", limit=3), tasks.build("arithmetic", "test")
    assert [few.example(i) for i in range(3)] == [many.example(i) for i in range(3)]
    assert tasks.build("arithmetic", "test", seed=1).example(0) != many.example(0)
    for i in (-1, 3):
        with pytest.raises(IndexError):
            few.example(i)


def test_a_file_of_conversations_is_split_by_its_first_question(tmp_path):
    path = chats(tmp_path / "a.jsonl", 400)
    train, test, both = (tasks.build(f"jsonl={path}", split) for split in ("train", "test", "all"))

    def questions(task):
        return {task.example(i).messages[0]["content"] for i in range(len(task))}

    assert len(both) == 400 and questions(train) | questions(test) == questions(both)
    assert not questions(train) & questions(test)
    assert 5 <= len(test) <= 40
    more = chats(tmp_path / "b.jsonl", 500)
    assert questions(test) <= questions(tasks.build(f"jsonl={more}", "test"))  # what was held out stays so
    assert [both.example(i).messages[0]["content"] for i in range(5)] != [f"q{i}" for i in range(5)]
    with pytest.raises(UserError, match="has no answers"):
        both.correct(both.example(0), "x")


def test_a_tiny_file_still_has_both_splits(tmp_path):
    path = chats(tmp_path / "a.jsonl", 2)
    assert len(tasks.build(f"jsonl={path}", "train")) == len(tasks.build(f"jsonl={path}", "test")) == 1
    with pytest.raises(UserError, match="train is empty.*use the split all"):
        tasks.build(f"jsonl={chats(path, 1)}", "train")


def said(path: Path, split: str) -> list[str]:
    """question and answer of each example of a split"""
    task = tasks.build(f"jsonl={path}", split)
    return [f"{q['content']} -> {a['content']}" for q, a in (task.example(i).messages for i in range(len(task)))]


def written(path: Path, pairs: list[tuple]) -> Path:
    path.write_text(
        "".join(
            json.dumps([{"role": "user", "content": f"q{q}"}, {"role": "assistant", "content": f"a{a}"}]) + "\n"
            for q, a in pairs
        )
    )
    return path


# (question, answer): all questions differ; a few are shared by many; a few conversations occur again and again
PAIRS = st.one_of(
    st.integers(2, 450).map(lambda n: [(i, i) for i in range(n)]),
    st.lists(
        st.tuples(st.sampled_from([0, 0, 0, 0, 1, 2, 3, 4, 5, 6]), st.integers(0, 10**9)), min_size=2, max_size=120
    ),
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2)), min_size=2, max_size=120),
)


@pytest.mark.fault("F4")
@pytest.mark.fault("outer D6")
@settings(max_examples=25, deadline=None)
@given(data=st.data(), pairs=PAIRS)
def test_what_is_held_out_stays_so_and_is_a_twentieth_at_most(tmp_path_factory, data, pairs):
    """The file grows from a few lines to all of them."""
    path, before = tmp_path_factory.mktemp("grown") / "chats.jsonl", set()
    sizes = sorted({*data.draw(st.lists(st.integers(2, len(pairs)), max_size=4)), len(pairs)})
    for n in sizes:
        written(path, pairs[:n])
        if len(set(pairs[:n])) < 2:
            with pytest.raises(UserError):
                tasks.build(f"jsonl={path}", "train")
            continue
        train, test, both = (said(path, split) for split in ("train", "test", "all"))
        assert 1 <= len(test) <= max(1, min(n // 20, 200)), "one at least, a twentieth at most"
        assert not set(train) & set(test) and set(train) | set(test) == set(both), "equal conversations are on one side"
        if len(set(pairs[:n])) == n:
            assert len(test) == max(1, n // 20) and sorted(train + test) == sorted(both)
        assert before <= set(test), "nothing that was held out is trained on"
        before = set(test)


@pytest.mark.fault("F4")
def test_a_question_that_many_ask_is_not_all_that_is_held_out(tmp_path):
    """The file of a report: 190 of 200 chats begin alike. And three eighths of 400, by whose question they were all
    held out.
    """
    path = tmp_path / "chats.jsonl"
    test = said(written(path, [("hey" if i >= 10 else i % 3, i) for i in range(200)]), "test")
    assert len(test) == 10
    chats = [
        [{"role": "user", "content": "Hi there" if i % 8 < 3 else f"q{i}"}, {"role": "assistant", "content": f"a{i}"}]
        for i in range(400)
    ]
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    test, train = said(path, "test"), said(path, "train")
    assert len(test) == 20 and 1 <= sum(one.startswith("Hi there") for one in test) <= 15, "7.5 in the mean"
    assert sum(one.startswith("Hi there") for one in train) > 130


@pytest.mark.fault("F4")
def test_at_most_two_hundred_are_held_out_and_a_shared_question_is_on_one_side(tmp_path):
    test = said(written(tmp_path / "chats.jsonl", [(i, i) for i in range(6000)]), "test")
    assert len(test) == 200
    pairs = [(i // 2, i) for i in range(800)]  # each question twice
    test, train = (
        {one.partition(" ")[0] for one in said(written(tmp_path / "twice.jsonl", pairs), split)}
        for split in ("test", "train")
    )
    assert len(test & train) <= 1 and len(test) >= 20, "one may wait for its second place"


@pytest.mark.fault("F4")
def test_the_split_says_how_much_it_holds_out(tmp_path):
    assert any(
        "10 of 200 conversations held out" in note
        for note in getattr(tasks.build(f"jsonl={chats(tmp_path / 'a.jsonl', 200)}", "train"), "notes", [])
    )


def test_a_mixture_has_each_example_as_often_as_its_weight_says(tmp_path):
    a, b = chats(tmp_path / "a.jsonl", 40), chats(tmp_path / "b.jsonl", 10)
    b.write_text(b.read_text().replace("q", "other"))
    mix = tasks.mixture(f"jsonl={a}:2, jsonl={b}@6:0.5", "all")
    seen = Counter(mix.example(i).messages[0]["content"] for i in range(len(mix)))
    assert len(mix) == 83 and mix.counts == [80, 3]
    assert Counter(seen[f"q{i}"] for i in range(40)) == {2: 40}
    assert sorted(n for q, n in seen.items() if q.startswith("other")) == [1, 1, 1]
    first = [mix.example(i).messages[0]["content"] for i in range(83)]
    assert first != sorted(first) and len(set(first[:20])) > 15  # shuffled, not one after the other
    assert first == [
        tasks.mixture(f"jsonl={a}:2,jsonl={b}@6:0.5", "all").example(i).messages[0]["content"] for i in range(83)
    ]
    assert first != [
        tasks.mixture(f"jsonl={a}:2,jsonl={b}@6:0.5", "all", seed=1).example(i).messages[0]["content"]
        for i in range(83)
    ]
    for i in (-1, 83):
        with pytest.raises(IndexError):
            mix.example(i)


@pytest.mark.fault("F20")
def test_a_colon_or_an_at_sign_of_a_files_name_stays_with_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a:b.jsonl", "week:2", "both", "both:3", "me@5"):
        chats(tmp_path / name, 40)
    assert tasks.tasks_of("jsonl=a:b.jsonl") == [("jsonl=a:b.jsonl", 1.0)]
    assert tasks.tasks_of("jsonl=a:b.jsonl:0.5, jsonl=a:b.jsonl@5:2") == [
        ("jsonl=a:b.jsonl", 0.5),
        ("jsonl=a:b.jsonl@5", 2.0),
    ]
    assert tasks.tasks_of("jsonl=week:2") == [("jsonl=week:2", 1.0)], "no file 'week'"
    assert tasks.tasks_of("jsonl=both:3") == [("jsonl=both", 3.0)], "what precedes exists too"
    assert len(tasks.mixture("jsonl=a:b.jsonl:0.5,jsonl=me@5,jsonl=me@5@6,jsonl=week:2", "all")) == 20 + 40 + 6 + 40
    with pytest.raises(UserError) as missing:
        tasks.mixture("jsonl=no:such.jsonl", "all")
    assert "no:such.jsonl" in str(missing.value)
    with pytest.raises(UserError) as bad:
        tasks.tasks_of("jsonl=both:x")
    assert (bad.value.code, bad.value.values) == ("bad-weight", {"name": "jsonl=both", "weight": "x"})


def test_weights():
    assert tasks.tasks_of("gsm8k:4, jsonl=a.jsonl@5:0.5,mmlu,") == [
        ("gsm8k", 4.0),
        ("jsonl=a.jsonl@5", 0.5),
        ("mmlu", 1.0),
    ]
    for bad in ("gsm8k:0", "gsm8k:-1", "gsm8k:x", "gsm8k:nan", "gsm8k:inf", ":2", "", " , "):
        with pytest.raises(UserError, match="expected"):
            tasks.tasks_of(bad)
    with pytest.raises(UserError, match="holds no examples"):
        tasks.mixture("arithmetic@0", "test")
