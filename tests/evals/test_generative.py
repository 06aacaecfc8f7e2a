"""Sampled replies: each is what it would be alone, whatever the batch and the ranks; graded, counted, refused."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanolab.cli import UserError
from nanolab.data.chat import parse_reply, render_prompt
from nanolab.evals.chat import GREEDY, evaluate_sampled, reply_seed
from nanolab.evals.score import pass_at_k, wilson
from nanolab.inference.request import Request

spec = importlib.util.spec_from_file_location("nanolab_tests_examples", Path(__file__).with_name("examples.py"))
examples = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(examples)

QUESTIONS = ["plain?", "words and words and words", "é", "only", "which of these is plain"]
TASK = examples.ListTask([(q, a) for q, a in zip(QUESTIONS, "+aa+a")])
SAMPLED = Request(temperature=1.0, top_k=0, max_tokens=12, seed=5)


def prompt(engine, text: str) -> list[int]:
    return render_prompt(engine.tokenizer, [{"role": "user", "content": text}])


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_a_reply_is_what_it_would_be_alone(batch_size):
    engine, seen = examples.engine(), []
    result = evaluate_sampled(
        engine, TASK, [0, 1, 2, 4], SAMPLED, num_samples=3, batch_size=batch_size, on_reply=seen.append
    )
    assert [(r.index, r.sample) for r in result.replies] == [(i, s) for i in (0, 1, 2, 4) for s in range(3)]
    assert len({str(r.content) for r in result.replies}) > 6
    for r in result.replies:
        request = Request(max_tokens=12, temperature=1.0)
        steps = engine.generate([prompt(engine, QUESTIONS[r.index])], request, [reply_seed(5, r.index, r.sample)])
        ids = [new.token for (new,) in steps]
        assert r.content == parse_reply(engine.tokenizer, ids)
        assert r.correct == TASK.correct(TASK.example(r.index), r.content)
        assert r.ended == (ids[-1] in (engine.tokenizer.bos, engine.tokenizer.special("<|assistant_end|>")))
    assert sorted(seen, key=lambda r: (r.index, r.sample)) == result.replies
    right = [sum(r.correct for r in result.replies if r.index == i) for i in (0, 1, 2, 4)]
    assert 0 < sum(right) < 12
    assert result.pass_at == {k: pytest.approx(sum(pass_at_k(3, c, k) for c in right) / 4) for k in (1, 2, 3)}
    assert result.interval == wilson(result.accuracy, 4)


@torch.no_grad()
def test_without_temperature_replies_are_greedy():
    engine = examples.engine()
    (reply,) = evaluate_sampled(engine, TASK, [3], replace(GREEDY, max_tokens=10)).replies
    ids = prompt(engine, "only")
    start, stops = len(ids), (engine.tokenizer.bos, engine.tokenizer.special("<|assistant_end|>"))
    while len(ids) < start + 10 and ids[-1] not in stops:
        ids.append(engine.model(torch.tensor([ids]))[0, -1].argmax().item())
    assert reply.content == parse_reply(engine.tokenizer, ids[start:]) and reply.content
    assert reply.ended == (ids[-1] in stops)


def test_a_problem_that_leaves_no_room_for_a_reply_counts_as_wrong():
    engine = examples.engine(sequence_len=16)
    rows = [("é", ""), ("words " * 20, "")]  # every reply holds the empty answer
    assert len(prompt(engine, rows[0][0])) < 16 < len(prompt(engine, rows[1][0]))
    result = evaluate_sampled(engine, examples.ListTask(rows), [0, 1], replace(GREEDY, max_tokens=100))
    assert (result.n, result.too_long, result.accuracy) == (2, 1, 0.5)


def test_calls_go_to_the_tool_and_come_back_in_the_reply():
    """A model that can only say python_start, then python_end: its reply holds call and answer."""
    engine = examples.engine()
    tokenizer = engine.tokenizer
    start, end = tokenizer.special("<|python_start|>"), tokenizer.special("<|python_end|>")

    def logits(idx, cache=None, last_only=False):
        cache.advance(idx.size(1))
        out = torch.zeros(idx.size(0), 1, tokenizer.vocab_size)
        for row, last in enumerate(idx[:, -1].tolist()):
            out[row, 0, {start: tokenizer.encode("7")[0], tokenizer.encode("7")[0]: end}.get(last, start)] = 1.0
        return out

    logits.config, logits.compute_dtype = engine.model.config, torch.float32
    engine.model = logits
    (reply,) = evaluate_sampled(
        engine, TASK, [0], replace(GREEDY, max_tokens=8, tools=lambda code: f"<{code}>")
    ).replies
    call = [{"type": "python", "text": "7"}, {"type": "python_output", "text": "<7>"}]
    assert reply.content[:2] == call and not reply.ended


@pytest.mark.parametrize(
    "settings, said",
    [
        (dict(num_samples=0), "0 replies to a problem"),
        (dict(batch_size=0), "try --num-samples 1 --device-batch-size 32"),
        (dict(num_samples=4), "4 replies to a problem at temperature 0 are all the same"),
        (dict(request=Request(temperature=-1.0)), "temperature is -1"),
    ],
)
def test_settings_without_meaning_are_refused(settings, said):
    with pytest.raises(UserError, match=said):
        evaluate_sampled(examples.engine(), TASK, [0], **settings)


def on_rank(runtime, indices):
    return evaluate_sampled(examples.engine(runtime), TASK, indices, SAMPLED, num_samples=3, batch_size=4)


@pytest.mark.parametrize("indices", [range(5), [2]], ids=["all", "fewer than ranks"])
def test_any_number_of_ranks_finds_the_same(run_ranks, indices):
    want = on_rank(examples.CPU, indices)
    assert run_ranks(on_rank, 2, indices) == [want, want]
