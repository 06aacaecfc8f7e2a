"""What an embedding holds beside the token's own row: one class per way, called (e_BTC, idx_BT, ctx) -> e_BTC before
the first layer. Dims: B batch, T tokens, C width, R rows of a table.

What an entry has to know of the tokens before this pass goes through `ctx.carry` and `set_carry`; `group` is the
optimizer group of its parameters."""

import torch
from torch import Tensor, nn

from nanolab.model.config import GPTConfig, padded_vocab
from nanolab.model.context import AttnContext
from nanolab.model.gpt import Embedding, Identity

MULTIPLIER = 2654435761  # Knuth's, The Art of Computer Programming 3, section 6.4; times an id it stays within int64


class TokenEmbedding(Identity):
    """e = E[x_t], the token's own row. Vaswani et al., arXiv 1706.03762, section 3.4."""


class BigramEmbedding(nn.Module):
    """e + B[(a x_{t-1} + x_t) mod R], a hashed table of token pairs that starts at 0; x_{-1} = -1. modded-nanogpt; hash
    embeddings, arXiv 1709.03933.

    The first token of a row has none before it, and with a document mask neither has the first of a document.
    """

    group = "value_embeds"

    def __init__(self, c: GPTConfig):
        super().__init__()
        self.table = Embedding(c.bigram_rows or padded_vocab(c), c.n_embd, kind="constant")

    def init_constants(self) -> None:
        self.table.weight.zero_()

    def forward(self, e_BTC: Tensor, idx: Tensor, ctx: AttnContext) -> Tensor:
        before = torch.cat((ctx.carry("bigram", torch.full_like(idx[:, :1], -1)), idx[:, :-1]), dim=1)
        ctx.set_carry("bigram", idx[:, -1:])
        if ctx.starts_BT is not None:
            before = before.masked_fill(ctx.starts_BT, -1)
        rows_BT = (MULTIPLIER * before + idx) % self.table.num_embeddings
        return e_BTC + self.table.look_up(rows_BT, e_BTC.dtype)


EMBEDDINGS = {"token": TokenEmbedding, "bigram": BigramEmbedding}
