"""A Hugging Face folder as evaluations read it, against transformers itself on tiny random models."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from nanolab.cli import UserError
from nanolab.evals.bpb import bits_per_byte
from nanolab.evals.likelihood import Text, score
from nanolab.interop.hf_model import load_folder, weights_hash
from nanolab.runtime import Runtime

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

CPU = Runtime(torch.device("cpu"), torch.float32)
TEXT = "the cat <|end|> sat\n\n é世 on the  mat"
WORDS = ["the", "cat", "sat", "on", "mat"]


def byte_level(folder: Path, size: int = 280, **specials: str) -> None:
    """As GPT-2's: a character stands for each byte."""
    level, bpe = tokenizers.pre_tokenizers.ByteLevel, tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer, bpe.decoder = level(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<|end|>"], initial_alphabet=level.alphabet(), show_progress=False
    )
    bpe.train_from_iterator(["the cat sat on the mat " * 20], trainer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, **specials).save_pretrained(folder)


def pieces(folder: Path) -> None:
    """As Llama 2's: pieces of text with marks for blanks, single bytes for all else, a blank before the first word."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *sorted(set("".join(WORDS)))]
    merges, vocab = (
        [("t", "h"), ("th", "e"), ("▁", "the"), ("a", "t")],
        {name: i for i, name in enumerate([*names, "th", "the", "▁the", "at"])},
    )
    bpe = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    n, d = tokenizers.normalizers, tokenizers.decoders
    bpe.normalizer = n.Sequence([n.Prepend("▁"), n.Replace(" ", "▁")])
    bpe.decoder = d.Sequence([d.Replace("▁", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def gpt2(folder: Path, **changes) -> None:
    sizes = (
        dict(
            vocab_size=300,
            n_positions=40,
            n_embd=32,
            n_layer=2,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
            initializer_range=0.3,
        )
        | changes
    )
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).save_pretrained(folder)


def llama(folder: Path) -> None:
    sizes = dict(
        vocab_size=300,
        max_position_embeddings=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, initializer_range=0.3)).save_pretrained(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    torch.manual_seed(0)
    made = {name: tmp_path_factory.mktemp(name) for name in ("gpt2", "llama")}
    gpt2(made["gpt2"])
    byte_level(made["gpt2"], bos_token="<|end|>", eos_token="<|end|>")
    llama(made["llama"])
    pieces(made["llama"])
    return made


@pytest.fixture
def copy(folders, tmp_path) -> Path:
    """A GPT-2 folder to break."""
    return Path(shutil.copytree(folders["gpt2"], tmp_path / "model"))


def ids(n: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(300, size=n).tolist()


@torch.no_grad()
def alone(folder: Path, ids: list[int], start: int, limit: int) -> tuple[float, bool]:
    """By transformers: the text's last `limit` tokens, all logits."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    start, kept = start - max(0, len(ids) - limit), ids[-limit:]
    logp = model(torch.tensor([kept])).logits[0].double().log_softmax(-1)
    at = range(start - 1, len(kept) - 1)
    return -sum(logp[i, kept[i + 1]].item() for i in at), all(logp[i].argmax() == kept[i + 1] for i in at)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("tokens", [30, 4000])
def test_scores_are_those_of_transformers(folders, family, tokens):
    reader, _ = load_folder(folders[family], CPU)
    assert reader.limit == 40
    greedy = [*ids(6, 9), *reader.greedy(ids(6, 9), 5)]
    groups = [
        [Text(ids(20, 1) + ids(n, n), 20) for n in (1, 4, 9)],
        [Text(greedy, 6)],
        [Text(ids(60, 3), 55), Text(ids(41, 4), 30)],
        [Text(ids(7, 5), 1)],
    ]
    for group, scores in zip(groups, score(reader, groups, tokens=tokens)):
        for text, got in zip(group, scores):
            nats, likeliest = alone(folders[family], text.ids, text.start, 40)
            assert got.nats == pytest.approx(nats, abs=1e-3) and got.greedy == likeliest
            assert (got.n_tokens, got.cut) == (len(text.ids) - text.start, max(0, len(text.ids) - 40))
            assert got.greedy == (text.ids is greedy)


def test_a_model_that_cannot_pick_places_gives_the_same(folders):
    reader, _ = load_folder(folders["gpt2"], CPU)
    groups = [[Text(ids(20, 1) + ids(n, n), 20) for n in (1, 4, 9)]]
    picked = score(reader, groups)
    assert reader.picks
    reader.picks = False
    assert [s.nats for s in score(reader, groups)[0]] == pytest.approx([s.nats for s in picked[0]], abs=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_bits_per_byte_are_those_of_transformers_own_loss(folders, family):
    reader, tokenizer = load_folder(folders[family], CPU)
    rows = np.array(
        [[tokenizer.bos, *tokenizer.encode(TEXT)[:20]], [tokenizer.bos, *tokenizer.encode("mat " * 30)[:20]]]
    )
    found = bits_per_byte(reader, (rows[:, :-1], rows[:, 1:]), tokenizer.token_bytes(), CPU, batch_size=1)
    model = transformers.AutoModelForCausalLM.from_pretrained(folders[family])
    nats = 20 * sum(model(torch.tensor([row]), labels=torch.tensor([row])).loss.item() for row in rows.tolist())
    assert found.nats == pytest.approx(nats, rel=1e-5) and found.n_tokens == 40
    assert found.bpb == pytest.approx(nats / math.log(2) / found.n_bytes)
    reader.tokens = 1  # a row at a time
    assert bits_per_byte(reader, (rows[:, :-1], rows[:, 1:]), tokenizer.token_bytes(), CPU).nats == pytest.approx(
        nats, rel=1e-5
    )


@pytest.mark.parametrize("family, extra", [("gpt2", 0), ("llama", 1)])
def test_tokens_are_as_long_as_the_text(folders, family, extra):
    """Llama's pieces begin with a blank that the text does not have."""
    _, tokenizer = load_folder(folders[family], CPU)
    lengths = tokenizer.token_bytes()
    for text in (TEXT, *WORDS, "the the", "\x00 ü"):
        found = tokenizer.encode(text)
        assert lengths[found].sum() == len(text.encode()) + extra
        assert tokenizer.decode(found) == text
    assert len(lengths) == tokenizer.vocab_size and lengths[tokenizer.bos] == 0


def test_text_that_looks_special_is_text(folders):
    _, tokenizer = load_folder(folders["gpt2"], CPU)
    assert tokenizer.bos == 0 and 0 not in tokenizer.encode(TEXT)
    assert tokenizer.encode_batch([TEXT, "", "cat"]) == [tokenizer.encode(TEXT), [], tokenizer.encode("cat")]
    assert tokenizer.encode_batch([]) == []
    assert tokenizer.encode("a\ud800 b") == tokenizer.encode("a\ufffd b"), "half of a pair, which JSON can hold"


def test_it_computes_in_the_dtype_that_it_is_saved_in_unless_another_is_asked_for(folders, monkeypatch):
    low = Runtime(torch.device("cpu"), torch.bfloat16)
    monkeypatch.delenv("NANOLAB_DTYPE", raising=False)
    reader, _ = load_folder(folders["gpt2"], low)
    assert reader.model.dtype == torch.float32 and reader.dtype_name == "float32"
    monkeypatch.setenv("NANOLAB_DTYPE", "bfloat16")
    assert load_folder(folders["gpt2"], low)[0].dtype_name == "bfloat16"


def test_weights_are_told_apart_by_their_content(copy, folders):
    assert weights_hash(copy) == weights_hash(folders["gpt2"]) != weights_hash(folders["llama"])


def test_a_text_begins_with_eos_where_there_is_no_bos(copy):
    byte_level(copy, eos_token="<|end|>")
    assert load_folder(copy, CPU)[1].bos == 0
    byte_level(copy)
    with pytest.raises(UserError, match="neither a bos nor an eos token"):
        _ = load_folder(copy, CPU)[1].bos


def test_bits_per_byte_need_tokens_that_are_bytes(copy):
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(copy)
    with pytest.raises(UserError, match="bits per byte are not known"):
        load_folder(copy, CPU)[1].token_bytes()


OWN_CODE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel, GenerationMixin
from transformers.modeling_outputs import CausalLMOutput

class OwnConfig(PretrainedConfig):
    model_type = "own"
    vocab_size, max_position_embeddings = 300, 40

class Own(PreTrainedModel, GenerationMixin):
    config_class = OwnConfig
    def __init__(self, config):
        super().__init__(config)
        self.table, self.head = torch.nn.Embedding(300, 8), torch.nn.Linear(8, 300)
        self.post_init()
    def get_input_embeddings(self): return self.table
    def get_output_embeddings(self): return self.head
    def forward(self, input_ids, attention_mask=None, use_cache=None):
        return CausalLMOutput(logits=self.head(self.table(input_ids)))
"""


def own(folder: Path) -> None:
    """A model that the folder's own code makes."""
    from safetensors.torch import save_file

    (folder / "modeling_own.py").write_text(OWN_CODE)
    weights = {"table.weight": torch.randn(300, 8), "head.weight": torch.randn(300, 8), "head.bias": torch.zeros(300)}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    auto = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.Own"}
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "architectures": ["Own"], "auto_map": auto}))


def test_the_folders_own_code_runs_only_when_asked_for(copy, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    own(copy)
    with pytest.raises(UserError, match="modeling_own.py, then add --trust-code"):
        load_folder(copy, CPU)
    reader, _ = load_folder(copy, CPU, trust_code=True)
    assert not reader.picks and reader.limit == 40
    text = Text(ids(9, 1), 5)
    table, head = reader.model.table, reader.model.head
    want = torch.nn.functional.cross_entropy(
        head(table(torch.tensor(text.ids[4:8]))), torch.tensor(text.ids[5:]), reduction="sum"
    )
    assert score(reader, [[text]])[0][0].nats == pytest.approx(want.item(), rel=1e-5)


def set_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def to_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"not to be opened")


def lose_a_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: w for name, w in weights.items() if "ln_f" not in name}, folder / "model.safetensors", {"format": "pt"}
    )


def cut_weights(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def lose_the_tokenizer(folder: Path) -> None:
    for path in folder.glob("token*"):
        path.unlink()


BROKEN = {
    "no folder": (shutil.rmtree, "model is not a folder; expected one with config.json"),
    "no config": (
        lambda f: (f / "config.json").unlink(),
        "config.json does not exist; .* for a run of nanolab use --model NAME",
    ),
    "not json": (lambda f: (f / "config.json").write_text("{"), "config.json is damaged"),
    "no model type": (
        lambda f: (f / "config.json").write_text("{}"),
        "config.json is damaged .* expected a JSON object with model_type",
    ),
    "encoder": (
        lambda f: set_config(f, model_type="bert", architectures=["BertForMaskedLM"]),
        "BertForMaskedLM, no causal language model",
    ),
    "translator": (lambda f: set_config(f, model_type="t5", architectures=None), "is a t5, no causal language model"),
    "unheard of": (
        lambda f: set_config(f, model_type="gpt99", architectures=["GPT99"]),
        "GPT99, no causal language model",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no weights; expected model.safetensors"),
    "pickle": (to_pickle, r"weights only as pickles \(pytorch_model.bin\), which run code"),
    "a tensor is missing": (lose_a_tensor, r"lack 2 tensors \(transformer.ln_f.bias, transformer.ln_f.weight"),
    "half a file": (cut_weights, "cannot be loaded: SafetensorError"),
    "another size": (lambda f: set_config(f, n_embd=64), "cannot be loaded"),
    "no tokenizer": (lose_the_tokenizer, "holds no tokenizer"),
    "larger tokenizer": (
        lambda f: gpt2(f, vocab_size=200),
        r"tokenizer of .* has 2\d\d ids, its weights have rows for 200",
    ),
}


@pytest.mark.parametrize("breaking, said", BROKEN.values(), ids=BROKEN)
def test_what_is_wrong_with_a_folder_is_named(copy, breaking, said):
    breaking(copy)
    with pytest.raises(UserError, match=said):
        load_folder(copy, CPU)


def test_without_transformers_it_says_what_to_install(copy, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(UserError, match="bash runs/setup.sh hf"):
        load_folder(copy, CPU)
