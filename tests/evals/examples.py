"""What tests of evaluations grade: a task out of plain lists, small models, results in plain values. Not a test."""

from typing import Any, NamedTuple

import torch

from nanolab.data.chat import text_of
from nanolab.data.tokenizer import Tokenizer
from nanolab.inference.engine import Engine
from nanolab.model.config import GPTConfig
from nanolab.model.gpt import GPT
from nanolab.runtime import Runtime

CPU = Runtime(torch.device("cpu"), torch.float32)


class Example(NamedTuple):
    messages: list[dict[str, Any]]
    answer: str
    letters: tuple[str, ...] = ()


class ListTask:
    """Questions with their answers; a reply is right if it holds the answer. kind: letters or generate."""

    version, split = 1, "test"

    def __init__(
        self,
        rows: list[tuple[str, str]],
        letters: list[tuple[str, ...]] | None = None,
        name: str = "list",
        baseline: float = 0.0,
    ):
        self.name, self.kind, self.baseline = name, "letters" if letters else "generate", baseline
        self.examples = [
            Example(
                [{"role": "user", "content": q}, {"role": "assistant", "content": a}], a, letters[i] if letters else ()
            )
            for i, (q, a) in enumerate(rows)
        ]

    def __len__(self) -> int:
        return len(self.examples)

    def example(self, i: int) -> Example:
        return self.examples[i]

    def correct(self, example: Example, content: Any) -> bool:
        return example.answer in text_of(content)


def tokenizer() -> Tokenizer:
    return Tokenizer.train(["plain words and plain words only " * 20], 275)


def engine(runtime: Runtime = CPU, seed: int = 0, scale: float = 0.3, **architecture: Any) -> Engine:
    """On a model with weights far from their initial ones: what it says is noise, but it depends on all that it
    reads.
    """
    tok = tokenizer()
    flags = {"sequence_len": 96, "n_layer": 2, "n_head": 2, "n_embd": 32} | architecture
    model = GPT(GPTConfig(vocab_size=tok.vocab_size, **flags))
    model.init_weights(seed)
    g = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.randn(p.shape, generator=g))
    return Engine(model.eval(), tok, runtime)
