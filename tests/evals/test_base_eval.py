"""base_eval on a model that knows nothing, whose bits per byte can be computed by hand."""

import bz2
import csv
import functools
import gzip
import importlib.util
import json
import lzma
import math
import random
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from nanolab.cli import UserError, to_json
from nanolab.data.config import DataConfig
from nanolab.data.corpus import open_data
from nanolab.data.tokenizer import Tokenizer
from nanolab.evals import compressors, core
from nanolab.evals.bpb import bits_per_byte
from nanolab.evals.checkpoints import follow
from nanolab.evals.config import BaseEvalConfig
from nanolab.evals.probes import PROBES
from nanolab.model.config import GPTConfig
from nanolab.model.gpt import GPT
from nanolab.records import checkpoint
from nanolab.records.models import ModelRef
from nanolab.runtime import Runtime
from nanolab.stages.config import BaseTrainConfig
from scripts.base_eval import run

loader = importlib.util.spec_from_file_location("nanolab_tests_tiny_bundle", Path(__file__).with_name("tiny_bundle.py"))
tiny = sys.modules[loader.name] = importlib.util.module_from_spec(loader)
loader.loader.exec_module(tiny)

RUNTIME = Runtime(torch.device("cpu"), torch.float32)


@pytest.fixture
def world(base_dir, tmp_path, monkeypatch) -> tuple[Path, Tokenizer, Path]:
    """(run directory, tokenizer, folder of text) of a finished run whose model finds every token equally likely."""
    monkeypatch.setenv("NANOLAB_DTYPE", "float32")
    rng = random.Random(0)
    words = "wörter and some more words that make up documents of text, nothing else".split()
    text = tmp_path / "text"
    text.mkdir()
    lines = [json.dumps({"text": " ".join(rng.choices(words, k=rng.randint(5, 120)))}) for _ in range(300)]
    (text / "a.jsonl").write_text("\n".join(lines))
    tokenizer = Tokenizer.train([" ".join(words)] * 3, 290)
    model = GPT(GPTConfig(sequence_len=64, vocab_size=tokenizer.vocab_size, n_layer=1, n_head=2, n_embd=32))
    model.init_weights(0)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    run_dir = base_dir / "runs" / "even"
    meta = {"model_config": to_json(model.config), "tokenizer_hash": tokenizer.hash, "tokens": 7000}
    checkpoint.save(
        run_dir / "checkpoints", 7, weights=dict(model.state_dict()), optimizer=None, meta=meta, runtime=RUNTIME
    )
    tokenizer.save(run_dir / "tokenizer")
    (run_dir / "config.json").write_text(json.dumps(to_json(BaseTrainConfig(data_dir=str(text)))))
    (run_dir / "result.json").write_text("{}")
    return run_dir, tokenizer, text


def config(**flags) -> BaseEvalConfig:
    return BaseEvalConfig(device_type="cpu", **flags)


@pytest.mark.parametrize("split_tokens", [-1, 500])
def test_bits_per_byte_and_compressors_are_of_the_runs_own_text(world, split_tokens, capsys):
    run_dir, tokenizer, text = world
    run(config(modes="bpb", split_tokens=split_tokens, json=True))
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads((run_dir / "eval_base.json").read_text())
    assert (result["model"], result["step"], result["data"]) == ("even", 7, str(text))
    data = open_data(DataConfig(data_dir=str(text)))
    for split, documents in (("val", data.val), ("train", data.train[0][0])):
        ids = [i for document in documents.iterate() for i in tokenizer.encode(document)]
        ids = ids[:split_tokens] if split_tokens > 0 else ids
        content = tokenizer.decode_bytes(ids)
        assert (result[split]["tokens"], result[split]["bytes"]) == (len(ids), len(content))
        assert result[split]["bpb"] == pytest.approx(
            len(ids) * math.log2(tokenizer.vocab_size) / len(content), rel=1e-6
        )
        if split == "val":
            sizes = {"gzip -9": len(gzip.compress(content, 9)), "bz2 -9": len(bz2.compress(content, 9))}
            sizes["xz -9e"] = len(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME))
            assert result["compressors"] == pytest.approx({k: 8 * n / len(content) for k, n in sizes.items()})
            assert result["compressor_bytes"] == len(content)


@pytest.mark.fault("core likely: Idle GPUs in base_eval")
def test_compressors_read_a_bounded_part_and_say_how_much(world, monkeypatch, capsys):
    """8 MB is seconds of xz -9e. The bound is checked by counting what they are given."""
    run_dir, _, text = world
    assert compressors.AT_MOST == 8_000_000
    monkeypatch.setattr("nanolab.lab.evaluate_text.AT_MOST", 1000)
    given = []
    monkeypatch.setattr(compressors, "COMPRESSORS", {"none": lambda data: given.append(data) or data})
    run(config(modes="bpb"))
    result = json.loads((run_dir / "eval_base.json").read_text())
    whole = b"".join(document.encode() for document in open_data(DataConfig(data_dir=str(text))).val.iterate())
    assert (
        given == [whole[:1000]]
        and result["compressors"] == {"none": 8.0}
        and result["compressor_bytes"] == 1000 < result["val"]["bytes"]
    )
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  none "))
    assert "8.0000" in line and f"the first 1,000 of these {result['val']['bytes']:,} bytes" in line


def test_other_text_can_be_given(world, tmp_path, capsys):
    other = tmp_path / "other.txt"
    other.write_text("something else " * 40)
    run(config(modes="bpb", val_data=str(other), json=True))
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["val"]["bytes"] == len(other.read_text())
    train = tmp_path / "train.txt"
    train.write_text("quite another text")
    run(config(modes="bpb", data_dir=str(train), val_data=str(other), json=True))
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["train"]["bytes"], result["data"]) == (len(train.read_text()), str(train))


def test_the_training_text_can_be_left_out(world, capsys):
    run_dir, *_ = world
    run(config(modes="bpb", split_tokens=300))
    both = json.loads((run_dir / "eval_base.json").read_text())
    (run_dir / "eval_base.json").unlink()
    capsys.readouterr()
    run(config(modes="bpb", split_tokens=300, train_text=False))
    assert json.loads((run_dir / "eval_base.json").read_text()) == {k: v for k, v in both.items() if k != "train"}
    out = capsys.readouterr().out
    assert "model, validation" in out and "model, training" not in out


def test_a_fine_tuned_model_is_measured_on_the_text_of_the_first_one(world, tmp_path):
    """The same weights under another kind: the same score of the same bytes, whatever the run's own flags are
    called.
    """
    run_dir, tokenizer, text = world
    run(config(modes="bpb", split_tokens=300))
    base = json.loads((run_dir / "eval_base.json").read_text())
    tuned = run_dir.parent / "tuned"
    meta = checkpoint.load_meta(run_dir / "checkpoints" / "step_000007")
    weights = checkpoint.load_weights(run_dir / "checkpoints" / "step_000007")
    origin = {"name": "even@7", "pretraining": json.loads((run_dir / "config.json").read_text()), "plan": {}}
    checkpoint.save(
        tuned / "checkpoints",
        3,
        weights=weights,
        optimizer=None,
        meta={**meta, "kind": "sft", "origin": origin},
        runtime=RUNTIME,
    )
    tokenizer.save(tuned / "tokenizer")
    (tuned / "config.json").write_text(json.dumps({"data": "a folder of chats", "seed": 3}))
    run(config(model="tuned", modes="bpb", split_tokens=300))
    assert json.loads((tuned / "eval_base.json").read_text()) == base | {"model": "tuned", "step": 3}


def test_a_mixture_gives_each_source_its_share_of_the_training_tokens(world, tmp_path, capsys):
    run_dir, tokenizer, text = world
    (tmp_path / "b.txt").write_text("zzzz " * 4000)
    (tmp_path / "val.txt").write_text("held out")
    mixed = BaseTrainConfig(data=f"{text}:0.75,{tmp_path / 'b.txt'}:0.25", val_data=str(tmp_path / "val.txt"))
    (run_dir / "config.json").write_text(json.dumps(to_json(mixed)))
    run(config(modes="bpb", split_tokens=400, json=True))
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    first, second = (
        [i for d in documents.iterate() for i in tokenizer.encode(d)] for documents, _ in open_data(mixed).train
    )
    assert result["train"]["tokens"] == 400
    assert result["train"]["bytes"] == len(tokenizer.decode_bytes(first[:300] + second[:100]))


def test_modes_of_one_step_are_kept_beside_one_another_and_another_step_starts_anew(world):
    run_dir, *_ = world
    path = run_dir / "eval_base.json"
    run(config(modes="bpb", split_tokens=200))
    bpb = json.loads(path.read_text())
    run(config(modes="sample"))
    both = json.loads(path.read_text())
    assert len(both["samples"]) == 7 and len(both["unconditioned"]) == 4
    assert {k: both[k] for k in bpb} == bpb and set(bpb["bpb"]["settings"]) == {"text", "tokens", "dtype"}
    path.write_text(json.dumps({**both, "step": 6}))
    run(config(modes="sample"))
    assert "val" not in json.loads(path.read_text())


@pytest.mark.fault("N2")
def test_no_evaluation_is_lost(world, tmp_path):
    """Other text, another step: what was measured before is kept, and is there again for its step."""
    from nanolab.records.models import read_json

    run_dir, *_ = world
    path, other = run_dir / "eval_base.json", tmp_path / "other.txt"
    other.write_text("something else " * 40)
    run(config(modes="bpb,sample", split_tokens=200))
    first = read_json(path)
    run(config(modes="bpb", split_tokens=200, val_data=str(other), train_text=False))
    second = read_json(path)
    assert second["val"] != first["val"] and "train" not in second and second["samples"] == first["samples"]
    (kept,) = second.get("earlier", [])
    assert {key: kept[key] for key in ("step", "weights", "bpb", "train", "val", "compressors")} == {
        key: first[key] for key in ("step", "weights", "bpb", "train", "val", "compressors")
    }
    run(config(modes="bpb", split_tokens=200))
    again = read_json(path)
    assert again["val"] == first["val"] and [record["val"] for record in again["earlier"]] == [second["val"]], (
        "each once"
    )
    weights, meta = (
        load(run_dir / "checkpoints" / "step_000007") for load in (checkpoint.load_weights, checkpoint.load_meta)
    )
    weights["lm_head.weight"][5] += 1
    checkpoint.save(run_dir / "checkpoints", 8, weights=weights, optimizer=None, meta=meta, runtime=RUNTIME)
    run(config(modes="bpb", split_tokens=100))
    assert read_json(path)["step"] == 8 and "samples" not in read_json(path)
    run(config(model="even@7", modes="sample"))
    back = read_json(path)
    assert (back["step"], back["val"]) == (7, first["val"]) and sorted(
        record["step"] for record in back["earlier"]
    ) == [7, 8]


def test_the_table_names_every_figure(world, capsys):
    run(config(split_tokens=300))
    lines = capsys.readouterr().out.splitlines()
    for name in ("model, validation", "model, training", "gzip -9", "bz2 -9", "xz -9e", "The largest planet"):
        assert any(name in line for line in lines), name


def test_a_mode_that_does_not_exist_is_refused(world):
    with pytest.raises(
        UserError,
        match=(
            "mode 'bbp' is unknown; expected one or more of bpb, sample, core, hellaswag, lambada, "
            f"{', '.join(PROBES)}; did you mean --modes bpb"
        ),
    ):
        run(config(modes="bbp"))
    assert not (world[0] / "eval_base.json").exists()


def test_the_validation_text_of_each_source_is_measured_by_itself(world, tmp_path, capsys):
    run_dir, tokenizer, _ = world
    texts = {"a.txt": "something else " * 40, "b.txt": "zzz zzz zzz " * 9}
    (tmp_path / "val").mkdir()
    for name, text in texts.items():
        (tmp_path / "val" / name).write_text(text)
    run(config(modes="bpb", val_data=str(tmp_path / "val"), train_text=False))
    out, result = capsys.readouterr().out, json.loads((run_dir / "eval_base.json").read_text())
    assert set(result["domains"]) == set(texts)
    for name, text in texts.items():
        row = result["domains"][name]
        assert row["bytes"] == len(text) and row["bpb"] == pytest.approx(
            row["tokens"] * math.log2(tokenizer.vocab_size) / row["bytes"]
        )
        assert any(f"model, {name}" in line and f"{row['bpb']:.4f}" in line for line in out.splitlines())
    assert sum(row["bytes"] for row in result["domains"].values()) == result["val"]["bytes"]


@pytest.fixture
def bundle(tmp_path) -> Path:
    return tiny.write(tmp_path / "bundle")


def test_tasks_of_the_bundle_are_scored_and_written(world, bundle, capsys):
    """Of a model that finds every token equally likely the first choice has the lowest mean, as all have."""
    run_dir, tokenizer, _ = world
    assert run(config(modes="core,lambada,hellaswag", eval_bundle=str(bundle), json=True)) == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert result == json.loads((run_dir / "eval_base.json").read_text())
    core, swag, words = result["core"], result["hellaswag"], result["lambada"]
    first = sum(row["gold"] == 0 for row in tiny.CHOICES) / 7
    assert {k: core["tasks"][k]["accuracy"] for k in ("copa", "hellaswag_zeroshot", "winograd")} == {
        "copa": first,
        "hellaswag_zeroshot": first,
        "winograd": 3 / 5,
    }
    cut, n = (sum(core["tasks"][label][what] for label in core["tasks"]) for what in ("cut", "n"))
    label = f"CORE-4 of 22@64, {100 * cut / n:.0f} % cut"
    assert cut and (core["label"], len(core["missing"]), core["failed"]) == (label, 18, {})
    assert swag["per_token"]["accuracy"] == first and swag["n"] == 7
    shortest = [min(range(3), key=lambda i: len(tokenizer.encode(" " + row["choices"][i]))) for row in tiny.CHOICES]
    assert swag["sum"]["accuracy"] == sum(pick == row["gold"] for pick, row in zip(shortest, tiny.CHOICES)) / 7
    tokens = [len(tokenizer.encode(" " + row["continuation"])) for row in tiny.WORDS]
    assert words["perplexity"] == pytest.approx(tokenizer.vocab_size ** (sum(tokens) / 6), rel=1e-4)
    with open(run_dir / "eval_base.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["Task"] for row in rows] == [*core["tasks"], label] and float(rows[-1]["Centered"]) == pytest.approx(
        core["value"], abs=1e-6
    )
    for text in (label, "missing from the bundle: jeopardy", "HellaSwag, 7 items", "LAMBADA, 6 items"):
        assert any(text in line for line in lines), text
    run(config(modes="bpb", split_tokens=200))
    assert json.loads((run_dir / "eval_base.json").read_text())["core"] == core, (
        "kept beside other modes of the same model"
    )


def test_a_broken_task_is_reported_and_the_rest_is_there(world, bundle, capsys):
    run_dir, *_ = world
    (bundle / "eval_data" / "b" / "words.jsonl").write_text("{oops\n")
    assert run(config(modes="core,lambada,hellaswag", eval_bundle=str(bundle))) == 1
    out, result = capsys.readouterr().out, json.loads((run_dir / "eval_base.json").read_text())
    assert (
        list(result["core"]["failed"]) == ["lambada_openai"]
        and "words.jsonl:1 is not JSON" in result["lambada"]["failed"]["lambada"]
    )
    assert result["core"]["label"].partition("@")[0] == "CORE-3 of 22" and result["hellaswag"]["n"] == 7
    assert "failed: lambada_openai: " in out and "failed: lambada: " in out
    tiny.write(bundle)
    assert run(config(modes="lambada", eval_bundle=str(bundle))) == 0
    again = json.loads((run_dir / "eval_base.json").read_text())
    assert again["lambada"]["n"] == 6 and again["core"] == result["core"], (
        "a failure stays with its mode, and goes with it"
    )


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_was_found_before_an_end_is_on_disk(world, bundle, monkeypatch, error):
    run_dir, *_ = world
    original = core.judge_groups

    def judged(reader, groups, runtime, judge, label="", stop=None):
        if label == "lambada_openai":
            raise error
        return original(reader, groups, runtime, judge, label)

    monkeypatch.setattr(core, "judge_groups", judged)
    with pytest.raises(error):
        run(config(modes="bpb,core", split_tokens=200, eval_bundle=str(bundle)))
    result = json.loads((run_dir / "eval_base.json").read_text())
    assert (
        list(result["core"]["tasks"]) == ["copa", "winograd"]
        and result["core"]["label"].partition("@")[0] == "CORE-2 of 22"
        and result["core"]["settings"]
        and "val" in result
    )
    assert result["core"]["failed"] == dict.fromkeys(
        ("lambada_openai", "hellaswag_zeroshot"), "the evaluation ended before it"
    )


def test_the_table_of_core_goes_with_the_weights_it_is_of(world, bundle):
    run_dir, *_ = world
    run(config(modes="core", eval_bundle=str(bundle)))
    run(config(modes="bpb", split_tokens=200))
    assert (run_dir / "eval_base.csv").exists()
    weights, meta = (
        load(run_dir / "checkpoints" / "step_000007") for load in (checkpoint.load_weights, checkpoint.load_meta)
    )
    weights["lm_head.weight"][5] += 1
    checkpoint.save(run_dir / "checkpoints", 7, weights=weights, optimizer=None, meta=meta, runtime=RUNTIME)
    run(config(modes="bpb", split_tokens=200))
    assert not (run_dir / "eval_base.csv").exists() and "core" not in json.loads(
        (run_dir / "eval_base.json").read_text()
    )


def test_hellaswag_in_its_own_form_and_without_a_first_token(world, bundle, tmp_path):
    run_dir, *_ = world
    path = tmp_path / "hellaswag_val.jsonl"
    path.write_text(
        "".join(
            json.dumps({"ctx": row["query"], "endings": row["choices"], "label": str(row["gold"])}) + "\n"
            for row in tiny.CHOICES
        )
    )
    run(config(modes="hellaswag", eval_bundle=str(bundle), max_per_task=4))
    of_bundle = json.loads((run_dir / "eval_base.json").read_text())["hellaswag"]
    run(config(modes="hellaswag", hellaswag=str(path), max_per_task=4, hellaswag_bos=False))
    own = json.loads((run_dir / "eval_base.json").read_text())["hellaswag"]
    assert (
        own | {"settings": 0} == of_bundle | {"settings": 0}
        and own["settings"]["original"]
        and not own["settings"]["bos"]
        and own["n"] == 4
    )
    with pytest.raises(UserError, match="--hellaswag .*none is not a file; expected jsonl with ctx, endings and label"):
        run(config(modes="hellaswag", hellaswag=str(tmp_path / "none")))


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ({"hf": "x", "model": "even"}, "--hf x with --model even; expected one of them"),
        ({"hf": "x", "all_checkpoints": True}, "--hf x with --all-checkpoints; expected one of them"),
        ({"max_per_task": 0}, "--max-per-task is 0; expected at least 1, or -1;"),
        ({"modes": "core", "eval_bundle": "nowhere"}, "--eval-bundle nowhere is not a folder"),
        (
            {"modes": "bpb", "model": "even@7", "all_checkpoints": True},
            "--model even@7 with --all-checkpoints, but a step in it",
        ),
        ({"modes": "bpb", "model": "even, even", "all_checkpoints": True}, "--model even, even names a run twice"),
        (
            {"modes": "sample", "all_checkpoints": True},
            "--modes sample with --all-checkpoints, but no score among them",
        ),
    ],
)
def test_flags_that_do_not_fit_are_refused(world, flags, text):
    with pytest.raises(UserError, match=text):
        run(config(**flags))


@pytest.mark.slow
def test_every_checkpoint_is_evaluated_once_and_drawn(world, bundle, base_dir, capsys):
    run_dir, tokenizer, _ = world
    weights, meta = (
        load(run_dir / "checkpoints" / "step_000007") for load in (checkpoint.load_weights, checkpoint.load_meta)
    )
    again = {
        "modes": "core,hellaswag,bpb,sample",
        "all_checkpoints": True,
        "eval_bundle": str(bundle),
        "split_tokens": 200,
    }
    assert run(config(**again)) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("even@")] == [
        "even@7: core",
        "even@7: hellaswag",
        "even@7: bpb",
    ]

    weights["lm_head.weight"][5] += 1
    checkpoint.save(
        run_dir / "checkpoints", 9, weights=weights, optimizer=None, meta=meta | {"tokens": 9000}, runtime=RUNTIME
    )
    other = run_dir.parent / "other"
    checkpoint.save(other / "checkpoints", 7, weights=weights, optimizer=None, meta=meta, runtime=RUNTIME)
    tokenizer.save(other / "tokenizer")
    (other / "config.json").write_text((run_dir / "config.json").read_text())
    with open(run_dir / "eval_checkpoints.jsonl", "a") as file:
        file.write('{"torn by a cra')
    assert run(config(**again, model="even,other", out=str(base_dir / "curves"))) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if "@" in line and ":" in line[:16]] == [
        f"{x}: {mode}" for x in ("even@9", "other@7") for mode in ("core", "hellaswag", "bpb")
    ]
    for mode in ("core", "hellaswag", "bpb"):
        with open(base_dir / "curves" / f"curve_{mode}.csv", newline="") as file:
            rows = [
                (row["run"], row["step"], row["tokens"], float(row["low"]) <= float(row["score"]) <= float(row["high"]))
                for row in csv.DictReader(file)
            ]
        assert rows == [("even", "7", "7000", True), ("even", "9", "9000", True), ("other", "7", "7000", True)]
        drawn = (base_dir / "curves" / f"curve_{mode}.svg").read_text()
        assert "even" in drawn and "other" in drawn and ("CORE-4 of 22" in drawn) == (mode == "core")
    run(config(**again, model="even,other", out=str(base_dir / "curves")))
    assert "even@" not in capsys.readouterr().out.replace("model even@", ""), "all is on record"
    assert len((run_dir / "eval_checkpoints.jsonl").read_text().splitlines()) == 7
    run(config(**again | {"modes": "core", "max_per_task": 4}))
    assert "even@7: core" in capsys.readouterr().out, "another evaluation"


def test_what_fails_for_a_checkpoint_is_named_and_on_record_until_it_is_mended(world, bundle, capsys):
    run_dir, *_ = world
    path = bundle / "eval_data" / "b" / "words.jsonl"
    good = path.read_text()
    path.write_text("{oops\n")
    (run_dir / "checkpoints" / "step_000006").mkdir()
    again = config(modes="core", all_checkpoints=True, eval_bundle=str(bundle))
    assert run(again) == 1
    out = capsys.readouterr().out
    assert (
        "failed: even@7: lambada_openai: " in out
        and "step_000006 is half-written or damaged" in out
        and "CORE-3 of 22@64, 37 % cut, over training" in out
    )
    assert run(again) == 1
    out = capsys.readouterr().out
    assert (
        "even@7: core\n" not in out
        and "failed: even@7: lambada_openai: " in out
        and "CORE-3 of 22@64, 37 % cut, over training" in out
    ), "on record"
    path.write_text(good)
    assert run(again) == 1 and "even@7: core\n" in capsys.readouterr().out
    (run_dir / "checkpoints" / "step_000006").rmdir()
    assert run(again) == 0


def test_checkpoints_that_are_gone_are_drawn_from_the_record_and_one_that_goes_meanwhile_is_named(
    world, bundle, capsys, monkeypatch
):
    run_dir, *_ = world
    weights, meta = (
        load(run_dir / "checkpoints" / "step_000007") for load in (checkpoint.load_weights, checkpoint.load_meta)
    )
    for step in (8, 9):
        weights["lm_head.weight"][step] += 1
        checkpoint.save(
            run_dir / "checkpoints",
            step,
            weights=weights,
            optimizer=None,
            meta=meta | {"tokens": 1000 * step},
            runtime=RUNTIME,
        )
    whole = checkpoint.verify

    def verify(path, *rest):
        whole(path, *rest)
        if path.name == "step_000008" and after:
            shutil.rmtree(path)

    again, after = config(modes="bpb", all_checkpoints=True, split_tokens=200), True
    monkeypatch.setattr(checkpoint, "verify", verify)
    assert run(again) == 1
    assert re.search("failed: .*step_000008", capsys.readouterr().out)
    shutil.rmtree(run_dir / "checkpoints" / "step_000007")
    assert run(again) == 0
    with open(run_dir / "curve_bpb.csv", newline="") as file:
        assert [(row["step"], row["tokens"]) for row in csv.DictReader(file)] == [("7", "7000"), ("9", "9000")]


def follow_on_rank(runtime: Runtime, run_dir: str):
    """Checkpoint 8 goes before rank 1 has read it; what every rank finds of the others."""

    def load_one(ref):
        if runtime.rank == 1 and ref.step == 8:
            raise FileNotFoundError(f"step {ref.step} is gone")
        return ref.step

    run = ModelRef("even", Path(run_dir), Path(run_dir), 7)
    settings, measure = lambda mode, ref: {"a": 1}, lambda mode, step: {"value": sum(runtime.gather_objects(step))}
    points, failed = follow([run], ["mode"], load_one, settings, measure, runtime)
    return [(p.step, p.tokens, p.result) for p in points["mode"]], failed


def test_a_checkpoint_that_goes_under_one_rank_is_a_failure_of_all(world, run_ranks):
    run_dir, *_ = world
    weights, meta = (
        load(run_dir / "checkpoints" / "step_000007") for load in (checkpoint.load_weights, checkpoint.load_meta)
    )
    weights["lm_head.weight"][5] += 1
    checkpoint.save(run_dir / "checkpoints", 8, weights=weights, optimizer=None, meta=meta, runtime=RUNTIME)
    found = run_ranks(follow_on_rank, 2, str(run_dir))
    assert found == [([(7, 7000, {"value": 14})], ["even@8: mode: step 8 is gone"])] * 2


def test_checkpoints_without_a_score_are_left_out(world, bundle, capsys):
    run_dir, *_ = world
    for path in bundle.rglob("*.jsonl"):
        path.write_text("{oops\n")
    assert run(config(modes="core", all_checkpoints=True, eval_bundle=str(bundle))) == 1
    assert "core: no checkpoint has a score" in capsys.readouterr().out and not (run_dir / "curve_core.svg").exists()


def test_what_draws_is_looked_for_before_the_evaluation(world, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="bash runs/setup.sh plots"):
        run(config(modes="bpb", all_checkpoints=True))
    assert not (world[0] / "eval_checkpoints.jsonl").exists()


@pytest.mark.slow
def test_a_folder_of_transformers_scores_as_the_model_it_came_from(
    world, bundle, tmp_path, capsys, base_dir, exports_read_warm
):
    """The same weights under gpt2's own class: the same bits per byte, the same tasks."""
    pytest.importorskip("transformers")
    from nanolab.cli import from_preset
    from nanolab.interop.export import export
    from nanolab.records.models import find_model
    from nanolab.training.schedule import gpt_config

    run_dir, tokenizer, text = world
    model = GPT(
        gpt_config(
            from_preset(BaseTrainConfig, "gpt2", depth=1, aspect_ratio=32, head_dim=16, max_seq_len=64),
            tokenizer.vocab_size,
            tokenizer.bos,
        )
    )
    model.init_weights(3)
    meta = checkpoint.load_meta(run_dir / "checkpoints" / "step_000007") | {
        "model_config": to_json(model.config),
        "kind": "base",
    }
    checkpoint.save(
        run_dir / "checkpoints", 7, weights=dict(model.state_dict()), optimizer=None, meta=meta, runtime=RUNTIME
    )
    export(find_model("even"), tmp_path / "exported", lambda *_: "")
    flags = {
        "modes": "bpb,core,hellaswag,lambada,sample",
        "eval_bundle": str(bundle),
        "data_dir": str(text),
        "split_tokens": 400,
    }
    assert run(config(**flags)) == run(config(**flags, hf=str(tmp_path / "exported"))) == 0
    ours, theirs = (
        json.loads((folder / "eval_base.json").read_text())
        for folder in (run_dir, *(base_dir / "eval").glob("exported-*"))
    )
    assert (
        theirs["val"]["bpb"] == pytest.approx(ours["val"]["bpb"], rel=1e-5)
        and theirs["val"]["tokens"] == ours["val"]["tokens"]
    )
    assert {k: v["outcomes"] for k, v in theirs["core"]["tasks"].items()} == {
        k: v["outcomes"] for k, v in ours["core"]["tasks"].items()
    }
    assert (
        theirs["lambada"]["perplexity"] == pytest.approx(ours["lambada"]["perplexity"], rel=1e-4)
        and theirs["hellaswag"]["sum"] == ours["hellaswag"]["sum"]
    )
    assert [s["text"] for s in theirs["samples"]] == [s["text"] for s in ours["samples"]] and theirs[
        "unconditioned"
    ] == []
    assert len(list((base_dir / "eval").glob("exported-*/eval_base.csv"))) == 1


@pytest.mark.fault("S14")
@pytest.mark.parametrize("modes", ["bpb", "sample", "core,hellaswag,lambada"])
def test_a_model_that_gives_nan_is_an_error_that_names_it(world, bundle, modes):
    run_dir, tokenizer, _ = world
    (_, path), *_ = checkpoint.steps(run_dir / "checkpoints")
    meta = checkpoint.load_meta(path)
    model = GPT(GPTConfig(**meta["model_config"]))
    model.init_weights(0)
    with torch.no_grad():
        model.lm_head.weight[3, 5] = float("nan")
    meta = {"model_config": to_json(model.config), "tokenizer_hash": tokenizer.hash, "tokens": 7000}
    checkpoint.save(
        run_dir / "checkpoints", 8, weights=dict(model.state_dict()), optimizer=None, meta=meta, runtime=RUNTIME
    )
    with pytest.raises(UserError) as error:
        run(config(modes=modes, eval_bundle=str(bundle), split_tokens=200))
    assert (error.value.code, error.value.values) == ("not-finite", {"model": "even"}) and not (
        run_dir / "eval_base.json"
    ).exists()


@pytest.mark.fault("S14")
def test_results_hold_no_nan(world, monkeypatch, capsys):
    """What is not finite is null in every file and on stdout, and a line says so. The parser refuses NaN and
    Infinity.
    """
    run_dir, *_ = world
    real = bits_per_byte
    monkeypatch.setattr(
        "nanolab.lab.evaluate_text.bits_per_byte", lambda *a, **k: real(*a, **k)._replace(error=float("inf"))
    )
    assert run(config(modes="bpb", split_tokens=200, json=True)) == 0
    strict = functools.partial(json.loads, parse_constant=lambda name: pytest.fail(name))
    said = capsys.readouterr()
    assert strict((run_dir / "eval_base.json").read_text()) == strict(said.out.splitlines()[-1])
    assert (
        strict((run_dir / "eval_base.json").read_text())["val"]["interval"] == [None, None] and "not finite" in said.err
    )
