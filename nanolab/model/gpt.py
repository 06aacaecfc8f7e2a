"""The model: ids -> logits or loss. Embedding, smear, blocks with value embeddings, backout, soft-capped head.

Dims: B batch, T tokens, C width, V vocabulary (padded inside, sliced outside). Master weights are fp32; activations are
`compute_dtype`; logits and loss are fp32.
"""

import math

import torch
from torch import nn

from nanolab.config import GPTConfig, UserError
from nanolab.model.accounting import SMEAR_CHANNELS, has_value_embedding, padded_vocab, windows
from nanolab.model.attention import KERNELS, CausalSelfAttention, default_kernel
from nanolab.model.blocks import MLP, Embedding, Linear, norm
from nanolab.model.cross_entropy import blocked_cross_entropy, blocked_nats, plain_cross_entropy, softcapped
from nanolab.model.positions import rope_angles


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.attn = CausalSelfAttention(config, has_value_embedding(config, layer))
        self.mlp = MLP(config.n_embd)

    def forward(self, x, *attn_args) -> torch.Tensor:
        x = x + self.attn(norm(x), *attn_args)
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    """Weights are uninitialised until `init_weights` or `load_state_dict`."""

    def __init__(self, config: GPTConfig, compute_dtype: torch.dtype = torch.float32, kernel: str = ""):
        super().__init__()
        self.config, self.compute_dtype, self.kernel_name = config, compute_dtype, kernel
        if kernel and kernel not in KERNELS:
            raise UserError(f"attention kernel {kernel!r} is unknown; expected one of {', '.join(KERNELS)}")
        V, C, n = padded_vocab(config), config.n_embd, config.n_layer
        kv_width = config.n_kv_head * (C // config.n_head)
        self.wte = Embedding(V, C)
        self.value_embeds = nn.ModuleDict({str(i): Embedding(V, kv_width) for i in range(n) if has_value_embedding(config, i)})
        self.h = nn.ModuleList(Block(config, i) for i in range(n))
        self.lm_head = Linear(C, V)
        self.resid_lambdas = nn.Parameter(torch.empty(n))
        self.x0_lambdas = nn.Parameter(torch.empty(n))
        self.smear_gate = Linear(SMEAR_CHANNELS, 1)
        self.smear_lambda = nn.Parameter(torch.empty(1))
        self.backout_lambda = nn.Parameter(torch.empty(1))
        self.windows = windows(config)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill every parameter. Matrices that write into the residual stream start at zero; uniform(-s, s) has std 1/sqrt(C)."""
        g = torch.Generator(device=self.lm_head.weight.device).manual_seed(seed)
        s, n = math.sqrt(3 / self.config.n_embd), self.config.n_layer
        self.wte.weight.normal_(0, 0.8, generator=g)
        self.lm_head.weight.normal_(0, 0.001, generator=g)
        for table in self.value_embeds.values():
            table.weight.uniform_(-s, s, generator=g)
        for block in self.h:
            for linear in (block.attn.c_q, block.attn.c_k, block.attn.c_v):
                linear.weight.uniform_(-s, s, generator=g)
            block.attn.c_proj.weight.zero_()
            block.mlp.c_fc.weight.uniform_(-0.4 * s, 0.4 * s, generator=g)
            block.mlp.c_proj.weight.zero_()
            if block.attn.ve_gate is not None:
                block.attn.ve_gate.weight.uniform_(0, 0.02, generator=g)
        self.smear_gate.weight.uniform_(0, 0.02, generator=g)
        self.smear_lambda.zero_()
        self.backout_lambda.fill_(0.2)
        depth = torch.linspace(0, 1, n) if n > 1 else torch.zeros(1)
        self.resid_lambdas.copy_(1.15 - 0.10 * depth)
        self.x0_lambdas.copy_(0.20 - 0.15 * depth)

    @property
    def kernel(self):
        return KERNELS[self.kernel_name or default_kernel(self.lm_head.weight.device.type)]

    def forward(self, idx, targets=None, *, reduction: str = "mean", cache=None, last_only: bool = False) -> torch.Tensor:
        """idx (B, T) int64 -> logits (B, T, V), or (B, 1, V) with last_only.

        With targets (B, T), -1 where not counted: nats, fp32; reduction "sum" and "mean" give a scalar, "none" (B, T).
        With a cache the tokens continue the rows that it holds.
        """
        x = self.hidden(idx, cache)
        if last_only:
            x = x[:, -1:]
        V, cap = self.config.vocab_size, self.config.softcap
        if targets is None:
            return softcapped(self.lm_head(x)[..., :V].float(), cap)
        rows, y, w = x.reshape(-1, x.size(-1)), targets.reshape(-1), self.lm_head.weight
        if reduction == "none" and not torch.is_grad_enabled():
            return blocked_nats(rows, w, y, cap, V).view(targets.shape)
        if reduction == "none" or rows.is_cuda:
            nats = plain_cross_entropy(rows, w, y, cap, V)
            if reduction == "none":
                return nats.view(targets.shape)
            total = nats.sum()
        elif torch.is_grad_enabled():
            total = blocked_cross_entropy(rows, w, y, cap, V)
        else:
            total = blocked_nats(rows, w, y, cap, V).sum()
        return total / (y >= 0).sum() if reduction == "mean" else total

    def hidden(self, idx: torch.Tensor, cache=None) -> torch.Tensor:
        """idx (B, T) -> the normed vectors (B, T, C) that the head reads."""
        T, config = idx.size(1), self.config
        start = cache.pos[:, None] if cache is not None else 0
        q_pos = torch.arange(T, device=idx.device)[None] + start  # (B or 1, T)
        cos, sin = rope_angles(q_pos, config.n_embd // config.n_head, config.rope_base, self.compute_dtype)
        x = x0 = self.smear(norm(self.wte.look_up(idx, self.compute_dtype)), cache)
        kernel, middle = self.kernel, None
        for i, block in enumerate(self.h):
            x = self.resid_lambdas[i] * x + self.x0_lambdas[i] * x0  # fp32 scalars: their steps are finer than bf16
            ve = self.value_embeds[str(i)].look_up(idx, x.dtype) if str(i) in self.value_embeds else None
            x = block(x, ve, cos, sin, self.windows[i], kernel, cache, i, q_pos)
            if i == config.n_layer // 2:
                middle = x
        if cache is not None:
            cache.advance(T)
        return norm(x - self.backout_lambda[0] * middle)

    def smear(self, e: torch.Tensor, cache=None) -> torch.Tensor:
        """Mix into each embedding a gated share of the one before it; the first token of a row has none before it."""
        before = torch.zeros_like(e[:, :1]) if cache is None or cache.prev is None else cache.prev
        if cache is not None:
            cache.prev = e[:, -1:]
        previous = torch.cat((before, e[:, :-1]), dim=1)
        gate = self.smear_lambda[0] * torch.sigmoid(self.smear_gate(e[..., :SMEAR_CHANNELS]))
        return e + gate * previous

    def param_groups(
        self, *, embedding_lr: float, unembedding_lr: float, matrix_lr: float, scalar_lr: float, weight_decay: float, batch_scale: float = 1.0
    ) -> list[dict]:
        """Groups for MuonAdamW, learning rates final: scaled by the batch law's multiplier and, for AdamW tables, by
        sqrt(768 / C) (the tables were tuned at width 768)."""
        m, c = batch_scale, math.sqrt(768 / self.config.n_embd)
        named = dict(self.named_parameters())
        ve = [n for n in named if n.startswith("value_embeds.")]
        # name, parameters, lr, betas, weight decay
        adamw = [
            ("lm_head", ["lm_head.weight"], unembedding_lr * m * c, (0.8, 0.96), 0.01),
            ("wte", ["wte.weight"], embedding_lr * m * c, (0.8, 0.995), 0.001),
            ("value_embeds", ve, 0.5 * embedding_lr * m * c, (0.8, 0.995), 0.01),
            ("resid_lambdas", ["resid_lambdas"], 0.01 * scalar_lr * m, (0.8, 0.95), 0.05),
            ("x0_lambdas", ["x0_lambdas"], scalar_lr * m, (0.96, 0.95), 0.0),
            ("smear_backout", ["smear_gate.weight", "smear_lambda", "backout_lambda"], 0.2, (0.8, 0.95), 0.0),
        ]
        groups = [
            dict(name=name, kind="adamw", params=[(n, named[n]) for n in names], lr=lr, betas=betas, eps=1e-10, weight_decay=wd)
            for name, names, lr, betas, wd in adamw
        ]
        blocks = [(n, p) for n, p in named.items() if n.startswith("h.")]
        for shape in sorted({tuple(p.shape) for _, p in blocks}):
            lr = matrix_lr * m * math.sqrt(max(1.0, shape[0] / shape[1]))
            params = [(n, p) for n, p in blocks if tuple(p.shape) == shape]
            name = f"muon_{shape[0]}x{shape[1]}"
            groups.append(dict(name=name, kind="muon", params=params, lr=lr, momentum=0.95, beta2=0.9, weight_decay=weight_decay, ns_steps=5))
        return groups
