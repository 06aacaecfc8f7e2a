"""HellaSwag: which of four endings continues a description. https://arxiv.org/abs/1905.07830

nanolab/evals/hellaswag.py scores its endings. The split test is the dataset's validation, because the answers of its
test rows are not public.
"""

import re

from nanolab.evals.icl import Question
from tasks.common import Dataset, Letters, RowReader

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

    @staticmethod
    def question(row: RowReader) -> Question:
        """The authors' and the hub's rows (ctx, endings, label), or the evaluation bundle's (query, choices, gold)."""
        if row.has("query"):
            return row.question()
        label = str(row.row.get("label"))
        if not label.isdecimal():
            raise row.refuse(f"the label {label!r}", "the number of the right ending; HellaSwag's test rows have none")
        choice = {"query": row.get("ctx", str), "choices": row.get("endings", list), "gold": int(label)}
        return RowReader(choice, row.where).question()

    def chat(self, row: RowReader, asked: Question) -> tuple[str, Question]:
        """After the activity, which the bundle's contexts begin with."""
        activity = "" if row.has("query") else f"{row.get('activity_label', str)}: "
        text, *choices = map(without_marks, (activity + asked.contexts[0], *asked.answers))
        return "Choose the most likely way in which this goes on.", Question((text,), tuple(choices), asked.gold)


def without_marks(text: str) -> str:
    """Without the marks [header], [title], [step], [substeps] that the web pages behind some rows have left."""
    return re.sub(r" {2,}", " ", re.sub(r"\s*\[(header|title|step|substeps)\]\s*", " ", text)).strip()
