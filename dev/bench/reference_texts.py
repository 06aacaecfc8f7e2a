"""Texts, tokens and starts of in-context items beside the reference's: python dev/bench/reference_texts.py --reference
CHECKOUT --eval-bundle DIR --tokenizer DIR

A check by hand. CHECKOUT is a checkout of karpathy/nanochat, whose core_eval is imported; nothing is copied. Of every
task in the bundle 30 items are rendered and encoded by both. What the tests compare with is the hash of its output on a
tiny bundle (tests/evals/test_icl.py, GOLDEN). The last line of stdout is one JSON document; the exit code is 1 if a
text differs."""

import argparse
import importlib.util
import json
import random
import sys
from pathlib import Path

from nanolab.data.tokenizer import Tokenizer
from nanolab.evals.bundle import SHUFFLE_SEED, open_bundle, read_items
from nanolab.evals.icl import encode_groups

SHORT = {"multiple_choice": "mc", "schema": "schema", "language_modeling": "lm"}


class Encode:
    """Our tokenizer, called as the reference calls its own."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    def get_bos_token_id(self) -> int:
        return self.tokenizer.bos

    def __call__(self, texts: list[str], prepend: int) -> list[list[int]]:
        return [[prepend, *self.tokenizer.encode(text)] for text in texts]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--reference", "--eval-bundle", "--tokenizer"):
        parser.add_argument(name, required=True, type=Path)
    args = parser.parse_args()
    spec = importlib.util.spec_from_file_location("reference_core_eval", args.reference / "nanochat" / "core_eval.py")
    spec.loader.exec_module(reference := importlib.util.module_from_spec(spec))
    tokenizer, counts = Tokenizer.load(args.tokenizer), {}
    for task in open_bundle(args.eval_bundle).tasks.values():
        rows = [json.loads(line) for line in task.path.read_text().splitlines()]
        random.Random(SHUFFLE_SEED).shuffle(rows)
        items = read_items(task, 30)
        rows, differ = rows[: len(items)], 0
        for group in encode_groups(task.kind, items, range(len(items)), task.shots, task.delimiter, tokenizer):
            solved = [j for j in range(len(rows)) if j != group.index]
            few = [rows[j] for j in random.Random(1234 + group.index).sample(solved, task.shots)]
            texts = getattr(reference, f"render_prompts_{SHORT[task.kind]}")(rows[group.index], task.delimiter, few)
            ids, starts, _ = getattr(reference, f"batch_sequences_{SHORT[task.kind]}")(Encode(tokenizer), texts)
            differ += [(list(t.ids), t.start) for t in group.texts()] != list(zip(ids, starts))
        counts[task.label] = differ
        print(f"{task.label}: {differ} of {len(items)} items differ")
    print(json.dumps({"differ": counts}))
    return int(any(counts.values()))


if __name__ == "__main__":
    sys.exit(main())
