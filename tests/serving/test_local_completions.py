"""lm-evaluation-harness' own local-completions, unchanged, against the real server; and our adapter on the same run and
the same task.
"""

import json
import sys

import pytest
import torch

from nanolab.interop.export import export
from nanolab.records.models import find_model

lm_eval = pytest.importorskip("lm_eval")
from lm_eval.tasks import TaskManager  # noqa: E402

from nanolab.interop.lm_eval import Nanolab  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.fault("S5")]


@pytest.fixture(scope="module")
def folder(runs, tmp_path_factory, transformers_python):
    """The chat model as scripts.export_hf writes it: the harness reads its tokenizer."""
    out = tmp_path_factory.mktemp("exported") / "parrot"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOLAB_BASE_DIR", str(runs))
        patch.setattr(sys, "executable", str(transformers_python))
        export(find_model("parrot"), out, lambda *about: "no card", "fp32", False)
    return out


@pytest.fixture(scope="module")
def manager(tmp_path_factory) -> TaskManager:
    """Tasks over a file of our own: choices after a question, whole texts, text to write."""
    out = tmp_path_factory.mktemp("tasks")
    words = "the cat sat on mat é 🙂 12 hi say".split()
    rows = [
        {"q": " ".join(words[s : s + 4]), "choices": ["the cat", "é 🙂", "12", "é 🙂 hello"], "gold": s % 4}
        for s in range(6)
    ]
    rows += [{"q": "", "choices": ["a", "b", "c", "d"], "gold": 0}]  # nothing before the choices
    (out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = (
        f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {out / 'rows.jsonl'}\n  cache_dir:"
        f" {out / 'cache'}\ntest_split: test\n"
    )
    metric = "metric_list:\n  - metric: {}\n    aggregation: {}\n    higher_is_better: true\n"
    choose = 'output_type: multiple_choice\ndoc_to_text: "{{q}}"\ndoc_to_target: gold\ndoc_to_choice: choices\n'
    (out / "choose.yaml").write_text(f"task: toy_choose\n{choose}{data}{metric.format('acc', 'mean')}")
    written = (
        'output_type: generate_until\ndoc_to_text: "{{choices[3]}}"\ndoc_to_target: "x"\ngeneration_kwargs:\n  until:'
        ' ["ll"]\n  max_gen_toks: 8\n'
    )
    (out / "write.yaml").write_text(f"task: toy_write\n{written}{data}{metric.format('exact_match', 'mean')}")
    return TaskManager(include_path=str(out), include_defaults=False)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # what pip lists, each time


def answers(lm, manager, task: str, **settings) -> list:
    results = lm_eval.simple_evaluate(lm, tasks=[task], task_manager=manager, bootstrap_iters=0, **settings)
    (samples,) = results["samples"].values()
    return [sample["filtered_resps"] for sample in sorted(samples, key=lambda s: s["doc_id"])]


def ours(runs, **arguments) -> Nanolab:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOLAB_BASE_DIR", str(runs))
        return Nanolab("parrot", device="cpu", dtype="float32", **arguments)


@pytest.mark.parametrize(
    "adapter, settings",
    [
        ({"add_bos_token": False}, {}),  # both begin with nothing; the harness sends lists of ids, one at a time
        ({"add_bos_token": False}, {"batch_size": 3}),
        ({"add_bos_token": False}, {"num_concurrent": 2}),
        ({}, {"tokenized_requests": False, "batch_size": 2}),  # texts, which the server begins as our adapter does
    ],
    ids=str,
)
def test_loglikelihoods_are_our_adapters(live, runs, folder, manager, adapter, settings):
    arguments = {
        "model": "parrot",
        "base_url": f"{live.url}/v1/completions",
        "tokenizer": str(folder),
        "max_length": 128,
    } | settings
    batch = {"batch_size": arguments.pop("batch_size", 1)}
    # as a text the token before an empty context is a name like any other
    items = 6 if "tokenized_requests" in settings else 7
    theirs = answers("local-completions", manager, "toy_choose", model_args=arguments, limit=items, **batch)
    mine = answers(ours(runs, **adapter), manager, "toy_choose", limit=items)
    assert len(theirs) == len(mine) == items
    nats = [torch.tensor([[float(nats) for nats, _ in item] for item in found]) for found in (theirs, mine)]
    torch.testing.assert_close(*nats, atol=1e-3, rtol=0)
    assert [[greedy for _, greedy in item] for item in theirs] == [[greedy for _, greedy in item] for item in mine]
    assert nats[0].std() > 1


@pytest.mark.parametrize(
    "settings", [{}, {"tokenizer_backend": None, "tokenized_requests": False}, {"batch_size": 3}], ids=str
)
def test_generated_texts_are_our_adapters(live, runs, folder, manager, settings):
    arguments = {
        "model": "parrot",
        "base_url": f"{live.url}/v1/completions",
        "tokenizer": str(folder),
        "max_length": 128,
    } | settings
    batch = {"batch_size": arguments.pop("batch_size", 1)}
    theirs = answers("local-completions", manager, "toy_write", model_args=arguments, **batch)
    assert theirs == answers(ours(runs, add_bos_token="tokenizer_backend" in settings), manager, "toy_write")
