"""Models by name: rows of flag values. A command takes those of a row that it has; flags given beside --preset win.

Each row names architecture, recipe, initialisation, batch, rates and horizon of a model that others have published, or
of a study; tests/test_presets.py holds the parameter counts. Pure data: imports nothing.
"""

from typing import Any

# The plain GPT-2 line: what all published rows share. The modern default is the other end of it.
GPT = dict(
    positions="learned",
    window_pattern="L",
    qk_norm="none",
    qk_gain=1.0,
    value_embeds=False,
    residual_scalars=False,
    smear=False,
    backout=False,
    embed_norm=False,
    mlp="gelu_tanh",
    norm="layernorm",
    norm_gain=True,
    softcap=0.0,
    tied_head=True,
    init="gpt2",
)

# GPT-2 (Radford et al. 2019), trained as its open reproductions are: 10^10 tokens, the rates of GPT-3 (arXiv
# 2005.14165, table 2.1).
GPT2 = GPT | dict(
    bias="qkv,out,mlp,norm",
    vocab_size=50257,
    pad_vocab_to=1,
    max_seq_len=1024,
    total_batch_size=524288,
    num_iterations=19073,
    recipe="adamw_cosine",
    beta1=0.9,
    beta2=0.95,
    eps=1e-8,
    weight_decay=0.1,
    grad_clip=1.0,
    warmup_steps=715,
    final_lr_frac=0.1,
)

PRESETS: dict[str, dict[str, Any]] = {
    "nanolab": {},  # the dial; every default
    "gpt2": GPT2 | dict(depth=12, aspect_ratio=64, head_dim=64, learning_rate=6e-4, device_batch_size=32),
    "gpt2-medium": GPT2 | dict(depth=24, aspect_ratio=42, head_dim=64, learning_rate=3e-4, device_batch_size=16),
    "gpt2-large": GPT2 | dict(depth=36, aspect_ratio=35, head_dim=64, learning_rate=2.5e-4, device_batch_size=8),
    "gpt2-xl": GPT2 | dict(depth=48, aspect_ratio=33, head_dim=64, learning_rate=2e-4, device_batch_size=4),
    # The positional study: learned positions are its first arm; the rotary arms turn neighbouring channels, base
    # 10,000.
    "odyssey16m": (
        GPT
        | dict(
            depth=4,
            aspect_ratio=64,
            head_dim=64,
            max_seq_len=1024,
            vocab_size=50257,
            rope_base=10_000.0,
            rope_layout="interleaved",
            embed_dropout=0.05,
            attn_dropout=0.05,
            resid_dropout=0.05,
            mlp_dropout=0.05,
            device_batch_size=32,
            total_batch_size=131072,
            num_iterations=10_000,
            recipe="adamw_cosine",
            learning_rate=6e-4,
            beta1=0.9,
            beta2=0.95,
            eps=1e-8,
            weight_decay=1e-3,
            grad_clip=1.0,
            warmup_steps=20,
            final_lr_frac=0.1,
        )
    ),
    # The softmax1 study: nanoGPT's small configuration with its width doubled.
    "baby": (
        GPT
        | dict(
            depth=6,
            aspect_ratio=128,
            head_dim=128,
            max_seq_len=256,
            vocab_size=50257,
            mlp="gelu",
            embed_dropout=0.2,
            attn_dropout=0.2,
            resid_dropout=0.2,
            mlp_dropout=0.2,
            device_batch_size=64,
            total_batch_size=16384,
            num_iterations=100_000,
            recipe="adamw_cosine",
            learning_rate=1e-3,
            beta1=0.9,
            beta2=0.99,
            eps=1e-8,
            weight_decay=0.1,
            grad_clip=1.0,
            warmup_steps=100,
            final_lr_frac=0.1,
        )
    ),
    # The study of token labels: arms are matched in time.
    "labels39m": (
        GPT
        | dict(
            depth=12,
            aspect_ratio=42,
            head_dim=32,
            max_seq_len=512,
            vocab_size=1024,
            pad_vocab_to=1,
            mlp="relu",
            bias="out,mlp,norm,head",
            tied_head=False,
            attn_dropout=0.2,
            resid_dropout=0.2,
            mlp_dropout=0.2,
            init="normal02",
            device_batch_size=132,
            total_batch_size=67584,
            max_seconds=23_400.0,
            recipe="adam_constant",
            learning_rate=3e-4,
            beta1=0.9,
            beta2=0.999,
            eps=1e-8,
        )
    ),
    # The default architecture as small as it gets, for tests and first tries.
    "tiny": dict(
        depth=2,
        aspect_ratio=16,
        head_dim=16,
        max_seq_len=64,
        vocab_size=265,
        init="dial",
        device_batch_size=8,
        total_batch_size=512,
        num_iterations=50,
        recipe="dial",
        lr_scale=0.5,
    ),
}
