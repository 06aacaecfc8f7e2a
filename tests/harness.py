"""lm-evaluation-harness with the 14,000 files of its own tasks read already, for forks of a server (tests/warm.py)."""

from pathlib import Path

import lm_eval.__main__
import lm_eval.evaluator
from lm_eval.tasks._index import TaskIndex

import nanolab.interop.lm_eval  # noqa: F401

OWN, build = Path(lm_eval.__file__).parent / "tasks", TaskIndex.build
index = build([OWN])
TaskIndex.build = staticmethod(
    lambda paths, **settings: index | build([path for path in paths if path != OWN], **settings)
)
