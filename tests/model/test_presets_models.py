"""Every preset from the command line: fifty steps at toy width on text, and its loss falls. (Counts:
tests/test_presets.py.)
"""

import json
from pathlib import Path

import pytest
import warm

from nanolab.presets import PRESETS

ROOT = Path(__file__).parents[2]
# parquet shards of English; without them the text is nanolab's own source
REAL = ROOT.parent / "shared" / "data" / "pretrain"
TOY = (
    "--depth 2 --aspect-ratio 32 --head-dim 16 --max-seq-len 64 --device-batch-size 8 --total-batch-size 512"
    " --num-iterations 50"
)


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """A function (module, arguments) that runs a command of nanolab; all share one base directory with a tokenizer."""
    base, shards = tmp_path_factory.mktemp("base"), sorted(REAL.glob("*.parquet"))
    source = shards[0] if shards else base / "own.txt"
    if not shards:
        source.write_text("\n\n".join(path.read_text() for path in sorted((ROOT / "nanolab").rglob("*.py"))))

    def run(module: str, *arguments: str) -> Path:
        environment = {
            "NANOLAB_BASE_DIR": str(base),
            "PATH": "/usr/bin:/bin",
            "OMP_NUM_THREADS": "1",
            "NANOLAB_DTYPE": "float32",
        }
        done = warm.python("-m", module, "--data-dir", source, *arguments, env=environment)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return base

    run("scripts.tok_train", "--vocab-size", "512", "--max-chars", "2000000")
    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_fifty_steps_on_real_text(command, name):
    warmup = [] if PRESETS[name].get("recipe") == "adam_constant" else ["--warmup-steps", "10"]
    base = command(
        "scripts.base_train",
        "--preset",
        name,
        "--run",
        name,
        "--device-type",
        "cpu",
        "--eval-every",
        "-1",
        *TOY.split(),
        *warmup,
    )
    rows = [json.loads(line) for line in (base / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    first, last = losses[0], sum(losses[-5:]) / 5
    assert len(losses) == 50 and 5.9 < first < 6.5, "the first loss is about ln 512"
    assert last < first - 0.2, (first, last)  # the rates of gpt2-xl, meant for 24 times the width, bring 0.27 nats
    assert json.loads((base / "runs" / name / "config.json").read_text())["preset"] == name
