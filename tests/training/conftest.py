"""A tiny run, which several tests of pretraining begin from."""

import pytest
from evals import tiny_bundle
from training import pretrained


@pytest.fixture
def flags(tmp_path, monkeypatch) -> dict:
    """Flags of base_train, with its text, tokenizer and evaluation bundle."""
    from nanolab.data.tokenizer import Tokenizer

    monkeypatch.setenv("NANOLAB_DTYPE", "float32")
    text = pretrained.write_text(tmp_path / "text")
    Tokenizer.train((p.read_text() for p in sorted(text.glob("*.txt"))), 300).save(tmp_path / "tok")
    return {
        "run": "toy",
        "data_dir": str(text),
        "tokenizer": str(tmp_path / "tok"),
        "depth": 1,
        "aspect_ratio": 32,
        "head_dim": 32,
        "max_seq_len": 64,
        "device_batch_size": 4,
        "total_batch_size": 256,
        "num_iterations": 3,
        "warmup_steps": 1,
        "lr_scale": 0.1,
        "eval_every": -1,
        "sample_every": -1,
        "save_every": -1,
        "device_type": "cpu",
        "eval_bundle": str(tiny_bundle.write(tmp_path / "bundle")),
        "core_metric_every": 2,
        "core_metric_max_per_task": 4,
    }
