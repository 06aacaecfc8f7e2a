"""Speed of in-context evaluation: examples per second of each type of task, scored as `evals.likelihood` scores them.

Without a bundle the items are random tokens in the shapes of CORE's tasks, so that no data is needed. Dims: T tokens
that the model reads."""

import random
from typing import Any, NamedTuple

from nanolab.cli import UserError
from nanolab.data.tokenizer import Tokenizer
from nanolab.evals import bundle, icl
from nanolab.evals.likelihood import GPTReader, score
from nanolab.inference.prepare import prepare_for_inference
from nanolab.lab.bench import measured, seconds
from nanolab.lab.bench_infer import the_model
from nanolab.lab.config import BenchConfig
from nanolab.records.environment import kernel_text
from nanolab.runtime import Runtime, print0

Group = list[icl.Text]  # the texts of one example


class Shape(NamedTuple):
    kind: str
    context: int  # tokens before the scored ones, solved items included
    texts: int
    tail: int  # scored tokens


# Medians of 60 items of each task, with a tokenizer of 8192 tokens
SHAPES = {
    "hellaswag_zeroshot": Shape("multiple_choice", 64, 4, 39),
    "copa": Shape("multiple_choice", 12, 2, 6),
    "arc_easy": Shape("multiple_choice", 442, 4, 5),
    "piqa": Shape("multiple_choice", 510, 2, 13),
    "commonsense_qa": Shape("multiple_choice", 551, 4, 1),
    "hellaswag": Shape("multiple_choice", 1016, 4, 39),
    "boolq": Shape("multiple_choice", 2111, 2, 1),
    "winograd": Shape("schema", 18, 2, 6),
    "lambada_openai": Shape("language_modeling", 85, 1, 2),
    "bigbench_qa_wikidata": Shape("language_modeling", 140, 1, 1),
    "jeopardy": Shape("language_modeling", 424, 1, 4),
    "bigbench_dyck": Shape("language_modeling", 546, 1, 3),
}


def examples(cfg: BenchConfig, runtime: Runtime) -> dict[str, Any]:
    """Examples/s of each type of task and of all, --max-per-task of each task; also with which lengths, and how many
    texts lost tokens.

    score: from tokens to results, each type of task at once. encode, with a bundle: from rows to tokens. The first
    round does not count."""
    if cfg.max_per_task < 1:
        raise UserError(f"--max-per-task {cfg.max_per_task}; expected at least 1; try --max-per-task 20")
    if cfg.eval_bundle and not cfg.model:
        raise UserError(
            f"--eval-bundle {cfg.eval_bundle} without --model; expected a model whose tokenizer encodes its texts; add"
            " --model NAME"
        )
    model, tokenizer = the_model(cfg, runtime)
    kernel = kernel_text(model.kernel_names(runtime.device.type))
    reader, results = GPTReader(prepare_for_inference(model), runtime), {}
    tasks = encoded(cfg, runtime, tokenizer, results) if cfg.eval_bundle else synthetic(cfg, model.config.vocab_size)
    kinds = {kind: [group for of, group in tasks if of == kind] for kind in icl.KINDS}
    times: dict[str, list[float]] = {kind: [] for kind, groups in kinds.items() if groups}
    for i in range(1 + cfg.repeats):
        for kind, samples in times.items():
            took = seconds(lambda: score(reader, kinds[kind]), runtime)
            samples += [took] if i else []
    for kind, samples in times.items():
        results[f"score_{kind}"] = measured([len(kinds[kind]) / took for took in samples], "examples/s")
    results["score"] = measured([len(tasks) / sum(took) for took in zip(*times.values())], "examples/s")
    lengths = [len(text.ids) for _, group in tasks for text in group]
    counts = {
        "examples": {kind: len(kinds[kind]) for kind in times},
        "texts": len(lengths),
        "tokens": sum(min(n, reader.limit) for n in lengths),
        "cut": sum(n > reader.limit for n in lengths),
    }
    return {"kernel": kernel, "dtype": runtime.dtype_name, "n": cfg.repeats, **counts, "results": results}


def synthetic(cfg: BenchConfig, vocab_size: int) -> list[tuple[str, Group]]:
    """(type, texts) of examples whose contexts are from 3/4 to 5/4 of what SHAPES says, and tails up to twice."""
    rng = random.Random(cfg.seed)

    def ids(n: int) -> list[int]:
        return rng.choices(range(vocab_size), k=n)

    found = []
    for kind, context, texts, tail in SHAPES.values():
        for _ in range(cfg.max_per_task):
            start = rng.randint(context * 3 // 4, context * 5 // 4)
            if kind == "schema":  # contexts differ in their middle, the tail is one
                before, behind, end = ids(start // 2), ids(start - start // 2 - 1), ids(rng.randint(1, 2 * tail - 1))
                group = [icl.Text([*before, *ids(1), *behind, *end], start) for _ in range(texts)]
            else:
                before = ids(start)
                group = [icl.Text(before + ids(rng.randint(1, 2 * tail - 1)), start) for _ in range(texts)]
            found.append((kind, group))
    return found


def encoded(
    cfg: BenchConfig, runtime: Runtime, tokenizer: Tokenizer, results: dict[str, Any]
) -> list[tuple[str, Group]]:
    """(type, texts) of the examples of --eval-bundle."""
    found = bundle.open_bundle(cfg.eval_bundle)
    for label, why in found.broken.items():
        print0(f"without {label}: {why}")
    tasks = found.tasks.values()
    items = {task.label: bundle.read_items(task, max(cfg.max_per_task, task.shots + 1)) for task in tasks}

    def work() -> list[tuple[str, Group]]:
        groups = (
            (
                task,
                icl.encode_groups(
                    task.kind, items[task.label], range(len(items[task.label])), task.shots, task.delimiter, tokenizer
                ),
            )
            for task in tasks
        )
        return [(task.kind, group.texts()) for task, of_task in groups for group in of_task]

    n = sum(map(len, items.values()))
    results["encode"] = measured([n / seconds(work, runtime) for _ in range(cfg.repeats)], "examples/s")
    return work()
