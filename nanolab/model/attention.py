"""The attention layer: what makes queries, keys and values, what is done to them, and the rules that a kernel follows.

Dims: B batch, T tokens, S keys, H query heads, G key/value heads, D head size, C width. The product itself is a
kernel's (kernels/); latent attention is in variants/latent.py, which also holds the table of attention kinds."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nanolab.model.blocks import Linear, Pass
from nanolab.model.config import GPTConfig
from nanolab.model.kernels.reference import cached
from nanolab.model.kernels.spec import Keys, Rules, seen
from nanolab.model.variants.gates import GATES
from nanolab.model.variants.parts import VE_GATE_CHANNELS, ValueMix, has_value_embedding
from nanolab.model.variants.positions import POSITIONS, ROTATIONS, Angles
from nanolab.model.variants.qk_norm import QK_NORMS
from nanolab.model.variants.softmax import NORMALISERS

WHOLE_ROW = 1 << 40  # the window of a layer without one, also on rows longer than those trained on


def windows(c: GPTConfig) -> list[int]:
    """Keys before itself that a query sees, per layer. A window of w lets it see itself and the w keys before it."""
    short = c.window_size or -(-c.sequence_len // 4 // 128) * 128
    if c.window_pattern == "rope":
        return [short if POSITIONS[c.positions].turns(c, i) else c.sequence_len for i in range(c.n_layer)]
    letters = [c.window_pattern[i % len(c.window_pattern)] for i in range(c.n_layer)]
    return [short if letter == "S" else c.sequence_len for letter in letters[:-1]] + [c.sequence_len]


@dataclass
class Reading:
    """One forward pass: what every layer needs to know of its tokens."""

    pos_BT: Tensor  # B is 1 where all rows are alike
    angles: Angles | None = None  # of the layers that turn
    slopes: Tensor | None = None  # (H,)
    first_BT: Tensor | None = None  # first position of the token's document, with a document mask
    starts_BT: Tensor | None = None  # whether the token begins a document, with a document mask
    cache: object | None = None  # inference.cache.KVCache
    by_window: dict[int, Keys] = field(default_factory=dict)  # made once for all layers with the same window

    def keys(self, layer: int, rules: Rules) -> Keys:
        """Of the keys that `append` has returned for this layer."""
        if rules.window not in self.by_window:
            k_pos, all_stored = self.cache.positions(layer, self.pos_BT.size(1))
            all_seen = (
                all_stored and self.pos_BT.size(1) == 1 and k_pos.size(1) <= rules.window + 1 and rules.first_BT is None
            )
            self.by_window[rules.window] = Keys(self.pos_BT, k_pos, seen(rules, self.pos_BT, k_pos), all_seen)
        return self.by_window[rules.window]

    def append(self, layer: int, a_BTGD: Tensor, b_BTGD: Tensor) -> tuple[Tensor, Tensor]:
        """What a layer caches of the new tokens -> the same of all tokens so far."""
        return (a_BTGD, b_BTGD) if self.cache is None else self.cache.append(layer, a_BTGD, b_BTGD)

    def left(self, name: str, default: Tensor) -> Tensor:
        """What the last pass over these rows left under `name`, (B, 1, ...), or `default`."""
        return default if self.cache is None else self.cache.left.get(name, default)

    def leave(self, name: str, value: Tensor) -> None:
        """Leave (B, 1, ...) for the next pass over these rows."""
        if self.cache is not None:
            self.cache.left[name] = value.clone()  # not a view of all tokens of the pass


def unturned(x: Tensor, angles: Angles | None) -> Tensor:
    return x


def turning(c: GPTConfig, layer: int):
    """The function (x_BTHD, angles) -> x_BTHD that gives queries and keys of this layer their positions."""
    return ROTATIONS[c.rope_layout] if POSITIONS[c.positions].turns(c, layer) else unturned


class Core(nn.Module):
    """q, k, v -> y by the layer's rules. Scores are scaled by 1/sqrt(width)."""

    def __init__(self, c: GPTConfig, layer: int, width: int):
        super().__init__()
        self.layer, self.normaliser = layer, NORMALISERS[c.normaliser](c)
        self.window = windows(c)[layer] if windows(c)[layer] < c.sequence_len else WHOLE_ROW
        self.scale, self.softcap, self.dropout = 1 / math.sqrt(width), c.score_softcap, c.attn_dropout

    def rules(self, slopes: Tensor | None, first_BT: Tensor | None, dropout: float) -> Rules:
        return Rules(self.window, self.scale, self.normaliser(), slopes, self.softcap, dropout, first_BT)

    def needs(self, c: GPTConfig, attention_widths: tuple[int, int]) -> frozenset[str]:
        """What a kernel must offer for this layer, out of rules.NEEDS. attention_widths: channels of q.k and of p v."""
        q_width, v_width = attention_widths
        first = torch.zeros(1, 1) if c.document_mask else None
        rules = self.rules(POSITIONS[c.positions].slopes(c), first, self.dropout)
        return rules.needs(c.sequence_len) | ({"value size"} if v_width != q_width else set())

    def forward(self, q_BTHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, reading: Reading, kernel) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        rules = self.rules(reading.slopes, reading.first_BT, dropout)
        if (
            reading.cache is None or k_BSGD.size(1) == q_BTHD.size(1) > 1
        ):  # nothing was cached before: plain causal attention
            return kernel(q_BTHD, k_BSGD, v_BSGD, rules)
        return cached(q_BTHD, k_BSGD, v_BSGD, rules, reading.keys(self.layer, rules))


class CausalSelfAttention(nn.Module):
    """softmax(q k^T / sqrt(D)) v with heads of their own keys and values. Vaswani et al., arXiv 1706.03762."""

    def __init__(self, c: GPTConfig, layer: int):
        super().__init__()
        H, G, D, bias = c.n_head, c.n_kv_head, c.head_dim, c.has_bias("qkv")
        self.layer, self.shape, self.kv_shape = layer, (H, D), (G, D)
        self.c_q = Linear(c.n_embd, H * D, bias)
        self.c_k = Linear(c.n_embd, G * D, bias)
        self.c_v = Linear(c.n_embd, G * D, bias)
        self.value_mix = ValueMix(G) if has_value_embedding(c, layer) else Pass()
        self.qk_norm = QK_NORMS[c.qk_norm](c, D, D)
        self.gain = c.qk_gain**2  # of q and of k, in one multiplication
        self.turn = turning(c, layer)
        self.core = Core(c, layer, D)
        self.gate = GATES[c.gate](c)
        self.c_proj = Linear(H * D, c.n_embd, c.has_bias("out"))

    @staticmethod
    def matrices(c: GPTConfig, layer: int) -> list[tuple[int, int]]:
        """(outputs, inputs) of every matrix; of these, `biased` have a bias with --bias qkv, the last one with --bias
        out.
        """
        C, kv = c.n_embd, c.n_kv_head * c.head_dim
        gates = [(c.n_kv_head, VE_GATE_CHANNELS)] if has_value_embedding(c, layer) else []
        return gates + [(C, C), (kv, C), (kv, C), (C, C)]

    @staticmethod
    def qkv_biases(c: GPTConfig, layer: int) -> int:
        return c.n_embd + 2 * c.n_kv_head * c.head_dim

    @staticmethod
    def normed_widths(c: GPTConfig) -> tuple[int, int]:
        """Widths that QK norm works on: of queries and of keys."""
        return c.head_dim, c.head_dim

    @staticmethod
    def score_widths(c: GPTConfig, layer: int) -> tuple[int, int]:
        """Channels of one head in q.k and in p v."""
        return c.head_dim, c.head_dim

    decode_widths = score_widths  # the same when one token is decoded from the cache

    @staticmethod
    def cached_shapes(c: GPTConfig, layer: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """(heads, channels) of the two tensors that the cache keeps of a token."""
        return (c.n_kv_head, c.head_dim), (c.n_kv_head, c.head_dim)

    def forward(self, x_BTC: Tensor, ve: Tensor | None, reading: Reading, kernel) -> Tensor:
        """ve: (B, T, G*D) on layers with value embeddings."""
        B, T, _ = x_BTC.shape
        q = self.c_q(x_BTC).view(B, T, *self.shape)
        k = self.c_k(x_BTC).view(B, T, *self.kv_shape)
        v = self.value_mix(self.c_v(x_BTC).view(B, T, *self.kv_shape), x_BTC, ve)
        q, k = self.qk_norm(q, k)  # before turning, which leaves lengths as they are
        q, k = self.turn(q, reading.angles) * self.gain, self.turn(k, reading.angles)
        k, v = reading.append(self.layer, k, v)
        y = self.gate(self.core(q, k, v, reading, kernel), x_BTC)
        return self.c_proj(y.reshape(B, T, -1))


class GroupedQueryAttention(CausalSelfAttention):
    """MHA with G key/value heads, each for H/G query heads. Ainslie et al., arXiv 2305.13245."""

    example = "gqa:2"


class MultiQueryAttention(CausalSelfAttention):
    """MHA with one key/value head for all query heads. Shazeer, arXiv 1911.02150."""
