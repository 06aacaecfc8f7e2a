"""The speed of evaluation: the rates are of the examples that are named. No test looks at a speed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from nanolab.cli import UserError
from nanolab.data.tokenizer import Tokenizer
from nanolab.evals.likelihood import Text
from nanolab.lab import bench, bench_eval
from nanolab.lab.bench_eval import SHAPES, synthetic
from nanolab.lab.config import BenchConfig
from nanolab.runtime import start

CFG = BenchConfig(
    what="eval",
    depth=1,
    aspect_ratio=32,
    head_dim=32,
    max_seq_len=128,
    vocab_size=270,
    max_per_task=2,
    repeats=2,
    device_type="cpu",
)
OF_TYPE = {"multiple_choice": 7, "schema": 1, "language_modeling": 4}  # tasks in SHAPES


def test_examples_have_the_shapes_of_the_tasks():
    found, shapes = synthetic(replace(CFG, max_per_task=30), 270), list(SHAPES.values())
    assert len(found) == 30 * len(shapes)
    for i, (kind, group) in enumerate(found):
        shape = shapes[i // 30]
        assert kind == shape.kind and len(group) == shape.texts
        assert len({text.start for text in group}) == 1
        assert 3 / 4 * shape.context - 1 <= group[0].start <= 5 / 4 * shape.context
        assert all(1 <= len(text.ids) - text.start < 2 * shape.tail for text in group)
        starts, tails = {tuple(t.ids[: t.start]) for t in group}, {tuple(t.ids[t.start :]) for t in group}
        assert len(starts if kind == "schema" else tails) >= min(2, shape.texts) or shape.tail == 1
        assert len(tails if kind == "schema" else starts) == 1
    assert synthetic(CFG, 270) == synthetic(CFG, 270)


def test_rates_are_examples_over_the_clock(monkeypatch):
    """The real score, under a clock that counts the places whose logits the model has given."""
    clock, calls = [0], []
    logits, score = bench_eval.GPTReader.logits, bench_eval.score

    def counted(reader, reads):
        for part in logits(reader, reads):
            clock[0] += len(part)
            yield part

    def called(reader, groups):
        before = clock[0]
        if len(calls) < 3:
            clock[0] += 10**9  # the first round, which does not count
        scores = score(reader, groups)
        calls.append((groups, scores, clock[0] - before))

    monkeypatch.setattr(bench_eval.GPTReader, "logits", counted)
    monkeypatch.setattr(bench_eval, "score", called)
    monkeypatch.setattr(bench.time, "perf_counter", lambda: float(clock[0]))
    document = bench_eval.examples(CFG, start("cpu", "float32"))
    results = document["results"]
    assert set(results) == {"score", *(f"score_{kind}" for kind in OF_TYPE)} and document["examples"] == {
        kind: 2 * n for kind, n in OF_TYPE.items()
    }
    kinds, rounds = list(document["examples"]), [calls[i : i + 3] for i in (3, 6)]
    assert len(calls) == 9 and all(ticks > len(groups) for groups, _, ticks in calls)
    for i, kind in enumerate(kinds):
        assert results[f"score_{kind}"]["samples"] == pytest.approx(
            [len(one[i][0]) / one[i][2] for one in rounds], rel=1e-3
        )
    assert results["score"]["samples"] == pytest.approx(
        [24 / sum(ticks for *_, ticks in one) for one in rounds], rel=1e-3
    )

    texts = [pair for groups, scores, _ in rounds[0] for pair in zip(sum(groups, []), sum(scores, []))]
    assert document["texts"] == len(texts) and document["cut"] == sum(s.cut > 0 for _, s in texts) > 0, (
        "by what scoring itself has cut"
    )
    assert document["tokens"] == sum(len(text.ids) - s.cut for text, s in texts)
    assert document["n"] == 2 and document["dtype"] == "float32" and document["kernel"]


@pytest.fixture
def bundle(tmp_path) -> Path:
    (tmp_path / "eval_data").mkdir()
    rows = [{"query": f"which {i}", "choices": ["yes", "no"], "gold": i % 2} for i in range(6)]
    (tmp_path / "eval_data" / "mc.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "eval_data" / "lm.jsonl").write_text(
        "\n".join(json.dumps({"context": f"one {i}", "continuation": "two"}) for i in range(6))
    )
    tasks = [("mc", "multiple_choice", 3), ("lm", "language_modeling", 0)]
    entries = [
        {"label": name, "icl_task_type": kind, "dataset_uri": f"{name}.jsonl", "num_fewshot": [k]}
        for name, kind, k in tasks
    ]
    (tmp_path / "core.yaml").write_text(json.dumps({"icl_tasks": entries}))  # JSON is YAML
    (tmp_path / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nmc,50\nlm,0\n")
    return tmp_path


def test_a_bundle_is_encoded_and_its_items_scored(bundle, monkeypatch, capsys):
    entries = json.loads((bundle / "core.yaml").read_text())["icl_tasks"]
    (bundle / "core.yaml").write_text(json.dumps({"icl_tasks": [*entries, {"label": "broken"}]}))
    tokenizer = Tokenizer.train(["which one two yes no " * 20], 270)
    model = bench_eval.the_model(CFG, start("cpu", "float32"))[0]
    monkeypatch.setattr(bench_eval, "the_model", lambda cfg, runtime: (model, tokenizer))
    seen: dict[int, list[list[Text]]] = {}
    original = bench_eval.score
    monkeypatch.setattr(
        bench_eval, "score", lambda reader, groups: (seen.setdefault(len(groups), groups), original(reader, groups))[1]
    )
    document = bench_eval.examples(replace(CFG, eval_bundle=str(bundle), model="any"), start("cpu", "float32"))
    # of mc as many as three solved ones and one need
    assert document["examples"] == {"multiple_choice": 4, "language_modeling": 2}
    assert set(document["results"]) == {"encode", "score", "score_multiple_choice", "score_language_modeling"}
    asked = tokenizer.decode(seen[4][0][0].ids[1:])
    assert "without broken: icl_task_type is None" in capsys.readouterr().out
    assert (
        asked.count("which") == 4
        and asked.endswith(" yes")
        and tokenizer.decode(seen[2][0][0].ids[1:]).endswith(" two")
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_per_task": 0}, "try --max-per-task 20"),
        ({"eval_bundle": "somewhere"}, "add --model NAME"),
        ({"eval_bundle": "nowhere", "model": "x"}, "no model 'x'"),
    ],
)
def test_mistakes_are_named(changes, said):
    with pytest.raises(UserError, match=said):
        bench_eval.examples(replace(CFG, **changes), start("cpu", "float32"))
