"""Option letters by their logits, against full forwards of one prompt at a time."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from nanolab.cli import UserError
from nanolab.data.chat import render_prompt
from nanolab.evals.chat import evaluate_letters, last_logits

spec = importlib.util.spec_from_file_location("nanolab_tests_examples", Path(__file__).with_name("examples.py"))
examples = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(examples)

ABC, ABCDE = ("A", "B", "C"), ("A", "B", "C", "D", "E")
QUESTIONS = [
    "plain?",
    "words and words and words",
    "é",
    "only",
    "which of these words is a plain one, and which is not?",
    "A",
    "one two",
    "longer",
]
ARCHITECTURES = {
    "default": {},
    "windows": {"window_pattern": "SL", "window_size": 4},
    "alibi": {"positions": "alibi", "window_pattern": "L"},
    "learned": {"positions": "learned", "window_pattern": "L", "smear": False},
    "tied": {"tied_head": True, "softcap": 0.0},
    "latent": {"attention": "mla", "value_embeds": False},
    "documents": {"document_mask": True, "bos": 266},
}


def task(answers: str = "ABCABCAB", **about):
    letters = [ABC if i % 2 else ABCDE for i in range(len(QUESTIONS))]
    return examples.ListTask(list(zip(QUESTIONS, answers)), letters, **about)


@torch.no_grad()
def alone(engine, text: str) -> torch.Tensor:
    ids = render_prompt(engine.tokenizer, [{"role": "user", "content": text}])
    return engine.model(torch.tensor([ids]))[0, -1]


@pytest.mark.parametrize("flags", ARCHITECTURES.values(), ids=ARCHITECTURES)
@torch.no_grad()
def test_logits_after_each_prompt_of_a_batch_are_those_it_gets_alone(flags):
    engine = examples.engine(**flags)
    assert flags.get("bos", engine.tokenizer.bos) == engine.tokenizer.bos
    prompts = [render_prompt(engine.tokenizer, [{"role": "user", "content": q}]) for q in QUESTIONS]
    torch.testing.assert_close(
        last_logits(engine.model, prompts, torch.device("cpu")), torch.stack([alone(engine, q) for q in QUESTIONS])
    )


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_letter_with_the_largest_logit_is_the_reply(batch_size):
    engine, questions, seen = examples.engine(), task(), []
    result = evaluate_letters(engine, questions, range(len(QUESTIONS)), batch_size=batch_size, on_reply=seen.append)
    for reply in result.replies:
        example = questions.example(reply.index)
        logits = alone(engine, QUESTIONS[reply.index])
        scores = {letter: logits[engine.tokenizer.encode(letter)[0]].item() for letter in example.letters}
        assert reply.content == max(scores, key=scores.get) and reply.correct == (reply.content == example.answer)
    assert [r.index for r in result.replies] == list(range(8)) and sorted(seen) == result.replies
    assert len({r.content for r in result.replies}) > 1  # the model does not say the same to everything
    assert (result.n, result.k, result.accuracy) == (8, 1, sum(r.correct for r in result.replies) / 8)


def test_a_model_that_prefers_nothing_says_the_first_letter():
    engine = examples.engine()
    with torch.no_grad():
        engine.model.lm_head.weight.zero_()
    result = evaluate_letters(engine, task("ABCAACAB"), [0, 1, 3, 4])
    assert [r.content for r in result.replies] == ["A"] * 4 and result.accuracy == 0.75


def test_a_prompt_that_the_model_cannot_read_counts_as_wrong():
    engine = examples.engine(sequence_len=12)
    rows = [("é", "A"), ("words " * 12, "A"), ("words é " * 3, "A")]
    lengths = [len(render_prompt(engine.tokenizer, [{"role": "user", "content": q}])) for q, _ in rows]
    assert [n < 12 for n in lengths] == [True, False, False]
    result = evaluate_letters(engine, examples.ListTask(rows, [("A",)] * 3), [0, 1, 2])
    assert (result.n, result.too_long, result.accuracy) == (3, 2, pytest.approx(1 / 3))


@pytest.mark.parametrize(
    "letters, kind, indices, said",
    [
        (("A", "no"), "letters", [0], "option 'no' of task list is 2 tokens; expected one"),
        (("A", ""), "letters", [0], "option '' of task list is 0 tokens; expected one"),
        (("A",), "letters", [], "task list has no problem to evaluate"),
        (("A",), "likelihood", [0], "task list is plain chat and has no answers"),
    ],
)
def test_what_cannot_be_compared_is_refused(letters, kind, indices, said):
    broken = examples.ListTask([("q", "A")], [letters])
    broken.kind = kind
    with pytest.raises(UserError, match=said):
        evaluate_letters(examples.engine(), broken, indices)


def on_rank(runtime, indices):
    return evaluate_letters(examples.engine(runtime), task(), indices, batch_size=2)


@pytest.mark.parametrize("indices", [range(8), [4]], ids=["all", "fewer than ranks"])
def test_any_number_of_ranks_finds_the_same(run_ranks, indices):
    want = on_rank(examples.CPU, indices)
    assert run_ranks(on_rank, 2, indices) == [want, want]
