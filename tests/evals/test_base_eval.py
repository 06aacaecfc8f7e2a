"""base_eval on a model that knows nothing, whose bits per byte can be computed by hand."""

import bz2
import gzip
import json
import lzma
import math
import random
from pathlib import Path

import pytest
import torch

from nanolab.config import BaseEvalConfig, BaseTrainConfig, DataConfig, GPTConfig, UserError, to_json
from nanolab.data.corpus import open_data
from nanolab.data.tokenizer import Tokenizer
from nanolab.model.gpt import GPT
from nanolab.runtime import Runtime
from nanolab.training import checkpoint
from scripts.base_eval import run

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
    meta = {"model_config": to_json(model.config), "tokenizer_hash": tokenizer.hash}
    checkpoint.save(run_dir / "checkpoints", 7, weights=dict(model.state_dict()), optimizer=None, meta=meta, runtime=RUNTIME)
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
        assert result[split]["bpb"] == pytest.approx(len(ids) * math.log2(tokenizer.vocab_size) / len(content), rel=1e-6)
        if split == "val":
            sizes = {"gzip -9": len(gzip.compress(content, 9)), "bz2 -9": len(bz2.compress(content, 9))}
            sizes["xz -9e"] = len(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME))
            assert result["compressors"] == pytest.approx({k: 8 * n / len(content) for k, n in sizes.items()})


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
    """The same weights under another kind: the same score of the same bytes, whatever the run's own flags are called."""
    run_dir, tokenizer, text = world
    run(config(modes="bpb", split_tokens=300))
    base = json.loads((run_dir / "eval_base.json").read_text())
    tuned = run_dir.parent / "tuned"
    meta = checkpoint.load_meta(run_dir / "checkpoints" / "step_000007")
    weights = checkpoint.load_weights(run_dir / "checkpoints" / "step_000007")
    origin = {"name": "even@7", "pretraining": json.loads((run_dir / "config.json").read_text()), "plan": {}}
    checkpoint.save(tuned / "checkpoints", 3, weights=weights, optimizer=None, meta={**meta, "kind": "sft", "origin": origin}, runtime=RUNTIME)
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
    first, second = ([i for d in documents.iterate() for i in tokenizer.encode(d)] for documents, _ in open_data(mixed).train)
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
    assert {k: both[k] for k in bpb} == bpb
    path.write_text(json.dumps({**both, "step": 6}))
    run(config(modes="sample"))
    assert "val" not in json.loads(path.read_text())


def test_the_table_names_every_figure(world, capsys):
    run(config(split_tokens=300))
    lines = capsys.readouterr().out.splitlines()
    for name in ("model, validation", "model, training", "gzip -9", "bz2 -9", "xz -9e", "The largest planet"):
        assert any(name in line for line in lines), name


def test_a_mode_that_does_not_exist_is_refused(world):
    with pytest.raises(UserError, match="mode 'bbp' is unknown; expected one or more of bpb, sample"):
        run(config(modes="bbp"))
    assert not (world[0] / "eval_base.json").exists()
