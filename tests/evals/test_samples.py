"""What is shown of a model's writing, against a naive greedy loop."""

import pytest
import torch

from nanolab.data.tokenizer import Tokenizer
from nanolab.evals.samples import PROMPTS, Continuation, continue_prompts, one_line, print_samples, unconditioned
from nanolab.model.config import GPTConfig
from nanolab.runtime import Runtime

RUNTIME = Runtime(torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["plain words and plain words only " * 20], 275)


@pytest.fixture
def model(make_gpt, tokenizer):
    return make_gpt(
        GPTConfig(sequence_len=96, vocab_size=tokenizer.vocab_size, n_layer=2, n_head=2, n_embd=32), scale=0.3
    )


@torch.no_grad()
def test_prompts_are_continued_greedily(model, tokenizer):
    samples = continue_prompts(model, tokenizer, RUNTIME, max_tokens=5)
    assert tuple(s.prompt for s in samples) == PROMPTS and len(set(PROMPTS)) == 7
    for sample in samples:
        ids = [tokenizer.bos, *tokenizer.encode(sample.prompt)]
        start = len(ids)
        while len(ids) < start + 5:
            ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
            if ids[-1] in (tokenizer.bos, tokenizer.special("<|assistant_end|>")):
                ids.pop()
                break
        assert sample.text == tokenizer.decode(ids[start:])


def test_prompts_that_a_short_model_cannot_read_are_left_out(make_gpt, tokenizer):
    short = make_gpt(GPTConfig(sequence_len=24, vocab_size=tokenizer.vocab_size, n_layer=1, n_head=2, n_embd=32))
    shown = [s.prompt for s in continue_prompts(short, tokenizer, RUNTIME)]
    assert shown == [p for p in PROMPTS if len(tokenizer.encode(p)) <= 22] and 0 < len(shown) < 7


def test_texts_from_nothing_repeat_with_their_seed_and_differ_from_one_another(model, tokenizer):
    texts = unconditioned(model, tokenizer, RUNTIME, rows=3, max_tokens=20, seed=1)
    assert texts == unconditioned(model, tokenizer, RUNTIME, rows=3, max_tokens=20, seed=1)
    assert len({*texts, *unconditioned(model, tokenizer, RUNTIME, rows=3, max_tokens=20, seed=2)}) == 6


def test_rank_zero_alone_prints_one_line_per_prompt(model, tokenizer, capsys):
    print_samples(model, tokenizer, Runtime(torch.device("cpu"), torch.float32, rank=1, world_size=2))
    assert capsys.readouterr().out == ""
    print_samples(model, tokenizer, RUNTIME)
    assert len(capsys.readouterr().out.splitlines()) == 7
    assert one_line(Continuation("a\n", "é\ufffdb\r\nc\x1b")) == "  a\\n ...é\ufffdb\\r\\nc\\x1b"
