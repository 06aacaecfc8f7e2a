"""How long a checkpoint holds up training on a CPU: written in the step, and from a copy beside the next steps.

    python dev/bench/save.py [MB] [PAIRS]

Each pair makes the same steps (matrix products, and an update of the state in place) after a save of either kind, in
turn: seconds of the call, and of call and steps together until the checkpoint is on the disk. The last line is a JSON
document."""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402

from nanolab.records import checkpoint  # noqa: E402
from nanolab.runtime import Runtime, keep_freed_memory  # noqa: E402

STEPS = 40


def steps(state: dict[str, torch.Tensor]) -> None:
    x = torch.ones(512, 512)
    for _ in range(STEPS):
        for _ in range(4):
            x @ x
        next(iter(state.values())).mul_(1.0)


def main() -> None:
    mb, pairs = (int(arg) for arg in sys.argv[1:] + ["200", "9"][len(sys.argv) - 1 :])
    torch.set_num_threads(1)
    keep_freed_memory()
    alone, weights = (
        Runtime(torch.device("cpu"), torch.float32),
        {f"w{i}": torch.randn(1 << 20) for i in range(mb // 8)},
    )
    optimizer = {f"m{i}@0:{1 << 20}": torch.randn(1 << 20) for i in range(mb // 8)}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        writer = checkpoint.Writer(alone)
        for pair in range(pairs + 1):
            row = {}
            for kind in ("in the step", "beside") if pair % 2 else ("beside", "in the step"):
                state = dict(weights=weights, optimizer=optimizer, meta={})
                began = time.perf_counter()
                if kind == "beside":
                    writer.save(Path(folder), 1, **state)
                else:
                    checkpoint.save(Path(folder), 1, runtime=alone, **state)
                row[kind] = time.perf_counter() - began
                steps(weights)
                writer.wait()
                row[f"{kind}, with steps"] = time.perf_counter() - began
            rows.append(row)
    rows = rows[1:]  # the first one touches memory that is new
    median = {key: round(statistics.median(row[key] for row in rows), 4) for key in rows[0]}
    ratios = sorted(row["beside"] / row["in the step"] for row in rows)
    ratio = {"median": round(statistics.median(ratios), 3), "range": [round(ratios[0], 3), round(ratios[-1], 3)]}
    print(json.dumps({"mb": mb, "pairs": pairs, "median_seconds": median, "ratio": ratio}))


if __name__ == "__main__":
    main()
