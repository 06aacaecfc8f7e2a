"""The 8-bit products as cuBLASLt wants them, on tensors without numbers."""

import pytest
import torch
from demands import Demands, aten

from nanolab.model import fp8
from nanolab.model.config import GPTConfig
from nanolab.model.gpt import GPT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 24, 4096])
def test_every_product_of_a_layer(tokens, dtype):
    """Forward and both gradients, for numbers of tokens that are no multiple of 16 too."""
    with torch.device("meta"):
        layer, x = fp8.Float8Linear(128, 384, bias=True), torch.empty(2, tokens, 128, dtype=dtype, requires_grad=True)
    with Demands() as demands:
        layer(x).float().sum().backward()
    assert demands.counts[aten._scaled_mm.default] == 3
    assert x.grad.shape == x.shape and layer.weight.grad.dtype == torch.float32


def test_a_step_of_a_converted_model(gpu):
    gpu((9, 0))
    with torch.device("meta"):
        model, idx = (
            GPT(GPTConfig(n_layer=2, n_head=2, n_embd=128, sequence_len=64, vocab_size=509), torch.bfloat16),
            torch.empty(3, 40, dtype=torch.long),
        )
    assert fp8.convert(model) > 8
    model.place("cuda")
    with Demands() as demands:
        model(idx, idx, reduction="sum").backward()
    assert demands.counts[aten._scaled_mm.default] % 3 == 0


@pytest.mark.parametrize("inputs,outputs", [(120, 128), (128, 120)])
def test_sizes_that_cublas_would_refuse_are_refused_by_name(inputs, outputs):
    with torch.device("meta"):
        layer, x = fp8.Float8Linear(inputs, outputs, bias=False), torch.empty(32, inputs)
    with pytest.raises(ValueError, match=f"{outputs}, {inputs}.*multiples of 16"):
        layer(x)
