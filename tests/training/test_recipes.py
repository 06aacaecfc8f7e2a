"""Recipes: every parameter in one group, rates by hand, and whole trainings against torch's own optimizers and
schedulers.
"""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nanolab.model.config import GPTConfig
from nanolab.model.gpt import GPT
from nanolab.model.variants.tables import AXES
from nanolab.runtime import Runtime
from nanolab.stages.config import BaseTrainConfig
from nanolab.training.optim import MuonAdamW
from nanolab.training.recipes import RECIPES, param_groups
from nanolab.training.schedule import Plan, make_plan

ONE = Runtime(torch.device("cpu"), torch.float32)
SMALL = GPTConfig(sequence_len=16, vocab_size=64, n_layer=2, n_head=2, n_embd=32)
FULL = dataclasses.replace(
    SMALL, positions="learned", softmax="sink", gate="head", qk_norm="l2", norm_gain=True, bias="qkv,out,mlp,norm,head"
)
# Of every table each entry, and the switches the other way.
VARIANTS = {
    f"{flag} {name}": {flag: "gqa:2" if name == "gqa" else name}
    for flag, table in AXES.items()
    for name, entry in table.items()
}
VARIANTS["attention mla"] = dict(attention="mla", value_embeds=False)
VARIANTS |= {
    f"{f.name} {not f.default}": {f.name: not f.default}
    for f in dataclasses.fields(SMALL)
    if type(f.default) is bool and f.name != "document_mask"
}
VARIANTS |= {
    "bias": dict(bias="qkv,out,mlp,norm,head"),
    "tied, biased head": dict(tied_head=True, bias="head"),
    "layernorm, gain": dict(norm="layernorm", norm_gain=True),
}


class Fake(nn.Module):
    """A module with parameters of the names and shapes given."""

    def __init__(self, **shapes):
        super().__init__()
        for name, shape in shapes.items():
            *path, last = name.split("/")
            place = self
            for part in path:
                if not hasattr(place, part):
                    place.add_module(part, nn.Module())
                place = getattr(place, part)
            place.register_parameter(last, nn.Parameter(torch.zeros(shape)))


def plan_of(recipe: str, **changes):
    return SimpleNamespace(recipe=recipe, batch_scale=1.0, weight_decay=0.1, model=SMALL, **changes)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_every_parameter_of_every_variant_is_in_one_group(recipe, changes):
    with torch.device("meta"):
        model = GPT(dataclasses.replace(SMALL, **changes))
    groups = param_groups(model, BaseTrainConfig(), plan_of(recipe))
    taken = [p for group in groups for _, p in group["params"]]
    assert len(taken) == len({id(p) for p in taken}) == len(list(model.parameters()))
    assert all(group["params"] for group in groups)


def test_the_dial_sends_each_kind_to_its_rate():
    """At width 192 (tables x 2), batch scale 0.5; the four rates are primes, so that a wrong one shows."""
    with torch.device("meta"):
        model = GPT(dataclasses.replace(FULL, n_embd=192))
    rates = BaseTrainConfig(embedding_lr=2.0, unembedding_lr=3.0, matrix_lr=5.0, scalar_lr=7.0)
    plan = SimpleNamespace(recipe="dial", batch_scale=0.5, weight_decay=0.1, model=model.config)
    groups = {g["name"]: g for g in param_groups(model, rates, plan)}
    want = {
        "lm_head": (3.0, 0.01),
        "wte": (2.0, 0.001),
        "positions": (0.5, 0.001),
        "value_embeds": (1.0, 0.01),
        "resid_lambdas": (0.035, 0.05),
        "x0_lambdas": (3.5, 0.0),
        "smear_backout": (0.2, 0.0),
        "vectors": (0.035, 0.0),
        "muon_192x192": (2.5, 0.1),
        "muon_192x768": (2.5, 0.1),
        "muon_768x192": (5.0, 0.1),
        "muon_2x192": (2.5, 0.1),
        "muon_2x12": (2.5, 0.1),
    }
    assert {name: (pytest.approx(g["lr"]), g["weight_decay"]) for name, g in groups.items()} == want
    names = {name: {n for n, _ in g["params"]} for name, g in groups.items()}
    assert names["smear_backout"] == {"smear.gate.weight", "smear.scale", "backout.scale"}
    assert {
        "lm_head.bias",
        "norm_f.weight",
        "norm_f.bias",
        "h.0.attn.c_q.bias",
        "h.1.mlp.c_proj.bias",
        "h.0.attn.core.normaliser.logit",
    } <= names["vectors"]
    assert all(p.ndim == 2 for name, g in groups.items() if name.startswith("muon") for _, p in g["params"])


def test_a_tied_table_trains_at_the_heads_rate():
    with torch.device("meta"):
        model = GPT(dataclasses.replace(SMALL, tied_head=True))
    groups = {g["name"]: g for g in param_groups(model, BaseTrainConfig(unembedding_lr=3.0), plan_of("dial"))}
    assert [n for n, _ in groups["lm_head"]["params"]] == ["wte.weight"] and "wte" not in groups
    assert groups["lm_head"]["lr"] == pytest.approx(3.0 * math.sqrt(768 / 32))


def test_decay_goes_by_dimensions():
    model = Fake(**{"wte/weight": (4, 2), "h/0/w": (2, 2), "h/0/filter": (2, 2, 3), "h/0/bias": (2,), "scale": ()})
    cfg = BaseTrainConfig(learning_rate=0.3, beta1=0.7, beta2=0.8, eps=1e-3)
    matrices, vectors = param_groups(model, cfg, plan_of("adamw_cosine"))
    assert (matrices["weight_decay"], [n for n, _ in matrices["params"]]) == (
        0.1,
        ["wte.weight", "h.0.w", "h.0.filter"],
    )
    assert (vectors["weight_decay"], [n for n, _ in vectors["params"]]) == (0.0, ["scale", "h.0.bias"])
    assert all(
        (g["kind"], g["lr"], g["betas"], g["eps"]) == ("adamw", 0.3, (0.7, 0.8), 1e-3) for g in (matrices, vectors)
    )


@pytest.mark.parametrize(
    "shapes",
    [{"stray/weight": (4, 4)}, {"h/0/filter": (2, 2, 3)}, {"stray": (3,)}],
    ids=["elsewhere", "three dimensions", "scalar"],
)
def test_what_no_rule_takes_is_named(shapes):
    model = Fake(**{"lm_head/weight": (4, 2), "wte/weight": (4, 2), **shapes})
    ((name, shape),) = shapes.items()
    with pytest.raises(ValueError) as error:
        param_groups(model, BaseTrainConfig(), plan_of("dial"))
    assert f"{name.replace('/', '.')} {shape}" in str(error.value) and "wte" not in str(error.value)


def plan(recipe: str, **flags) -> Plan:
    return make_plan(
        BaseTrainConfig(depth=4, recipe=recipe, device_batch_size=2, max_seq_len=64, total_batch_size=128, **flags),
        1000,
        1,
    )


def test_only_the_dial_follows_the_laws():
    """The others take the flags as they are; --lr-scale multiplies every recipe's rates, and moves no decay but the
    dial's.
    """
    for recipe, decay in (("adamw_cosine", 0.1), ("adam_constant", 0.0)):
        for scale, want in ((-1.0, 1.0), (0.25, 0.25)):
            p = plan(recipe, weight_decay=0.1, lr_scale=scale)
            assert (p.batch_scale, p.weight_decay) == (want, decay)
    assert plan("dial", weight_decay=0.1).batch_scale == pytest.approx(math.sqrt(128 / 2**19))


@pytest.mark.parametrize("warmup,n,final", [(20, 200, 0.1), (0, 50, 0.0), (1, 10, 0.5), (10, 10, 0.1), (30, 10, 0.1)])
def test_cosine_is_torchs_cosine_after_torchs_warmup(warmup, n, final):
    p = plan("adamw_cosine", num_iterations=n, warmup_steps=warmup, final_lr_frac=final)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    parts = []
    if warmup:
        parts.append(
            torch.optim.lr_scheduler.LinearLR(
                optimizer, start_factor=1 / warmup, end_factor=1.0, total_iters=max(1, warmup - 1)
            )
        )
    if n > warmup:
        parts.append(torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=n - warmup, eta_min=final))
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, parts, milestones=[warmup] * (len(parts) - 1))
    for step in range(n):
        assert p.lr_multiplier(step, step / n) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-6), step
        optimizer.step()
        schedule.step()
    if n > warmup:
        assert p.lr_multiplier(n, 1.0) == pytest.approx(final)


def test_cosine_by_the_clock_and_past_its_end():
    p = plan("adamw_cosine", max_seconds=60.0, warmup_steps=4, final_lr_frac=0.1)
    assert p.num_iterations is None
    for step, progress, want in [(0, 0.0, 0.25), (3, 0.0, 1.0), (50, 0.5, 0.55), (90, 1.0, 0.1), (91, 1.2, 0.1)]:
        assert p.lr_multiplier(step, progress) == pytest.approx(want), (step, progress)


def test_constant_is_constant():
    p = plan("adam_constant", num_iterations=50, warmup_steps=10, final_lr_frac=0.1)
    assert {p.lr_multiplier(step, step / 50) for step in range(51)} == {1.0}


def oracle(recipe: str, model: nn.Module, cfg: BaseTrainConfig, n: int):
    """The recipe in torch's own terms: an optimizer and a scheduler."""
    if recipe == "adam_constant":
        optimizer = torch.optim.Adam(
            model.parameters(), lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps
        )
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    big, small = ([p for p in model.parameters() if (p.dim() > 1) == wanted] for wanted in (True, False))
    groups = [dict(params=big, weight_decay=cfg.weight_decay), dict(params=small, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps)

    def shape(step: int) -> float:
        if step < cfg.warmup_steps:
            return (step + 1) / cfg.warmup_steps
        share = (step - cfg.warmup_steps) / (n - cfg.warmup_steps)
        return cfg.final_lr_frac + (1 - cfg.final_lr_frac) * (1 + math.cos(math.pi * share)) / 2

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, shape)


@pytest.mark.parametrize("recipe,clip", [("adamw_cosine", -1.0), ("adamw_cosine", 1.0), ("adam_constant", -1.0)])
def test_a_training_is_torchs_training(recipe, clip, make_gpt):
    """Twelve steps of a GPT-2 in small, weights compared after each, with and without clipping."""
    n = 12
    config = dataclasses.replace(
        SMALL,
        positions="learned",
        qk_norm="none",
        value_embeds=False,
        residual_scalars=False,
        smear=False,
        backout=False,
        embed_norm=False,
        mlp="gelu_tanh",
        norm="layernorm",
        norm_gain=True,
        bias="qkv,out,mlp,norm",
        softcap=0.0,
        tied_head=True,
    )
    cfg = BaseTrainConfig(
        depth=2,
        recipe=recipe,
        learning_rate=3e-3,
        beta1=0.8,
        beta2=0.9,
        eps=1e-6,
        weight_decay=0.3,
        warmup_steps=3,
        final_lr_frac=0.1,
        num_iterations=n,
        grad_clip=clip,
        max_seq_len=16,
        device_batch_size=4,
        total_batch_size=64,
    )
    p = make_plan(cfg, 64, 1)
    ours, theirs = make_gpt(config), make_gpt(config)
    optimizer = MuonAdamW(param_groups(ours, cfg, p), ONE)
    torch_optimizer, schedule = oracle(recipe, theirs, cfg, n)
    g, norms = torch.Generator().manual_seed(0), []
    for step in range(n):
        ids = torch.randint(0, 64, (4, 17), generator=g)
        for model in (ours, theirs):
            model(ids[:, :-1], ids[:, 1:]).backward()
        for group in optimizer.groups:
            group["lr"] = group["initial_lr"] * p.lr_multiplier(step, step / n)
        norms.append(torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip if clip > 0 else math.inf).item())
        assert optimizer.grad_norm(p.grad_clip).item() == pytest.approx(norms[-1], rel=1e-5)
        for o in (optimizer, torch_optimizer):
            o.step()
            o.zero_grad()
        schedule.step()
        for (name, a), b in zip(ours.named_parameters(), theirs.parameters()):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"step {step}, {name}: {m}")
    assert clip < 0 or min(norms) < clip < max(norms), f"the clip has to bite, sometimes: {norms}"
