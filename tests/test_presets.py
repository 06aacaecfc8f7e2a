"""Presets: published parameter counts, rows that commands can take, and models that learn."""

import dataclasses
from pathlib import Path

import pytest
import torch

from nanolab.cli import HORIZONS, UserError, from_preset
from nanolab.lab.config import BenchConfig
from nanolab.model.accounting import n_params
from nanolab.model.config import Architecture, GPTConfig, InspectConfig
from nanolab.model.gpt import GPT
from nanolab.presets import PRESETS
from nanolab.runtime import Runtime
from nanolab.stages.config import BaseTrainConfig
from nanolab.training.optim import MuonAdamW
from nanolab.training.recipes import RECIPES, param_groups
from nanolab.training.schedule import gpt_config, make_plan

# preset: layers, heads, width, row, parameters, whether the position table counts among them; as published
PUBLISHED = {
    "gpt2": (12, 12, 768, 1024, 124_439_808, True),
    "gpt2-medium": (24, 16, 1024, 1024, 354_823_168, True),
    "gpt2-large": (36, 20, 1280, 1024, 774_030_080, True),
    "gpt2-xl": (48, 25, 1600, 1024, 1_557_611_200, True),
    "odyssey16m": (4, 4, 256, 1024, 16_025_856, False),
    "baby": (6, 6, 768, 256, 81_110_784, False),
    "labels39m": (12, 16, 512, 512, 39_122_944, True),
}


def model_of(name: str) -> GPTConfig:
    flags = from_preset(InspectConfig, name)
    return gpt_config(flags, flags.vocab_size)


def on_meta(config: GPTConfig) -> GPT:
    with torch.device("meta"):
        return GPT(config)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_and_counts(name):
    layers, heads, width, row, parameters, with_positions = PUBLISHED[name]
    c = model_of(name)
    assert (c.n_layer, c.n_head, c.n_embd, c.sequence_len) == (layers, heads, width, row)
    sizes = {n: p.numel() for n, p in on_meta(c).named_parameters()}
    assert sum(sizes.values()) - (0 if with_positions else sizes["positions.wpe.weight"]) == parameters
    assert n_params(c)["total"] == sum(sizes.values())


def test_the_vocabulary_of_the_label_study_is_1014_or_1024():
    """39.11M and 39.12M, so nothing is padded. Its interleaved arm, with rows of 1024, has 39.39M."""
    c = model_of("labels39m")
    for changes, millions in ((dict(vocab_size=1014), 39.11), (dict(), 39.12), (dict(sequence_len=1024), 39.39)):
        assert round(n_params(dataclasses.replace(c, **changes))["total"] / 1e6, 2) == millions


@pytest.mark.parametrize("name", PRESETS)
def test_rows_hold_fields_of_commands_and_everything_that_a_training_needs(name):
    fields = {f.name: type(f.default) for cls in (BaseTrainConfig, InspectConfig) for f in dataclasses.fields(cls)}
    row = PRESETS[name]
    assert set(row) <= set(fields) and "preset" not in row
    assert all(type(value) is fields[key] for key, value in row.items())
    if name != "nanolab":
        assert {"recipe", "init", "device_batch_size", "total_batch_size"} <= set(row) and row["recipe"] in RECIPES
        assert len(set(HORIZONS) & set(row)) == 1
        assert row["recipe"] == "dial" or {"learning_rate", "beta1", "beta2", "eps"} <= set(row)


# preset: (tokens a step, micro-batch, horizon), (recipe, rate, last rate's share, warm-up, betas, decay, clip), (four
# dropouts), init
STUDIES = {
    "gpt2": (524288, 32, 19073, "adamw_cosine", 6e-4, 0.1, 715, 0.9, 0.95, 0.1, 1.0, 0.0, 0.0, 0.0, 0.0, "gpt2"),
    "odyssey16m": (
        131072,
        32,
        10_000,
        "adamw_cosine",
        6e-4,
        0.1,
        20,
        0.9,
        0.95,
        1e-3,
        1.0,
        0.05,
        0.05,
        0.05,
        0.05,
        "gpt2",
    ),
    "baby": (16384, 64, 100_000, "adamw_cosine", 1e-3, 0.1, 100, 0.9, 0.99, 0.1, 1.0, 0.2, 0.2, 0.2, 0.2, "gpt2"),
    "labels39m": (
        67584,
        132,
        None,
        "adam_constant",
        3e-4,
        None,
        None,
        0.9,
        0.999,
        0.0,
        -1.0,
        0.0,
        0.2,
        0.2,
        0.2,
        "normal02",
    ),
}


@pytest.mark.parametrize("name", STUDIES)
def test_studies_train_as_they_were_published(name):
    cfg, want = from_preset(BaseTrainConfig, name), STUDIES[name]
    plan = make_plan(cfg, from_preset(InspectConfig, name).vocab_size, 1)
    (matrices, vectors), m = param_groups(on_meta(plan.model), cfg, plan), plan.model
    shape = (cfg.final_lr_frac, cfg.warmup_steps) if plan.recipe == "adamw_cosine" else (None, None)
    got = (
        plan.total_batch_size,
        plan.device_batch_size,
        plan.num_iterations,
        plan.recipe,
        matrices["lr"],
        *shape,
        *matrices["betas"],
        matrices["weight_decay"],
    )
    assert (*got, plan.grad_clip, m.embed_dropout, m.attn_dropout, m.resid_dropout, m.mlp_dropout, m.init) == want
    assert matrices["eps"] == 1e-8 and vectors["weight_decay"] == 0.0
    assert plan.max_seconds == (23_400 if name == "labels39m" else None)


def test_the_modern_default_is_the_empty_row():
    assert from_preset(BaseTrainConfig, "nanolab") == BaseTrainConfig()


def test_changes_win_and_a_horizon_replaces_the_rows_own():
    cfg = from_preset(BaseTrainConfig, "gpt2", positions="rope", warmup_steps=3)
    assert (cfg.preset, cfg.positions, cfg.warmup_steps, cfg.norm, cfg.num_iterations) == (
        "gpt2",
        "rope",
        3,
        "layernorm",
        19073,
    )
    timed = from_preset(BaseTrainConfig, "gpt2", max_seconds=60.0)
    assert (timed.num_iterations, timed.max_seconds) == (-1, 60.0)
    stepped = from_preset(BaseTrainConfig, "labels39m", num_iterations=7)
    assert (stepped.num_iterations, stepped.max_seconds) == (7, -1.0)


def test_a_command_takes_what_it_has():
    inspect, bench = from_preset(InspectConfig, "baby"), from_preset(BenchConfig, "baby")
    assert (inspect.vocab_size, inspect.mlp, inspect.max_seq_len) == (50257, "gelu", 256) and not hasattr(
        inspect, "learning_rate"
    )
    assert (bench.recipe, bench.grad_clip, bench.device_batch_size) == ("adamw_cosine", 1.0, 64)


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(UserError, match="preset 'gtp2' is unknown; .*did you mean --preset gpt2"):
        from_preset(BaseTrainConfig, "gtp2")


LEARNERS = ["nanolab", "gpt2", "odyssey16m", "baby", "labels39m", "tiny"]  # the larger gpt2 are gpt2 at this width


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNERS)
def test_fifty_steps_at_toy_width_learn(name):
    """Bytes of this package's source, each preset's own architecture, recipe, rates, dropout and clip."""
    toy = dict(
        depth=2,
        aspect_ratio=32,
        head_dim=16,
        max_seq_len=64,
        device_batch_size=8,
        total_batch_size=512,
        num_iterations=50,
        warmup_steps=10,
    )
    cfg = from_preset(BaseTrainConfig, name, **toy)
    plan = make_plan(cfg, 256, 1)
    model = GPT(plan.model)
    model.init_weights(0)
    torch.manual_seed(0)
    optimizer = MuonAdamW(param_groups(model, cfg, plan), Runtime(torch.device("cpu"), torch.float32))
    source = Path(__file__).parents[1] / "nanolab" / "model" / "gpt.py"
    text = torch.tensor(list(source.read_bytes()))
    g, losses = torch.Generator().manual_seed(0), []
    for step in range(50):
        starts = torch.randint(0, len(text) - 65, (8,), generator=g)
        rows = torch.stack([text[s : s + 65] for s in starts])
        loss = model(rows[:, :-1], rows[:, 1:])
        loss.backward()
        for group in optimizer.groups:
            group["lr"] = group["initial_lr"] * plan.lr_multiplier(step, step / 50)
        if plan.grad_clip > 0:
            optimizer.grad_norm(plan.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    first, last = losses[0], sum(losses[-5:]) / 5
    assert 5.3 < first < 5.9, "at the start all 256 bytes are about as likely"
    assert last < first - 0.4, (first, last)


def test_the_plain_line_has_every_switch_the_other_way():
    """GPT-2 and the modern default are two ends of one line."""
    default, plain = dataclasses.asdict(Architecture()), dataclasses.asdict(model_of("gpt2"))
    switches = ["value_embeds", "residual_scalars", "smear", "backout", "embed_norm", "norm_gain", "tied_head"]
    assert all(plain[name] is not default[name] for name in switches)
