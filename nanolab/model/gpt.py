"""The model: ids -> logits or loss. Embedding, blocks, head; what is switched off by a flag is a module that passes its
input on.

Dims: B batch, T tokens, C width, V vocabulary (padded inside, sliced outside). Master weights are fp32; activations are
`compute_dtype`; logits and loss are fp32.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanolab.model.accounting import attention_class, has_value_embedding, padded_vocab
from nanolab.model.attention import Reading
from nanolab.model.blocks import Embedding, Linear, Pass, TiedHead, dropout, make_norm, wide
from nanolab.model.config import GPTConfig
from nanolab.model.cross_entropy import blocked_cross_entropy, blocked_nats, plain_cross_entropy, quickly_softcapped
from nanolab.model.kernels.choice import KERNELS, choose_kernel, kernel_line
from nanolab.model.kernels.spec import on_cuda
from nanolab.model.variants.init import INITS
from nanolab.model.variants.mlp import MLPS
from nanolab.model.variants.parts import Backout, ResidualScalars, Smear
from nanolab.model.variants.positions import POSITIONS
from nanolab.model.variants.tables import check


class Block(nn.Module):
    def __init__(self, c: GPTConfig, layer: int):
        super().__init__()
        self.norm_1, self.norm_2 = make_norm(c), make_norm(c)
        self.attn = attention_class(c)(c, layer)
        self.mlp = MLPS[c.mlp](c)
        self.drop_attn, self.drop_mlp = dropout(c.resid_dropout), dropout(c.mlp_dropout)

    def forward(self, x: Tensor, *attn_args, at: tuple[Tensor, Tensor] | None = None) -> Tensor:
        x = x + self.drop_attn(self.attn(self.norm_1(x), *attn_args))
        if at is not None:
            x = x[at]
        return x + self.drop_mlp(self.mlp(self.norm_2(x)))


class Documents(nn.Module):
    """Where the document of each token begins, so that attention can stay inside it."""

    def __init__(self, bos: int):
        super().__init__()
        self.bos = bos

    def forward(self, reading: Reading, idx: Tensor) -> Reading:
        reading.starts_BT = idx == self.bos
        begun = torch.where(reading.starts_BT, reading.pos_BT, 0)
        before = reading.left("document", torch.zeros_like(begun[:, :1]))
        reading.first_BT = torch.cat((before, begun), dim=1).cummax(1).values[:, 1:]
        reading.leave("document", reading.first_BT[:, -1:])
        return reading


class GPT(nn.Module):
    """Weights are uninitialised until `init_weights` or `load_state_dict`. Raises UserError for flags that cannot work.

    activation_checkpointing (Chen et al., arXiv 1604.06174): for the backward pass each layer keeps its input alone and
    computes the rest again, with the same random numbers. It may be set at any time."""

    activation_checkpointing = False

    def __init__(self, config: GPTConfig, compute_dtype: torch.dtype = torch.float32, kernel: str = ""):
        super().__init__()
        check(config)
        self.config, self.compute_dtype, self.kernel_name = config, compute_dtype, kernel
        V, C, n = padded_vocab(config), config.n_embd, config.n_layer
        kv_width = config.n_kv_head * config.head_dim
        self.wte = Embedding(V, C)
        self.positions = POSITIONS[config.positions](config)
        self.documents = Documents(config.bos) if config.document_mask else Pass()
        self.norm_e = make_norm(config) if config.embed_norm else Pass()
        self.smear = Smear() if config.smear else Pass()
        self.drop = dropout(config.embed_dropout)
        self.lambdas = ResidualScalars(n) if config.residual_scalars else Pass()
        self.value_embeds = nn.ModuleDict(
            {str(i): Embedding(V, kv_width) for i in range(n) if has_value_embedding(config, i)}
        )
        self.h = nn.ModuleList(Block(config, i) for i in range(n))
        self.backout = Backout() if config.backout else Pass()
        self.norm_f = make_norm(config)
        self.lm_head = (
            TiedHead(self.wte, config.has_bias("head")) if config.tied_head else Linear(C, V, config.has_bias("head"))
        )
        self._kernels: dict[str, list] = {}
        if not self.wte.weight.is_meta:
            self.kernel_names(self.wte.weight.device.type)  # refuses a kernel that cannot do what the flags ask

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill every parameter, as --init says."""
        for module in self.modules():
            if hasattr(module, "init_constants"):
                module.init_constants()
        INITS[self.config.init](self, torch.Generator(device=self.wte.weight.device).manual_seed(seed))

    def kernel_names(self, device_type: str) -> list[str]:
        """The attention kernel of each layer on this kind of device. Raises UserError where none can do what the flags
        ask.
        """
        names = [choose_kernel(needs, device_type, self.compute_dtype, self.kernel_name) for needs in self._needs()]
        self._kernels[device_type] = [KERNELS[name].run for name in names]
        return names

    def kernel_line(self, device_type: str) -> str:
        """The same as a line for people, with the reason where a faster kernel is missing."""
        return kernel_line(
            list(zip(self.kernel_names(device_type), self._needs())), device_type, self.compute_dtype, self.kernel_name
        )

    def _needs(self) -> list[frozenset[str]]:
        widths = [attention_class(self.config).score_widths(self.config, i) for i in range(len(self.h))]
        return [block.attn.core.needs(self.config, w) for block, w in zip(self.h, widths)]

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
        V, cap, head = self.config.vocab_size, self.config.softcap, self.lm_head
        rows, y = x.reshape(-1, x.size(-1)), targets.reshape(-1)
        if reduction == "none" and not torch.is_grad_enabled():
            return blocked_nats(rows, head, y, cap, V).view(targets.shape)
        if reduction == "none" or on_cuda(rows) or not head.fused_head:
            nats = plain_cross_entropy(rows, head, y, cap, V)
            if reduction == "none":
                return nats.view(targets.shape)
            total = nats.sum()
        elif torch.is_grad_enabled():
            total = blocked_cross_entropy(rows, head.weight, head.bias, y, cap, V)
        else:
            total = blocked_nats(rows, head, y, cap, V).sum()
        return total / (y >= 0).sum() if reduction == "mean" else total

    def logits(self, x: Tensor) -> Tensor:
        """What `hidden` gives, or some of its rows, (..., C) -> (..., V), at least fp32."""
        logits = self.lm_head(x)[..., : self.config.vocab_size]
        return quickly_softcapped(logits.to(wide(logits.dtype)), self.config.softcap)

    def layer(
        self, i: int, x: Tensor, x0: Tensor, idx: Tensor, reading: Reading, kernel, at: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """The stream x (B, T, C) after layer i, x0 the one before the first."""
        x = self.lambdas(x, x0, i)
        ve = self.value_embeds[str(i)].look_up(idx, x.dtype) if str(i) in self.value_embeds else None
        return self.h[i](x, ve, reading, kernel, at=at)

    def hidden(self, idx: Tensor, cache=None, at: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """idx (B, T) -> the normed vectors (B, T, C) that the head reads, or (K, C) of them: at, rows (K,) and columns
        (K,).

        Behind the last layer's attention tokens do not meet any more: the others are not computed from there on.
        """
        T, dtype, device = idx.size(1), self.compute_dtype, idx.device
        if device.type not in self._kernels:
            self.kernel_names(device.type)
        start = cache.pos[:, None] if cache is not None else 0
        pos = torch.arange(T, device=device)[None] + start
        reading = Reading(pos, self.positions.angles(pos, dtype), self.positions.slopes_H, cache=cache)
        reading = self.documents(reading, idx)
        e = self.norm_e(self.positions.add(self.wte.look_up(idx, dtype), pos))
        x = x0 = self.drop(self.smear(e, reading))
        middle, last = x, len(self.h) - 1
        again = self.activation_checkpointing and torch.is_grad_enabled()
        for i, kernel in enumerate(self._kernels[device.type]):
            args = i, x, x0, idx, reading, kernel, at if i == last else None
            x = checkpoint(self.layer, *args, use_reentrant=False) if again else self.layer(*args)
            if i == len(self.h) // 2:
                middle = x
        if cache is not None:
            cache.advance(T)
        if middle.dim() > x.dim():
            middle = middle[at]
        return self.norm_f(self.backout(x, middle))
