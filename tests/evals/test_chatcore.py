"""ChatCORE by hand, and what the numbers of a look while training are called."""

import importlib.util
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from nanolab.evals.chat import (
    GREEDY,
    MEMBERS,
    chatcore,
    chatcore_score,
    evaluate_letters,
    evaluate_sampled,
    evaluate_task,
)
from nanolab.evals.score import Interval, centred
from nanolab.inference.request import Request
from nanolab.inference.tools import TOOLS
from tasks import TASKS

spec = importlib.util.spec_from_file_location("nanolab_tests_examples", Path(__file__).with_name("examples.py"))
examples = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(examples)


def test_chance_is_zero_and_perfection_one():
    assert (centred(0.25, 0.25), centred(1.0, 0.25), centred(0.0, 0.0)) == (0.0, 1.0, 0.0)
    assert centred(0.4, 0.25) == pytest.approx(0.2) and centred(1.0, 1.0) == 0.0


def test_the_score_is_the_mean_of_centred_accuracies_by_hand():
    score = chatcore_score([("mmlu", 0.25, 0.4, Interval(0.37, 0.46)), ("gsm8k", 0.0, 0.1, Interval(0.05, 0.25))])
    assert score.label == "ChatCORE-2 of 6"
    assert score.value == pytest.approx((0.2 + 0.1) / 2)
    down, up = math.hypot(0.03 / 0.75, 0.05) / 2, math.hypot(0.06 / 0.75, 0.15) / 2
    assert score.interval == pytest.approx((0.15 - down, 0.15 + up))


def test_a_mean_over_all_members_and_only_that_is_called_chatcore():
    rows = [(name, 0.0, 0.5, Interval(0.4, 0.6)) for name in MEMBERS]
    assert chatcore_score(rows)[:2] == ("ChatCORE", 0.5)
    # not a member
    assert chatcore_score([*rows, ("arithmetic", 0.0, 1.0, Interval(0.9, 1.0))])[:2] == ("ChatCORE", 0.5)
    assert chatcore_score(rows[1:]).label == "ChatCORE-5 of 6"
    assert chatcore_score([("arithmetic", 0.0, 1.0, Interval(0.9, 1.0)), rows[0]]) is None  # one member is no mean


def test_members_are_tasks_that_can_be_graded():
    assert len(MEMBERS) == len(set(MEMBERS)) == 6
    for name in MEMBERS:
        assert TASKS[name].kind in ("letters", "generate") and "test" in TASKS[name].splits
        assert TASKS[name].baseline == 0.25 if TASKS[name].kind == "letters" else 0 <= TASKS[name].baseline < 1


def tasks():
    letters = [("A", "B")] * 4
    by_letter = examples.ListTask(
        [("plain?", "A"), ("words", "B"), ("é", "A"), ("only", "A")], letters, name="mmlu", baseline=0.25
    )
    return [
        by_letter,
        examples.ListTask([("one", "a"), ("two", ""), ("three", "e")], name="gsm8k"),
        examples.ListTask([("x", "")], name="arithmetic"),
    ]


def test_a_look_while_training_names_every_task_and_what_is_lacking():
    engine, (by_letter, generated, other) = examples.engine(), tasks()
    found = chatcore(engine, tasks(), 3, 2, max_tokens=5)
    a = evaluate_letters(engine, by_letter, range(3)).accuracy
    b = evaluate_sampled(engine, generated, range(2), replace(GREEDY, max_tokens=5)).accuracy
    assert found == pytest.approx(
        {
            "chatcore/mmlu": a,
            "chatcore/gsm8k": b,
            "chatcore/arithmetic": 1.0,
            "chatcore/ChatCORE-2 of 6": ((a - 0.25) / 0.75 + b) / 2,
        }
    )
    assert set(chatcore(engine, [other], max_tokens=5)) == {"chatcore/arithmetic"}


def test_the_kind_of_a_task_decides_how_it_is_answered_and_the_limit_how_often():
    engine, (by_letter, generated, _) = examples.engine(), tasks()
    assert evaluate_task(engine, by_letter, -1) == evaluate_letters(engine, by_letter, range(4))
    assert (
        evaluate_task(engine, by_letter, 99).n == 4
        and evaluate_task(engine, generated, 2, replace(GREEDY, max_tokens=3)).n == 2
    )
    request = Request(temperature=1.0, top_k=5, seed=9, max_tokens=6, tools=TOOLS["calculator"])
    two = dict(request=request, num_samples=2)
    assert evaluate_task(engine, generated, **two) == evaluate_sampled(engine, generated, range(3), **two)
