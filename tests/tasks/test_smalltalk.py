"""Smalltalk: the test prompts are unseen and need no calculation, a call of the tool is wrong, files that cannot be are
named.

Oracle: sentences compared by a normalisation written here, hand-made replies and files.
"""

import hashlib
import json
import re
from pathlib import Path

import pytest

import tasks
from nanolab.cli import UserError
from nanolab.data.chat import check_messages
from tasks.identity import TOPICS, cores

TOML = Path(__file__).parents[2] / "tasks/smalltalk.toml"


def asked(split: str, n: int, spec: str = "smalltalk") -> list[str]:
    task = tasks.build(spec, split, limit=n)
    return [task.example(i).messages[0]["content"] for i in range(len(task))]


def sentences(text: str) -> set[str]:
    """Without case and marks, and with 0 for every number."""
    return {" ".join(re.findall("[a-z0]+", re.sub(r"\d+", "0", part.lower()))) for part in re.split("[.?!] ", text)}


def test_prompts_are_unseen_and_many_have_numbers():
    prompts, train = asked("test", -1), set().union(*map(sentences, asked("train", 10_000)))
    assert len({frozenset(sentences(q)) for q in prompts}) == len(prompts) == 100
    assert not [q for q in prompts if sentences(q) & train]
    assert sum(bool(re.search(r"\d", q)) for q in prompts) >= 40
    assert not [
        q for q in prompts if re.search(r"how (many|much)|plus|minus|times|total|left|together|\d [-+*x] \d", q.lower())
    ]


def test_training_has_numbers_and_no_braces():
    train = asked("train", 3000)
    assert 0.5 < sum(bool(re.search(r"\d", q)) for q in train) / len(train) < 0.7
    assert not [q for q in train if re.search(r"[{}#]", q)] and len({q.lower() for q in train}) > 1200
    ages = {int(found[1]) for q in train if (found := re.fullmatch(r"(?i)i am (\d+) years old\.?", q))}
    assert len(ages) > 5 and 2 <= min(ages) and max(ages) <= 90
    assert 0.15 < sum(q == q.lower() for q in train) / len(train) < 0.25
    assert 0.15 < sum(q[-1] not in ".?!" for q in train) / len(train) < 0.25


def test_topics_are_plain_and_leave_the_name_to_identity():
    train = tasks.build("smalltalk", "train", limit=3000)
    examples = [train.example(i) for i in range(3000)]
    for example in examples:
        check_messages(example.messages)
        reply = example.messages[1]["content"]
        assert (
            train.correct(example, reply)
            and 4 < len(reply) < 90
            and reply[-1] in ".!?"
            and not re.search(r"\d|nanolab", reply)
        )
    both = set().union(*(sentences(e.messages[0]["content"]) for e in examples))
    assert not both & {
        s
        for topic in TOPICS
        for held in (False, True)
        for group in cores(topic, held, "x")
        for core in group
        for s in sentences(core)
    }


def test_examples_are_pinned_whatever_the_limit():
    for split, pinned in (("train", "cf8a73a006d2"), ("test", "d48d1ea5da9b")):
        few, many = tasks.build("smalltalk", split, limit=5), tasks.build("smalltalk", split)
        assert [few.example(i) for i in range(5)] == [many.example(i) for i in range(5)]
        got = hashlib.sha256(json.dumps([many.example(i).messages for i in range(100)]).encode()).hexdigest()[:12]
        assert got == pinned, "the same index gives another text: raise the task's version, then pin the new hash"


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ("That is nice.", 1),
        ([{"type": "text", "text": "Hm."}], 1),
        ("25", 1),
        ("", 0),
        (" \n", 0),
        ([], 0),
        (
            [
                {"type": "python", "text": "2+3"},
                {"type": "python_output", "text": "5"},
                {"type": "text", "text": "It is 5."},
            ],
            0,
        ),
        ([{"type": "text", "text": "Well: "}, {"type": "python", "text": "2+3"}], 0),
    ],
)
def test_a_reply_with_a_call_or_without_text_is_wrong(reply, right):
    task = tasks.build("smalltalk", "test")
    assert task.rewards(task.example(0), reply) == {"correct": float(right)}


GOOD = '[[topic]]\nquestions = ["I am {2-9}."]\nanswers = ["Good."]\n[test]\nquestions = ["Hi."]\nanswers = ["Ho."]\n'


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "talk.toml"
    path.write_text(GOOD)
    task = tasks.build(f"smalltalk={path}", "train", limit=99)
    assert {task.example(i).messages[0]["content"].lower().rstrip(".") for i in range(99)} == {
        f"i am {n}" for n in range(2, 10)
    }
    assert {task.example(i).messages[1]["content"] for i in range(99)} == {"Good."}
    assert asked("test", -1, f"smalltalk={path}") == ["Hi."]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (("[[topic]]", "[[topics]]"), "has the table 'topics'.*did you mean topic"),
        (("[[topic]]", "[topic]"), r"no \[\[topic\]\]"),
        (("[test]", "[[topic]]"), r"no \[test\]"),
        (("[test]", "[[test]]"), "test has nothing; expected questions and answers"),
        (('answers = ["Good."]', ""), "topic 1 has questions; expected questions and answers"),
        (('answers = ["Good."]', "answers = []"), "topic 1: answers is \\[\\]; expected a list of texts"),
        (('answers = ["Ho."]', "answers = [1]"), "test: answers is \\[1\\]"),
        (("{2-9}", "{two}"), "'I am {two}.' has braces"),
        (("{2-9}", "{9-2}"), "has braces; expected a range"),
        (('"Hi."', '"Hi. I am 7!"'), "test asks 'Hi. I am 7!', which is in a topic too"),
        (('"Hi."', '"i AM 7"'), "test asks 'i AM 7', which"),
        (('["Good."]', "[Good]"), "cannot be read as TOML .*line 3"),
    ],
)
def test_files_that_cannot_be(tmp_path, change, complaint):
    path = tmp_path / "talk.toml"
    assert change[0] in GOOD
    path.write_text(GOOD.replace(*change))
    with pytest.raises(UserError, match=complaint) as error:
        tasks.build(f"smalltalk={path}", "train")
    assert str(error.value).startswith(str(path))
    with pytest.raises(UserError, match="nowhere.toml is not a file"):
        tasks.build("smalltalk=nowhere.toml", "train")
