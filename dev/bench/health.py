"""How long /health takes while clients come and leave at once: python dev/bench/health.py [--tree CHECKOUT] [--clients 200] [--probes 1000] > health.json

Starts scripts.chat_web of --tree (default: this one) with a model of --depth 4 and random weights, and lets so many clients ask for long
replies, every second one as a stream, and leave after 50 to 500 ms, all at once and again until the probes are made. Each probe is a GET of
/health on a connection of its own, from this process. The last line of stdout is one JSON document.
"""

import argparse
import asyncio
import importlib.util
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
spec = importlib.util.spec_from_file_location("nanolab_dev_flood", Path(__file__).parent / "flood.py")
flood = importlib.util.module_from_spec(spec)
spec.loader.exec_module(flood)


def make_model(base: Path) -> str:
    """A run with a base model of depth 4 and random weights."""
    import torch

    from nanolab.config import GPTConfig, to_json
    from nanolab.data.tokenizer import Tokenizer
    from nanolab.model.gpt import GPT
    from nanolab.runtime import Runtime
    from nanolab.training import checkpoint

    tokenizer = Tokenizer.train([path.read_text() for folder in ("nanolab", "tests") for path in sorted((ROOT / folder).rglob("*.py"))], 8192)
    model = GPT(GPTConfig(sequence_len=2048, vocab_size=tokenizer.vocab_size, n_layer=4, n_head=2, n_embd=256))  # as --depth 4 makes it
    model.init_weights(0)
    folder, meta = base / "runs" / "d4", {"model_config": to_json(model.config), "tokenizer_hash": tokenizer.hash, "kind": "base"}
    checkpoint.save(folder / "checkpoints", 1, weights=dict(model.state_dict()), optimizer=None, meta=meta, runtime=Runtime(torch.device("cpu"), torch.float32))
    tokenizer.save(folder / "tokenizer")
    return "d4"


async def probe(port: int) -> float:
    """Seconds from connecting to the whole answer. Raises AssertionError unless it is 200."""
    start = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    answer = await reader.read()
    writer.close()
    assert b" 200 " in answer[:15], answer
    return time.perf_counter() - start


async def measure(port: int, clients: int, probes: int) -> dict:
    for n in (1, 8):
        await flood.many(port, 40, n)
    rng, outcomes, times, done = random.Random(1), Counter(), [], asyncio.Event()

    async def crowd() -> None:
        while not done.is_set():
            outcomes.update(await asyncio.gather(*(flood.ask(port, 1500, rng.uniform(0.05, 0.5), stream=i % 2 == 0) for i in range(clients))))

    crowding = asyncio.create_task(crowd())
    while len(times) < probes:
        times.append(await probe(port))
        await asyncio.sleep(0.005)
    done.set()
    await crowding
    cuts = statistics.quantiles(times, n=1000)
    ms = {name: round(1000 * value, 2) for name, value in (("p50", cuts[499]), ("p90", cuts[899]), ("p99", cuts[989]), ("worst", max(times)))}
    return {"n": len(times), "clients": clients, "floods": sum(outcomes.values()) // clients, "outcomes": dict(outcomes), "ms": ms}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tree", type=Path, default=ROOT)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--probes", type=int, default=1000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "scripts.chat_web", "--model", make_model(Path(folder)), "--port", "0", "--device-type", "cpu"]
        env = os.environ | {"NANOLAB_BASE_DIR": folder, "PYTHONPATH": str(args.tree)}
        with subprocess.Popen(command, cwd=args.tree, env=env, stdout=subprocess.PIPE, text=True) as process:
            try:
                line = next(line for line in process.stdout if line.startswith("nanolab serves"))
                result = asyncio.run(measure(int(re.search(r"127\.0\.0\.1:([0-9]+)", line)[1]), args.clients, args.probes))
            finally:
                process.kill()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=args.tree, capture_output=True, text=True).stdout.strip()
    print(json.dumps({"model": "depth 4, random weights, vocabulary 8192, context 2048", "commit": commit} | result))


if __name__ == "__main__":
    main()
