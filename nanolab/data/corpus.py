"""Corpora: which files a name stands for, an endless shuffled sequence of their documents, and pinned validation text.

Validation is the corpus's declared file, or --val-data, or else a split that is drawn once and written to the base
directory: no training file that comes later can change it, and training skips every document that is also in it.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from nanolab.cli import UserError, check_bounds, nearest
from nanolab.data import hub, pydocs
from nanolab.data.config import DataConfig
from nanolab.data.formats import FORMATS, find_files, format_of, index_file
from nanolab.data.kept import Pinned
from nanolab.data.lines import CUT_BYTES, LONG_LINE
from nanolab.data.mixture import positive, weighted
from nanolab.data.parquet import write_documents
from nanolab.files import key_shuffler, locked, write_text
from nanolab.runtime import base_dir, print0
from nanolab.terminal import progress

CACHE_CHARS = 96 << 20  # decoded text kept per source
# a corpus without a validation file gives up this share of its text, and at most so much
SPLIT_SHARE, SPLIT_BYTES = (0.05, 10e6)


def digest(text: str) -> bytes:
    """8 bytes that stand for `text` in the set of held-out documents."""
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()


class Documents:
    """An endless, randomly addressable, shuffled sequence of the documents of one source.

    Document n belongs to epoch n // n_documents. In each epoch the blocks are permuted, and the documents inside each
    block, by (seed, epoch): neighbouring n lie in the same block, so that reading in order decodes each block once.
    """

    def __init__(
        self, name: str, paths: Sequence[Path], seed: int = 0, held_out: frozenset[bytes] = frozenset()
    ) -> None:
        """held_out: digests of documents that `get` and `iterate` leave out. Raises UserError for files that cannot be
        read.
        """
        self.name, self.paths, self.seed, self.held_out = name, list(paths), int(seed), held_out
        indexed = [index_file(path) for path in progress(self.paths, f"indexing {name}")]
        self.hashes = [index.identity for index in indexed]
        self.blocks = [block for index in indexed for block in index.blocks]
        self.n_documents = sum(block.n for block in self.blocks)
        self.n_bytes, self.marks = sum(index.n_bytes for index in indexed), sum(index.marks for index in indexed)
        self.fingerprint = hashlib.sha256("".join(self.hashes).encode()).hexdigest()
        self.block_order = lru_cache(4)(self._block_order)
        self._inside = lru_cache(256)(lambda epoch, b: key_shuffler(self.seed, epoch, b).permutation(self.blocks[b].n))
        self._decoded: OrderedDict[int, tuple[Sequence[str | None], int]] = OrderedDict()
        self._cached_chars = 0
        self._skipped = 0  # since `get` last returned text

    def _block_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The blocks' order in `epoch`, and for each place the number of documents up to its end."""
        order = key_shuffler(self.seed, epoch).permutation(len(self.blocks))
        return order, np.cumsum([self.blocks[b].n for b in order])

    def _texts(self, b: int) -> Sequence[str | None]:
        if b in self._decoded:
            self._decoded.move_to_end(b)
            return self._decoded[b][0]
        texts = format_of(self.blocks[b].path).read(self.blocks[b])
        # on the disk: four at a time
        chars = sum(len(t) for t in texts if t) if isinstance(texts, list) else CACHE_CHARS // 4
        self._decoded[b] = texts, chars
        self._cached_chars += chars
        while self._cached_chars > CACHE_CHARS and len(self._decoded) > 1:
            self._cached_chars -= self._decoded.popitem(last=False)[1][1]
        return texts

    def _find(self, n: int) -> tuple[int, int]:
        """(block, place in the block) of document n."""
        epoch, i = divmod(int(n), self.n_documents)
        order, ends = self.block_order(epoch)
        place = int(np.searchsorted(ends, i, side="right"))
        b = int(order[place])
        return b, int(self._inside(epoch, b)[i - (int(ends[place - 1]) if place else 0)])

    def get(self, n: int) -> str | None:
        """Document n, or None where it is blank or held out. Raises UserError when nothing at all is left to train
        on.
        """
        b, i = self._find(n)
        text = self.kept(self._texts(b)[i])
        self._skipped = self._skipped + 1 if text is None else 0
        if self._skipped > 2 * self.n_documents + 1000:
            seen = f"every document of {self.name} is blank or in the validation set"
            raise UserError(f"{seen}; expected text to train on; add text or change --val-data")
        return text

    def where(self, n: int) -> str:
        """File and place of document n, for messages."""
        b, i = self._find(n)
        block = self.blocks[b]
        return f"{block.path} {format_of(block.path).unit} {block.start}, document {i}"

    def kept(self, text: str | None) -> str | None:
        """`text`, or None where it is blank or held out."""
        blank = text is None or not text.strip()
        return None if blank or (self.held_out and digest(text) in self.held_out) else text

    def iterate(self) -> Iterator[str]:
        """One pass in file order, without blank and held-out documents."""
        for block in self.blocks:
            yield from filter(None, map(self.kept, format_of(block.path).scan(block)))

    def counts(self) -> dict[str, Any]:
        """What one pass over all files gives. marks: <|endoftext|> inside texts."""
        sizes, marks = [], 0
        for text in progress(self.iterate(), f"reading {self.name}", self.n_documents):
            sizes.append(len(text.encode()))
            marks += text.count("<|endoftext|>")
        found = {"documents": len(sizes), "bytes": sum(sizes), "left_out": self.n_documents - len(sizes)}
        where = sorted({str(path.parent) for path in self.paths})
        return {**found, "files": len(self.paths), "where": where, "marks": marks}


def hold_out_groups(sizes: dict[str, int]) -> set[str]:
    """The groups (files, packages) that become validation text: in order of their hash, while they fit the cap in
    bytes.
    """
    cap = min(SPLIT_SHARE * sum(sizes.values()), SPLIT_BYTES)
    chosen: set[str] = set()
    taken = 0
    for group in sorted(sizes, key=digest):
        if taken < 0.8 * cap and taken + sizes[group] <= cap:
            chosen.add(group)
            taken += sizes[group]
    return chosen


def _draw(documents: Documents, names: dict[Path, str]) -> tuple[list[str], list[str]]:
    """(validation texts, names of the files they come from): whole files where small ones are many, single documents
    otherwise.
    """
    sizes = dict.fromkeys(names.values(), 0)
    for block in documents.blocks:
        sizes[names[block.path]] += block.length
    files = hold_out_groups(sizes)
    if sum(sizes[f] for f in files) >= 0.5 * min(SPLIT_SHARE * sum(sizes.values()), SPLIT_BYTES):
        chosen = Documents(documents.name, [p for p in documents.paths if names[p] in files])
        return list({digest(t): t for t in chosen.iterate()}.values()), sorted(files)
    texts: dict[bytes, str] = {}
    first: dict[bytes, str] = {}  # for a corpus so small that chance takes nothing
    taken = 0
    for b in progress(documents.block_order(0)[0], "drawing validation text"):
        for text in filter(None, map(documents.kept, format_of(documents.blocks[b].path).scan(documents.blocks[b]))):
            key = digest(text)
            if len(first) < 1000:
                first[key] = text
            if int.from_bytes(key, "big") < SPLIT_SHARE * 2**64:
                taken += len(text.encode()) if key not in texts else 0
                texts[key] = text
        if taken >= SPLIT_BYTES:
            break
    if not texts and len(first) < 2:
        seen = f"{documents.name} holds {len(first)} document, so none can be held out for validation"
        raise UserError(f"{seen}; expected at least 2 that differ; give validation text with --val-data FILE")
    return list(texts.values()) or [first[min(first)]], sorted(names.values())


def _drawn_before(wanted: str) -> Path | None:
    """The folder of the validation text with this fingerprint, whatever the text's path was when it was drawn."""
    for manifest in sorted((base_dir() / "corpora").glob("local-*/manifest.json")) if wanted else []:
        if hashlib.sha256(json.loads(manifest.read_text())["sha256"].encode()).hexdigest() == wanted:
            return manifest.parent
    return None


def _pinned_split(where: Path, files: list[Path], wanted: str = "") -> Path:
    """The validation file of local text at `where`: drawn once, checked ever after. Raises UserError if it no longer
    fits.

    wanted: the fingerprint of a split that a run was trained beside; it is taken wherever the text was when it was
    drawn."""
    root = where if where.is_dir() else where.parent
    documents = Documents(where.name, files)
    names = {path: path.relative_to(root).as_posix() for path in files}
    folder = _drawn_before(wanted) or base_dir() / "corpora" / _key(where)
    manifest, val = folder / "manifest.json", folder / "val.parquet"
    hashes = {names[path]: sha for path, sha in zip(documents.paths, documents.hashes)}
    if not manifest.exists():
        texts, drawn_from = _draw(documents, names)
        sha = write_documents(val, sorted(texts, key=digest))  # in order of hash: any beginning is a fair sample
        pinned = {
            "source": str(where),
            "sha256": sha,
            "documents": len(texts),
            "drawn_from": {f: hashes[f] for f in drawn_from},
        }
        write_text(manifest, json.dumps(pinned, indent=1))
    pinned = json.loads(manifest.read_text())
    advice = f"to draw new validation text type: rm -r {folder} (or name a file with --val-data)"
    if not val.exists() or index_file(val)[0] != pinned["sha256"]:
        raise UserError(f"{val} is not the file that its manifest names; expected sha256 {pinned['sha256']}; {advice}")
    if wanted:  # by content, whatever the files are called now
        names = {sha: f for f, sha in pinned["drawn_from"].items()}
        hashes = {names.get(sha, f): sha for f, sha in hashes.items()}
    changed = [f for f, sha in pinned["drawn_from"].items() if hashes.get(f, sha) != sha]
    if changed or not hashes.keys() & pinned["drawn_from"].keys():
        seen = f"{changed[0]} has changed" if changed else "none of the files are left"
        raise UserError(
            f"{seen} since the validation text of {where} was drawn; expected the same text, or more files; {advice}"
        )
    return val


def _key(where: Path) -> str:
    return f"local-{where.stem}-{hashlib.sha256(str(where).encode()).hexdigest()[:8]}"


# name -> function of (training shards or -1, workers) that makes the corpus and returns its training and validation
# files
CORPORA: dict[str, Callable[[int, int], tuple[list[Path], list[Path]]]] = {
    "pydocs": lambda num_shards, workers: pydocs.ensure_pydocs(workers, hold_out_groups),
    **{name: partial(hub.ensure_corpus, name) for name in hub.CORPORA},
}


def corpora_of(data: str) -> list[tuple[str, float]]:
    """ "a" or "a:0.7,b:0.3" as [(name, weight)], weights summing to 1. A name is a corpus or a path (has a slash).
    Raises UserError.
    """
    out: dict[str, float] = {}
    for name, weight in weighted(data, lambda name: name in CORPORA or Path(name).expanduser().exists()):
        if name not in CORPORA and "/" not in name and Path(name).suffix.lower() not in FORMATS:
            near = nearest(name, list(CORPORA), prefix="--data ") or "; try --data pydocs"
            hint = f"; try --data ./{name}" if name and Path(name).exists() else near
            raise UserError(
                f"corpus {name!r} is unknown; expected one of {', '.join(CORPORA)}, or a path with a slash{hint}",
                "unknown-corpus",
                name=name,
                try_=hint,
            )
        value = positive(weight, name, data, "--data pydocs:0.7,tinystories:0.3")
        if name in out:
            raise UserError(
                f"{name} in --data {data} appears twice; expected each corpus once; add its weights",
                "twice",
                name=name,
                weight=weight,
            )
        out[name] = value
    return [(name, weight / sum(out.values())) for name, weight in out.items()]


@dataclass
class Data:
    """What a run trains on and what it is judged on."""

    train: list[tuple[Documents, float]]  # (source, weight), weights summing to 1
    val: Documents  # read it with iterate()
    fingerprint: str  # of everything `train` gives, in order
    val_fingerprint: str
    val_bytes: int
    val_from: str  # where the validation text comes from
    # place in `train` -> the validation file that was drawn from it
    drawn: dict[int, Path] = field(default_factory=dict)

    def describe(self, tokenizer: Any = None, tokens: int | None = None) -> list[tuple[str, str]]:
        """(label, facts) of each source and of the validation text; with a tokenizer and the tokens of a run, the
        passes it makes.
        """
        out = []
        for documents, weight in self.train:
            share = f", weight {weight:.3g}" if len(self.train) > 1 else ""
            rate = _tokens_per_byte(documents, tokenizer) if tokens else 0
            passes = f", about {tokens * weight / (documents.n_bytes * rate):.3g} passes over it" if rate else ""
            out.append(("data", f"{documents.name}: {_sizes(documents, documents.n_bytes)}{share}{passes}"))
        return out + [("validation", f"{_sizes(self.val, self.val_bytes)}, {self.val_from}")]


def _sizes(documents: Documents, n_bytes: int) -> str:
    names = [path.name for path in documents.paths]
    shown = ", ".join(names if len(names) <= 4 else [*names[:3], "...", names[-1]])
    return (
        f"{len(names):,} {'file' if len(names) == 1 else 'files'} ({shown}), {documents.n_documents:,} documents,"
        f" {n_bytes:,} bytes"
    )


def _tokens_per_byte(documents: Documents, tokenizer: Any) -> float:
    """Of the first documents of the first pass, bos included; 0 where they hold no text."""
    n_tokens = n_bytes = 0
    for n in range(min(documents.n_documents, 256)):
        if n_bytes < 250_000 and (text := documents.get(n)):
            text = text[:250_000]
            n_tokens, n_bytes = n_tokens + 1 + len(tokenizer.encode(text)), n_bytes + len(text.encode())
    return n_tokens / max(n_bytes, 1)


def open_data(cfg: DataConfig, seed: int = 0, workers: int = 2, pinned: Pinned | None = None) -> Data:
    """Make, download or find the text that `cfg` asks for. seed: of the shuffle. pinned: of a run that goes on.

    Raises UserError for what is missing or damaged.
    """
    pinned = pinned or Pinned()
    check_bounds(DataConfig, vars(cfg))
    mixture = [(cfg.data_dir, 1.0)] if cfg.data_dir else corpora_of(cfg.data)
    declared = {p.resolve(): p for p in _local_files(cfg.val_data)} if cfg.val_data else {}
    sources, validation, drawn = [], list(declared.values()), {}
    origins = [f"of --val-data {cfg.val_data}"] if declared else []
    for name, weight in mixture:
        local = None if name in CORPORA and not cfg.data_dir else Path(name).expanduser().resolve()
        train, val = (_local_files(local), []) if local else CORPORA[name](cfg.num_shards, workers)
        train = [p for p in train if p.resolve() not in declared]
        if not train:
            raise UserError(
                f"every file of {name} is in --val-data {cfg.val_data}; expected others to train on; add files"
            )
        with locked(
            base_dir() / "corpora" / f"{_key(local) if local else name}.index"
        ):  # ranks of one job take turns: the first does the work
            for path in progress(train, f"indexing {name}"):
                index_file(path)
            if not declared:
                if not val:
                    drawn[len(sources)] = pinned.splits.get(len(sources)) or _pinned_split(
                        local, train, pinned.val_fingerprint
                    )
                validation += val or [drawn[len(sources)]]
                origins.append(
                    f"the validation file of {name}" if val else f"drawn once from {local.name} and not trained on"
                )
        sources.append((local.name if local else name, train, weight))
    val = Documents("validation", validation, seed)
    digests, val_bytes = set(), 0
    for text in val.iterate():
        digests.add(digest(text))
        val_bytes += len(text.encode())
    held_out = frozenset(digests)
    out = [(Documents(name, train, seed, held_out), weight) for name, train, weight in sources]
    for documents in [*(documents for documents, _ in out), val]:
        _print_notes(documents)
    parts = json.dumps([val.fingerprint, *([documents.fingerprint, weight] for documents, weight in out)])
    return Data(
        out, val, hashlib.sha256(parts.encode()).hexdigest(), val.fingerprint, val_bytes, "; ".join(origins), drawn
    )


def validation_only(pinned: Pinned) -> Data:
    """The validation text that a run keeps, of data that is not there."""
    val = Documents("validation", list(pinned.splits.values()))
    return Data([], val, "", val.fingerprint, sum(len(text.encode()) for text in val.iterate()), "kept with the run")


def _local_files(where: str | Path) -> list[Path]:
    files, left_out = find_files(where)
    if left_out:
        print0(left_out)
    return files


def _print_notes(documents: Documents) -> None:
    """What in the files of a source might be meant otherwise than it is read."""
    if documents.marks:
        print0(
            f"{documents.name}: {documents.marks:,} marks <|endoftext|> are not alone on a line and stay text; to"
            " divide documents there, put each on a line of its own"
        )
    if cut := len({block.path for block in documents.blocks if block.kind.endswith("-cut")}):
        print0(
            f"{documents.name}: {cut} .txt files have a line of {LONG_LINE // 1024} KiB or more; their lines are cut at"
            f" blanks into documents of about {CUT_BYTES:,} bytes"
        )
