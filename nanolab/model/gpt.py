"""The default model from top to bottom: ids -> logits or loss.

Embedding, blocks of attention and MLP, head, loss. Variants (variants/) are made of this file's parts and chosen by
name; kernels/ computes the attention product; cpu.py puts faster functions into a model that runs on a CPU. Master
weights are fp32, activations `compute_dtype`, logits and loss fp32. Weights are uninitialised until `init_weights` or a
checkpoint fills them.

Dims: B batch, T tokens, S keys, H query heads, G key/value heads, D head size, C width, V vocabulary (padded inside,
sliced outside), N rows."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanolab.model.config import GPTConfig, check_flags, entry, make_norm, padded_vocab, parts_of, rope_of, windows
from nanolab.model.context import Angles, AttnContext, Documents
from nanolab.model.kernels.choice import KERNELS, choose_kernel, kernel_line
from nanolab.model.kernels.reference import cached
from nanolab.model.kernels.spec import AttnSpec

EPS = torch.finfo(torch.float32).eps
WHOLE_ROW = 1 << 40  # the window of a layer without one, also on rows longer than those trained on


# What the default model computes, each as its formula says. cpu.py has faster forms of the same functions.


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype for sums and logits of values in `dtype`: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def rms_norm(x: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, without gain. arXiv 1910.07467."""
    return F.rms_norm(x, (x.size(-1),), eps=EPS)


def relu2(x: Tensor) -> Tensor:
    """max(x, 0)^2. arXiv 2109.08668."""
    return F.relu(x).square()


def softcapped(logits: Tensor, softcap: float) -> Tensor:
    """softcap * tanh(logits / softcap). Gemma 2, arXiv 2408.00118, section 2."""
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def cross_entropy(
    x_NC: Tensor, head: nn.Module, targets_N: Tensor, softcap: float, vocab_size: int, reduction: str
) -> Tensor:
    """Nats of the targets, at least fp32, 0 where the target is -1: (N,) with reduction "none", otherwise their sum."""
    logits = head(x_NC)[:, :vocab_size]
    logits = softcapped(logits.to(wide(logits.dtype)), softcap)
    nats = F.cross_entropy(logits, targets_N, ignore_index=-1, reduction="none")
    return nats if reduction == "none" else nats.sum()


def apply_rope(x_BTHD: Tensor, angles: Angles) -> Tensor:
    """Pairs (x[i], x[i + d/2]) of the first d channels turn by minus the angle, as in the reference harness. GPT-NeoX,
    arXiv 2204.06745.
    """
    cos, sin = angles
    d = cos.size(-1)
    a, b, rest = x_BTHD.tensor_split((d, 2 * d), dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


# Modules


class Linear(nn.Linear):
    """A linear map whose fp32 master weight is cast to the input's dtype at each use. kind: for initial values
    (variants/init.py).
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False, kind: str = "matrix"):
        super().__init__(in_features, out_features, bias=bias)
        self.kind = kind

    def reset_parameters(self) -> None:
        pass

    def init_constants(self) -> None:
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Embedding(nn.Embedding):
    """A table of fp32 rows, looked up and cast. kind: for initial values."""

    def __init__(self, rows: int, width: int, kind: str = "tokens"):
        super().__init__(rows, width)
        self.kind = kind

    def reset_parameters(self) -> None:
        pass

    def look_up(self, idx: Tensor, dtype: torch.dtype) -> Tensor:
        return self(idx).to(dtype)  # by __call__: adapters hook the table


class TiedHead(nn.Module):
    """The head whose matrix is the embedding table. Press and Wolf, arXiv 1608.05859."""

    def __init__(self, table: Embedding, bias: bool):
        super().__init__()
        self._table = [table]  # in a list: its weight is a parameter of the model once, as wte
        self.bias = nn.Parameter(torch.empty(table.num_embeddings)) if bias else None

    @property
    def weight(self) -> Tensor:
        return self._table[0].weight

    init_constants = Linear.init_constants
    forward = Linear.forward


class Identity(nn.Module):
    """Gives back its first argument: the part of a model that is switched off."""

    def __init__(self, *_):
        super().__init__()

    def forward(self, x: Tensor, *_) -> Tensor:
        return x


def dropout(p: float) -> nn.Module:
    """Zero a share p of the values in training and scale the rest by 1 / (1 - p). arXiv 1207.0580."""
    return nn.Dropout(p) if p else nn.Identity()


class Norm(nn.Module):
    """What the norms share: an optional gain and an optional bias per channel."""

    def __init__(self, width: int, gain: bool, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width)) if gain else None
        self.bias = nn.Parameter(torch.empty(width)) if bias else None

    def init_constants(self) -> None:
        if self.weight is not None:
            self.weight.fill_(1.0)
        if self.bias is not None:
            self.bias.zero_()


class RMSNorm(Norm):
    """x / sqrt(mean(x^2) + eps). Zhang and Sennrich, arXiv 1910.07467."""

    normalize = staticmethod(rms_norm)

    def forward(self, x: Tensor) -> Tensor:
        x = self.normalize(x)
        if self.weight is not None:
            x = x * self.weight.to(x.dtype)
        return x if self.bias is None else x + self.bias.to(x.dtype)


class AttentionOp(nn.Module):
    """q, k, v -> y by the layer's rules and kernel. Scores are scaled by 1/sqrt(width).

    width, v_width: channels of q.k and of p v. needs: what a kernel must offer for this layer, out of spec.NEEDS."""

    kernel: Any = None  # set by GPT.place

    def __init__(self, c: GPTConfig, layer: int, width: int, v_width: int):
        super().__init__()
        self.layer, self.normaliser = layer, entry(c, "softmax")(c)  # the name that sinks have in checkpoints
        self.window = windows(c)[layer] if windows(c)[layer] < c.sequence_len else WHOLE_ROW
        self.scale, self.softcap, self.dropout = 1 / math.sqrt(width), c.score_softcap, c.attn_dropout
        first = torch.zeros(1, 1) if c.document_mask else None
        needs = self.rules(entry(c, "positions").slopes(c), first, self.dropout).needs(c.sequence_len)
        self.needs = needs | ({"value size"} if v_width != width else set())

    def rules(self, slopes: Tensor | None, first_BT: Tensor | None, dropout: float) -> AttnSpec:
        return AttnSpec(self.window, self.scale, self.normaliser(), slopes, self.softcap, dropout, first_BT)

    def forward(self, q_BTHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, ctx: AttnContext) -> Tensor:
        rules = self.rules(ctx.slopes, ctx.first_BT, self.dropout if self.training else 0.0)
        # nothing was cached before: plain causal attention
        if ctx.cache is None or k_BSGD.size(1) == q_BTHD.size(1) > 1:
            return self.kernel(q_BTHD, k_BSGD, v_BSGD, rules)
        return cached(q_BTHD, k_BSGD, v_BSGD, rules, ctx.keys(self.layer, rules))


class CausalSelfAttention(nn.Module):
    """softmax(q k^T / sqrt(D)) v, each of G key/value heads for H/G query heads: MHA with G = H, MQA with G = 1. MHA:
    Vaswani et al., arXiv 1706.03762; GQA: Ainslie et al., arXiv 2305.13245; MQA: Shazeer, arXiv 1911.02150.
    """

    def __init__(self, c: GPTConfig, layer: int):
        super().__init__()
        H, G, D, bias = c.n_head, c.n_kv_head, c.head_dim, c.has_bias("qkv")
        self.layer, self.shape, self.kv_shape = layer, (H, D), (G, D)
        self.c_q = Linear(c.n_embd, H * D, bias)
        self.c_k = Linear(c.n_embd, G * D, bias)
        self.c_v = Linear(c.n_embd, G * D, bias)
        self.value_mix = next((part.mix(c, layer) for part in parts_of(c, "values")), Identity())
        self.qk_norm = entry(c, "qk_norm")(c, D, D)
        self.gain = c.qk_gain**2  # of q and of k, in one multiplication
        self.rope = rope_of(c, layer)
        self.core = AttentionOp(c, layer, D, D)
        self.gate = entry(c, "gate")(c)
        self.c_proj = Linear(H * D, c.n_embd, c.has_bias("out"), kind="residual")

    @staticmethod
    def score_widths(c: GPTConfig, layer: int) -> tuple[int, int]:
        """Channels of one head in q.k and in p v."""
        return c.head_dim, c.head_dim

    decode_widths = score_widths  # the same when one token is decoded from the cache

    @staticmethod
    def cached_shapes(c: GPTConfig, layer: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """(heads, channels) of the two tensors that the cache keeps of a token."""
        return (c.n_kv_head, c.head_dim), (c.n_kv_head, c.head_dim)

    def forward(self, x_BTC: Tensor, ve: Tensor | None, ctx: AttnContext) -> Tensor:
        """ve: (B, T, G*D) on layers with value embeddings."""
        B, T, _ = x_BTC.shape
        q = self.c_q(x_BTC).view(B, T, *self.shape)
        k = self.c_k(x_BTC).view(B, T, *self.kv_shape)
        v = self.value_mix(self.c_v(x_BTC).view(B, T, *self.kv_shape), x_BTC, ve)
        q, k = self.qk_norm(q, k)  # before rotation, which keeps lengths
        q, k = self.rope(q, ctx.angles) * self.gain, self.rope(k, ctx.angles)
        k, v = ctx.append(self.layer, k, v)
        y = self.gate(self.core(q, k, v, ctx), x_BTC)
        return self.c_proj(y.reshape(B, T, -1))


class MLP(nn.Module):
    """W2 max(0, W1 x)^2 with 4C hidden channels. Primer, So et al., arXiv 2109.08668."""

    activation = staticmethod(relu2)

    def __init__(self, c: GPTConfig):
        super().__init__()
        self.c_fc = Linear(c.n_embd, 4 * c.n_embd, c.has_bias("mlp"), kind="hidden")
        self.c_proj = Linear(4 * c.n_embd, c.n_embd, c.has_bias("mlp"), kind="residual")

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.activation(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, c: GPTConfig, layer: int):
        super().__init__()
        self.norm_1, self.norm_2 = make_norm(c), make_norm(c)
        self.attn = entry(c, "attention")(c, layer)
        self.mlp = entry(c, "mlp")(c)
        self.drop_attn, self.drop_mlp = dropout(c.resid_dropout), dropout(c.mlp_dropout)

    def forward(
        self, x: Tensor, ve: Tensor | None, ctx: AttnContext, at: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """x (B, T, C) -> the same, or its rows `at` alone, (K, C)."""
        x = x + self.drop_attn(self.attn(self.norm_1(x), ve, ctx))
        if at is not None:
            x = x[at]
        return x + self.drop_mlp(self.mlp(self.norm_2(x)))


class GPT(nn.Module):
    """Raises UserError for flags that cannot work.

    activation_checkpointing (Chen et al., arXiv 1604.06174): for the backward pass each layer keeps its input alone and
    computes the rest again, with the same random numbers. It may be set at any time."""

    activation_checkpointing = False
    loss, cap = staticmethod(cross_entropy), staticmethod(softcapped)
    placed: Any = None  # (compute dtype, kind of device) that `place` has prepared the layers for

    def __init__(self, config: GPTConfig, compute_dtype: torch.dtype = torch.float32, kernel: str = ""):
        super().__init__()
        check_flags(config)
        self.config, self.compute_dtype, self.kernel_name = config, compute_dtype, kernel
        V, C, n = padded_vocab(config), config.n_embd, config.n_layer
        self.wte = Embedding(V, C)
        self.embedding = entry(config, "embedding")(config)
        self.positions = entry(config, "positions")(config)
        self.documents = Documents(config.bos) if config.document_mask else Identity()
        self.norm_e = make_norm(config) if config.embed_norm else Identity()
        self.drop = dropout(config.embed_dropout)
        self.parts: dict[str, list[str]] = {"embedding": [], "values": [], "layer": [], "end": []}
        for part in parts_of(config):
            self.add_module(part.name, part(config))
            self.parts[part.seam].append(part.name)
        self.h = nn.ModuleList(Block(config, i) for i in range(n))
        self.norm_f = make_norm(config)
        bias = config.has_bias("head")
        self.lm_head = TiedHead(self.wte, bias) if config.tied_head else Linear(C, V, bias, kind="head")
        self.place(self.wte.weight.device.type)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill every parameter, as --init says."""
        for module in self.modules():
            if hasattr(module, "init_constants"):
                module.init_constants()
        entry(self.config, "init")(self, torch.Generator(device=self.wte.weight.device).manual_seed(seed))

    def place(self, device_type: str) -> None:
        """Give every layer its attention kernel, and the model the functions that this kind of device computes fastest.
        Raises UserError where no kernel can do what the flags ask."""
        from nanolab.model.cpu import accelerate

        if device_type == "meta":
            return
        for block, name in zip(self.h, self.kernel_names(device_type)):
            block.attn.core.kernel = KERNELS[name].run
        accelerate(self, device_type)
        self.placed = self.compute_dtype, device_type

    def _apply(self, fn: Any, recurse: bool = True) -> "GPT":
        """What `to` and its like call: on another device other kernels are faster."""
        super()._apply(fn, recurse)
        if self.placed != (self.compute_dtype, self.wte.weight.device.type):
            self.place(self.wte.weight.device.type)
        return self

    def kernel_names(self, device_type: str) -> list[str]:
        """The attention kernel of each layer on this kind of device. Raises UserError as `place` does."""
        layers = (block.attn.core.needs for block in self.h)
        return [choose_kernel(needs, device_type, self.compute_dtype, self.kernel_name) for needs in layers]

    def kernel_line(self, device_type: str) -> str:
        """The same as a line for people, with the reason where a faster kernel is missing."""
        layers = [(name, block.attn.core.needs) for name, block in zip(self.kernel_names(device_type), self.h)]
        return kernel_line(layers, device_type, self.compute_dtype, self.kernel_name)

    def forward(self, idx, targets=None, *, reduction: str = "mean", cache=None, last_only: bool = False) -> Tensor:
        """idx (B, T) int64 -> logits (B, T, V), or (B, 1, V) with last_only.

        With targets (B, T), -1 where not counted: nats, fp32; reduction "sum" and "mean" give a scalar, "none" (B, T).
        With a cache the tokens continue the rows that it holds.
        """
        B, T = idx.shape
        if last_only:
            last = (torch.arange(B, device=idx.device), torch.full((B,), T - 1, device=idx.device)) if T > 1 else None
            return self.logits(self.hidden(idx, cache, last).view(B, 1, -1))
        x = self.hidden(idx, cache)
        if targets is None:
            return self.logits(x)
        x, y = x.flatten(0, 1), targets.reshape(-1)
        nats = self.loss(x, self.lm_head, y, self.config.softcap, self.config.vocab_size, reduction)
        if reduction == "none":
            return nats.view(targets.shape)
        return nats / (y >= 0).sum() if reduction == "mean" else nats

    def hidden(self, idx: Tensor, cache=None, at: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """idx (B, T) -> the normed vectors (B, T, C) that the head reads, or (K, C) of them: at, rows (K,) and columns
        (K,).

        After the last layer's attention tokens no longer interact, so only `at` goes through its MLP, norm and head.
        """
        T, dtype = idx.size(1), self.compute_dtype
        pos = torch.arange(T, device=idx.device)[None] + (cache.pos[:, None] if cache is not None else 0)
        ctx = AttnContext(pos, self.positions.angles(pos, dtype), self.positions.slopes_H, cache=cache)
        ctx = self.documents(ctx, idx)
        x = self.norm_e(self.positions.add(self.wte.look_up(idx, dtype), pos))
        x = x0 = self.drop(self.through("embedding", self.embedding(x, idx, ctx), idx, ctx))
        middle, last = x, len(self.h) - 1
        again = self.activation_checkpointing and torch.is_grad_enabled()
        for i, block in enumerate(self.h):
            args = i, block, x, x0, idx, ctx, at if i == last else None
            x = checkpoint(self.layer, *args, use_reentrant=False) if again else self.layer(*args)
            if i == (last + 1) // 2:
                middle = x
        if cache is not None:
            cache.advance(T)
        if middle.dim() > x.dim():
            middle = middle[at]
        return self.norm_f(self.through("end", x, middle))

    def layer(
        self, i: int, block: Block, x: Tensor, x0: Tensor, idx: Tensor, ctx: AttnContext, at: tuple | None
    ) -> Tensor:
        """The residual stream x (B, T, C) after layer i, `block`; x0 is the one before the first."""
        x = self.through("layer", x, x0, i)
        return block(x, self.through("values", None, idx, i, x.dtype), ctx, at)

    def through(self, seam: str, x: Any, *args: Any) -> Any:
        """x after the parts that are switched on at this seam (variants/parts.py)."""
        for name in self.parts[seam]:
            x = getattr(self, name)(x, *args)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """What `hidden` gives, or some of its rows, (..., C) -> (..., V), at least fp32."""
        logits = self.lm_head(x)[..., : self.config.vocab_size]
        return self.cap(logits.to(wide(logits.dtype)), self.config.softcap)
