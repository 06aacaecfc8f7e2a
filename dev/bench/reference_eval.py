"""In-context tasks beside the reference's: python dev/bench/reference_eval.py --reference CHECKOUT --model NAME
--eval-bundle DIR [flags]

CHECKOUT is a checkout of karpathy/nanochat, whose model and core_eval are imported; nothing is copied. It gets the
weights of NAME, a run whose architecture is its own, the run's tokenizer and the bundle's items in our order. Its model
has no max_seq_len and reads long texts whole; here it is given one, the run's sequence length, so that it cuts texts as
we do: "same decisions" is about a reference changed in this. It computes in fp32 on CPUs unless NANOCHAT_DTYPE says
otherwise, nanolab in its default dtype unless NANOLAB_DTYPE does. Freed memory is kept as nanolab keeps it. Measured:
  decisions  right or wrong, item by item. Where the two differ, the gap says how near to a tie the item is, from fp64:
  between the
             mean nats of the true text and of the best other one, or in logits between the tokens and the best others
  examples   examples/s of each task, with rendering and encoding, alternating in pairs of whole tasks
The last line of stdout is one JSON document.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from reference_infer import reference

from nanolab import runtime
from nanolab.data.tokenizer import Tokenizer
from nanolab.evals import icl
from nanolab.evals.bundle import SHUFFLE_SEED, TaskSpec, open_bundle, read_items, read_rows
from nanolab.evals.likelihood import GPTReader, judge_groups, score
from nanolab.inference.prepare import prepare_for_inference
from nanolab.model.gpt import GPT
from nanolab.records.environment import environment
from nanolab.records.models import load_model


class TheirTokenizer:
    """What core_eval asks of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, texts: list[str], prepend: int) -> list[list[int]]:
        return [[prepend, *ids] for ids in self.tokenizer.encode_batch(texts)]

    def get_bos_token_id(self) -> int:
        return self.tokenizer.bos


class Ours:
    """Our evaluation of a task: "1" for each right item, "0" for each wrong one."""

    def __init__(self, reader: GPTReader, tokenizer: Tokenizer, rt: runtime.Runtime):
        self.reader, self.tokenizer, self.rt = reader, tokenizer, rt

    def groups(self, task: TaskSpec, items: list[icl.Question]) -> list[icl.ItemGroup]:
        return list(icl.encode_groups(task.kind, items, range(len(items)), task.shots, task.delimiter, self.tokenizer))

    def outcomes(self, task: TaskSpec, items: list[icl.Question]) -> str:
        right = icl.KINDS[task.kind].right
        found = judge_groups(
            self.reader, self.groups(task, items), self.rt, lambda scores, group: right(scores, group.gold)
        )
        return "".join(str(int(ok)) for ok in found)


class Theirs:
    """The reference's evaluation of a task."""

    def __init__(self, checkout: Path, weights: GPT, tokenizer: Tokenizer, device: torch.device):
        self.model, _, self.dtype = reference(checkout, weights)
        self.model.max_seq_len = weights.config.sequence_len
        self.tokenizer, self.device = TheirTokenizer(tokenizer), device

    def rows(self, task: TaskSpec, n: int) -> list[dict[str, Any]]:
        rows = [row for _, row in read_rows(task.path)]
        random.Random(SHUFFLE_SEED).shuffle(rows)
        return rows[:n]

    def outcomes(self, task: TaskSpec, rows: list[dict[str, Any]]) -> str:
        from nanochat.core_eval import evaluate_example

        about = {"task_type": task.kind, "num_fewshot": task.shots, "continuation_delimiter": task.delimiter}
        return "".join(
            str(int(evaluate_example(i, self.model, self.tokenizer, rows, self.device, about)))
            for i in range(len(rows))
        )


@torch.no_grad()
def gap(model: GPT, reader: GPTReader, task: TaskSpec, group: icl.ItemGroup) -> float:
    """How far the decision is from a tie; below 0 where it is wrong."""
    if task.kind != "language_modeling":
        means = [s.nats / s.n_tokens for s in score(reader, [group.texts()])[0]]
        return min(mean for i, mean in enumerate(means) if i != group.gold) - means[group.gold]
    (text,) = group.texts()
    cut = max(0, len(text.ids) - reader.limit)
    ids = torch.tensor(text.ids[cut:], device=reader.device)
    logits, targets = model(ids[None])[0, text.start - cut - 1 : -1], ids[text.start - cut :, None]
    of_tokens = logits.gather(1, targets)[:, 0].clone()
    return (of_tokens - logits.scatter(1, targets, -torch.inf).amax(1)).min().item()


def seconds(work: Callable[[], str]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def spread(ratios: list[float]) -> dict[str, Any]:
    each = [round(ratio, 3) for ratio in ratios]
    return {"median": round(statistics.median(ratios), 3), "lowest": min(each), "highest": max(each), "each": each}


def compare(
    ours: Ours,
    theirs: Theirs,
    exact: GPT,
    tasks: dict[str, TaskSpec],
    items: dict[str, list[icl.Question]],
    rows: dict[str, list],
) -> dict[str, Any]:
    """Every decision of both, and how near to a tie those are on which they differ."""
    differ, n, right = [], 0, {}
    reader = GPTReader(exact, ours.rt)
    for label, task in tasks.items():
        both = ours.outcomes(task, items[label]), theirs.outcomes(task, rows[label])
        n += len(both[0])
        right[label] = {"n": len(both[0]), "nanolab": both[0].count("1"), "reference": both[1].count("1")}
        print(
            f"{label:34s} right: {right[label]['nanolab']} for nanolab, {right[label]['reference']} for the reference,"
            f" of {len(both[0])}",
            flush=True,
        )
        groups = ours.groups(task, items[label])
        for i in [i for i, (a, b) in enumerate(zip(*both, strict=True)) if a != b]:
            differ.append(
                {
                    "task": label,
                    "item": i,
                    "nanolab": int(both[0][i]),
                    "reference": int(both[1][i]),
                    "gap": gap(exact, reader, task, groups[i]),
                }
            )
            print(f"  differs: {differ[-1]}", flush=True)
    print(
        f"decisions: {len(differ)} of {n} differ, the farthest from a tie by"
        f" {max((abs(d['gap']) for d in differ), default=0):.2g}"
    )
    return {"n": n, "differ": differ, "right": right}


def race(sides: dict[str, Callable[[str], str]], counts: dict[str, int], pairs: int) -> dict[str, Any]:
    """Seconds of each task by side and pair; ratios of examples/s, of each task and of all together."""
    spent: dict[str, dict[str, list[float]]] = {name: {label: [] for label in counts} for name in sides}
    for i in range(pairs):
        for label in counts:
            for name in list(sides)[:: 1 if i % 2 == 0 else -1]:
                spent[name][label].append(seconds(lambda: sides[name](label)))
        total = {name: sum(of[label][-1] for label in counts) for name, of in spent.items()}
        print(
            f"pair {i + 1} of {pairs}, seconds: {', '.join(f'{name} {t:.1f}' for name, t in total.items())}", flush=True
        )
    ours, theirs = spent["nanolab"], spent["reference"]
    ratios = {label: spread([b / a for a, b in zip(ours[label], theirs[label])]) for label in counts}
    each = [sum(theirs[label][i] for label in counts) / sum(ours[label][i] for label in counts) for i in range(pairs)]
    for label, ratio in {**ratios, "all": spread(each)}.items():
        print(
            f"{label:34s} {ratio['median']:6.2f} times the reference's examples/s, {ratio['lowest']} to"
            f" {ratio['highest']}"
        )
    return {"seconds": spent, "ratios": ratios, "all": spread(each)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, required=True, help="a checkout of karpathy/nanochat")
    parser.add_argument("--model", required=True, help="NAME[@STEP|best]")
    parser.add_argument("--eval-bundle", type=Path, required=True)
    parser.add_argument(
        "--max-per-task", type=int, default=20, help="items of each task; more than 10, of which some are shown solved"
    )
    parser.add_argument("--pairs", type=int, default=3, help="times that both do every task; 0: only the decisions")
    parser.add_argument("--tasks", default="", help="labels joined by commas; default: all")
    parser.add_argument("--device-type", default="")
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()

    rt = runtime.start(args.device_type, threads=args.threads)
    model, tokenizer, _ = load_model(args.model, rt)
    exact = GPT(model.config, torch.float64)
    exact.load_state_dict(model.state_dict())
    theirs = Theirs(args.reference, model, tokenizer, rt.device)
    ours = Ours(GPTReader(prepare_for_inference(model), rt), tokenizer, rt)
    tasks = {
        label: task
        for label, task in open_bundle(args.eval_bundle).tasks.items()
        if not args.tasks or label in args.tasks.split(",")
    }
    items = {label: read_items(task, args.max_per_task) for label, task in tasks.items()}
    rows = {label: theirs.rows(task, len(items[label])) for label, task in tasks.items()}

    document = {
        "bench": "reference_eval",
        "dtypes": {"nanolab": rt.dtype_name, "reference": str(theirs.dtype).removeprefix("torch.")},
        "max_per_task": args.max_per_task,
        "decisions": compare(ours, theirs, exact.double().to(rt.device).eval(), tasks, items, rows),
    }
    if args.pairs:
        sides = {
            "nanolab": lambda label: ours.outcomes(tasks[label], items[label]),
            "reference": lambda label: theirs.outcomes(tasks[label], rows[label]),
        }
        document["examples"] = race(sides, {label: len(of) for label, of in items.items()}, args.pairs)
    print(json.dumps(document | {"env": environment(rt)}))


if __name__ == "__main__":
    main()
