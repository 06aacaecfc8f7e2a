"""A model made ready to generate: weights cast once, products of one input joined, tables instead of formulas.

Training keeps fp32 masters and casts them at each use; what is served does not change any more, so the same values are
cast once. What the default model does per layer in a dozen small operators is done in fewer, with the same results: for
one decoded token it is their number that costs. Dims as in model/gpt.py."""

import logging
import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanolab.cli import UserError
from nanolab.model.config import no_rope
from nanolab.model.context import Angles, AttnContext
from nanolab.model.gpt import GPT, CausalSelfAttention, Identity, Linear, RMSNorm, apply_rope
from nanolab.model.variants.mlp import SwiGLU
from nanolab.model.variants.norms import LayerNorm
from nanolab.model.variants.parts import ResidualScalars
from nanolab.model.variants.qk_norm import NoQKNorm, RMSQKNorm


def prepare_for_inference(model: GPT, *, int8: bool = False) -> GPT:
    """`model` itself, changed for good: it generates what it did before, faster and in less memory, and cannot be
    trained.

    Matrices, tables and biases are in its compute dtype; what is computed with in fp32 stays fp32. int8: matrices are
    kept as 8-bit integers with a scale per output, which changes results a little. Raises UserError where torchao is
    not installed."""
    dtype, device = model.compute_dtype, model.wte.weight.device
    model.requires_grad_(False).eval()
    for module in list(model.modules()):
        if isinstance(module, (nn.Linear, nn.Embedding, RMSNorm, LayerNorm)) or module is model.lm_head:
            for p in module.parameters(recurse=False):
                p.data = p.data.to(dtype)
    with torch.no_grad():
        for block in model.h:
            if joinable(block.attn):
                block.attn = JoinedAttention(block.attn)
            if isinstance(block.mlp, SwiGLU):
                block.mlp = JoinedSwiGLU(block.mlp)
        model.positions = TabledPositions(model, all(isinstance(block.attn, JoinedAttention) for block in model.h))
        if model.config.residual_scalars:
            model.lambdas = FixedScalars(model.lambdas)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is Linear:
                setattr(parent, name, plain(child))
    if int8:
        quantize(model)
    elif device.type == "cpu" and dtype == torch.float32:
        for module in model.modules():
            if isinstance(
                module, nn.Linear
            ):  # by input, where a product with one row takes half the time and others no more
                module.weight.data = module.weight.data.t().contiguous().t()
    return model


# not gates, nor what MLA absorbs
WIDE = ("c_qkv", "c_q", "c_k", "c_v", "c_dq", "c_uq", "c_dkv", "c_proj", "c_fc", "c_gate_fc", "lm_head")


# What torchao 0.18 logs when it is imported and int8 weights have no use for: two libraries of other formats for GPUs,
# a deprecated call.
NOISE = re.compile(
    r"Failed to load \S+/_C_(mxfp8|cutlass_90a)\.\S+: Could not load this library|<enum 'KernelPreference'> is an Enum"
    r" subclass"
)


def quantize(model: GPT) -> None:
    """int8 weights for every matrix of the blocks and of the head, by torchao."""

    def wanted(record: logging.LogRecord) -> bool:
        return not NOISE.match(record.getMessage())

    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    for logger in loggers:
        logger.addFilter(wanted)
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError:
        raise UserError(
            "int8 weights need torchao, which is not installed; expected it beside torch; try bash runs/setup.sh int8,"
            " or serve without --int8"
        ) from None
    finally:
        for logger in loggers:
            logger.removeFilter(wanted)
    quantize_(
        model,
        Int8WeightOnlyConfig(),
        filter_fn=lambda module, name: isinstance(module, nn.Linear) and name.split(".")[-1] in WIDE,
    )


def plain(linear: Linear) -> nn.Linear:
    """torch's own, which casts nothing."""
    out = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
    out.weight, out.bias = linear.weight, linear.bias
    return out


def joined(*parts: Linear) -> Linear:
    """One product for several of the same input; its outputs are theirs, one after the other."""
    out = Linear(parts[0].in_features, sum(part.out_features for part in parts))
    out.weight = nn.Parameter(torch.cat([part.weight for part in parts]), requires_grad=False)
    if parts[0].bias is not None:
        out.bias = nn.Parameter(torch.cat([part.bias for part in parts]), requires_grad=False)
    return out


def joinable(attn: nn.Module) -> bool:
    """Whether queries and keys are treated alike, so that one operator can do both."""
    return (
        isinstance(attn, CausalSelfAttention)
        and type(attn.qk_norm) in (NoQKNorm, RMSQKNorm)
        and attn.rope in (no_rope, apply_rope)
    )


class JoinedAttention(nn.Module):
    """CausalSelfAttention with one product for q, k and v, and one norm and one rotation for all heads of q and k,
    whose gain is in the scores' scale."""

    def __init__(self, attn: CausalSelfAttention):
        super().__init__()
        (H, D), (G, _) = attn.shape, attn.kv_shape
        self.layer, self.heads, self.shape = attn.layer, (H, G), (H + 2 * G, D)
        self.c_qkv = joined(attn.c_q, attn.c_k, attn.c_v)
        self.value_mix, self.core, self.gate, self.c_proj = attn.value_mix, attn.core, attn.gate, attn.c_proj
        self.core.scale *= attn.gain
        self.norm = attn.qk_norm.normalize if type(attn.qk_norm) is RMSQKNorm else Identity()
        self.rope = tabled_rope if attn.rope is apply_rope else no_rope

    def forward(self, x_BTC: Tensor, ve: Tensor | None, ctx: AttnContext) -> Tensor:
        B, T, _ = x_BTC.shape
        H, G = self.heads
        qk, v = self.c_qkv(x_BTC).view(B, T, *self.shape).split((H + G, G), dim=2)
        v = self.value_mix(v, x_BTC, ve)
        q, k = self.rope(self.norm(qk), ctx.angles).split((H, G), dim=2)
        k, v = ctx.append(self.layer, k, v)
        y = self.gate(self.core(q, k, v, ctx), x_BTC)
        return self.c_proj(y.reshape(B, T, -1))


def tabled_rope(x_BTHD: Tensor, angles: Angles) -> Tensor:
    """gpt.apply_rope by tables: (a, b) -> (a, b) (cos, cos) + (b, a) (sin, -sin) on the channels that turn."""
    cos, sin = angles
    n = cos.size(-1)
    if n == x_BTHD.size(-1):
        return x_BTHD * cos + x_BTHD.roll(n // 2, -1) * sin
    x, rest = x_BTHD[..., :n], x_BTHD[..., n:]
    return torch.cat((x * cos + x.roll(n // 2, -1) * sin, rest), dim=-1)


class JoinedSwiGLU(nn.Module):
    """SwiGLU with one product for the gate and what it gates."""

    def __init__(self, mlp: SwiGLU):
        super().__init__()
        self.c_gate_fc, self.c_proj = joined(mlp.c_gate, mlp.c_fc), mlp.c_proj

    def forward(self, x: Tensor) -> Tensor:
        gate, x = self.c_gate_fc(x).chunk(2, dim=-1)
        return self.c_proj(F.silu(gate) * x)


class TabledPositions(nn.Module):
    """Positions whose angles are looked up. doubled: for `tabled_rope`, else for the entries of ROTATIONS."""

    def __init__(self, model: GPT, doubled: bool):
        super().__init__()
        self.positions, self.table = model.positions, None
        angles = self.positions.angles(
            torch.arange(model.config.sequence_len, device=model.wte.weight.device)[None], model.compute_dtype
        )
        if angles:
            cos, sin = (x[0, :, 0] for x in angles)
            self.table = torch.cat((cos, cos, sin, -sin) if doubled else (cos, sin), dim=-1)

    def add(self, e_BTC: Tensor, pos_BT: Tensor) -> Tensor:
        return self.positions.add(e_BTC, pos_BT)

    @property
    def slopes_H(self) -> Tensor | None:
        return self.positions.slopes_H

    def angles(self, pos_BT: Tensor, dtype: torch.dtype) -> Angles | None:
        """cos and sin, each (B, T, 1, channels)."""
        return None if self.table is None else F.embedding(pos_BT, self.table)[:, :, None].chunk(2, dim=-1)


class FixedScalars(nn.Module):
    """ResidualScalars taken apart once, and one sum of products for each layer."""

    def __init__(self, scalars: ResidualScalars):
        super().__init__()
        self.resid, self.x0 = scalars.resid.detach().unbind(), scalars.x0.tolist()

    def forward(self, x: Tensor, x0: Tensor, layer: int) -> Tensor:
        return torch.add(self.resid[layer] * x, x0, alpha=self.x0[layer])
