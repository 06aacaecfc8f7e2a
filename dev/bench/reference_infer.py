"""Speed of the reference's engine: python dev/bench/reference_infer.py --reference CHECKOUT [flags of scripts.bench
infer]

CHECKOUT is a checkout of karpathy/nanochat, of which the model and the engine are imported and nothing is copied. The
model has the shape that the flags say and the weights of nanolab's model of that shape, moved off their initial values;
on the way it is compared with that one. Measured as `scripts.bench infer` measures nanolab's engine, with the same
prompts and lengths:
  decode_b1       tokens/s of one reply, from its first token to its last
  clients_total   tokens/s of --clients requests that wait from the start: one after another, since it batches only
                  samples of one
                  prompt
It computes in its own default dtype, fp32 on CPUs and bf16 on GPUs that have it; NANOCHAT_DTYPE=bfloat16 changes that.
Freed memory is kept as nanolab keeps it. The last line of stdout is one JSON document."""

import argparse
import json
import sys
import time
from pathlib import Path
from types import ModuleType

import torch

from nanolab import runtime
from nanolab.cli import parse
from nanolab.inference.engine import Request
from nanolab.lab.bench import measured
from nanolab.lab.bench_infer import Prompts
from nanolab.lab.config import BenchConfig
from nanolab.model.gpt import GPT
from nanolab.records.environment import environment
from nanolab.training.schedule import gpt_config

THEIR_NAMES = {
    "smear.scale": "smear_lambda",
    "smear.gate.weight": "smear_gate.weight",
    "lambdas.resid": "resid_lambdas",
    "lambdas.x0": "x0_lambdas",
    "backout.scale": "backout_lambda",
}


class NoStops:
    """What its engine asks of a tokenizer: special tokens, here ids that no model gives, so that every reply has full
    length.
    """

    def encode_special(self, text: str) -> int:
        return -1

    def get_bos_token_id(self) -> int:
        return -1


def their_name(name: str) -> str:
    name = THEIR_NAMES.get(name, name).replace("attn.value_mix.gate", "attn.ve_gate")
    return "transformer." + name if name.startswith(("wte.", "h.")) else name


def reference(path: Path, model: GPT) -> tuple[torch.nn.Module, type, torch.dtype]:
    """Its model with the weights of `model`, its Engine, and the dtype that it computes in."""
    sys.path.insert(0, str(path))
    # trains its tokenizers; imported, not used, by what is needed here
    sys.modules.setdefault("rustbpe", ModuleType("rustbpe"))
    from nanochat.common import COMPUTE_DTYPE
    from nanochat.engine import Engine
    from nanochat.gpt import GPT as Reference
    from nanochat.gpt import GPTConfig

    c = model.config
    with torch.device("meta"):
        theirs = Reference(
            GPTConfig(c.sequence_len, c.vocab_size, c.n_layer, c.n_head, c.n_kv_head, c.n_embd, c.window_pattern)
        )
    theirs.to_empty(device=model.wte.weight.device)
    theirs.init_weights()  # fills what is no weight, too
    theirs.load_state_dict({their_name(name): weight for name, weight in model.state_dict().items()}, strict=True)
    return theirs.eval(), Engine, COMPUTE_DTYPE


@torch.no_grad()
def difference(model: GPT, theirs: torch.nn.Module, request: Request) -> float:
    """Largest difference of the logits of one prompt."""
    ids = torch.tensor([request.prompt], device=model.wte.weight.device)
    return (model(ids) - theirs(ids)).abs().max().item()


def reply(engine, request: Request, rt: runtime.Runtime) -> list[float]:
    """When each token came."""
    ticks = []
    for _ in engine.generate(list(request.prompt), num_samples=1, max_tokens=request.max_tokens, temperature=0.0):
        ticks.append(time.perf_counter())
    rt.synchronize()
    assert len(ticks) == request.max_tokens
    return ticks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, required=True, help="a checkout of karpathy/nanochat")
    args, flags = parser.parse_known_args()
    cfg = parse(BenchConfig, ["--what", "infer", *flags])
    rt = runtime.start(cfg.device_type, "float32", cfg.seed, cfg.threads)
    with torch.device(rt.device):
        model = GPT(gpt_config(cfg, cfg.vocab_size, bos=0))
    model.init_weights(cfg.seed)
    noise = torch.Generator(device=rt.device).manual_seed(cfg.seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=noise, device=p.device), alpha=0.02)
    theirs, Engine, dtype = reference(args.reference, model)
    prompts = Prompts(cfg.vocab_size, cfg.seed)
    apart = difference(model, theirs, prompts.request(model.config.sequence_len // 2, 1))
    del model

    engine = Engine(theirs, NoStops())
    decode, total = [], []
    for _ in range(1 + cfg.repeats):  # the first does not count
        ticks = reply(engine, prompts.request(cfg.prompt_tokens, cfg.decode_tokens), rt)
        decode.append((len(ticks) - 1) / (ticks[-1] - ticks[0]))
        crowd = prompts.crowd(cfg)
        start = time.perf_counter()
        tokens = sum(len(reply(engine, request, rt)) for request in crowd)
        total.append(tokens / (time.perf_counter() - start))
    results = {"decode_b1": measured(decode[1:], "tokens/s"), "clients_total": measured(total[1:], "tokens/s")}
    facts = {
        "bench": "reference_infer",
        "reference_dtype": str(dtype).removeprefix("torch."),
        "largest_logit_difference": apart,
        "tokens": tokens,
    }
    for name, result in results.items():
        print(f"reference {name:24s} {result['median']:>12g} {result['unit']}")
    print(json.dumps(facts | {"n": cfg.repeats, "results": results, "env": environment(rt)}))


if __name__ == "__main__":
    main()
