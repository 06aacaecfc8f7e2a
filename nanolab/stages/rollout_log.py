"""rollouts.jsonl: every reply of a run, and the means over a rollout."""

import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from nanolab.cli import UserError, as_json
from nanolab.files import write_text

FILE = "rollouts.jsonl"
UNWRITTEN = ("place", "length", "drawn")  # of a reply's record


def rollout_metrics(rows: Sequence[dict[str, Any]], samples: int) -> dict[str, float]:
    """Means over the records of a rollout, in order of their places."""
    rewards = [row["reward"] for row in rows]
    groups = [rewards[i : i + samples] for i in range(0, len(rewards), samples)]
    means = {f"rl/part/{name}": statistics.fmean(row["parts"][name] for row in rows) for name in rows[0]["parts"]}
    return {
        "rl/reward": statistics.fmean(rewards),
        **means,
        "rl/tokens": statistics.fmean(row["tokens"] for row in rows),
        "rl/ended": statistics.fmean(row["ended"] for row in rows),
        "rl/mixed": statistics.fmean(min(g) < max(g) for g in groups),
    }


class RolloutLog:
    """rollouts.jsonl, one object per reply. The first write drops what a run that was ended after its checkpoint left
    of that step on.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file: BinaryIO | None = None

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        if self._file is None:
            kept = [line for line in self._lines() if line["step"] < rows[0]["step"]]
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
            self._file = open(self.path, "ab")
        try:
            self._file.write("".join(as_json(row, self.path.name) + "\n" for row in rows).encode())
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"{self.path} could not be written: {error.strerror}; make room there, then type the same command with"
                " --resume"
            ) from error

    def _lines(self) -> list[dict[str, Any]]:
        """What is there already, without a line that a crash tore."""
        found = []
        for line in self.path.read_text(errors="replace").splitlines() if self.path.exists() else []:
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found

    def sync(self) -> None:
        if self._file:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file:
            self._file.close()
