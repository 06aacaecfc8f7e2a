"""MMLU: questions from 57 subjects with four options each. https://arxiv.org/abs/2009.03300

The split train is the dataset's auxiliary_train: questions of other exams, without a subject.
"""

from nanolab.evals.icl import Question
from tasks.common import Dataset, Letters, RowReader

SOURCES = {
    "mmlu": Dataset(
        {"dev": "mmlu/dev.jsonl.gz", "test": "mmlu/test.jsonl.gz"},
        "cais/mmlu",
        "all",
        "c30699e8356da336a370243923dbaf21066bb9fe",
        {"train": "auxiliary_train", "validation": "validation", "dev": "dev", "test": "test"},
    )
}


class MMLU(Letters):
    sources = SOURCES
    splits = ("train", "validation", "dev", "test")

    @staticmethod
    def question(row: RowReader) -> Question:
        return Question((row.get("question", str),), tuple(row.get("choices", list)), row.get("answer", int))

    def chat(self, row: RowReader, asked: Question) -> tuple[str, Question]:
        subject = row.get("subject", str).replace("_", " ")
        return f"Choose the right answer to this question {f'about {subject}' if subject else 'of an exam'}.", asked
