"""What tests of several rooms need."""

import dataclasses
import importlib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def configs() -> dict[str, type]:
    """Name -> class, of every dataclass of flags."""
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in ROOT.glob("nanolab/*/config.py")]
    found = [one for name in sorted(names) for one in vars(importlib.import_module(name)).values()]
    return {one.__name__: one for one in found if dataclasses.is_dataclass(one)}
