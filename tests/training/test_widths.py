"""dev/widths.py: sizes of activations over width, against what initial values and Adam's step say."""

import importlib.util
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nanolab.cli import UserError, parse
from nanolab.model.gpt import GPT
from nanolab.runtime import Runtime
from nanolab.stages.config import BaseTrainConfig
from nanolab.training.schedule import gpt_config

CPU = Runtime(torch.device("cpu"), torch.float32)
FLAGS = "--depth 2 --head-dim 32 --max-seq-len 32 --device-batch-size 2 --total-batch-size 512 --num-iterations 100"


@pytest.fixture(scope="module")
def widths():
    spec = importlib.util.spec_from_file_location("dev_widths", Path(__file__).parents[2] / "dev" / "widths.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measured(widths, flags: str, steps: int) -> dict:
    cfg = parse(BaseTrainConfig, f"{FLAGS} {flags}".split())
    return {width: widths.sizes(cfg, width, steps, 128, CPU) for width in (64, 128, 256)}


def test_sizes_at_the_start_are_those_of_the_initial_values(widths):
    """The head is N(0, 0.001) and reads vectors of root mean square 1: logits are N(0, 0.001^2 C)."""
    found = measured(widths, "", 0)
    for width, of_width in found.items():
        assert of_width["logits"] == [pytest.approx(0.001 * math.sqrt(2 * width / math.pi), rel=0.05)]
        assert of_width["attention 0"] == of_width["mlp 1"] == [0.0], "residual projections begin at 0"
    slopes = widths.exponents(found, 0)
    assert slopes["logits"] == pytest.approx(0.5, abs=0.06) and slopes["mlp 1"] is None
    assert slopes["stream 1"] == pytest.approx(0, abs=0.05)


def test_steps_are_those_of_the_recipe(widths):
    """Against torch's Adam on a model of the same weights and tokens."""
    cfg = parse(BaseTrainConfig, f"{FLAGS} --recipe adam_constant --learning-rate 0.01 --eps 1e-6".split())
    found = widths.sizes(cfg, 64, 2, 128, CPU)
    model = GPT(gpt_config(replace(cfg, aspect_ratio=32), 128, bos=0))
    model.init_weights(cfg.seed)
    adam = torch.optim.Adam(model.parameters(), 0.01, (cfg.beta1, cfg.beta2), 1e-6)
    ids = torch.from_numpy(np.random.default_rng(cfg.seed).integers(0, 128, (2, 33)))
    for step in range(3):
        logits = model(ids[:, :-1])
        assert found["logits"][step] == pytest.approx(logits.abs().mean().item(), rel=1e-3)
        F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        adam.step()
        adam.zero_grad()
    assert found["logits"][2] > 10 * found["logits"][0]
    slow, fast = (parse(BaseTrainConfig, f"{FLAGS} --warmup-steps {n}".split()) for n in (50, 1))
    assert widths.sizes(slow, 64, 1, 128, CPU) == widths.sizes(fast, 64, 1, 128, CPU), "there is no warm-up"


def test_exponents_are_slopes_of_logs(widths):
    rows = {width: {"a": [1.0, 3 * width**0.7], "b": [0.0, 5.0]} for width in (32, 64, 256)}
    assert widths.exponents(rows, 0) == {"a": pytest.approx(0, abs=1e-9), "b": None}
    assert widths.exponents(rows, 1) == {"a": pytest.approx(0.7), "b": pytest.approx(0, abs=1e-9)}


def test_a_width_that_does_not_divide_is_refused(widths):
    with pytest.raises(UserError) as error:
        widths.sizes(parse(BaseTrainConfig, FLAGS.split()), 80, 1, 64, CPU)
    assert (error.value.code, error.value.values) == ("width", {"width": 80})
