"""What a run keeps of its data: the names and sha256 of the files, and the validation text that was drawn from them.

So it can go on wherever the data and its own directory have gone, and name the files that differ.
"""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from nanolab.cli import UserError
from nanolab.files import write_text


class Documents(Protocol):
    """What is asked of a source; see `corpus.Documents`."""

    name: str
    paths: list[Path]
    hashes: list[str]


class Data(Protocol):
    """What is asked of a corpus; see `corpus.Data`."""

    train: Sequence[tuple[Any, float]]
    val: Any
    drawn: dict[int, Path]


@dataclass
class Pinned:
    """The validation text that a run began with: it goes on with the same, wherever its data or its directory has
    gone.
    """

    splits: dict[int, Path] = field(default_factory=dict)  # place in the mixture -> validation file that the run keeps
    val_fingerprint: str = ""  # of a run that keeps none: what it was trained beside

    @classmethod
    def of(cls, run_dir: Path, val_fingerprint: str = "") -> "Pinned":
        kept = run_dir / "data" / "files.json"
        sources = json.loads(kept.read_text())["train"] if kept.exists() else []
        return cls(
            {i: kept.parent / source["validation"] for i, source in enumerate(sources) if source["validation"]},
            val_fingerprint,
        )


def keep(data: Data, folder: Path) -> None:
    """Write the names and sha256 of the files of `data`, and copies of the validation files that were drawn from it,
    into `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for i, path in data.drawn.items():
        if path.parent != folder:
            shutil.copyfile(path, folder / f"val-{i}.parquet")
    train = [
        {
            "name": documents.name,
            "weight": weight,
            "files": listing(documents),
            "validation": f"val-{i}.parquet" if i in data.drawn else None,
        }
        for i, (documents, weight) in enumerate(data.train)
    ]
    write_text(folder / "files.json", json.dumps({"train": train, "validation": listing(data.val)}, indent=1))


def listing(documents: Documents) -> list[list[str]]:
    """[name, sha256] of each file; names are relative to the folder that all are in."""
    root = Path(os.path.commonpath([path.parent for path in documents.paths]))
    return [[path.relative_to(root).as_posix(), sha] for path, sha in zip(documents.paths, documents.hashes)]


def check_same(data: Data, folder: Path) -> None:
    """Raise UserError, naming the files, where `data` differs from what `keep` wrote into `folder`; not for other names
    in the same order.
    """
    kept = json.loads((folder / "files.json").read_text())
    advice = "put the old files back, or start another run with --run NAME"
    for source, (documents, _) in zip(kept["train"], data.train):
        then, now = source["files"], listing(documents)
        before, after, had, has = dict(then), dict(now), {sha for _, sha in then}, {sha for _, sha in now}
        if [sha for _, sha in then] == [sha for _, sha in now]:
            continue
        if sorted(sha for _, sha in then) == sorted(sha for _, sha in now):
            old, new = next((a, b) for (a, sha), (b, other) in zip(then, now) if sha != other)
            raise UserError(
                f"the files of {documents.name} are those that the run began with, in another order: files are read in"
                f" order of their names, and {old} stood where {new} is now. Give them their old names, or start"
                " another run with --run NAME",
                "data-reordered",
                then=old,
                now=new,
            )
        changed = [name for name, sha in then if name in after and after[name] != sha and sha not in has]
        missing = [name for name, sha in then if name not in after and sha not in has]
        added = [name for name, sha in now if name not in before and sha not in had]
        kinds = {"changed": changed, "missing": missing, "added": added}
        seen = "; ".join(
            f"{kind}: {', '.join(names[:5])}{f' and {len(names) - 5} more' * (len(names) > 5)}"
            for kind, names in kinds.items()
            if names
        )
        raise UserError(
            f"the files of {documents.name} are not those that the run began with ({seen or 'copies of a file'})."
            f" Expected the same; {advice}",
            "data-changed",
            **kinds,
        )
