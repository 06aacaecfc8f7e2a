"""Files of documents: what is read under a folder, ONE table of formats, and the index of a file.

A block is what is read and decoded at once (blocks.py). The index of a file (its blocks and the sha256 of its bytes) is
made once, by a pass that checks every line of text files, and is kept under the base directory by path, size and
modification time, so that a 10 GB file is neither held in memory nor indexed again."""

import hashlib
import json
import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from nanolab.cli import UserError
from nanolab.data.blocks import Block, Format
from nanolab.data.kinds import check_kind, recognise
from nanolab.data.lines import index_jsonl, index_txt, read_lines
from nanolab.data.parquet import index_parquet, read_parquet, scan_parquet
from nanolab.files import sha256_file, write_text
from nanolab.runtime import base_dir, print0

INDEX_FORMAT = 2


class Index(NamedTuple):
    """What is known of one file without reading it again."""

    # sha256 of its bytes; "-cut" follows where lines are cut, since the same bytes then give other documents than they
    # once did
    identity: str
    blocks: list[Block]
    n_bytes: int  # of text; of a parquet file about
    marks: int  # separators inside lines or texts, which divide nothing; not counted in parquet files


def find_files(where: str | Path) -> tuple[list[Path], str]:
    """The text files at `where` (one file, or a folder searched recursively), sorted by path, and a line on those that
    are not read, if any.

    Links are followed; a folder that is reached twice is read once. Raises UserError for a link to nothing, and if
    there is no text."""
    where = Path(where).expanduser()
    if not where.exists():
        raise UserError(f"{where} does not exist; expected a folder or file with text; type --data-dir PATH")
    seen, left_out = ([where], Counter()) if where.is_file() else _walk(where)
    files = []
    for path in seen:
        if any(part.startswith(".") for part in path.relative_to(where).parts):
            left_out["hidden"] += 1
        elif path.suffix.lower() in FORMATS and path.is_file():
            files.append(path)
        else:
            left_out[path.suffix.lower() or "without a suffix"] += 1
    kinds = ", ".join(f"{n} {kind}" for kind, n in left_out.most_common())
    if not files:
        names = ", ".join(p.name for p in seen[:5]) or "nothing"
        known = where.is_file() and recognise(where)
        advice = f"; {where.name} is {known[0]}: type {known[1]}" if known else ""
        raise UserError(
            f"no text under {where}: saw {names}; expected .parquet (a `text` column), .jsonl (a `text` field) or .txt"
            f" files{advice}",
            "no-text",
            path=str(where),
            kinds=dict(left_out),
        )
    return files, f"{where.name}: {left_out.total()} files not read: {kinds}" if left_out else ""


def _walk(top: Path) -> tuple[list[Path], Counter[str]]:
    """Everything under `top` that is not a folder, sorted, and a count of linked folders that were reached before."""
    found: list[Path] = []
    left_out: Counter[str] = Counter()
    folders, links, entered = [top], [], set()  # real folders first, so that a link to one of them adds nothing
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        if (real := folder.resolve()) in entered:
            left_out["linked folders seen before"] += 1
            continue
        entered.add(real)
        try:
            paths = sorted(folder.iterdir())
        except OSError as error:
            raise UserError(
                f"{folder} cannot be read ({error.strerror}); expected a folder; check its permissions",
                "folder-not-readable",
                path=str(folder),
            ) from error
        for path in paths:
            hidden = any(part.startswith(".") for part in path.relative_to(top).parts)
            if path.is_dir() and not (hidden and path.is_symlink()):
                (links if path.is_symlink() else folders).append(path)
            elif hidden or path.exists():
                found.append(path)
            else:
                seen = f"{path} is a link to {os.readlink(path)}, which does not exist"
                raise UserError(
                    f"{seen}; expected a file; complete the download it belongs to, or delete the link",
                    "dangling-link",
                    path=str(path),
                )
    return sorted(found), left_out


# suffix -> how its files are read
FORMATS = {
    ".parquet": Format(index_parquet, read_parquet, scan_parquet, "row group"),
    ".jsonl": Format(index_jsonl, read_lines, read_lines, "byte"),
    ".txt": Format(index_txt, read_lines, read_lines, "byte"),
}


def format_of(path: Path) -> Format:
    return FORMATS[path.suffix.lower()]


def index_file(path: Path) -> Index:
    """What the documents of one file are, from the cache where size and time still agree. Raises UserError for bad
    content.
    """
    status = path.stat()
    key = [INDEX_FORMAT, status.st_size, status.st_mtime_ns, path.suffix.lower()]
    cache = base_dir() / "index" / (hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:24] + ".json")
    if not (cache.exists() and (entry := json.loads(cache.read_text()))["key"] == key):
        if status.st_size == 0:
            raise UserError(f"{path} is empty (0 bytes); expected text; delete it or point --data-dir elsewhere")
        suffix, counts = path.suffix.lower(), Counter()
        check_kind(path, suffix)
        if status.st_size > 500e6:
            print0(f"indexing {path} ({status.st_size / 1e9:.1f} GB), once")
        blocks = [Block(path, *b) for b in format_of(path).index(path, counts)]
        if not blocks:
            raise UserError(
                f"{path} holds no documents; expected at least one; delete it or point --data-dir elsewhere"
            )
        if blocks[0].kind.startswith("txt"):
            with open(path, "rb") as file:
                nulls = sum(chunk.count(0) for chunk in iter(lambda: file.read(1 << 20), b""))
            if nulls:
                print0(
                    f"note: {path} has {nulls:,} NULs, which are trained on as text; without them: tr -d '\\000' < IN"
                    " > OUT"
                )
        entry = {
            "path": str(path.resolve()),
            "key": key,
            "sha256": sha256_file(path),
            "bytes": counts["bytes"],
            "marks": counts["marks"],
        }
        entry["blocks"] = [list(b[1:]) for b in blocks]
        write_text(cache, json.dumps(entry))
    blocks = [Block(path, *b) for b in entry["blocks"]]
    cut = "-cut" if any(block.kind.endswith("-cut") for block in blocks) else ""
    return Index(entry["sha256"] + cut, blocks, entry["bytes"], entry["marks"])
