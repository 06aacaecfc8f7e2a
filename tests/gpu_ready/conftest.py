"""Tensors on the meta device, which the model is made to take for a GPU's."""

import sys
from pathlib import Path

import pytest

# demands; axes, the values of every flag
sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "contracts")]
pytest.register_assert_rewrite("demands")

from demands import flash_attn_func, flex_attention, fused  # noqa: E402

from nanolab.model.kernels import (  # noqa: E402
    choice,
    fa3,
    flex,
    sdpa,  # noqa: E402
)


@pytest.fixture
def gpu(monkeypatch):
    """A function capability -> None: from there on the meta device is a GPU of it, on which every package is
    installed.
    """

    def put(capability):
        for module in (sdpa, flex, fa3):
            monkeypatch.setattr(module, "on_cuda", lambda x: x.device.type == "meta")
        for module in (choice, fa3):
            monkeypatch.setattr(module, "capability_of", lambda device_type: capability)
        monkeypatch.setattr(fa3, "probed", lambda device_type: (flash_attn_func, ""))
        monkeypatch.setattr(flex, "flex_attention", flex_attention)
        monkeypatch.setattr(flex, "create_block_mask", lambda *args, **named: object())
        monkeypatch.setattr(flex, "_compiled", lambda function: function)
        monkeypatch.setattr(sdpa.F, "scaled_dot_product_attention", fused(capability))
        flex._blocks.cache_clear()

    yield put
    flex._blocks.cache_clear()
