"""ARC, easy and challenge: grade-school science questions with three to five options.
https://arxiv.org/abs/1803.05457
"""

from nanolab.evals.icl import Question
from tasks.common import Dataset, Letters, RowReader

REPO, REVISION = "allenai/ai2_arc", "210d026faf9955653af8916fad021475a3f00453"
HUB = {"train": "train", "validation": "validation", "test": "test"}
FOLDER = "eval_bundle/eval_data/world_knowledge"
SOURCES = {
    "arc-easy": Dataset({"test": f"{FOLDER}/arc_easy.jsonl"}, REPO, "ARC-Easy", REVISION, HUB),
    "arc-challenge": Dataset({"test": f"{FOLDER}/arc_challenge.jsonl"}, REPO, "ARC-Challenge", REVISION, HUB),
}


class Arc(Letters):
    sources = SOURCES
    splits = ("train", "validation", "test")

    @staticmethod
    def question(row: RowReader) -> Question:
        """The hub's rows (question, choices with labels, answerKey) or the bundle's (query, choices, gold)."""
        if row.has("query"):
            return row.question()
        options = RowReader(row.get("choices", dict), row.where)
        question, choices, labels = row.get("question", str), options.get("text", list), options.get("label", list)
        key = row.get("answerKey", str)
        if key not in labels:
            raise row.refuse(f"the answer {key!r} is not among the labels {labels}", "one of them")
        return Question((question,), tuple(choices), labels.index(key))

    def chat(self, row: RowReader, asked: Question) -> tuple[str, Question]:
        context = asked.contexts[0].removeprefix("Question:")
        return "Choose the right answer to this science question.", asked._replace(contexts=(context,))
