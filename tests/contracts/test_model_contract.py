"""What every attention kernel must do inside every shape of model. A new entry of KERNELS is tested by being there."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nanolab.config import GPTConfig
from nanolab.inference.cache import KVCache
from nanolab.model.accounting import n_params, train_flops_per_token
from nanolab.model.attention import KERNELS
from nanolab.model.gpt import GPT

# name: config, windows of the layers (None: the config's own; S is never below 128, so tiny ones are set by hand), B, T
MODELS = {
    "plain": (GPTConfig(sequence_len=32, vocab_size=64, n_layer=2, n_head=2, n_kv_head=2, n_embd=32), None, 2, 32),
    "one layer, odd row, odd vocabulary": (GPTConfig(sequence_len=17, vocab_size=37, n_layer=1, n_head=1, n_kv_head=1, n_embd=34), None, 3, 17),
    "shared heads, tiny windows": (GPTConfig(sequence_len=24, vocab_size=64, n_layer=4, n_head=4, n_kv_head=2, n_embd=64), [1, 3, 2, 24], 2, 21),
    "one shared head, past a block": (GPTConfig(sequence_len=640, vocab_size=64, n_layer=3, n_head=2, n_kv_head=1, n_embd=32), None, 1, 301),
}


@pytest.fixture(params=MODELS)
def case(request):
    return MODELS[request.param]


@pytest.fixture(params=KERNELS)
def kernel(request):
    return request.param


def idle(config: GPTConfig) -> set[str]:
    """Weights without effect: with one or two layers backout takes a share of the last layer's own output, which the norm undoes."""
    return {"backout_lambda"} if config.n_layer <= 2 else set()


def build(make_gpt, case, kernel, **arguments):
    config, windows, B, T = case
    model = make_gpt(config, kernel=kernel, **arguments)
    model.windows = windows or model.windows
    g = torch.Generator().manual_seed(5)
    return model, torch.randint(config.vocab_size, (B, T), generator=g), torch.randint(config.vocab_size, (B, T), generator=g)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shape_dtype_and_soft_cap(make_gpt, case, kernel, dtype):
    model, idx, y = build(make_gpt, case, kernel, compute_dtype=dtype)
    logits, loss = model(idx), model(idx, y)
    assert logits.shape == (*idx.shape, model.config.vocab_size) and logits.dtype == torch.float32
    assert logits.abs().max() <= model.config.softcap
    assert loss.shape == () and loss.dtype == torch.float32 and loss.isfinite()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_causal_to_the_bit(make_gpt, case, kernel, dtype):
    model, idx, _ = build(make_gpt, case, kernel, compute_dtype=dtype)
    before = model(idx)
    for t in {0, 1, idx.size(1) // 2, idx.size(1) - 1}:
        changed = idx.clone()
        changed[:, t] = (changed[:, t] + 1) % model.config.vocab_size
        after = model(changed)
        assert torch.equal(before[:, :t], after[:, :t]), f"token {t} changed an earlier logit"
        assert (before[:, t] != after[:, t]).any(), f"token {t} does not matter"


@torch.no_grad()
def test_cache_equals_full_forward(make_gpt, case, kernel):
    """Prefill of a third, another chunk, then a token at a time."""
    model, idx, _ = build(make_gpt, case, kernel)
    B, T = idx.shape
    cache = KVCache(model.config, B, limit=T)
    sizes = [T // 3, T - T // 3 - 5, 1, 1, 1, 1, 1]
    got = torch.cat([model(chunk, cache=cache) for chunk in idx.split(sizes, dim=1)], 1)
    torch.testing.assert_close(got, model(idx), atol=2e-5, rtol=0)


def test_init_fills_every_parameter(case):
    model = GPT(case[0])
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(float("nan"))
    model.init_weights(seed=0)
    assert not [n for n, p in model.named_parameters() if p.isnan().any()]
    assert not list(model.buffers()), "a buffer would need initialising, saving and a test"


def test_gradient_reaches_every_parameter(make_gpt, case, kernel):
    """Every row of every matrix, and every scalar, matters; of a table the rows that were looked up, and no other."""
    model, idx, y = build(make_gpt, case, kernel)
    model(idx, y).backward()
    V, noise = model.config.vocab_size, 1e-8  # of a mean loss in fp32
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
        size = p.grad.abs() if p.dim() == 1 else p.grad.abs().sum(1)
        used = torch.ones_like(size, dtype=torch.bool)
        if name.startswith(("wte", "value_embeds")):
            used = torch.zeros_like(used).index_fill(0, idx.unique(), True)
        elif name == "lm_head.weight":
            used = torch.arange(len(size)) < V
        assert name in idle(model.config) or (size[used] > noise).all(), name
        assert (size[~used] == 0).all(), name


def test_gradients_agree_between_kernels(make_gpt, case, kernel):
    grads = []
    for name in ("eager", kernel):
        model, idx, y = build(make_gpt, case, name)
        model(idx, y).backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    for name in set(grads[0]) - idle(case[0]):
        assert (grads[1][name] - grads[0][name]).norm() < 1e-4 * grads[0][name].norm(), name


def test_one_batch_is_overfitted(case, kernel):
    """From the real initialisation, in which the residual projections are zero, with torch's plain AdamW."""
    config, windows, B, T = case
    model = GPT(config, kernel=kernel)
    model.windows = windows or model.windows
    model.init_weights(seed=0)
    T = min(T, 16)
    g = torch.Generator().manual_seed(5)
    idx = torch.randint(config.vocab_size, (B, T + 1), generator=g)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=0.02, betas=(0.9, 0.95), weight_decay=0.0), []
    for _ in range(30):
        loss = model(idx[:, :-1], idx[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(torch.tensor(float(config.vocab_size)).log().item(), abs=0.02), "a fresh model is uniform"
    assert losses[-1] < 0.1, losses[::6]


def test_parameters_and_flops_are_as_counted(case):
    """The nominal count of attention is the full T x window rectangle, forward and twice backward; a causal triangle costs
    half of it. The eager kernel with full windows does compute the whole square, so there formula and machine agree."""
    c = case[0]
    config = GPTConfig(**{**vars(c), "window_pattern": "L"})
    model = GPT(config, kernel="eager")
    model.init_weights(seed=0)
    assert sum(p.numel() for p in model.parameters()) == n_params(config)["total"]
    idx = torch.zeros(2, config.sequence_len, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(idx, idx).backward()
    assert counter.get_total_flops() == train_flops_per_token(config) * idx.numel()


def test_state_dict_round_trip(make_gpt, case, kernel):
    model, idx, _ = build(make_gpt, case, kernel)
    copy = GPT(case[0], kernel=kernel)
    copy.windows = model.windows
    copy.load_state_dict(model.state_dict())
    assert torch.equal(copy(idx), model(idx))
