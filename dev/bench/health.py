"""How long /health takes while clients come and leave at once: python dev/bench/health.py [--tree CHECKOUT] [--clients
200] [--probes 1000] > health.json

Starts scripts.chat_web of --tree (default: this one) with a model of --depth 4, random weights and room for all
clients, and lets these ask for long replies and leave all at once, wave after wave, from a process of their own. Each
probe is a GET of /health on a connection of its own, from another. The last line of stdout is one JSON document."""

import argparse
import asyncio
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from http.client import HTTPConnection
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))


def make_model(base: Path) -> str:
    """A run with a base model of depth 4 and random weights."""
    import torch

    from nanolab.cli import to_json
    from nanolab.data.tokenizer import Tokenizer
    from nanolab.model.config import GPTConfig
    from nanolab.model.gpt import GPT
    from nanolab.records import checkpoint
    from nanolab.runtime import Runtime

    tokenizer = Tokenizer.train(
        [path.read_text() for folder in ("nanolab", "tests") for path in sorted((ROOT / folder).rglob("*.py"))], 8192
    )
    # as --depth 4 makes it
    model = GPT(GPTConfig(sequence_len=2048, vocab_size=tokenizer.vocab_size, n_layer=4, n_head=2, n_embd=256))
    model.init_weights(0)
    folder, meta = (
        base / "runs" / "d4",
        {"model_config": to_json(model.config), "tokenizer_hash": tokenizer.hash, "kind": "base"},
    )
    checkpoint.save(
        folder / "checkpoints",
        1,
        weights=dict(model.state_dict()),
        optimizer=None,
        meta=meta,
        runtime=Runtime(torch.device("cpu"), torch.float32),
    )
    tokenizer.save(folder / "tokenizer")
    return "d4"


async def crowd(port: int, clients: int) -> None:
    """A wave of clients every five seconds: all ask for a long reply, half of them as a stream, and four seconds later
    all leave at once.
    """
    body = [
        json.dumps({"prompt": "def f(x):" * (1 + i % 40), "max_tokens": 1500, "stream": i % 2 == 0}).encode()
        for i in range(clients)
    ]
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length:"
        " {}\r\n\r\n"
    )

    async def one(i: int) -> asyncio.StreamWriter:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head.format(len(body[i])).encode() + body[i])
        return writer

    for wave in itertools.count(1):
        next_wave = asyncio.ensure_future(asyncio.sleep(5))
        writers = await asyncio.gather(*map(one, range(clients)))
        await asyncio.sleep(4)
        for writer in writers:
            writer.transport.abort()
        print(wave, flush=True)
        await next_wave


def probe(port: int) -> tuple[float, int]:
    """Milliseconds from connecting to the whole answer, and its status."""
    start = time.perf_counter()
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/health")
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return 1000 * (time.perf_counter() - start), answer.status


def measure(port: int, clients: int, probes: int) -> dict:
    command = [sys.executable, __file__, "--crowd", str(port), "--clients", str(clients)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as crowding:
        try:
            crowding.stdout.readline()  # the first wave has left
            answers = []
            for _ in range(probes):
                answers.append(probe(port))
                time.sleep(0.005)
        finally:
            crowding.terminate()
        waves = len(crowding.stdout.readlines())
    times = sorted(ms for ms, _ in answers)
    at = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "worst": 1}
    ms = {name: round(times[min(len(times) - 1, int(share * len(times)))], 2) for name, share in at.items()}
    return {
        "n": len(times),
        "clients": clients,
        "waves": waves,
        "answers": dict(Counter(status for _, status in answers)),
        "ms": ms,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tree", type=Path, default=ROOT)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--probes", type=int, default=1000)
    parser.add_argument("--crowd", type=int, default=0, help="only the clients, against this port")
    args = parser.parse_args()
    if args.crowd:
        return asyncio.run(crowd(args.crowd, args.clients))
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "scripts.chat_web",
            "--model",
            make_model(Path(folder)),
            "--port",
            "0",
            "--queue",
            str(args.clients),
            "--device-type",
            "cpu",
        ]
        env = os.environ | {"NANOLAB_BASE_DIR": folder, "PYTHONPATH": str(args.tree)}
        with subprocess.Popen(command, cwd=args.tree, env=env, stdout=subprocess.PIPE, text=True) as process:
            try:
                line = next(line for line in process.stdout if line.startswith("nanolab serves"))
                result = measure(int(re.search(r"127\.0\.0\.1:([0-9]+)", line)[1]), args.clients, args.probes)
            finally:
                process.kill()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=args.tree, capture_output=True, text=True
    ).stdout.strip()
    print(json.dumps({"model": "depth 4, random weights, vocabulary 8192, context 2048", "commit": commit} | result))


if __name__ == "__main__":
    main()
