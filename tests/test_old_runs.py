"""What commit 9e9a9b1 wrote is loaded, resumed, served and read by transformers
(tests/fixtures/made_by_9e9a9b1/README.md says how it was made).
"""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
import warm

from nanolab.records.models import load_model
from nanolab.runtime import Runtime
from nanolab.serving.config import ServeConfig

ROOT = Path(__file__).parents[1]
OLD = Path(__file__).parent / "fixtures" / "made_by_9e9a9b1"
EXPECTED = json.loads((OLD / "expected.json").read_text())
RUNTIME = Runtime(torch.device("cpu"), torch.float32)


@pytest.fixture
def old(tmp_path, monkeypatch):
    """A copy of the folder, which is also the working directory; a function (script, *arguments) -> its standard
    output.
    """
    folder = shutil.copytree(OLD, tmp_path / "old")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("NANOLAB_BASE_DIR", "base")
    env = os.environ | {"PYTHONPATH": str(ROOT), "NANOLAB_DTYPE": "float32"}

    def run(script: str, *arguments: str, ranks: int = 1) -> str:
        module = ["-m", f"scripts.{script}"]
        if ranks > 1:
            module = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", ranks, *module, "--"]
        done = warm.python(*module, *arguments, env=env, cwd=folder)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.mark.parametrize("name", EXPECTED)
def test_weights_and_tokenizer_say_what_they_said(old, name):
    want = EXPECTED[name]
    model, tokenizer, meta = load_model(f"{name}@4", RUNTIME)
    assert [tokenizer.bos, *tokenizer.encode(want["prompt"])] == want["ids"]
    with torch.inference_mode():
        logits = model(torch.tensor([want["ids"]]))[0, -1].float()
    assert logits.topk(3).indices.tolist() == want["top"]
    torch.testing.assert_close(logits[:16], torch.tensor(want["logits"]), atol=1e-4, rtol=0)
    assert (
        old("chat_cli", "--model", f"{name}@4", "-p", want["prompt"], "--temperature", "0", "--max-tokens", "12")
        == want["reply"]
    )


RESUMED = {
    "old": (
        "base_train --run old --resume --data-dir texts --tokenizer base/tokenizers/small --depth 2 --aspect-ratio 16"
        " --head-dim 16 --max-seq-len 64 --device-batch-size 4 --total-batch-size 512 --num-iterations 8 --warmup-steps"
        " 2 --lr-scale 0.5 --eval-every 4 --eval-tokens 1024 --sample-every -1 --save-every 4 --keep all --device-type"
        " cpu --threads 1"
    ),
    "old-sft": (
        "chat_sft --model old@4 --run old-sft --resume --tasks jsonl=chats.jsonl --num-iterations 8 --save-every 4"
        " --keep all --eval-every 4 --eval-tokens 512 --threads 1 --device-type cpu"
    ),
}


@pytest.mark.parametrize(
    "name, ranks",
    [
        *((name, 1) for name in EXPECTED),
        *(pytest.param(name, 3, marks=[pytest.mark.slow, pytest.mark.fault("F7")]) for name in EXPECTED),
    ],
)
def test_a_run_goes_on_as_the_uninterrupted_one_did(old, name, ranks):
    """On as many ranks as it had, or on three, which have 3, 3 and 2 of its 8 rows a step."""
    old(*RESUMED[name].split(), ranks=ranks)
    rows = [json.loads(line) for line in Path(f"base/runs/{name}/metrics.jsonl").read_text().splitlines()]
    for key, want in (("train/loss", EXPECTED[name]["losses"]), ("val/bpb", EXPECTED[name]["bpb"])):
        seen = {str(r["step"]): r[key] for r in rows if key in r and r["step"] >= 4}
        assert seen.keys() == want.keys()
        for step, value in want.items():
            assert math.isclose(seen[step], value, rel_tol=1e-4), (key, step, seen[step], value)


def test_it_is_served(old):
    from starlette.testclient import TestClient

    from nanolab.serving.api import create_app
    from nanolab.serving.server import load_models

    cfg = ServeConfig(model="old,old-sft", device_type="cpu")
    app = create_app(load_models(cfg, RUNTIME), cfg)
    with TestClient(app, base_url="http://127.0.0.1") as http:
        answer = http.post(
            "/v1/completions",
            json={"model": "old", "prompt": EXPECTED["old"]["prompt"], "max_tokens": 12, "temperature": 0},
        ).json()
        assert answer["choices"][0]["text"] == EXPECTED["old"]["reply"].rstrip("\n")
        messages = [{"role": "user", "content": EXPECTED["old-sft"]["prompt"]}]
        answer = http.post(
            "/v1/chat/completions", json={"model": "old-sft", "messages": messages, "max_tokens": 12, "temperature": 0}
        ).json()
        assert answer["choices"][0]["message"]["content"] == EXPECTED["old-sft"]["reply"].rstrip("\n")


def test_its_export_is_read_by_transformers(old):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        "export", trust_remote_code=True, dtype=torch.float32
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained("export")
    ours, own, _ = load_model("old-sft@4", RUNTIME)
    ids = [own.bos, *own.encode("What is fox 3?")]
    assert [tokenizer.bos_token_id, *tokenizer("What is fox 3?", add_special_tokens=False)["input_ids"]] == ids
    with torch.inference_mode():
        theirs, mine = model(torch.tensor([ids])).logits[0, -1], ours(torch.tensor([ids]))[0, -1].float()
    assert (theirs - mine).abs().max() < 0.05  # the export is in bf16
    assert theirs.argmax() == mine.argmax()
