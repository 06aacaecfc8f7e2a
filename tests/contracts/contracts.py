"""What every model must do, whatever its architecture: functions that take a config and fail if its model does not.

`fast` is the combination that hundreds of configs can afford; the tests of single variants call the functions one by
one. Dims: B batch, T tokens, V vocabulary."""

import copy
import dataclasses
import functools
import math
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nanolab.cli import UserError, from_json, to_json
from nanolab.inference.cache import KVCache
from nanolab.model import accounting
from nanolab.model.config import GPTConfig, chosen, windows
from nanolab.model.gpt import GPT
from nanolab.model.kernels.choice import KERNELS
from nanolab.model.variants import tables
from nanolab.records import checkpoint
from nanolab.runtime import Runtime
from nanolab.stages.config import BaseTrainConfig
from nanolab.training.optim import MuonAdamW
from nanolab.training.recipes import RECIPES, param_groups

CPU = Runtime(torch.device("cpu"), torch.float32)
DOCUMENTS = (5, 13)  # places in a row, beside the first, where a document begins


def build(
    config: GPTConfig, kernel: str = "", dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> GPT:
    """A model in eval mode with every parameter moved off its initial value, at which many parts have no effect.

    The same weights for every kernel, dtype and device; with float64 they are stored in float64. It is shared: whoever
    changes its weights copies it first."""
    entries = (table.get(str(getattr(config, flag)).partition(":")[0]) for flag, table in tables.AXES.items())
    model = built(config, dtype, device, seed, tuple(entries)).eval()
    model.zero_grad()
    model.kernel_name, model.activation_checkpointing = kernel, False
    model.place(device)
    return model


@functools.lru_cache(160)
def built(config: GPTConfig, dtype: torch.dtype, device: str, seed: int, entries: tuple) -> GPT:
    """entries: of the tables, which a test may change."""
    model = GPT(config, dtype)
    model.init_weights(seed)
    g = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_((0.1 if p.dim() > 1 else 0.3) * torch.randn(p.shape, generator=g))
    return (model.double() if dtype == torch.float64 else model).to(device)


def tokens(config: GPTConfig, B: int = 2, T: int = 24, seed: int = 5, device: str = "cpu") -> Tensor:
    """(B, T) ids other than bos; where the config has one, it begins each row and two documents within."""
    g = torch.Generator().manual_seed(seed)
    idx = torch.randint(config.bos + 1, config.vocab_size, (B, T), generator=g)
    if config.bos >= 0:
        idx[:, [0, *(t for t in DOCUMENTS if t < T)]] = config.bos
    return idx.to(device)


def kernels(config: GPTConfig, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[str]:
    """The kernels that train this model on the device. Another one says so when it is asked for, naming its flag and
    saying what to type.
    """
    with torch.device("meta"):
        model = GPT(config, dtype)
    able = []
    for model.kernel_name in KERNELS:
        try:
            model.kernel_names(device)
        except UserError as error:
            assert "--attn-kernel" in str(error) and model.kernel_name in str(error), error
        else:
            able.append(model.kernel_name)
    assert "eager" in able, "the reference must run everything"
    return able


def idle(config: GPTConfig) -> Iterator[str]:
    """Patterns of the names of parameters without effect.

    With one or two layers backout takes a share of the last layer's own output, which the norm undoes. A bias of the
    keys adds the same to all scores of a query, and softmax does not see that: unless all channels turn after it, the
    keys are normed, or the scores bend or meet a sink."""
    if config.n_layer <= 2:
        yield "backout.*"
    shift_invariant = config.softmax == "softmax" or (config.softmax == "softmax_n" and config.softmax_n == 0)
    if shift_invariant and config.qk_norm == "none" and config.score_softcap == 0:
        for layer in range(config.n_layer):
            if config.rope_fraction < 1 or not tables.AXES["positions"][config.positions].uses_rope(config, layer):
                yield f"h.{layer}.attn.c_k.bias"


def is_idle(config: GPTConfig, name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in idle(config))


@torch.no_grad()
def shapes_and_dtypes(config: GPTConfig) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model, idx = build(config, dtype=dtype), tokens(config)
        logits, loss = model(idx), model(idx, idx)
        assert logits.shape == (*idx.shape, config.vocab_size) and logits.dtype == torch.float32
        assert loss.shape == () and loss.dtype == torch.float32 and loss.isfinite()
        assert config.softcap == 0 or logits.abs().max() <= config.softcap
        assert all(p.dtype == torch.float32 for p in model.parameters())


@torch.no_grad()
def causal(
    config: GPTConfig, kernel: str = "", dtype: torch.dtype = torch.float32, T: int = 24, device: str = "cpu"
) -> None:
    """A changed token changes no logit before its own, to the bit; and its own, and the next one's."""
    model, idx = build(config, kernel, dtype, device), tokens(config, T=T, device=device)
    before = model(idx)
    for t in {1, T // 2 - 1, T - 1}:
        changed = idx.clone()
        changed[:, t] = config.bos + 1 + (changed[:, t] - config.bos) % (config.vocab_size - config.bos - 1)
        after = model(changed)
        assert torch.equal(before[:, :t], after[:, :t]), f"token {t} changed an earlier logit"
        assert (before[:, t : t + 2] != after[:, t : t + 2]).any(dim=(0, 2)).all(), f"token {t} changes too little"


@torch.no_grad()
def documents_apart(config: GPTConfig, kernel: str = "") -> None:
    """With the document mask a changed token changes, to the bit, nothing in other documents, and what follows in its
    own, as far as windows let it."""
    model, idx = build(config, kernel), tokens(config)
    before, (first, end), reach = model(idx), DOCUMENTS, 1 + sum(windows(config))
    for t in (first + 1, end - 1):
        changed = idx.clone()
        changed[:, t] = config.bos + 1 + (changed[:, t] - config.bos) % (config.vocab_size - config.bos - 1)
        differs = (before != model(changed)).any(dim=(0, 2))
        assert differs[t : min(end, t + reach)].all() and not differs[:t].any() and not differs[end:].any(), (
            t,
            differs,
        )
    changed = idx.clone()
    changed[:, end] = config.bos + 1  # no longer a beginning: the two documents are one
    assert (before != model(changed)).any(dim=(0, 2))[end : end + reach].all()


@torch.no_grad()
def cache_equals_forward(config: GPTConfig, T: int = 24, device: str = "cpu") -> None:
    """One prefill; chunks and single tokens; rows of unequal length put together, of which one leaves."""
    model, idx = build(config, device=device), tokens(config, B=3, T=T, device=device)
    full = model(idx)
    for sizes in ([T], [1, T - 1], [T // 3, T - T // 3 - 5, 1, 1, 1, 1, 1]):
        cache = KVCache(config, 3, limit=T, device=device)
        got = torch.cat([model(chunk, cache=cache) for chunk in idx.split(sizes, dim=1)], 1)
        torch.testing.assert_close(got, full, atol=2e-5, rtol=0, msg=lambda m: f"chunks {sizes}: {m}")

    starts = [T - 4, 3, T // 2]
    joint = KVCache(config, 3, capacity=4, device=device)
    for row, start in enumerate(starts):
        alone = KVCache(config, 1, capacity=start, device=device)
        model(idx[row : row + 1, :start], cache=alone, last_only=True)
        joint.put([row], alone, [0])
    for rows, count in (([0, 1, 2], 3), ([2, 1], 2)):
        if len(rows) < 3:
            joint.select(rows)
        new = torch.stack([idx[r, starts[r] : starts[r] + count] for r in rows])
        chunks = new.split(1, dim=1) if count == 2 else (new[:, :1], new[:, 1:])
        got = torch.cat([model(chunk, cache=joint) for chunk in chunks], 1)
        want = torch.stack([full[r, starts[r] : starts[r] + count] for r in rows])
        torch.testing.assert_close(got, want, atol=2e-5, rtol=0, msg=lambda m: f"rows {rows} of unequal length: {m}")
        starts = [start + count for start in starts]


@torch.no_grad()
def init_fills(config: GPTConfig) -> None:
    """Every parameter is initialised, buffers hold what no seed decides and are not saved, the seed decides, and a
    fresh model is uniform.

    To 0.1 nats; with a tied head to 0.3, since every token then has a bent for itself.
    """
    model = GPT(config)
    fresh, built = dict(GPT(config).named_buffers()), model.to("meta").to_empty(device="cpu")
    assert not set(fresh) & set(model.state_dict()), "a buffer that is saved"
    assert all(torch.equal(buffer, fresh[name]) for name, buffer in built.named_buffers()), (
        "a buffer that memory was only allocated for"
    )
    drawn = []
    for seed in (0, 0, 1):
        for p in model.parameters():
            p.fill_(float("nan"))
        model.init_weights(seed)
        assert not [name for name, p in model.named_parameters() if p.isnan().any()]
        drawn.append(torch.cat([p.flatten() for p in model.parameters()]))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    loss = model.eval()(tokens(config), tokens(config, seed=6)).item()
    assert abs(loss - math.log(config.vocab_size)) < (0.3 if config.tied_head else 0.1)


@torch.no_grad()
def logits_of(config: GPTConfig, kernel: str, dtype: torch.dtype, T: int, device: str) -> tuple[Tensor, GPT, Tensor]:
    """Logits, the model and the ids that they are of."""
    model, idx = build(config, kernel, dtype, device), tokens(config, T=T, device=device)
    return model(idx), model, idx


def gradients(
    config: GPTConfig, kernel: str, dtype: torch.dtype = torch.float32, T: int = 24, device: str = "cpu"
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradients of a mean loss."""
    logits, model, idx = logits_of(config, kernel, dtype, T, device)
    y = tokens(config, T=T, seed=6, device=device)
    model(idx, y).backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing, f"no finite gradient, with {kernel}: {missing}"
    return logits, {name: p.grad for name, p in model.named_parameters()}


def recomputed_gradients(config: GPTConfig, kernel: str = "") -> None:
    """With activation checkpointing the loss and the gradients of a training step are the same to the bit, and so are
    the random numbers after it.
    """
    model, idx, y = build(config, kernel).train(), tokens(config), tokens(config, seed=6)
    found = []
    for on in (False, True):
        model.activation_checkpointing = on
        model.zero_grad()
        torch.manual_seed(3)
        loss = model(idx, y)
        loss.backward()
        found.append(
            {"loss": loss.detach(), "random": torch.rand(3)} | {name: p.grad for name, p in model.named_parameters()}
        )
    assert not [name for name, value in found[0].items() if not torch.equal(value, found[1][name])]


def gradients_arrive(config: GPTConfig, draws: int = 16) -> None:
    """In float64 every number of every parameter gets a gradient; only rows that pad the vocabulary get none, ever.

    A batch holds every token and whole rows, so that each row of each table is looked up. Weights and batch are drawn
    again until every number was reached once: with some weights a hidden unit of a relu MLP is silent on all tokens.
    Float64, because a gradient is a sum that may nearly cancel: 7e-9 was seen in a bias whose median is 4e-4, more than
    rounding, which is below 1e-15 (a sum of terms below 1 times 2^-53)."""
    missed: dict[str, Tensor] = {}
    for draw in range(draws):
        model, V = build(config, "eager", torch.float64, seed=draw), config.vocab_size
        model(every_token(config, draw), every_token(config, draws + draw)).backward()
        for name, p in model.named_parameters():
            assert p.grad is not None and p.grad.isfinite().all(), f"no finite gradient of {name}"
            used = p.grad[:V] if name.startswith(("wte", "value_embeds", "lm_head")) else p.grad
            assert not p.grad[len(used) :].any(), f"gradient in unused rows of {name}"
            if not is_idle(config, name):
                missed[name] = missed.get(name, True) & (used.abs() < 1e-15)
        if not any(numbers.any() for numbers in missed.values()):
            return
    raise AssertionError(
        "; ".join(
            f"no gradient in {numbers.double().mean():.0%} of {name}"
            for name, numbers in missed.items()
            if numbers.any()
        )
    )


def every_token(config: GPTConfig, seed: int) -> Tensor:
    """(B, T) with every id of the vocabulary in it and T the longest row that the model reads."""
    T, V, g = config.sequence_len, config.vocab_size, torch.Generator().manual_seed(seed)
    B = -(-V // T) + 1
    ids = torch.cat((torch.arange(V), torch.randint(V, (B * T - V,), generator=g)))
    return ids[torch.randperm(B * T, generator=g)].view(B, T)


# logits; a parameter's gradient, as a share of its norm
TIGHT = {torch.float32: (2e-5, None), torch.float64: (1e-10, 1e-9)}


def kernels_agree(config: GPTConfig, names: list[str], dtype: torch.dtype = torch.float32, T: int = 24) -> None:
    """Logits as eager's, and in float64 the gradient of every parameter.

    Not in fp32: a learned scalar's gradient may nearly cancel, and rounding takes a relu's unit to the other side now
    and then. Kernels are held to their gradients in fp32 one by one, in tests/model/test_kernels.py."""
    close, share = TIGHT[dtype]

    def found(kernel: str) -> tuple[Tensor, dict[str, Tensor]]:
        return gradients(config, kernel, dtype, T) if share else (logits_of(config, kernel, dtype, T, "cpu")[0], {})

    logits, grads = found("eager")
    for kernel in names:
        other, theirs = found(kernel)
        torch.testing.assert_close(other, logits, atol=close, rtol=0, msg=lambda m: f"logits of {kernel}: {m}")
        for name, grad in grads.items():
            if not is_idle(config, name):
                assert (theirs[name] - grad).norm() < share * grad.norm(), f"gradient of {name} with {kernel}"


def bf16_is_within_rounding(config: GPTConfig, names: list[str], T: int = 24, device: str = "cpu") -> None:
    """In bf16 a kernel strays from fp32 by at most half more than eager in bf16 does (attention in fp32, everything
    around it in bf16): logits, and the gradients of matrices, whose mean error is given here since a learned scalar's
    is a sum in which almost everything cancels. And that is a few of bf16's roundings, 2^-8 each."""

    def error(kernel: str) -> tuple[float, float]:
        other, theirs = gradients(config, kernel, torch.bfloat16, T, device)
        kept = [name for name, grad in grads.items() if grad.dim() > 1]
        stray = sum(((theirs[n] - grads[n]).norm() / grads[n].norm()).item() for n in kept) / len(kept)
        return ((other - logits).norm() / logits.norm()).item(), stray

    logits, grads = gradients(config, "eager", T=T, device=device)
    reference = error("eager")
    assert 0 < reference[0] < 8 * 2.0**-8 and reference[1] < 0.1, reference
    for kernel in names:
        assert all(mine < 1.5 * its for mine, its in zip(error(kernel), reference)), (kernel, error(kernel), reference)


def counts(config: GPTConfig) -> None:
    """Parameters, FLOPs and cache bytes as the accounting says. The nominal count of attention is
    the full T x window rectangle; eager with full windows does compute the whole square, so there formula and machine
    agree."""
    config = dataclasses.replace(config, window_pattern="L")
    model = GPT(config, kernel="eager").eval()
    model.init_weights(0)
    p = accounting.n_params(config)
    parts = ("wte", "wpe", "tables", "lm_head", "matrices", "vectors", "scalars")
    assert p["total"] == sum(q.numel() for q in model.parameters()) == sum(p[part] for part in parts)
    in_blocks = sum(q.numel() for name, q in model.named_parameters() if name.startswith("h.") and q.dim() == 2)
    assert p["matrices"] == in_blocks and p["scaling"] == in_blocks + model.wte.weight.numel()
    idx = torch.zeros(2, config.sequence_len, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(idx, idx).backward()
    said, seen = accounting.train_flops_per_token(config) * idx.numel(), counter.get_total_flops()
    assert said == seen, f"{said:,} FLOPs are counted, {seen:,} are done, with {chosen(config) or 'the defaults'}"
    for dtype in (torch.float32, torch.bfloat16):
        cache = KVCache(config, rows=3, capacity=7, dtype=dtype)
        tensors = [
            t for value in vars(cache).values() if isinstance(value, list) for t in value if isinstance(t, Tensor)
        ]
        assert sum(t.nbytes for t in tensors) == 3 * 7 * accounting.kv_bytes_per_token(config, dtype.itemsize)


@torch.no_grad()
def decode_counts(config: GPTConfig) -> None:
    """FLOPs of one token over a cache; `context` counts the keys attended, the new token's own among them."""
    config = dataclasses.replace(config, window_pattern="L")
    model, idx = build(config), tokens(config, B=1)
    cache = KVCache(config, capacity=64)
    model(idx, cache=cache)
    with FlopCounterMode(display=False) as counter, nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        model(idx[:, 1:2], cache=cache)
    assert counter.get_total_flops() == accounting.decode_flops_per_token(config, idx.size(1) + 1)


def saved_and_loaded(config: GPTConfig, folder: Path) -> None:
    """A checkpoint on disk gives back the same logits to the bit, from the config in its JSON and the weights in its
    safetensors.
    """
    model, idx = build(config), tokens(config)
    path = checkpoint.save(
        folder, 1, weights=model.state_dict(), optimizer=None, meta={"model_config": to_json(config)}, runtime=CPU
    )
    checkpoint.verify(path)
    loaded = from_json(GPTConfig, checkpoint.load_meta(path)["model_config"])
    copy = GPT(loaded).eval()
    copy.load_state_dict(checkpoint.load_weights(path), strict=True)
    assert loaded == config
    with torch.no_grad():
        assert torch.equal(copy(idx), model(idx))


def overfits(config: GPTConfig, steps: int = 80) -> None:
    """One batch is learned from the real initialisation by torch's plain AdamW."""
    model = GPT(config)
    model.init_weights(0)
    idx, y = tokens(config, T=12), tokens(config, T=12, seed=6)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0), []
    while len(losses) < steps and (not losses or losses[-1] > 0.3):
        loss = model.train()(idx, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] <= 0.3, losses[::10]


def every_recipe_steps(config: GPTConfig) -> None:
    """One step of every recipe moves every parameter that matters, to finite values."""
    start = build(config)
    start(tokens(config), tokens(config, seed=6)).backward()
    for recipe in RECIPES:
        model = copy.deepcopy(start)
        for p, own in zip(start.parameters(), model.parameters()):
            own.grad = p.grad.clone()
        plan = SimpleNamespace(recipe=recipe, batch_scale=1.0, weight_decay=0.1, model=config)
        optimizer = MuonAdamW(param_groups(model, BaseTrainConfig(), plan), CPU)
        optimizer.step()
        stuck = [
            name
            for (name, p), before in zip(model.named_parameters(), start.parameters())
            if not p.isfinite().all() or (torch.equal(p, before) and not is_idle(config, name))
        ]
        assert not stuck, f"{recipe} does not train {stuck}"


def slopes_are_gradients(config: GPTConfig) -> None:
    """Float64 finite differences through the whole model on eager: for every kind of parameter, along a random
    direction of all layers' parameters of that kind."""
    model = copy.deepcopy(build(config, "eager", torch.float64))
    idx, y = tokens(config, B=1, T=10), tokens(config, B=1, T=10, seed=6)
    loss = model(idx, y)
    assert loss.dtype == torch.float64
    loss.backward()
    kinds: dict[str, list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        kinds.setdefault(".".join(part for part in name.split(".") if not part.isdigit()), []).append(p)
    g, step = torch.Generator().manual_seed(3), 1e-7  # so small that hardly any relu changes its side
    for kind, parameters in kinds.items():
        direction = [torch.randn(p.shape, generator=g, dtype=torch.float64) for p in parameters]

        @torch.no_grad()
        def at(distance: float) -> float:
            for p, d in zip(parameters, direction):
                p += distance * d
            value = model(idx, y).item()
            for p, d in zip(parameters, direction):
                p -= distance * d
            return value

        slope = (at(step) - at(-step)) / (2 * step)
        want = sum((p.grad * d).sum().item() for p, d in zip(parameters, direction))
        assert abs(slope - want) < 1e-6 * (1 + abs(want)), f"{kind}: slope {slope}, gradient {want}"


def drops_only_in_training(config: GPTConfig, kernel: str = "") -> None:
    """eval() draws nothing. train() does where there is a dropout, by torch's generator, and otherwise equals
    eval().
    """
    model, idx = build(config, kernel), tokens(config)
    drops = any(getattr(config, f.name) for f in dataclasses.fields(config) if f.name.endswith("_dropout"))

    def logits(seed: int, training: bool) -> Tensor:
        torch.manual_seed(seed)
        return model.train(training)(idx).detach()

    still, first = logits(1, False), logits(1, True)
    assert torch.equal(still, logits(2, False)) and torch.equal(first, logits(1, True))
    assert torch.equal(first, logits(2, True)) != drops and torch.equal(first, still) != drops
    model.train()(idx, idx).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def fast(config: GPTConfig) -> None:
    """Everything that is cheap, on every kernel that can run the model."""
    names = kernels(config)
    causal(config)
    if config.document_mask:
        documents_apart(config)
    cache_equals_forward(config)
    init_fills(config)
    gradients_arrive(config)
    kernels_agree(config, names)
    kernels_agree(config, names, torch.float64)
    counts(config)
    drops_only_in_training(config)
    recomputed_gradients(config)
    every_recipe_steps(config)
