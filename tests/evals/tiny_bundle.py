"""An evaluation bundle of a few lines, and a reader whose probabilities are a table. Not a test."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from nanolab.data.tokenizer import Tokenizer
from nanolab.evals.likelihood import Reads

CHOICES = [
    {"query": f"Which is {i}?", "choices": [f"the {i}", "another", f"no {i} at all"], "gold": i % 3} for i in range(7)
]
SCHEMAS = [
    {
        "context_options": [f"The cup, since cup {i}", f"The cup, since the larger bag {i}"],
        "continuation": "was too small.",
        "gold": i % 2,
    }
    for i in range(5)
]
WORDS = [{"context": f" after {i} comes \n", "continuation": f"{i + 1} and {i + 2}"} for i in range(6)]
TASKS: list[tuple[dict[str, Any], list[dict[str, Any]], str]] = [  # entry of the list, rows, baseline in percent
    (
        {
            "label": "copa",
            "dataset_uri": "a/choices.jsonl",
            "num_fewshot": [2],
            "icl_task_type": "multiple_choice",
            "continuation_delimiter": "\nAnswer: ",
        },
        CHOICES,
        "25",
    ),
    (
        {"label": "winograd", "dataset_uri": "b/schemas.jsonl", "num_fewshot": [0], "icl_task_type": "schema"},
        SCHEMAS,
        "50",
    ),
    (
        {
            "label": "lambada_openai",
            "dataset_uri": "b/words.jsonl",
            "num_fewshot": [0],
            "icl_task_type": "language_modeling",
        },
        WORDS,
        "0",
    ),
    (
        {
            "label": "hellaswag_zeroshot",
            "dataset_uri": "a/choices.jsonl",
            "num_fewshot": [0],
            "icl_task_type": "multiple_choice",
        },
        CHOICES,
        "33.3",
    ),
]


def write(folder: Path, tasks=TASKS) -> Path:
    """The bundle of these tasks, in `folder`."""
    for entry, rows, _ in tasks:
        path = folder / "eval_data" / entry["dataset_uri"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "core.yaml").write_text(yaml.safe_dump({"icl_tasks": [entry for entry, *_ in tasks]}))
    with open(folder / "eval_meta_data.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            [
                ("Eval Task", "Task Category", "Random baseline", "Description"),
                *((e["label"], "", b, 'commas, "quotes"') for e, _, b in tasks),
            ]
        )
    return folder


def tokenizer() -> Tokenizer:
    return Tokenizer.train(["the cup was too small, and another after all. Which answer is no answer? " * 9], 300)


class Table:
    """Every token's probabilities depend on the one before it alone: sums over a table are an oracle for any text."""

    limit, tokens, shares = 10_000, 4096, False

    def __init__(self, vocab_size: int, seed: int = 0):
        self.table = torch.randn(
            vocab_size, vocab_size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )

    def logits(self, reads: Reads) -> Iterator[torch.Tensor]:
        yield self.table[torch.from_numpy(reads.ids[reads.rows, reads.columns])]

    def nats(self, ids: list[int], start: int) -> float:
        return -sum(self.table[a].log_softmax(-1)[b].item() for a, b in zip(ids[start - 1 :], ids[start:]))

    def greedy(self, ids: list[int], start: int) -> bool:
        return all(self.table[a].argmax() == b for a, b in zip(ids[start - 1 :], ids[start:]))
