"""Flags of the data and of the commands that read or make text. Imports no torch."""

from dataclasses import dataclass
from typing import Any

from nanolab.cli import Condition, Count, CountOrAuto, NonNegativeFloat, NonNegativeInt, PositiveFloat, Seed


def corpora(c: Any) -> set[str]:
    """The corpora among the parts of --data: what is no path."""
    parts = (part.split(":")[0].strip() for part in c.data.split(",") if "/" not in part)
    return {name for name in parts if "." not in name}


def on_the_hub(c: Any) -> bool:
    """Whether a part of --data is downloaded from the hub."""
    return bool(corpora(c) - {"pydocs"})


@dataclass(frozen=True)
class DataConfig:
    """Where documents come from."""

    data: str = "pydocs"  # corpus name, or a weighted mixture such as pydocs:0.7,tinystories:0.3
    # a folder or file of your own text (parquet with a `text` column, .jsonl, .txt); overrides --data
    data_dir: str = ""
    val_data: str = ""  # file or folder that is the validation text; default: the corpus's own, or a pinned split
    num_shards: CountOrAuto = -1  # training shards to use of a hub corpus; -1: those that are on disk, at least 8

    CONDITIONS = [
        Condition("data", "data_dir", lambda c: not c.data_dir, "one of the two"),
        Condition("num_shards", "data_dir", lambda c: not c.data_dir, "--data with a corpus of the hub"),
        Condition("num_shards", "data", lambda c: not c.data or on_the_hub(c), "--data with a corpus of the hub"),
    ]


@dataclass(frozen=True)
class DataBuildConfig(DataConfig):
    """Build or download a corpus and say what it holds."""

    workers: Count = 4  # parallel downloads or builders
    json: bool = False  # last line of output is one JSON document

    CONDITIONS = [
        Condition("workers", "data_dir", lambda c: not c.data_dir, "--data with the name of a corpus"),
        Condition("workers", "data", lambda c: bool(corpora(c)), "--data with the name of a corpus"),
    ]


@dataclass(frozen=True)
class TokTrainConfig(DataConfig):
    """Train the byte-level BPE tokenizer."""

    vocab_size: Count = 32768  # tokens of the vocabulary, special tokens included
    max_chars: Count = 2_000_000_000  # characters to read
    doc_cap: Count = 10_000  # characters read of one document: of a longer one, an even sample
    tokenizer: str = ""  # folder to write tokenizer.json to; default: tokenizer/ in the base directory


@dataclass(frozen=True)
class TokEvalConfig(DataConfig):
    """Compare the tokenizer with GPT-2's and GPT-4's on several kinds of text."""

    tokenizer: str = ""  # folder or file of the tokenizer; default: tokenizer/ in the base directory
    json: bool = False  # last line of output is one JSON document


@dataclass(frozen=True)
class GenChatConfig:
    """Have another model write conversations, through any endpoint that speaks OpenAI's chat API."""

    spec: str = ""  # TOML file: topics, personas, openings, dynamics, and the instructions (nanolab/data/synthesis.py)
    output: str = ""  # JSONL file that conversations are appended to; what is in it already is not asked for again
    model: str = ""  # the endpoint's name of the model
    url: str = "https://api.openai.com/v1"  # address of the endpoint, without /chat/completions
    api_key_env: str = "OPENAI_API_KEY"  # environment variable that holds the key; none is sent if it is not set
    num: Count = 1000  # conversations to write
    workers: Count = 4  # requests at a time
    temperature: NonNegativeFloat = 1.0  # sampling temperature; 0: the likeliest token each time
    max_tokens: NonNegativeInt = 4096  # tokens of an answer at most; 0: the endpoint is not told
    # json_schema | json_object | none: how much of the form the endpoint can be told to keep
    response_format: str = "json_schema"
    timeout: PositiveFloat = 120.0  # seconds for one answer
    seed: Seed = 42  # seed of the choices; the file keeps it
    json: bool = False  # last line of output is one JSON document
