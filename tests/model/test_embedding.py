"""Entries of EMBEDDINGS, computed by hand, token by token."""

import pytest
import torch

from nanolab.inference.cache import KVCache
from nanolab.model.config import GPTConfig
from nanolab.model.context import AttnContext
from nanolab.model.variants.embedding import BigramEmbedding

CONFIG = dict(
    sequence_len=16, vocab_size=300, n_layer=2, n_head=2, n_embd=32, bos=7, embedding="bigram"
)  # ids above 255 and a table whose height is no divisor of the multiplier


def by_hand(e, table, ids, starts):
    """The rows of one text; whole numbers of Python, which do not overflow."""
    out, before = [], -1
    for t, (token, start) in enumerate(zip(ids, starts)):
        before = -1 if start or t == 0 else before
        out.append(e[t] + table[(2654435761 * before + token) % len(table)])
        before = token
    return torch.stack(out)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("rows", [0, 23])
def test_bigrams_add_the_row_of_their_hash(rows, mask):
    c = GPTConfig(**CONFIG, bigram_rows=rows, document_mask=mask)
    part, g = BigramEmbedding(c), torch.Generator().manual_seed(0)
    torch.no_grad()(part.init_constants)()
    assert part.table.weight.shape == (rows or 320, 32) and not part.table.weight.any()
    with torch.no_grad():
        part.table.weight.normal_(generator=g)
    ids = torch.randint(300, (3, 16), generator=g)
    ids[:, 0], ids[1, 9] = 7, 7
    e = torch.randn(3, 16, 32, generator=g)
    ctx = AttnContext(torch.arange(16)[None], starts_BT=ids == 7 if mask else None)
    for b in range(3):
        wanted = by_hand(e[b], part.table.weight, ids[b].tolist(), (ids[b] == 7).tolist() if mask else [False] * 16)
        assert torch.equal(part(e, ids, ctx)[b], wanted)


def test_the_pair_across_two_passes_is_known(make_gpt):
    model = make_gpt(GPTConfig(**CONFIG)).eval()
    ids = torch.randint(300, (2, 12), generator=torch.Generator().manual_seed(1))
    cache = KVCache(model.config, rows=2, capacity=12)
    with torch.no_grad():
        parts = [model(part, cache=cache) for part in (ids[:, :5], ids[:, 5:6], ids[:, 6:])]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(ids), atol=1e-5, rtol=0)
        without = model(torch.cat((ids[:, :4], ids[:, 3:4], ids[:, 5:]), dim=1))
    assert (without[:, 5] - parts[1][:, 0]).abs().max() > 1e-3  # the pair matters
