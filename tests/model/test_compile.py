"""The training step is one graph for torch.compile, as it runs on GPUs: nothing in forward or backward leaves it."""

import pytest
import torch

from nanolab.model.config import GPTConfig
from nanolab.model.gpt import cross_entropy

MODELS = {
    "default": {},
    "latent, sinks": dict(attention="mla", value_embeds=False, softmax="sink", gate="head"),
    "activation checkpointing": dict(mlp_dropout=0.1, resid_dropout=0.1),
    "documents, learned positions": dict(
        document_mask=True, bos=3, positions="learned", mlp="swiglu", norm="layernorm", bias="qkv,norm"
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_one_graph(make_gpt, name):
    """Traced with the eager backend: the same loss and gradients to the last digits, and no graph break (fullgraph
    raises on one).
    """
    model = make_gpt(
        GPTConfig(sequence_len=32, vocab_size=64, n_layer=3, n_head=2, n_embd=32, window_size=9, **MODELS[name]),
        kernel="sdpa",
    )
    model.loss = cross_entropy  # the blocked loss is for CPUs, which do not compile
    idx = torch.randint(64, (2, 32), generator=torch.Generator().manual_seed(0))
    results = []
    model.activation_checkpointing = name == "activation checkpointing"
    for step in (model, torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)):
        model.zero_grad()
        torch.manual_seed(1)
        loss = step(idx, idx, reduction="sum")
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    torch._dynamo.reset()
    torch.testing.assert_close(*results)
