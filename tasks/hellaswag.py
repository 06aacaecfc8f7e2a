"""HellaSwag as chat: which of four endings continues a description. https://arxiv.org/abs/1905.07830

The split test is the dataset's validation, because the answers of its test rows are not public.
"""

import re

from tasks.common import Dataset, Example, Letters, RowReader, multiple_choice

SOURCES = {
    "hellaswag": Dataset(
        {"test": "eval_bundle/eval_data/language_understanding/hellaswag.jsonl"},
        "Rowan/hellaswag",
        "",
        "218ec52e09a7e7462a5400043bb9a69a41d06b76",
        {"train": "train", "test": "validation"},
    )
}


class HellaSwag(Letters):
    sources = SOURCES

    def read(self, row: RowReader) -> Example:
        """The hub's rows (activity_label, ctx, endings, label), or the evaluation bundle's (query, choices, gold)."""
        if row.has("query"):
            text, choices, answer = row.get("query", str), row.get("choices", list), row.get("gold", int)
        else:
            text = f"{row.get('activity_label', str)}: {row.get('ctx', str)}"
            choices, answer = row.get("endings", list), row.get("label", str)
            if not answer.isdecimal():
                raise row.refuse(
                    f"the label {answer!r}", "the number of the right ending; the hub's test rows have none"
                )
            answer = int(answer)
        text, *choices = [without_marks(x) if isinstance(x, str) else x for x in (text, *choices)]
        return multiple_choice(row, text, choices, answer, "Choose the most likely way in which this goes on.")


def without_marks(text: str) -> str:
    """Without the marks [header], [title], [step], [substeps] that the web pages behind some rows have left."""
    return re.sub(r" {2,}", " ", re.sub(r"\s*\[(header|title|step|substeps)\]\s*", " ", text)).strip()
