"""Tokenizer: same ids as `tokenizers`, lossless, text stays text, exact bytes, refusals. Oracle: `tokenizers` and
UTF-8.
"""

import argparse
import ast
import json
import os
import subprocess
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import warm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanolab.cli import UserError
from nanolab.data import tokenizer_files as files
from nanolab.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from nanolab.data.tokenizer_training import Sample

FOREIGN = (
    "Größe façade naïve 東京都は大きい。 Привет, мир! नमस्ते दुनिया مرحبا 한국어 👩‍👩‍👧‍👦🇺🇳 ﬁ Å ſ'ſ ¼½"
    " ١٢٣\u2028\u0085\u00a0"
)
TEXTS = [Path(module.__file__).read_text(encoding="utf-8") for module in (argparse, ast)] + [FOREIGN * 4]
VOCAB = 1200


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return Tokenizer.train(TEXTS, VOCAB)


def hugging_face(path: Path) -> tokenizers.Tokenizer:
    """`tokenizers` on the same file, told to leave text that looks like a special token alone."""
    hf = tokenizers.Tokenizer.from_file(str(path))
    hf.encode_special_tokens = True
    return hf


@pytest.fixture(scope="module")
def hf(tok: Tokenizer, tmp_path_factory) -> tokenizers.Tokenizer:
    return hugging_face(tok.save(tmp_path_factory.mktemp("tok")))


@pytest.fixture(scope="module")
def gpt2_style(tmp_path_factory) -> Path:
    """A folder with vocab.json and merges.txt in the layout of GPT-2's, <|endoftext|> in the vocabulary included."""
    folder = tmp_path_factory.mktemp("gpt2")
    learner = tokenizers.ByteLevelBPETokenizer()
    learner.train_from_iterator(TEXTS, vocab_size=1000, min_frequency=2, show_progress=False)
    learner.save_model(str(folder))
    vocab = json.loads((folder / "vocab.json").read_text())
    vocab["<|endoftext|>"] = len(vocab)
    vocab.setdefault("model", len(vocab))  # a word that must not make the file look like a tokenizer.json
    (folder / "vocab.json").write_text(json.dumps(vocab))
    return folder


def same_ids(tok: Tokenizer, hf: tokenizers.Tokenizer, text: str) -> None:
    ids = tok.encode(text)
    assert ids == hf.encode(text, add_special_tokens=False).ids
    assert tok.decode(ids) == text


def spelled(tok: Tokenizer) -> list[str]:
    """Ordinary tokens that are whole characters, as text."""
    out = []
    for token in tok._bpe.vocab:
        try:
            out.append(token.decode())
        except UnicodeDecodeError:
            pass
    return out


def test_vocabulary(tok):
    assert tok.vocab_size == VOCAB and len(tok.token_bytes()) == VOCAB
    assert len(SPECIAL_TOKENS) == 9 and SPECIAL_TOKENS[0] == "<|bos|>"
    assert [tok.special(name) for name in SPECIAL_TOKENS] == list(range(VOCAB - 9, VOCAB))
    assert tok.bos == VOCAB - 9


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=200))
def test_any_text_has_the_ids_of_tokenizers(tok, hf, text):
    same_ids(tok, hf, text)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.large_base_example])
@given(data=st.data())
def test_concatenated_tokens_have_the_ids_of_tokenizers(tok, hf, data):
    same_ids(tok, hf, "".join(data.draw(st.lists(st.sampled_from(spelled(tok)), max_size=40))))


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=" \t\n\r\u00a0\u2028'sSlLvVeErRdDmMtTſ12३½-_—.", max_size=60))
def test_contractions_digits_and_blanks_have_the_ids_of_tokenizers(tok, hf, text):
    same_ids(tok, hf, text)


def test_real_text_has_the_ids_of_tokenizers(tok, hf, gpt2_style):
    for text in TEXTS:
        same_ids(tok, hf, text)
    gpt2 = Tokenizer.load(gpt2_style)
    theirs = tokenizers.ByteLevelBPETokenizer(str(gpt2_style / "vocab.json"), str(gpt2_style / "merges.txt"))
    for text in TEXTS:
        assert gpt2.encode(text) == theirs.encode(text).ids


@pytest.mark.slow
def test_every_code_point_has_the_ids_of_tokenizers(tok, hf, gpt2_style):
    """Two regex engines read the two built-in patterns; a newer Unicode table in one of them would show here."""
    gpt2 = Tokenizer.load(gpt2_style)
    gpt2_files = str(gpt2_style / "vocab.json"), str(gpt2_style / "merges.txt")
    gpt2_hf = tokenizers.ByteLevelBPETokenizer(*gpt2_files)._tokenizer  # it alone has encode_batch_fast
    ranges = chain(
        range(0xD800),
        range(0xE000, 0x20000),
        range(0x20000, 0x30000, 61),
        range(0x30000, 0x34000),
        range(0xE0000, 0xE0200),
    )
    points = [chr(i) for i in ranges]  # all planes that hold more than ideographs, newest additions included
    for context in ("a{0}b", "'{0}s", "1{0}2", " {0} x", "!{0}\n", "  {0}\n\n{0}", "'l{0}"):
        texts = ["".join(context.format(c) for c in points[i : i + 512]) for i in range(0, len(points), 512)]
        assert tok.encode_batch(texts) == [e.ids for e in hf.encode_batch_fast(texts, add_special_tokens=False)]
        assert gpt2.encode_batch(texts) == [e.ids for e in gpt2_hf.encode_batch_fast(texts)]


def test_pieces_follow_the_pattern(tok):
    pieces = lambda text: [p for p, _ in hf_split.pre_tokenize_str(text)]  # noqa: E731
    hf_split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(files.PATTERN), "isolated")
    assert pieces("I'LL don't it's") == ["I", "'LL", " don", "'t", " it", "'s"]
    assert pieces("12345 (abc) x,") == ["12", "34", "5", " (", "abc", ")", " x", ","]
    assert pieces("a;\n\n  b   c  ") == ["a", ";\n\n", " ", " b", "  ", " c", "  "]
    assert pieces("a  \n \n  b\t") == ["a", "  \n \n", " ", " b", "\t"]


def test_text_that_looks_special_stays_text(tok):
    text = "".join(SPECIAL_TOKENS) + " <|bos|>"
    ids = tok.encode(text)
    assert not set(ids) & set(tok.specials.values())
    assert tok.decode(ids) == text
    assert tok.decode([tok.bos, *tok.encode("hi")]) == "<|bos|>hi"


def test_token_bytes_are_exact(tok):
    lengths = tok.token_bytes()
    for text in TEXTS:
        assert lengths[tok.encode(text)].sum() == len(text.encode())
    assert [lengths[i] for i in tok.specials.values()] == [0] * 9
    assert sorted(tok.decode_bytes([i]) for i in range(VOCAB) if lengths[i] == 1) == [bytes([b]) for b in range(256)]
    assert tok.decode_bytes(tok.encode("é")[:1]) in (b"\xc3", "é".encode())


def test_batches_and_threads_change_nothing(tok):
    texts = ["", "a b", *TEXTS, FOREIGN]
    one_by_one = [tok.encode(text) for text in texts]
    assert one_by_one == tok.encode_batch(texts, threads=1) == tok.encode_batch(texts, threads=4)
    arrays = tok.encode_arrays(texts, threads=3)
    assert all(a.dtype == np.int32 and a.tolist() == ids for a, ids in zip(arrays, one_by_one))


def test_half_a_surrogate_pair_becomes_the_replacement_character(tok):
    assert tok.decode(tok.encode("a\ud800b")) == "a\ufffdb"
    Tokenizer.train(["a\ud800b " * 50] + TEXTS[:1], 300)


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["a", " ", "\n", " \t", "-", "中", "1"])
def test_long_runs_are_encoded(tok, unit):
    text = "x" + unit * 1_100_000 + "y"
    assert tok.decode(tok.encode(text)) == text


def test_saving_and_loading_keeps_ids_and_hash(tok, tmp_path):
    path = tok.save(tmp_path / "a")
    assert [p.name for p in path.parent.iterdir()] == ["tokenizer.json"]
    for again in (Tokenizer.load(path), Tokenizer.load(path.parent)):
        assert (
            again.hash == tok.hash and again.encode(TEXTS[0]) == tok.encode(TEXTS[0]) and again.specials == tok.specials
        )
    reordered = json.loads(path.read_text())
    reordered["model"]["vocab"] = dict(reversed(reordered["model"]["vocab"].items()))
    path.write_text(json.dumps(reordered, indent=4))
    assert Tokenizer.load(path).hash == tok.hash
    assert Tokenizer.train(TEXTS, VOCAB).hash == tok.hash
    assert Tokenizer.train(TEXTS, VOCAB - 1).hash != tok.hash


def test_gpt2_files_keep_their_ids(gpt2_style, tmp_path):
    gpt2 = Tokenizer.load(gpt2_style)
    vocab = json.loads((gpt2_style / "vocab.json").read_text())
    assert gpt2.vocab_size == len(vocab) + 9
    assert gpt2.special("<|endoftext|>") == vocab["<|endoftext|>"] == gpt2.bos and gpt2.special("<|bos|>") == len(vocab)
    assert gpt2.encode("<|endoftext|>") != [vocab["<|endoftext|>"]]
    assert gpt2.decode_bytes([vocab["Ġthe"]]) == b" the"
    saved = Tokenizer.load(gpt2.save(tmp_path))
    assert saved.hash == gpt2.hash and saved.encode(TEXTS[1]) == gpt2.encode(TEXTS[1]) and saved.bos == gpt2.bos
    hf = hugging_face(tmp_path / "tokenizer.json")
    assert hf.encode(TEXTS[1]).ids == gpt2.encode(TEXTS[1])


def test_ids_out_of_rank_order_are_kept(tok, tmp_path):
    """A foreign file may number its tokens as it likes."""
    raw = json.loads(tok.save(tmp_path).read_text())
    ids = np.random.default_rng(0).permutation(VOCAB - 9).tolist()
    raw["model"]["vocab"] = {s: i if s in tok.specials else ids[i] for s, i in raw["model"]["vocab"].items()}
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    shuffled, hf = Tokenizer.load(tmp_path), hugging_face(tmp_path / "tokenizer.json")
    for text in TEXTS:
        same_ids(shuffled, hf, text)
        assert shuffled.encode(text) == [ids[i] for i in tok.encode(text)]
    assert shuffled.encode("") == []


def test_all_splits_of_a_token_may_be_listed(tok, tmp_path):
    """Files converted from tiktoken list every pair that spells a token; those that are never met change nothing."""
    raw = json.loads(tok.save(tmp_path).read_text())
    vocab = raw["model"]["vocab"]
    splits = lambda s: [[s[:i], s[i:]] for i in range(1, len(s)) if s[:i] in vocab and s[i:] in vocab]  # noqa: E731
    raw["model"]["merges"] = [pair for s, i in sorted(vocab.items(), key=lambda x: x[1]) for pair in splits(s)]
    raw["model"]["ignore_merges"] = True
    assert len(raw["model"]["merges"]) > VOCAB
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    loaded, hf = Tokenizer.load(tmp_path), hugging_face(tmp_path / "tokenizer.json")
    for text in TEXTS:
        assert loaded.encode(text) == hf.encode(text).ids == tok.encode(text)


def refused(tok: Tokenizer, folder: Path, change, message: str) -> None:
    raw = json.loads(tok.save(folder).read_text())
    change(raw)
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=message):
        Tokenizer.load(folder)


def ambiguous(raw: dict) -> None:
    """bytes a, b, c become ab, c by the list, but a whole-word look-up would find abc."""
    keep = {s: i for s, i in raw["model"]["vocab"].items() if i < 256}
    raw["model"] |= {
        "vocab": keep | {"ab": 256, "bc": 257, "abc": 258},
        "merges": [["a", "b"], ["b", "c"], ["a", "bc"]],
    }
    raw["added_tokens"] = []


def late(raw: dict) -> None:
    """abcd: by the list cd comes before the second pair of abc; by rank abc, listed first as a + bc, comes before
    cd.
    """
    ambiguous(raw)
    raw["model"]["vocab"]["cd"] = 259
    raw["model"]["merges"] += [["c", "d"], ["ab", "c"]]


CHANGES = {
    "two encoders could differ": ambiguous,
    r"do not reach \(first 'abc'\)": late,
    "normalizer NFC": lambda raw: raw.update(normalizer={"type": "NFC"}),
    "Unigram model": lambda raw: raw["model"].update(type="Unigram"),
    "byte_fallback": lambda raw: raw["model"].update(byte_fallback=True),
    "no token for 1 of the 256 bytes": lambda raw: raw["model"]["vocab"].pop("!"),
    "not of two byte-level tokens": lambda raw: raw["model"]["merges"].append(["▁", "a"]),
    "not in the vocabulary": lambda raw: raw["model"]["merges"].append(["Z", "Q"]),
    "not special": lambda raw: raw["added_tokens"].append({"id": 9999, "content": "  ", "special": False}),
    "the same id": lambda raw: raw["added_tokens"].append({"id": 7, "content": "<|x|>", "special": True}),
    "Whitespace": lambda raw: raw.update(pre_tokenizer={"type": "Whitespace"}),
    "add_prefix_space": lambda raw: raw["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
    "cuts text twice": lambda raw: raw["pre_tokenizer"]["pretokenizers"][1].update(use_regex=True),
    "loses text": lambda raw: raw["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": r"\p{L}+|\s+"}),
    "tiktoken does not know": lambda raw: raw["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": "("}),
}


@pytest.mark.parametrize("message", CHANGES)
def test_files_that_could_differ_are_refused(tok, tmp_path, message):
    refused(tok, tmp_path, CHANGES[message], message)


@pytest.mark.slow
def test_other_patterns_are_accepted_when_they_read_the_same(tok, tmp_path):
    raw = json.loads(tok.save(tmp_path).read_text())
    three_digits = files.PATTERN.replace("{1,2}", "{1,3}")
    raw["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": three_digits}
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    other, hf = Tokenizer.load(tmp_path), hugging_face(tmp_path / "tokenizer.json")
    same_ids(other, hf, TEXTS[0] + " 1234567")
    assert other.hash != tok.hash


CL100K = (  # tiktoken's cl100k_base
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+|"
    r" ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)


@pytest.mark.fault("L3")
def test_a_pattern_that_two_engines_cut_differently_is_refused_whatever_the_vocabulary(tok, tmp_path):
    """This vocabulary has no token of three digits, so no token shows the difference in the pieces."""
    raw = json.loads(tok.save(tmp_path).read_text())
    raw["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": CL100K}
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    assert hugging_face(tmp_path / "tokenizer.json").pre_tokenizer.pre_tokenize_str("2018") == [("2018", (0, 4))]
    with pytest.raises(UserError) as error:
        Tokenizer.load(tmp_path)
    assert error.value.code == "pattern-differs" and error.value.values == {"pattern": CL100K}


PATTERNS = [r"\d", r"\d{1,2}", r"\d{1,3}", r"\d+", r"\d{2}|\d", r"\d{3}|\d{1,2}", r"\d\d(?=\d)|\d+", r"\d{4}|\d"]


def test_cuts_are_compared_without_a_vocabulary():
    """A text of digits cut by one pattern is what tiktoken cuts by another exactly where a plain search of Python's
    cuts alike.
    """
    import re

    text = "2018222200"
    cuts = {p: [piece.encode() for piece in re.findall(p, text)] for p in PATTERNS}
    for cut in cuts.values():
        for other in PATTERNS:
            assert (files.first_difference(other, [cut]) is None) == (cuts[other] == cut), (cut, other)


def specials_first(folder: Path, vocab_size: int = 600) -> Path:
    """A tokenizer as people train them with `tokenizers`: the trainer puts its special tokens first."""
    learner = tokenizers.Tokenizer(tokenizers.models.BPE())
    learner.pre_tokenizer, learner.decoder = (
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        tokenizers.decoders.ByteLevel(),
    )
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    learner.train_from_iterator(
        TEXTS,
        tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["<|endoftext|>", "<|pad|>"],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    folder.mkdir(exist_ok=True)
    learner.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.mark.fault("L2")
def test_special_tokens_keep_their_ids_wherever_they_are(tok, tmp_path):
    """In `tokenizers`, which numbers tokens that are only added after the vocabulary: first, last, and inside a
    vocabulary with shuffled ids.
    """
    first = specials_first(tmp_path / "first")
    raw = json.loads(tok.save(tmp_path / "last").read_text())
    ids = np.random.default_rng(0).permutation(VOCAB).tolist()
    raw["model"]["vocab"] = {s: ids[i] for s, i in (raw["model"]["vocab"] | tok.specials).items()}
    raw["added_tokens"] = [token | {"id": ids[token["id"]]} for token in raw["added_tokens"]]
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "tokenizer.json").write_text(json.dumps(raw))
    for source in (first, tmp_path / "last" / "tokenizer.json", tmp_path / "inside" / "tokenizer.json"):
        original, ours = hugging_face(source), Tokenizer.load(source)
        hf = hugging_face(ours.save(tmp_path / "saved"))
        assert {name: hf.token_to_id(name) for name in ours.specials} == ours.specials
        assert all(original.token_to_id(name) in (None, i) for name, i in ours.specials.items())
        assert hf.get_vocab_size() == ours.vocab_size and [
            hf.decode([i], skip_special_tokens=False) for i in range(ours.vocab_size)
        ] == [ours.decode([i]) for i in range(ours.vocab_size)]
        assert hf.decode(list(ours.specials.values())) == ""
        for text in [*TEXTS, "<|endoftext|>I find it<|pad|>"]:
            assert (
                ours.encode(text)
                == hf.encode(text, add_special_tokens=False).ids
                == original.encode(text, add_special_tokens=False).ids
            )
        assert Tokenizer.load(tmp_path / "saved").hash == ours.hash
    assert Tokenizer.load(first).bos == 0


@pytest.mark.fault("L4")
@pytest.mark.parametrize("number", [500, 1250])
def test_special_ids_that_tokenizers_would_not_give_are_said(tok, tmp_path, capsys, number):
    """A hole in the vocabulary, and a gap after it. The file's ids are used, and kept in `tokenizers` from then on."""
    raw = json.loads(tok.save(tmp_path).read_text())
    vocab = {s: i for s, i in raw["model"]["vocab"].items() if s not in tok.specials}
    raw["model"]["vocab"] = {s: i + (i >= number) for s, i in vocab.items()}
    raw["added_tokens"] = [raw["added_tokens"][0] | {"id": number, "content": "<|x|>"}]
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    theirs = hugging_face(tmp_path / "tokenizer.json").token_to_id("<|x|>")
    assert theirs != number
    ours = Tokenizer.load(tmp_path)
    said = capsys.readouterr().out
    assert f"{number} in the file" in said and f"{theirs} there" in said and said.count("\n") == 1
    hf = hugging_face(ours.save(tmp_path / "again"))
    assert (
        hf.token_to_id("<|x|>") == ours.special("<|x|>") == number
        and hf.token_to_id("<|bos|>") == ours.special("<|bos|>") == max(VOCAB - 9, number) + 1
    )
    Tokenizer.load(tmp_path / "again")
    assert capsys.readouterr().out == ""


@pytest.mark.fault("L2")
def test_a_special_token_written_like_an_ordinary_one_is_not_written(tok, tmp_path):
    """`tokenizers` would give it the ordinary token's id."""
    word = next(token for token in tok._bpe.vocab if len(token) > 3 and token.isalpha()).decode()
    raw = json.loads(tok.save(tmp_path).read_text())
    raw["added_tokens"].append(raw["added_tokens"][0] | {"id": VOCAB, "content": word})
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    assert hugging_face(tmp_path / "tokenizer.json").token_to_id(word) != VOCAB
    with pytest.raises(UserError) as error:
        Tokenizer.load(tmp_path).save(tmp_path / "again")
    assert error.value.code == "special-token-is-ordinary" and error.value.values == {"token": word}


def test_missing_and_damaged_files_say_so(tmp_path):
    with pytest.raises(UserError, match="scripts.tok_train --tokenizer"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "BP')
    with pytest.raises(UserError, match="is not JSON"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(UserError, match="expected merges.txt"):
        Tokenizer.load(tmp_path)


def test_a_vocabulary_larger_than_the_text_supports_names_the_size_to_type():
    text = ["the cat and the dog and the cow"]
    with pytest.raises(UserError, match=r"--vocab-size \d+") as error:
        Tokenizer.train(text, 5000)
    size = int(str(error.value).split("--vocab-size ")[1])
    assert Tokenizer.train(text, size).vocab_size == size
    with pytest.raises(UserError):
        Tokenizer.train(text, size + 1)
    with pytest.raises(UserError, match="at least 265"):
        Tokenizer.train(text, 264)
    assert Tokenizer.train([], 265).decode(Tokenizer.train([], 265).encode(FOREIGN)) == FOREIGN


def script(name: str, *flags: str) -> subprocess.CompletedProcess:
    """python -m scripts.NAME, without a network."""
    env = os.environ | {"HTTPS_PROXY": "http://127.0.0.1:9", "NO_PROXY": "", "COLUMNS": "200"}
    return warm.python("-m", f"scripts.{name}", *flags, env=env, timeout=120)


def test_scripts_train_and_evaluate(tmp_path):
    texts = [text for whole in TEXTS for text in whole.split("\n\n")]
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    flags = ["--data-dir", str(tmp_path / "text.jsonl"), "--tokenizer", str(tmp_path / "tok")]
    done = script("tok_train", *flags, "--vocab-size", "600")
    assert done.returncode == 0, done.stderr
    tok = Tokenizer.load(tmp_path / "tok")
    assert tok.vocab_size == 600 and tok.hash[:12] in done.stdout and "bytes/token" in done.stdout
    done = script("tok_train", *flags, "--vocab-size", "90000")
    assert done.returncode == 1 and "--vocab-size" in done.stderr and Tokenizer.load(tmp_path / "tok").hash == tok.hash
    done = script("tok_eval", *flags, "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert (
        document["hash"] == tok.hash and document["lossless"] and document["unreachable"].keys() == {"GPT-2", "GPT-4"}
    )
    assert (
        document["texts"]["prose"]["bytes_per_token"]["nanolab"] > 1.3 and "unreachable" in done.stdout.splitlines()[5]
    )


def test_training_text_follows_the_weights_and_the_caps():
    class Source:
        def __init__(self, text: str, n: int) -> None:
            self.iterate = lambda: iter([text] * n)

    sample = Sample([(Source("a" * 500, 1000), 0.8), (Source("b" * 30, 1000), 0.2)], max_chars=10_000, doc_cap=100)
    text = "".join(sample)
    assert sample.chars == sample.bytes == len(text) == 10_000
    assert abs(text.count("b") - 2000) <= 100
    rest = "".join(Sample([(Source("a", 10), 0.5), (Source("b", 90), 0.5)], max_chars=1000, doc_cap=100))
    assert sorted(rest) == ["a"] * 10 + ["b"] * 90
