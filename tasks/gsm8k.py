"""GSM8K: grade-school word problems, solved step by step with the calculator. https://arxiv.org/abs/2110.14168

The dataset marks each calculation as <<48/2=24>>; here that is a call of the tool and its output. The answer follows
"####"."""

import re

from nanolab.data.chat import parts_of, text_of
from nanolab.data.turn import Part
from tasks.common import Content, Dataset, Example, Published, RowReader
from tasks.numbers import NUMBER, marked_number, same_number, to_number

SOURCES = {
    "gsm8k": Dataset(
        {"train": "gsm8k/train.jsonl", "test": "gsm8k/test.jsonl"},
        "openai/gsm8k",
        "main",
        "e53f048856ff4f594e959d75785d2c2d37b678ee",
        {"train": "train", "test": "test"},
    )
}
CALCULATION = re.compile(r"<<([^<>]*)=([^<>=]*)>>")


class GSM8K(Published):
    sources = SOURCES
    kind = "generate"
    measures = "flexible extract: without #### the last number"

    def read(self, row: RowReader) -> Example:
        question, solution = row.get("question", str), row.get("answer", str)
        answer = to_number(solution.rpartition("####")[2])
        if "####" not in solution or answer is None:
            raise row.refuse(f"the answer ends in {solution[-40:]!r}", "'#### ' and a number at its end")
        return Example(
            [{"role": "user", "content": question}, {"role": "assistant", "content": with_calls(solution)}], answer
        )

    def correct(self, example: Example, content: Content) -> bool:
        """The number after the last "####", or without one the last number of the text; compared as numbers."""
        return same_number(example.answer, content)

    def strict(self, example: Example, content: Content) -> bool:
        """The number after the last "####" alone, as the paper and karpathy/nanochat grade."""
        found = marked_number(text_of(content))
        return found is not None and found == example.answer

    def rewards(self, example: Example, content: Content) -> dict[str, float]:
        """correct; format: the reply ends with a line "#### number"."""
        last = text_of(content).strip().split("\n")[-1]
        return {
            "correct": float(self.correct(example, content)),
            "format": float(last.startswith("####") and NUMBER.search(last) is not None),
        }


def with_calls(solution: str) -> list[Part]:
    """`solution` with each <<expression=result>> as a call of the calculator and its output."""
    parts, end = [], 0
    for mark in CALCULATION.finditer(solution):
        parts.append({"type": "text", "text": solution[end : mark.start()]})
        parts += [{"type": "python", "text": mark[1]}, {"type": "python_output", "text": mark[2]}]
        end = mark.end()
    return parts_of([*parts, {"type": "text", "text": solution[end:]}])
