"""A GPT-2 of transformers made in a second: a folder with config, random weights and a tokenizer, as save_pretrained
leaves it.
"""

import json
from pathlib import Path

import tokenizers
import torch
import transformers

TEXTS = [
    "the cat sat on the mat and the dog sat on the cat; ",
    "naïve café\n\n    return 12 + 345\n",
    "it's what they'll say, isn't it? ",
] * 5
END = "<|endoftext|>"


def make(folder: Path, *, old_tokenizer: bool = False, seed: int = 0, **settings) -> Path:
    """old_tokenizer: vocab.json and merges.txt instead of tokenizer.json. settings: of GPT2Config."""
    folder.mkdir(parents=True, exist_ok=True)
    learner = tokenizers.ByteLevelBPETokenizer()
    learner.train_from_iterator(TEXTS, vocab_size=300, min_frequency=2, show_progress=False)
    learner.save_model(str(folder))
    vocab = json.loads((folder / "vocab.json").read_text())
    end = vocab[END] = len(vocab)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    if not old_tokenizer:
        tokenizer = transformers.GPT2Tokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
        (folder / "vocab.json").unlink(), (folder / "merges.txt").unlink()
        tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    size = dict(vocab_size=end + 1, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=end, eos_token_id=end)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**size | settings))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape), alpha=0.15)
    model.save_pretrained(folder)
    return folder
