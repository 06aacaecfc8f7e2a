"""Evaluate a chat model: python -m scripts.chat_eval [--model NAME] [--tasks gsm8k,arc-easy] [--data FOLDER]
[--max-problems N].

Options are chosen by the logits of their letters, other replies sampled and graded; of conversations without answers
(jsonl=FILE, smoltalk) the loss is measured. Every number has its n and its 95 % interval. Results go to eval_chat.json
in the run directory, beside those of other tasks, steps and settings (nanolab/evals/record.py)."""

from nanolab.cli import main, parse
from nanolab.evals.config import ChatEvalConfig


def run(cfg: ChatEvalConfig) -> int:
    from nanolab.lab.evaluate_chat import evaluate_chat

    return evaluate_chat(cfg)


if __name__ == "__main__":
    main(lambda: run(parse(ChatEvalConfig)))
