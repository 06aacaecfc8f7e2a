"""A decode step that a CUDA graph can hold: nothing comes from the host, nothing waits for the device. Without a GPU:
the meta device stands for it.

Capturing refuses or, worse, freezes what the host contributes: constants that are copied, sizes that depend on values.
"""

import axes
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from nanolab.inference.cache import KVCache
from nanolab.inference.prepare import prepare_for_inference
from nanolab.inference.recorded import fixed_step
from nanolab.model.config import GPTConfig
from nanolab.model.gpt import GPT

aten = torch.ops.aten
WAIT = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten.is_nonzero,
    aten.equal,
    aten.masked_select,
    aten._unique2,
    aten.item,
}
# whatever device they name
HOST = {torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy, torch.frombuffer, torch.Tensor.new_tensor}


class OnTheDevice(TorchDispatchMode):
    """Refuses every operator that reads from the host, or leaves the host to wait for the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        assert function.overloadpacket not in WAIT, f"{name}: the host waits for the device"
        given = [x for x in tree_iter((args, kwargs or {})) if isinstance(x, torch.Tensor)]
        assert not any(x.device.type == "cpu" for x in given), f"{name}: reads a tensor of the host"
        if function.overloadpacket in (aten.index, aten.index_put, aten.index_put_):
            masks = [x for x in tree_iter(args[1]) if x is not None and x.dtype in (torch.bool, torch.uint8)]
            assert not masks, f"{name}: a mask as an index, whose sum the host waits for"
        if function._schema.is_mutable:
            return function(*args, **(kwargs or {}))
        key = function, shapes(args), shapes(list((kwargs or {}).items()))
        if key not in FOUND:
            out = function(*args, **(kwargs or {}))
            assert not any(x.device.type == "cpu" for x in tree_iter(out) if isinstance(x, torch.Tensor)), (
                f"{name}: gives a tensor of the host"
            )
            FOUND[key] = out
        return tree_map_only(torch.Tensor, on_gpu, FOUND[key])


# The shapes that an operator gives for shapes: torch finds them in Python, at ten times the cost of a look.
FOUND: dict[tuple, object] = {}


def shapes(x: object) -> object:
    if isinstance(x, torch.Tensor):
        return x.shape, x.stride(), x.dtype
    return tuple(map(shapes, x)) if isinstance(x, (list, tuple)) else (type(x), x)


class NoConstants(TorchFunctionMode):
    """Refuses what makes a tensor of Python's numbers: of these no operator is seen."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        assert function not in HOST, f"{function}: numbers of the host are copied"
        return function(*args, **(kwargs or {}))


def on_gpu(x):
    """A tensor like this one on a device that is not the host's. (Fake tensors on "cuda" cannot be indexed where torch
    was built without CUDA.)
    """
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def move(model: nn.Module) -> None:
    """The model on that device, with what else modules hold of tensors: a prepared model makes them where its weights
    are.
    """
    for module in model.modules():
        for name, p in module._parameters.items():
            module._parameters[name] = None if p is None else nn.Parameter(on_gpu(p), requires_grad=False)
        for name, b in module._buffers.items():
            module._buffers[name] = None if b is None else on_gpu(b)
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                setattr(module, name, on_gpu(value))
            elif isinstance(value, tuple) and value and all(isinstance(x, torch.Tensor) for x in value):
                setattr(module, name, tuple(map(on_gpu, value)))


@torch.inference_mode()
def decodes(config: GPTConfig, rows: int, prepared: bool) -> None:
    """The step of a bucket, and the cache's own, as the device sees them."""
    model = GPT(config, torch.bfloat16).eval().requires_grad_(False)
    for p in model.parameters():
        p.zero_()
    model = prepare_for_inference(model) if prepared else model
    cache = KVCache(model.config, rows, capacity=16, dtype=torch.bfloat16)
    model(torch.zeros(rows, 3, dtype=torch.int64), cache=cache)
    names = sorted(cache.carry)
    move(model)
    cache.pos, cache.carry = on_gpu(cache.pos), {name: on_gpu(x) for name, x in cache.carry.items()}
    cache.k, cache.v = ([on_gpu(x) for x in part] for part in (cache.k, cache.v))
    small = [torch.empty(rows, 1, dtype=torch.int64, device="meta"), cache.pos, *(cache.carry[name] for name in names)]
    inputs = [*small, *(x[:, :16] for x in (*cache.k, *cache.v))]
    with NoConstants(), OnTheDevice():
        logits, *left = fixed_step(model, cache.rings, names)(*inputs)
        plain = model(inputs[0], cache=cache, last_only=True)[:, -1]
    assert (
        logits.shape == plain.shape == (rows, model.config.vocab_size)
        and logits.device.type == plain.device.type == "meta"
    )
    assert [x.shape for x in left] == [cache.carry[name].shape for name in names]


@pytest.mark.slow
@pytest.mark.fault("core D4")
@pytest.mark.parametrize("name", axes.singles())
def test_a_decode_step_copies_nothing_from_the_host(name):
    decodes(axes.singles()[name], rows=2, prepared=False)
    decodes(axes.singles()[name], rows=1, prepared=True)


@pytest.mark.slow
def test_a_decode_step_of_every_pair_copies_nothing_from_the_host():
    for row in axes.rows()[0]:
        decodes(axes.config(axes.settings(row)), rows=2, prepared=True)


@pytest.mark.parametrize(
    "step",
    [
        lambda x: x + torch.tensor([1.0, 2.0], device="meta"),
        lambda x: x + torch.arange(2),
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.cpu(),
        lambda x: bool((x > 0).all()),
        lambda x: x * torch.tensor(2.0),
    ],
)
def test_the_check_sees_what_a_capture_would_not_take(step):
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), NoConstants(), OnTheDevice():
        step(torch.empty(2, device="meta"))
