"""Serve a model: python -m scripts.chat_web [--model NAME[,NAME...]] [--port 8000]. A chat page in the browser,
OpenAI's API under /v1.
"""

import sys

from nanolab.cli import UserError, main, parse
from nanolab.serving.config import ServeConfig
from scripts import GENERATING, spin

TOOL_THREADS = 4  # programs of `--tool python` that run at once beside each replica


def run(cfg: ServeConfig) -> int:
    spin(GENERATING)
    from nanolab import runtime
    from nanolab.inference.sampling import check_settings
    from nanolab.inference.sandbox import walls
    from nanolab.serving.api import create_app
    from nanolab.serving.security import LOOPBACK, find_key, own_names
    from nanolab.serving.server import Server, bind

    check_settings(cfg.temperature, cfg.top_k, cfg.top_p)
    for name in ("max_rows", "replicas", "max_tokens"):
        if getattr(cfg, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(cfg, name)}; expected at least 1")
    for line in walls(cfg, cfg.tool == "python"):
        print(line, flush=True)
    listening = bind(cfg.host, cfg.port)  # before the models are loaded, which takes longer
    models = {served.name: served for served in load(cfg, runtime.start(cfg.device_type))}
    app = create_app(models, cfg)
    print(memory([replica.engine for served in models.values() for replica in served.replicas], cfg.prefix_mb << 20))
    if cfg.host not in LOOPBACK:
        known = ", ".join(sorted({*LOOPBACK, *own_names(cfg.host)} | {*filter(None, cfg.allowed_hosts.split(","))}))
        print(
            f"note: answers to any IP address of this machine and to the names {known}; another name needs"
            " --allowed-hosts NAME",
            file=sys.stderr,
        )
    if cfg.host not in LOOPBACK and not find_key(cfg):
        print(
            f"warning: no API key is set; anyone who can reach {cfg.host} can use this server; set"
            f" {cfg.api_key_env}=SECRET in the environment",
            file=sys.stderr,
        )

    def ready() -> None:
        host, port = listening.getsockname()[:2]
        place = f"[{host}]" if ":" in host else host
        print(f"nanolab serves {', '.join(models)} at http://{place}:{port} (page), /v1 (OpenAI API)", flush=True)

    Server(app, models.values(), cfg.drain_seconds, ready).run([listening])
    return 0


def memory(engines: list, prefix_bytes: int) -> str:
    """What full batches take beside the weights, and whether that is free now. On CUDA replicas have a device each."""
    from nanolab.runtime import free_bytes

    device = engines[0].runtime.device
    shared = [engine for engine in engines if engine.runtime.device == device]
    full, snapshots, free = sum(engine.most_bytes for engine in shared), prefix_bytes * len(shared), free_bytes(device)
    gib = lambda n: f"{n / 2**30:.2f} GiB"  # noqa: E731
    line = (
        f"memory: up to {gib(full)} for keys and values (--max-rows {engines[0].max_rows}), {gib(snapshots)} for"
        " snapshots (--prefix-mb)"
    )
    if free:
        line += f"; {gib(free)} free" + ", which is less: replies may fail with 503; lower --max-rows" * (
            full + snapshots > free
        )
    return line


def load(cfg: ServeConfig, rt) -> list:
    """The models that --model names, each with its replicas. On a CPU replicas share the weights and the cores."""
    from dataclasses import replace

    import torch

    from nanolab.inference.engine import Engine
    from nanolab.inference.prepare import prepare_for_inference
    from nanolab.records.models import find_model, load_model
    from nanolab.serving.worker import ModelServer

    cuda = rt.device.type == "cuda"
    if cuda and cfg.replicas > torch.cuda.device_count():
        raise UserError(
            f"--replicas {cfg.replicas}, but there are {torch.cuda.device_count()} devices; expected at most one"
            " replica each"
        )
    if not cuda:
        torch.set_num_threads(max(1, torch.get_num_threads() // cfg.replicas))
    served = []
    for ref in cfg.model.split(","):
        found = find_model(ref.strip())
        name = ref.strip() if "@" in ref else found.name
        if any(name == other.name for other in served):
            print(f"note: --model names {name} more than once; it is served once", file=sys.stderr)
            continue
        engines = []
        for i in range(cfg.replicas):
            place = replace(rt, device=torch.device("cuda", i)) if cuda else rt
            if cuda or not engines:
                model, tokenizer, meta = load_model(found, place)
                model = prepare_for_inference(model, int8=cfg.int8)
            slow = TOOL_THREADS if cfg.tool == "python" else 0
            engines.append(
                Engine(
                    model,
                    tokenizer,
                    place,
                    max_rows=cfg.max_rows,
                    prefix_bytes=cfg.prefix_mb << 20,
                    graphs=True,
                    tool_threads=slow,
                )
            )
        served.append(ModelServer(name, engines, cfg.queue, meta.get("kind", "base")))
    return served


if __name__ == "__main__":
    main(lambda: run(parse(ServeConfig)))
