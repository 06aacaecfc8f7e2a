"""Exports under the versions of transformers that people have, each installed beside the locked one for one process,
which has imported torch before.
"""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import warm
from packaging.requirements import Requirement

from nanolab.data.chat import render, template_of
from nanolab.data.tokenizer import Tokenizer
from nanolab.interop import export
from nanolab.model.config import GPTConfig
from nanolab.model.gpt import GPT

pytestmark = pytest.mark.slow
# the oldest that an export names; 5.24 renamed the cache
VERSIONS = ["4.57.6", "5.20.0", "5.22.0", "5.23.0", pytest.param("5.24.0", marks=pytest.mark.fault("L1"))]
CONFIG = GPTConfig(sequence_len=32, vocab_size=285, n_layer=2, n_head=2, n_embd=32)
TEXT = "the crow saw the cheese and took it. The fox said: three times four is 12, isn't it?\n\tA\u00e9\U0001f600 " * 3
CHATS = [  # a text ends in a character of several tokens
    [
        {"role": "user", "content": "three times four?"},
        {"role": "assistant", "content": "\U0001f600"},
        {"role": "user", "content": "and"},
        {"role": "assistant", "content": "12", "weight": 0},
    ],
    [
        {"role": "user", "content": "3"},
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "\u00e9\U0001f600"},
                {"type": "python", "text": "3"},
                {"type": "python_output", "text": "3\u00e9"},
            ],
        },
    ],
]
PROMPT = [[250, 5, 17, 99]]

# What a reader of the folder does, with transformers alone: tokens that `forward` read, and the text.
READ = """
import sys
sys.modules["nanolab"] = None
# the installed one is younger than transformers 4.57 and its huggingface_hub, which import it; a reader of an old
# version has none or an old one
sys.modules["kernels"] = None
import json, torch, transformers
folder, prompt = sys.argv[1], torch.tensor(json.loads(sys.argv[2]))
chats, template = json.loads(sys.argv[3]), sys.argv[4]
model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
plain = dict(attention_mask=torch.ones_like(prompt), max_new_tokens=5, do_sample=False)
plain |= dict(eos_token_id=None, pad_token_id=0)
read = []
model.register_forward_pre_hook(lambda _, args, kwargs: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
words = [tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in range(model.config.vocab_size)]
said = {"version": transformers.__version__, "vocabulary": words}
ways = {"greedy": {}, "beams": {"num_beams": 3}}
ways |= {"no cache": {"use_cache": False}, "beams, no cache": {"num_beams": 3, "use_cache": False}}
for name, how in ways.items():
    read.clear()
    said[name] = {"text": model.generate(prompt, **plain | how)[0].tolist(), "read": list(read)}
first = model.generate(prompt, return_dict_in_generate=True, **plain)
both = torch.cat([first.sequences, prompt], dim=1)
past = {name: first[name] for name in ("cache", "past_key_values") if name in first.keys()}
read.clear()
try:
    again = model.generate(both, **plain | {"attention_mask": torch.ones_like(both)}, **past)
    said["second turn"] = {"text": again[0].tolist(), "read": list(read)}
except ValueError as error:
    said["second turn"] = str(error)
chat = tokenizer.apply_chat_template(chats, chat_template=template, return_dict=True, return_assistant_tokens_mask=True)
said["chats"] = list(zip(chat["input_ids"], chat["assistant_masks"]))
model.train()
said["gradients"] = []
for kwargs in (None, {}, {"use_reentrant": True}, {"use_reentrant": False}):
    if kwargs is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    model.zero_grad()
    model(input_ids=prompt, labels=prompt).loss.backward()
    said["gradients"].append([p.grad.norm().item() for p in model.parameters()])
base = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True, attn_implementation="sdpa")
hidden = base(prompt).last_hidden_state
said["base"] = (hidden - model.base_model(input_ids=prompt).last_hidden_state).abs().max().item()
try:
    load = transformers.AutoModelForCausalLM.from_pretrained
    load(folder, trust_remote_code=True, attn_implementation="flash_attention_2")
except ValueError as error:
    said["flash"] = str(error)
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([TEXT], 285)


@pytest.fixture(scope="module")
def model():
    model, g = GPT(CONFIG).eval(), torch.Generator().manual_seed(0)
    model.init_weights(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=g))
    return model


@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    export.write_export(folder, model, tokenizer, "base")
    return folder


def pip(folder: Path, *packages: str) -> None:
    """Install into `folder`, and nothing else; a registry that cannot be reached skips the test."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-compile",
        "--retries",
        "1",
        "--timeout",
        "30",
        "--target",
        str(folder),
        *packages,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode and re.search("from versions: none|connection|timed out", done.stderr, re.IGNORECASE):
        pytest.skip(f"the package registry cannot be reached: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr


def install(version: str, folder: Path) -> None:
    """transformers in that version, and what it asks for in versions that are not installed."""
    if importlib.metadata.version("transformers") == version:
        return
    pip(folder, f"transformers=={version}")
    asked = [
        Requirement(line)
        for line in next(iter(importlib.metadata.distributions(name="transformers", path=[str(folder)]))).requires
    ]
    pinned = [
        r
        for r in asked
        if (r.marker is None or r.marker.evaluate({"extra": ""}))
        and not r.specifier.contains(importlib.metadata.version(r.name))
    ]
    if pinned:
        pip(folder, *map(str, pinned))


@torch.no_grad()
def greedy(model: GPT, ids: list[int], n: int) -> list[int]:
    for _ in range(n):
        ids = [*ids, model(torch.tensor([ids]))[0, -1].argmax().item()]
    return ids


@pytest.fixture
def beside():
    """A folder for packages, deleted at once: a version has 120 MB."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.mark.parametrize("version", VERSIONS)
def test_generation_reads_each_token_once(version, beside, folder, model, tokenizer, tmp_path):
    """Also with beams and in a second turn; the text is the one without a cache, and the native model's."""
    install(version, beside)
    env = os.environ | {
        "PYTHONPATH": str(beside),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    python = warm.executable(
        "torch.distributed", "torch._dynamo", "torch.fx.experimental.symbolic_shapes", "scipy.stats"
    )
    command = [python, "-c", READ, folder, json.dumps(PROMPT), json.dumps(CHATS), template_of(tokenizer)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["version"] == version
    assert said["greedy"]["read"] == said["beams"]["read"] == [4, 1, 1, 1, 1] and said["no cache"]["read"] == [
        4,
        5,
        6,
        7,
        8,
    ]
    assert said["greedy"]["text"] == said["no cache"]["text"] == greedy(model, PROMPT[0], 5)
    assert said["beams"]["text"] == said["beams, no cache"]["text"]
    # the last token of a text is not read
    assert said["second turn"] == {
        "text": greedy(model, said["greedy"]["text"] + PROMPT[0], 5),
        "read": [5, 1, 1, 1, 1],
    }
    assert said["vocabulary"] == [tokenizer.decode([i]) for i in range(285)]
    assert [tuple(pair) for pair in said["chats"]] == [tuple(map(list, render(tokenizer, chat))) for chat in CHATS]
    plain, *others = said["gradients"]
    assert len(others) == 3 and all(gradients == pytest.approx(plain, rel=1e-4) for gradients in others)
    assert said["base"] == 0 and "attn_implementation 'flash_attention_2' is not offered by this model" in said["flash"]
