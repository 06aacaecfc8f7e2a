"""The offline corpus: the English documentation that lies in every Python installation.

Sources are a fixed list: the standard library and the distributions that nanolab requires (with what those require;
never extras). Files are read as text and parsed with `ast`; nothing is imported or run. A document is a module's
docstring with those of its short functions, a long function, a class with its methods, a long string that is prose
(`add_docstr` calls, pydoc's topics), the long comments of a file, a documentation file, or a distribution's
description. Doctest sessions, fenced code and paragraphs that were there before (licences, parameters that a hundred
functions share) are left out."""

import ast
import gc
import hashlib
import importlib.metadata
import json
import os
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from inspect import cleandoc
from multiprocessing import get_context
from pathlib import Path

FORMAT = 1  # raised when the same installation would give other text
MIN_CHARS, MAX_CHARS = 200, 16_000  # shorter documents are dropped, longer ones are cut between paragraphs
SAME_LETTERS = 160  # texts that agree in this many letters count as one
SAME_PARAGRAPH = 40  # a paragraph of fewer letters may come again
SHARD_DOCUMENTS = 8192
NOT_READ = {"scipy"}  # required later: without it the corpus is that of the published figures
# test suites are not prose
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
NOT_PROSE = re.compile(
    r"licen[sc]e|copying|notice|authors|top_level|record|entry_points|cmakelists|requirements|vendor", re.I
)
STOP_WORDS = frozenset(
    "the of to a and is in for be that this it with as or if are by on from an not can will which when you at has"
    " have was".split()
)
Unit = list[tuple[str, str]]  # (heading, docstring) pairs that belong together


def required_distributions(root: str = "nanolab") -> tuple[dict[str, importlib.metadata.Distribution], list[str]]:
    """The installed distributions `root` requires, directly or not, by name; and the names required but not
    installed.
    """
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    found: dict[str, importlib.metadata.Distribution] = {}
    missing, waiting = [], list(importlib.metadata.requires(root) or [])
    while waiting:
        requirement = Requirement(waiting.pop())
        name = canonicalize_name(requirement.name)
        if name in found or name in missing or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
        else:
            waiting += found[name].requires or []
    return dict(sorted(found.items())), sorted(missing)


def source_files() -> tuple[list[tuple[str, str]], dict[str, str], list[str]]:
    """(group, path) of every file to read, in reading order; version by distribution; names that are left out."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, subfolders, names in os.walk(stdlib):
        subfolders[:] = sorted(set(subfolders) - SKIPPED_FOLDERS)
        for name in sorted(names):
            if name.endswith(".py"):
                path = Path(folder, name)
                files.append(("python." + path.relative_to(stdlib).parts[0].removesuffix(".py"), str(path)))
    found, left_out = required_distributions()
    found = {name: distribution for name, distribution in found.items() if name not in NOT_READ}
    for name, distribution in found.items():
        if distribution.files is None:  # no RECORD: nothing says which files are its own
            left_out.append(name)
        for file in sorted(distribution.files or []):
            path = Path(str(file.locate()))
            prose = file.suffix in (".rst", ".md", ".txt") and not NOT_PROSE.search(str(file))
            wanted = file.suffix in (".py", ".pyi") or prose or file.name == "METADATA"
            if wanted and not SKIPPED_FOLDERS.intersection(file.parts) and path.is_file():
                # the largest distributions could never be validation text as a whole, so their subpackages are groups
                group = ".".join(file.with_suffix("").parts[:2]) if file.suffix in (".py", ".pyi") else name
                files.append((group, str(path)))
    return files, {name: d.version for name, d in found.items()}, left_out


def read_units(path: str) -> list[Unit]:
    """The documentation in one file; the first unit is the module's own. Files that do not parse hold none."""
    gc.disable()  # syntax trees have no cycles; collecting while they grow costs a sixth of the time
    try:
        raw = Path(path).read_bytes()
        if not path.endswith((".py", ".pyi")):
            text = raw.decode("utf-8")
            if path.endswith("METADATA"):
                text = text.replace("\r\n", "\n").partition("\n\n")[2]  # the description follows the headers
            return [[], [("", text)]]
        if b'"""' not in raw and b"'''" not in raw and b"topics" not in raw:
            return []  # six times faster than parsing, and docstrings worth having are in triple quotes
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's escape sequences
            tree = ast.parse(raw)
    except (SyntaxError, ValueError, RecursionError):
        return []
    finally:
        gc.enable()
    units: list[Unit] = [[("", ast.get_docstring(tree) or "")]]
    for node in _statements(tree.body):
        if isinstance(node, (ast.Expr, ast.Assign, ast.AnnAssign)):
            strings = (c.value for c in ast.walk(node) if isinstance(c, ast.Constant) and isinstance(c.value, str))
            units += [[("", cleandoc(s))] for s in strings if len(s) >= MIN_CHARS]
        else:
            units.append(list(_docstrings(node, "")))
    comments = re.findall(r"(?:^[ \t]*#.*\n){3,}", raw.decode("utf-8", "replace"), re.M)
    units.append([("", re.sub(r"^[ \t]*#+ ?", "", c, flags=re.M)) for c in comments if len(c) >= MIN_CHARS])
    return units


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Definitions, assignments and bare expressions, also those under `if` and `try`."""
    for i, node in enumerate(body):
        if isinstance(node, (ast.If, ast.Try)):
            yield from _statements(node.body)
            yield from _statements(node.orelse)
        elif isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef, ast.Assign, ast.AnnAssign)):
            yield node
        elif isinstance(node, ast.Expr) and (i or not isinstance(node.value, ast.Constant)):
            yield node


def _docstrings(node: ast.stmt, prefix: str) -> Iterator[tuple[str, str]]:
    name = prefix + getattr(node, "name", "")
    if isinstance(node, ast.ClassDef):
        yield f"class {name}", ast.get_docstring(node) or ""
        for child in _statements(node.body):
            if not isinstance(child, (ast.Expr, ast.Assign, ast.AnnAssign)):
                yield from _docstrings(child, name + ".")
    elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        arguments = [
            a.arg for a in node.args.posonlyargs + node.args.args + node.args.kwonlyargs if a.arg not in ("self", "cls")
        ]
        yield f"{name}({', '.join(arguments)})", ast.get_docstring(node) or ""


def clean(text: str) -> str:
    """`text` without doctest sessions, fenced code, template lines, images and the headings that these leave empty."""
    kept, session = [], False
    for line in re.sub(r"^ *```.*?^ *```", "", text.expandtabs(), flags=re.S | re.M).splitlines():
        stripped = line.strip()
        session = bool(stripped) and (session or stripped.startswith((">>>", "... ")))
        if not session and not re.fullmatch(r"\{\w+\}|[>.*]* *!?\[!\[.*|<[^>]*>|\.\. (image|figure)::.*", stripped):
            kept.append(line.rstrip())
    text = "\n".join(kept)
    heading = r"[^\n]+\n *[=~^\"-]{3,}\n"
    text = re.sub(rf"(?:^|(?<=\n)){heading}(?:\n*(?={heading})|\s*\Z)", "", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def is_prose(text: str) -> bool:
    """English sentences rather than code, tables or another language: mostly ASCII letters, enough stop words."""
    words = re.findall(r"[A-Za-z]+", text)
    letters = sum(map(len, words))
    return letters > 0.55 * len(text) and sum(w.lower() in STOP_WORDS for w in words) >= 0.12 * len(words)


def first_letters(text: str) -> str:
    """What makes two texts the same: the first SAME_LETTERS letters, whatever their case and what stands between
    them.
    """
    return re.sub(r"[^a-z]", "", text[: 8 * SAME_LETTERS].lower())[:SAME_LETTERS]


def gather_documents(files: list[tuple[str, list[Unit]]]) -> Iterator[tuple[str, str]]:
    """(group, text) of every document, in order, each text once. files: (group, units) in reading order."""
    docstrings, paragraphs, given = {""}, set(), {""}

    def is_new(paragraph: str) -> bool:
        key = first_letters(paragraph)
        repeated = len(key) >= SAME_PARAGRAPH and key in paragraphs
        paragraphs.add(key)
        return not repeated

    def finish(group: str, text: str) -> Iterator[tuple[str, str]]:
        for piece in cut("\n\n".join(filter(is_new, text.split("\n\n")))):
            if is_prose(piece) and (key := first_letters(piece)) not in given:
                given.add(key)
                yield group, piece

    for group, units in files:
        own = []  # the module's docstring, and what is too short to stand alone
        for i, unit in enumerate(units):
            parts = []
            for heading, text in unit:
                if (key := first_letters(text)) not in docstrings:
                    docstrings.add(key)
                    parts.append(f"{heading}\n\n{text}" if heading else text)
            text = "\n\n".join(parts)
            if i and len(text) >= MIN_CHARS:
                yield from finish(group, text)
            elif parts:
                own.append(text)
        yield from finish(group, "\n\n".join(own))


def cut(text: str) -> Iterator[str]:
    """`text` in pieces of at most MAX_CHARS (more only for a single paragraph), none shorter than MIN_CHARS."""
    piece = ""
    for paragraph in text.split("\n\n"):
        if piece and len(piece) + len(paragraph) > MAX_CHARS:
            if len(piece) >= MIN_CHARS:
                yield piece
            piece = ""
        piece += ("\n\n" if piece else "") + paragraph
    if len(piece) >= MIN_CHARS:
        yield piece


def _read_cleaned(path: str) -> list[Unit]:
    return [[(h, clean(t)) for h, t in unit] for unit in read_units(path)]


def documents(workers: int = 2) -> tuple[list[tuple[str, str]], dict]:
    """All documents as (group, text) in reading order, read by `workers` processes, and what they came from."""
    from nanolab.terminal import progress

    files, versions, left_out = source_files()
    # spawn: a forked child of a process that has started threads may hang
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        units = pool.map(_read_cleaned, [path for _, path in files], chunksize=64)
        units = list(progress(units, "reading documentation", total=len(files)))
    origin = {"python": sysconfig.get_python_version(), "distributions": versions, "left_out": left_out}
    return list(gather_documents([(group, u) for (group, _), u in zip(files, units)])), origin


def ensure_pydocs(workers: int, hold_out: Callable[[dict[str, int]], set[str]]) -> tuple[list[Path], list[Path]]:
    """Training and validation files, built at the first use. hold_out: the groups for validation, given the bytes of
    each.

    Once built the corpus stays as it is, whatever is installed later. Raises UserError when its files are damaged.
    """
    from nanolab.cli import UserError
    from nanolab.data.formats import index_file
    from nanolab.files import locked
    from nanolab.runtime import base_dir

    folder = base_dir() / "corpora" / "pydocs"
    if not (folder / "manifest.json").exists():
        with locked(folder):
            _build(folder, workers, hold_out)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    for name, sha in files.items():
        if not (folder / name).exists() or index_file(folder / name)[0] != sha:
            seen = f"{folder / name} is not the file that was built"
            raise UserError(f"{seen}; expected sha256 {sha}; to build the corpus again type: rm -r {folder}")
    return [folder / name for name in files if name != "val.parquet"], [folder / "val.parquet"]


def _build(folder: Path, workers: int, hold_out: Callable[[dict[str, int]], set[str]]) -> None:
    from nanolab.data.parquet import write_documents
    from nanolab.files import replacing
    from nanolab.runtime import print0

    if (folder / "manifest.json").exists():  # another process was faster
        return
    print0("building the corpus pydocs from this Python installation (once)")
    found, origin = documents(workers)
    found.sort(key=lambda d: hashlib.sha256(d[1].encode()).digest())  # a shuffle that depends on nothing but the text
    sizes: dict[str, int] = {}
    for group, text in found:
        sizes[group] = sizes.get(group, 0) + len(text.encode())
    validation = hold_out(sizes)
    parts = {"val.parquet": [d for d in found if d[0] in validation]}
    train = [d for d in found if d[0] not in validation]
    for i in range(0, len(train), SHARD_DOCUMENTS):
        parts[f"shard_{i // SHARD_DOCUMENTS:05d}.parquet"] = train[i : i + SHARD_DOCUMENTS]
    with replacing(folder) as fresh:
        files = {
            name: write_documents(fresh / name, [t for _, t in p], group=[g for g, _ in p]) for name, p in parts.items()
        }
        manifest = {
            "format": FORMAT,
            "documents": len(found),
            "bytes": sum(sizes.values()),
            "validation": sorted(validation),
        }
        (fresh / "manifest.json").write_text(json.dumps({**manifest, **origin, "files": files}, indent=1))
