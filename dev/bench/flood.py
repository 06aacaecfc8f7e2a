"""Reliability of the server: crowd it, leave it, look at its memory: python dev/bench/flood.py [--model NAME] >
flood.json

Starts scripts.chat_web as a process of its own, with a queue of 8 and 8 rows at once, on --model or on a tiny one made
for it:
  flood    200 clients at once with timeouts of 50 to 500 ms ask for long replies, every second one as a stream, and
           leave
  normal   at once afterwards: a short request, and how long it takes
  memory   2,000 short requests, 8 at a time, every tenth given up half way; resident memory before, on the way and
           after
  end      SIGTERM while a reply is being streamed: it has to arrive whole, and the process to leave with 0
The last line of stdout is one JSON document. The exit code is 1 if one of the promises is broken (see PROMISES).
"""

import argparse
import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from http.client import HTTPConnection
from pathlib import Path

ROOT = Path(__file__).parents[2]
QUEUE = ROWS = 8
PROMISES = {
    "nobody met an error of the server": lambda r: (
        {*r["flood"]["outcomes"], *r["memory"]["outcomes"]} <= {"200", "429", "left"}
    ),
    "a normal request is answered within a second": lambda r: (r["normal_seconds"] or 60) < 1,
    "memory is flat (within 3 % or 8 MiB)": lambda r: r["memory"]["grown_mib"] < max(8, 0.03 * r["memory"]["mib"][0]),
    "SIGTERM lets a reply finish": lambda r: r["end"] == {"whole": True, "exit_code": 0},
}


def make_model(base: Path) -> str:
    """A run with a small base model of random weights whose logits are all equal: greedy, it never ends."""
    import torch

    from nanolab.cli import to_json
    from nanolab.data.tokenizer import Tokenizer
    from nanolab.model.config import GPTConfig
    from nanolab.model.gpt import GPT
    from nanolab.records import checkpoint
    from nanolab.runtime import Runtime

    tokenizer = Tokenizer.train(["plain words and plain words only " * 20], 275)
    model = GPT(GPTConfig(sequence_len=2048, vocab_size=tokenizer.vocab_size, n_layer=2, n_head=2, n_embd=64))
    model.init_weights(0)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    folder, meta = (
        base / "runs" / "endless",
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
    return "endless"


def mib(process: subprocess.Popen) -> float:
    """Resident memory."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) / 1024


async def ask(port: int, tokens: int, timeout: float, stream: bool = False) -> str:
    """One completion on a connection of its own; its HTTP status, or left, for a client that waited no longer, or
    error.
    """
    body = json.dumps(
        {"prompt": "x" * (1 + tokens % 40), "max_tokens": tokens, "temperature": 0, "stream": stream}
    ).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type:"
        f" application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )

    async def talk() -> str:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(head.encode() + body)
            status = (await reader.readline()).split()[1].decode()
            await reader.read()
            return status
        finally:
            writer.close()

    try:
        return await asyncio.wait_for(talk(), timeout)
    except asyncio.TimeoutError:
        return "left"
    except (OSError, IndexError) as error:  # reset, or closed without an answer
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return "error"


async def flood(port: int, clients: int) -> Counter:
    rng = random.Random(1)
    return Counter(
        await asyncio.gather(*(ask(port, 1500, rng.uniform(0.05, 0.5), stream=i % 2 == 0) for i in range(clients)))
    )


async def many(port: int, requests: int, clients: int = ROWS) -> Counter:
    """Short requests from so many clients; every tenth is given up."""
    numbers, outcomes = iter(range(requests)), Counter()

    async def one_client() -> None:
        for i in numbers:
            outcomes[
                await (
                    ask(port, 1500, 0.05, stream=True) if i % 10 == 9 else ask(port, 1 + i % 16, 30, stream=i % 2 == 0)
                )
            ] += 1

    await asyncio.gather(*(one_client() for _ in range(clients)))
    return outcomes


async def crowd(port: int, process: subprocess.Popen, clients: int, requests: int) -> dict:
    for n in range(1, ROWS + 1):
        # warm: with every number of rows, since steps of few are recorded when they have come up often
        await many(port, 60, n)
    start = time.monotonic()
    outcomes = await flood(port, clients)
    flooded = {
        "clients": clients,
        "queue": QUEUE,
        "rows": ROWS,
        "seconds": round(time.monotonic() - start, 3),
        "outcomes": dict(outcomes),
    }
    start = time.monotonic()
    status = await ask(port, 8, 30)
    normal = time.monotonic() - start if status == "200" else None
    memory, total = [mib(process)], Counter()
    for _ in range(4):
        total += await many(port, requests // 4)
        memory.append(mib(process))
    kept = {
        "requests": requests,
        "outcomes": dict(total),
        "mib": [round(m, 1) for m in memory],
        "grown_mib": round(memory[-1] - memory[0], 1),
    }
    return {"flood": flooded, "normal_seconds": normal and round(normal, 4), "memory": kept}


def end(port: int, process: subprocess.Popen) -> dict:
    """SIGTERM after the first event of a stream."""
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    body = json.dumps({"prompt": "x", "max_tokens": 500, "temperature": 0, "stream": True})
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    answer.readline()
    process.send_signal(signal.SIGTERM)
    return {"whole": answer.read().endswith(b"data: [DONE]\n\n"), "exit_code": process.wait(30)}


def machine() -> dict:
    from nanolab import runtime
    from nanolab.records.environment import environment

    return environment(runtime.start("cpu", "float32"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="", help="NAME of a run; default: a tiny one made for this")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--requests", type=int, default=2000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | ({} if args.model else {"NANOLAB_BASE_DIR": folder})
        model = args.model or make_model(Path(folder))
        flags = ["--model", model, "--port", "0", "--queue", str(QUEUE), "--max-rows", str(ROWS), "--prefix-mb", "8"]
        command = [sys.executable, "-m", "scripts.chat_web", *flags]
        with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) as process:
            try:
                line = next(line for line in process.stdout if line.startswith("nanolab serves"))
                port = int(re.search(r"127\.0\.0\.1:([0-9]+)", line)[1])
                result = {"model": args.model or "tiny"} | asyncio.run(
                    crowd(port, process, args.clients, args.requests)
                )
                result["end"] = end(port, process)
            finally:
                process.kill()
    broken = [promise for promise, kept in PROMISES.items() if not kept(result)]
    print(json.dumps(result | {"broken": broken, "env": machine()}))
    raise SystemExit(bool(broken))


if __name__ == "__main__":
    main()
