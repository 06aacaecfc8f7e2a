"""Every contract over every value of every axis, one at a time on a tiny model, and over other shapes of model."""

import dataclasses

import axes
import contracts
import pytest
import torch

from nanolab.model.config import GPTConfig

SHAPES = {
    "one layer, odd row, odd vocabulary": GPTConfig(sequence_len=25, vocab_size=37, n_layer=1, n_head=1, n_embd=34),
    "two layers, value embeddings": GPTConfig(
        sequence_len=32, vocab_size=64, n_layer=2, n_head=2, n_embd=32, window_size=3
    ),
    "three heads": GPTConfig(
        sequence_len=32,
        vocab_size=50,
        n_layer=3,
        n_head=3,
        attention="mqa",
        n_embd=36,
        positions="alibi",
        value_embeds=False,
    ),
}
CONFIGS = axes.singles() | SHAPES


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


def test_shapes_and_dtypes(config):
    contracts.shapes_and_dtypes(config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_causal_to_the_bit(config, dtype):
    for kernel in contracts.kernels(config, dtype):
        contracts.causal(config, kernel, dtype)


def test_cache_equals_full_forward(config):
    contracts.cache_equals_forward(config)


def test_init_fills_every_parameter(config):
    contracts.init_fills(config)


@pytest.mark.slow
def test_gradients_arrive(config):
    contracts.gradients_arrive(config)


@pytest.mark.slow
def test_recomputed_gradients_are_the_same(config):
    for kernel in contracts.kernels(config) if config.attn_dropout else [""]:
        contracts.recomputed_gradients(config, kernel)


def test_kernels_agree(config):
    contracts.kernels_agree(config, contracts.kernels(config))
    contracts.kernels_agree(config, contracts.kernels(config), torch.float64)


@pytest.mark.slow
def test_bf16_is_within_rounding(config):
    contracts.bf16_is_within_rounding(config, contracts.kernels(config, torch.bfloat16))


@pytest.mark.slow
def test_one_batch_is_overfitted(config):
    contracts.overfits(config)


def test_every_recipe_takes_a_step(config):
    contracts.every_recipe_steps(config)


@pytest.mark.slow
def test_parameters_flops_and_bytes_are_as_counted(config):
    contracts.counts(config)
    contracts.decode_counts(config)


def test_saved_and_loaded(config, tmp_path):
    contracts.saved_and_loaded(config, tmp_path)


@pytest.mark.slow
def test_gradients_are_slopes(config):
    contracts.slopes_are_gradients(config)


@pytest.mark.slow
def test_dropout_only_in_training(config):
    for kernel in contracts.kernels(config) if config.attn_dropout else [""]:
        contracts.drops_only_in_training(config, kernel)


@pytest.mark.parametrize("positions", ["rope", "alibi", "learned"])
def test_documents_apart(positions):
    config = axes.config(dict(document_mask=True, positions=positions))
    for kernel in contracts.kernels(config):
        contracts.documents_apart(config, kernel)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{}, dict(positions="alibi", softmax="sink"), dict(attention="mla", document_mask=True)], ids=axes.label
)
def test_rows_of_several_blocks(changes):
    """Longer than the blocks of rows that kernels work on, with windows shorter and longer than a block."""
    config = dataclasses.replace(
        axes.config(changes), sequence_len=320, n_layer=3, window_size=150, window_pattern="SSL"
    )
    contracts.kernels_agree(config, contracts.kernels(config), T=301)
    contracts.cache_equals_forward(config, T=301)
    for kernel in contracts.kernels(config):
        contracts.causal(config, kernel, T=301)


@pytest.mark.gpu
def test_on_a_gpu(config):
    """Not flex, whose every compilation takes many seconds: tests/model/test_kernels.py runs it on every rule."""
    for kernel in set(contracts.kernels(config, torch.bfloat16, "cuda")) - {"flex"}:
        contracts.bf16_is_within_rounding(config, [kernel], device="cuda")
        contracts.causal(config, kernel, torch.bfloat16, device="cuda")
    contracts.cache_equals_forward(config, device="cuda")
