"""Any causal language model in a Hugging Face folder, as evaluations read models: logits where they count, nats, its
tokenizer.

transformers builds the model; nothing is downloaded, no pickle is opened, and code in the folder runs only when that is
asked for. Texts are read whole, without shared prefixes. Dims: R rows, T tokens, K places, V vocabulary."""

import hashlib
import inspect
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanolab.cli import UserError
from nanolab.data.kinds import check_pointer
from nanolab.files import sha256_file
from nanolab.interop.gpt2 import check_weights
from nanolab.runtime import Runtime

# what configs call the tokens of a text
LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
UNLIMITED = 1 << 30  # tokens, of a model whose config names no longest text
LOGITS = 1 << 29  # numbers of one pass at most, which bounds the tokens of a pass for large vocabularies
TRY_SAVING = "save it again with model.save_pretrained and tokenizer.save_pretrained"


def load_folder(path: Path | str, runtime: Runtime, trust_code: bool = False) -> tuple["HFReader", "HFTokenizer"]:
    """The model, in eval mode on the runtime's device, and its tokenizer. trust_code: run code that the folder has.

    It computes in the dtype that it is saved in, or in NANOLAB_DTYPE.

    Raises UserError, naming the file, for a folder that is missing, incomplete, damaged, of another kind of model, or
    with weights only as pickles, and for a tokenizer that does not fit the weights."""
    try:
        import transformers
    except ImportError:
        raise UserError(
            "reading a Hugging Face folder needs transformers, which is not installed; try bash runs/setup.sh hf"
        ) from None
    folder = Path(path)
    check_folder(folder, transformers, trust_code)
    transformers.utils.logging.disable_progress_bar()
    dtype = runtime.dtype if os.environ.get("NANOLAB_DTYPE") else "auto"
    how = {"local_files_only": True, "trust_remote_code": trust_code}
    try:
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, output_loading_info=True, **how
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **how)
    except Exception as error:  # whatever transformers, its tokenizers or the folder's own code raise
        said = " ".join(str(error).split())
        raise UserError(
            f"{folder} cannot be loaded: {type(error).__name__}: {said[:300]}; expected a whole model with its"
            f" tokenizer; {TRY_SAVING}"
        ) from None
    if found["missing_keys"]:
        names = sorted(found["missing_keys"])
        lost = f"{len(names)} tensors ({', '.join(names[:4])}{', ...' * (len(names) > 4)})"
        raise UserError(
            f"the weights of {folder} lack {lost}, which would be random; expected all of {type(model).__name__};"
            f" {TRY_SAVING}"
        )
    rows, ids = model.get_input_embeddings().weight.shape[0], len(tokenizer)
    if not tokenizer.encode("a b", add_special_tokens=False):
        raise UserError(
            f"{folder} holds no tokenizer; expected tokenizer.json or another file with a vocabulary; {TRY_SAVING}"
        )
    if ids > rows:
        raise UserError(
            f"the tokenizer of {folder} has {ids} ids, its weights have rows for {rows}; expected one model's tokenizer"
            " and weights; put the model's own tokenizer there"
        )
    check_weights(dict(model.named_parameters()), folder, TRY_SAVING)
    return HFReader(model.to(runtime.device).eval(), runtime), HFTokenizer(tokenizer, folder)


def weights_hash(folder: Path) -> str:
    """sha256 of the weights' files."""
    return hashlib.sha256(
        json.dumps([sha256_file(path) for path in sorted(folder.glob("*.safetensors"))]).encode()
    ).hexdigest()


def check_folder(folder: Path, transformers: Any, trust_code: bool) -> None:
    """Raises UserError for what can be said without building a model."""
    file = folder / "config.json"
    for path in sorted(folder.glob("*")):
        check_pointer(path)
    if not folder.is_dir():
        raise UserError(
            f"{folder} is not a folder; expected one with config.json, model.safetensors and tokenizer.json; give the"
            " path of a local model"
        )
    if not file.is_file():
        raise UserError(
            f"{file} does not exist; expected the folder of a Hugging Face model; for a run of nanolab use --model NAME"
        )
    try:
        config = json.loads(file.read_text())
        kind, named, own = str(config["model_type"]), config.get("architectures") or [], "auto_map" in config
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{file} is damaged ({type(error).__name__}: {error}); expected a JSON object with model_type; {TRY_SAVING}"
        ) from None
    known = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if own and kind not in known:
        if not trust_code:
            files = ", ".join(sorted(p.name for p in folder.glob("*.py")))
            raise UserError(
                f"{folder} brings code of its own for a {kind!r} model; expected one that transformers knows; read"
                f" {files}, then add --trust-code"
            )
    elif kind not in known or (named and not set(named) & set(known.values())):
        seen = " ".join(named) or kind
        raise UserError(
            f"{folder} is a {seen}, no causal language model; expected one that predicts the next token, such as"
            f" {known['gpt2']}; use another folder"
        )
    pickles = [p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in sorted(folder.glob(pattern))]
    if not any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
        there = (
            f"weights only as pickles ({', '.join(pickles[:3])}), which run code when they are opened"
            if pickles
            else "no weights"
        )
        raise UserError(
            f"{folder} has {there}; expected model.safetensors; load the model where it is trusted, and save it with"
            " model.save_pretrained"
        )


class HFReader:
    """What `evals.likelihood.score` and `evals.bpb.bits_per_byte` ask of a model."""

    shares = False

    def __init__(self, model: Any, runtime: Runtime):
        self.model, self.device, self.dtype_name = model, runtime.device, str(model.dtype).removeprefix("torch.")
        config = model.config.get_text_config()
        self.vocab_size: int = model.get_output_embeddings().weight.shape[0]
        self.limit: int = next((n for name in LIMITS if (n := getattr(config, name, None))), UNLIMITED)
        self.tokens = min(1024 if runtime.device.type == "cpu" else 32768, LOGITS // self.vocab_size)
        self.picks = "logits_to_keep" in inspect.signature(model.forward).parameters

    def logits(self, reads) -> Iterator[Tensor]:
        """(K, V), fp32, of the K places of `evals.likelihood.Reads`; columns that count in no row never reach the
        head.
        """
        rows, columns = (torch.from_numpy(x).to(self.device) for x in (reads.rows, reads.columns))
        kept, place = columns.unique(return_inverse=True)
        yield self._forward(torch.from_numpy(reads.ids).to(self.device), kept)[rows, place].float()

    def _forward(self, ids: Tensor, columns: Tensor) -> Tensor:
        """Logits (R, len(columns), V) in the compute dtype."""
        picked = {"logits_to_keep": columns} if self.picks else {}
        logits = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **picked).logits
        return logits if self.picks else logits[:, columns]

    @torch.no_grad()
    def __call__(self, idx: Tensor, targets: Tensor, *, reduction: str) -> Tensor:
        """Nats (B, T), fp32, 0 where the target is -1: of reductions there is "none"."""
        assert reduction == "none"
        out, columns = [], torch.arange(idx.size(1), device=idx.device)
        for x, y in zip(*(half.split(max(1, self.tokens // idx.size(1))) for half in (idx, targets))):
            logits = self._forward(x, columns).float()
            out.append(
                F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-1, reduction="none").view(y.shape)
            )
        return torch.cat(out)

    @torch.no_grad()
    def greedy(self, ids: Sequence[int], max_tokens: int) -> list[int]:
        """The likeliest tokens after `ids`, one by one."""
        idx = torch.tensor([ids], device=self.device)
        return self.model.generate(
            idx, attention_mask=torch.ones_like(idx), do_sample=False, max_new_tokens=max_tokens
        )[0, len(ids) :].tolist()


class HFTokenizer:
    """The tokenizer of a folder. Ordinary text never yields a special id, whatever it looks like."""

    def __init__(self, tokenizer: Any, folder: Path):
        self._tokenizer, self._folder = tokenizer, folder
        self.vocab_size = len(tokenizer)

    @property
    def bos(self) -> int:
        """What a text begins with: the tokenizer's bos, or its eos where it has none."""
        ids = [i for i in (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id) if i is not None]
        if not ids:
            raise UserError(
                f"the tokenizer of {self._folder} has neither a bos nor an eos token; expected one to begin texts with;"
                " name it in tokenizer_config.json"
            )
        return ids[0]

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text; no bos is added."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""
        if not texts:
            return []
        # half pairs, as JSON may have, become U+FFFD
        texts = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts]
        return self._tokenizer(
            texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
        )["input_ids"]

    def encode_arrays(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        """`encode` of each text as int32 arrays. threads: as many as the tokenizer itself chooses."""
        return [np.array(ids, dtype=np.int32) for ids in self.encode_batch(texts)]

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)

    def token_bytes(self) -> np.ndarray:
        """(V,) int32: how many bytes of text each id stands for; 0 for special tokens and for ids without a token.

        Where a tokenizer puts a blank before a text's first word, that is a byte which the text does not have. Raises
        UserError where tokens are not bytes of text."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        kinds = set(decoders(json.loads(backend.to_str())["decoder"])) if backend else set()
        if "ByteLevel" not in kinds and not kinds & {"ByteFallback", "Metaspace"}:
            raise UserError(
                f"the tokenizer of {self._folder} (decoder: {', '.join(sorted(kinds)) or 'none'}) does not spell texts"
                " out byte by byte, so that bits per byte are not known; expected byte-level BPE, or pieces with byte"
                " fallback; leave bits per byte out"
            )
        added = self._tokenizer.added_tokens_decoder
        special = {*self._tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
        lengths = np.zeros(self.vocab_size, dtype=np.int32)
        for token, i in self._tokenizer.get_vocab().items():
            if i in added:
                lengths[i] = 0 if i in special else len(token.encode())
            elif "ByteLevel" in kinds:
                lengths[i] = len(token)  # its alphabet has a character for each byte
            else:
                lengths[i] = (
                    1 if token.startswith("<0x") and token.endswith(">") else len(token.replace("▁", " ").encode())
                )
        lengths[[i for i in special if i < self.vocab_size]] = 0
        return lengths


def decoders(settings: Any) -> Iterator[str]:
    """The types of a decoder in tokenizer.json and of those it is made of."""
    if isinstance(settings, dict):
        yield settings["type"]
        for part in settings.get("decoders", ()):
            yield from decoders(part)
