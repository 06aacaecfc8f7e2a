"""Flags of export and import. Imports no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ExportConfig:
    """Write a model as a folder that transformers loads."""

    model: str = ""  # NAME[@STEP|best]; default: the newest finished run
    out: str = ""  # folder to write
    dtype: str = "fp32"  # fp32 | bf16: of the weights; bf16 rounds them
    push: str = ""  # USER/NAME: upload the folder to the hub; needs a token; a new repository is private
    overwrite: bool = False  # replace an exported model in --out


@dataclass(frozen=True)
class ImportConfig:
    """Make a GPT-2 of a transformers folder a finished run, which every command takes."""

    folder: str = ""  # folder with config.json, model.safetensors and the tokenizer's files; the first argument
    run: str = ""  # run directory under <base>/runs/; default: the folder's name
