"""nanolab's own source in one file: what a module needs of the others, in the order of their imports, word for word.

So that a model that has left the house is the model, for every variant, and nobody writes it twice. Of each module only
the statements are kept that something kept reads; imports of other packages are merged. What would make the file mean
something else than its parts (one name for two things, an import under another name) is refused. Imports no torch."""

import ast
import builtins
import collections.abc
import importlib.util
import re
import symtable
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

PACKAGE = "nanolab"
# Kernels that need another package or a compiler. Lines of tables that name them are left out, and so are their names
# in lists.
OMITTED = ("nanolab.model.kernels.fa3", "nanolab.model.kernels.flex")


class Part(NamedTuple):
    """A statement at the top of a module."""

    defines: set[str]
    reads: set[str]
    text: str  # whole lines, with the comment above


class Module:
    """A module taken apart. Raises ValueError for an import that one file could not do without."""

    def __init__(self, name: str, text: str):
        self.name, self.doc, self.parts = name, "", []
        self.ours: dict[str, str] = {}  # name -> module of ours that it comes from
        self.late: set[str] = set()  # modules of ours that are imported within functions
        self.others: dict[str, tuple[str, str]] = {}  # name -> (module of other people's, or "", what to import of it)
        omitted: set[str] = set()
        tree = ast.parse(text)
        self.doc = ast.get_docstring(tree) or ""
        for node in tree.body[bool(self.doc) :]:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                omitted |= self._take_imports(node)
        statements = [
            node for node in tree.body[bool(self.doc) :] if not isinstance(node, (ast.Import, ast.ImportFrom))
        ]
        keys = {key for node in statements for key in _entries_with(node, omitted)}
        for node in statements:
            source = _cut(_lines(text, node), omitted, keys) if omitted else _lines(text, node)
            source = self._without_late_imports(source)
            self.parts.append(Part(_defined(node), _read(source), source))

    def _without_late_imports(self, source: str) -> str:
        """A statement without the imports of ours within its functions, where a module needs one that needs it. In one
        file the name is there by the time the function runs.
        """
        lines = source.splitlines()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
                self._take_imports(node)
                self.late.add(node.module)
                blank = node.end_lineno < len(lines) and not lines[node.end_lineno]  # the line after it
                lines[node.lineno - 1 : node.end_lineno + blank] = [None] * (node.end_lineno + blank - node.lineno + 1)
        return "\n".join(line for line in lines if line is not None)

    def _take_imports(self, node: ast.Import | ast.ImportFrom) -> set[str]:
        """Note what an import brings; returns the names of omitted modules."""
        omitted = set()
        for alias in node.names:
            bound = alias.asname or alias.name
            if isinstance(node, ast.Import):
                if alias.name.split(".")[0] == PACKAGE:
                    raise ValueError(
                        f"{self.name} imports {alias.name} as a whole; expected from {alias.name} import NAME, which"
                        " one file can do without"
                    )
                self.others[bound.split(".")[0] if not alias.asname else bound] = (
                    "",
                    f"{alias.name} as {bound}" if alias.asname else alias.name,
                )
            elif f"{node.module}.{alias.name}" in OMITTED:
                omitted.add(bound)
            elif (node.module or "").split(".")[0] == PACKAGE:
                if alias.asname:
                    raise ValueError(
                        f"{self.name} imports {alias.name} under the name {bound}; in one file it has one name; import"
                        " it under its own"
                    )
                self.ours[bound] = node.module
            else:
                # its aliases there
                source = (
                    "collections.abc"
                    if node.module == "typing" and hasattr(collections.abc, alias.name)
                    else node.module
                )
                self.others[bound] = source, f"{alias.name} as {bound}" if alias.asname else alias.name
        return omitted


def stitch(start: str, head: str = "", texts: Mapping[str, str] = {}) -> str:
    """The source of module `start` and of everything of ours that it needs. head: the file's docstring.

    texts: of modules that have no file. Raises ValueError where one file cannot mean what the modules do.
    """
    modules: dict[str, Module] = {}
    kept: dict[
        str, set[int]
    ] = {}  # module -> places of the parts that are read, the modules in the order of their imports
    others: dict[str, tuple[str, str]] = {}

    def module(name: str) -> Module:
        if name not in modules:
            modules[name] = Module(
                name,
                (
                    texts[name]
                    if name in texts
                    else Path(importlib.util.find_spec(name).origin).read_text(encoding="utf-8")
                ),
            )
        return modules[name]

    def take(name: str, place: int) -> None:
        if place in (chosen := kept.setdefault(name, set())):
            return
        chosen.add(place)
        for read in sorted(module(name).parts[place].reads):
            find(name, read)

    def find(name: str, read: str) -> None:
        m = module(name)
        places = [i for i, part in enumerate(m.parts) if read in part.defines]
        for place in places:
            take(name, place)
        if places:
            return
        if read in m.ours:
            find(m.ours[read], read)
        elif read in m.others:
            if others.setdefault(read, m.others[read]) != m.others[read]:
                raise ValueError(
                    f"{read} is {_said(others[read])} and, in {name}, {_said(m.others[read])}; in one file a name means"
                    " one thing; rename one"
                )
        elif not hasattr(builtins, read) and read not in ("__name__", "__file__"):
            raise ValueError(
                f"{name} reads {read}, which one file does not have; expected a name of the module or an import at"
                " its top"
            )

    for place in range(len(module(start).parts)):
        take(start, place)
    order = _ordered(start, modules)
    _check_names(
        {name: set().union(*(modules[name].parts[i].defines for i in kept[name])) for name in order if name in kept},
        others,
    )
    body = [_section(modules[name], sorted(kept[name])) for name in order if name in kept]
    docstring = f'"""{head}"""\n\n' if head else ""
    return docstring + "\n\n\n".join(["\n".join(_imports(others)), *body]) + "\n"


def _ordered(start: str, modules: dict[str, Module]) -> list[str]:
    """Every module after those that it imports at its top; those imported within functions alone come last."""
    order: list[str] = []
    late: list[str] = []

    def visit(name: str) -> None:
        if name in modules and name not in order:
            for imported in dict.fromkeys(modules[name].ours.values()):
                if imported in modules[name].late:
                    late.append(imported)
                else:
                    visit(imported)
            order.append(name)

    visit(start)
    for name in late:
        visit(name)
    return order


def _check_names(defined: dict[str, set[str]], others: dict[str, tuple[str, str]]) -> None:
    owner: dict[str, str] = {}
    for module, names in defined.items():
        for name in sorted(names):
            if name in owner:
                raise ValueError(
                    f"{name} is defined in {owner[name]} and in {module}; in one file a name means one thing;"
                    " rename one"
                )
            if name in others:
                raise ValueError(
                    f"{name} is defined in {module} and is elsewhere {_said(others[name])}; in one file a name means"
                    " one thing; rename it"
                )
            if hasattr(builtins, name):
                raise ValueError(
                    f"{name}, defined in {module}, is a name of Python's own, which other modules may mean; rename it"
                )
            owner[name] = module


def _said(other: tuple[str, str]) -> str:
    module, what = other
    return f"from {module} import {what}" if module else f"import {what}"


def _imports(others: dict[str, tuple[str, str]]) -> list[str]:
    """Python's own, torch's, the rest: each block in alphabetical order."""
    blocks: list[list[str]] = [[], [], []]
    for module in sorted({module or what for module, what in others.values()}):
        names = sorted({what for source, what in others.values() if source == module})
        root = module.split(".")[0].split(" ")[0]
        block = blocks[0 if root in sys.stdlib_module_names else 1 if root == "torch" else 2]
        if any((source, what) == ("", module) for source, what in others.values()):
            block.append(f"import {module}")
        if names:
            block.append(f"from {module} import {', '.join(names)}")
    return [
        line for block in blocks if block for line in [*sorted(block, key=lambda line: line.startswith("from")), ""]
    ][:-1]


def _section(module: Module, places: list[int]) -> str:
    """The parts of a module, under what its docstring says of it and of the letters of its shapes."""
    first, *paragraphs = module.doc.split("\n\n")
    said = [
        f"{module.name.replace('.', '/')}.py: {first.partition(chr(10))[0]}".removesuffix(": ").removesuffix(
            " Imports no torch."
        ),
        *(line for p in paragraphs if "Dims" in p for line in p.splitlines()),
    ]
    text, after_block = "\n".join(f"# {line}" for line in said), True
    for place in places:
        part = module.parts[place].text
        is_block = re.match(r"(#.*\n)*(@|class |def )", part) is not None
        text += ("\n\n\n" if is_block or after_block else "\n") + part
        after_block = is_block
    return text


def _lines(text: str, node: ast.stmt) -> str:
    """The whole lines of a statement, from its comment and decorators on."""
    lines = text.splitlines()
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
    while first and lines[first - 1].startswith("#"):
        first -= 1
    return "\n".join(lines[first : node.end_lineno])


def _defined(node: ast.stmt) -> set[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    targets = (
        node.targets
        if isinstance(node, ast.Assign)
        else [node.target]
        if isinstance(node, (ast.AnnAssign, ast.AugAssign))
        else []
    )
    return {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}


def _read(source: str) -> set[str]:
    """The names that a statement takes from its module, at once or when its functions run."""
    found, tables = set(), [symtable.symtable(source, "part", "exec")]
    while tables:
        table = tables.pop()
        outermost = table.get_type() == "module"
        found |= {s.get_name() for s in table.get_symbols() if s.is_referenced() and (outermost or s.is_global())}
        tables += table.get_children()
    return found - _defined(ast.parse(source).body[0])


def _names(node: ast.AST) -> set[str]:
    return {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}


def _entries_with(node: ast.AST, names: set[str]) -> set[str]:
    """Keys of the entries of dicts whose values read one of `names`."""
    dicts = [inner for inner in ast.walk(node) if isinstance(inner, ast.Dict)]
    return {
        key.value
        for d in dicts
        for key, value in zip(d.keys, d.values)
        if isinstance(key, ast.Constant) and _names(value) & names
    }


def _cut(source: str, names: set[str], keys: set[str]) -> str:
    """A statement without the entries of dicts that read one of `names`, and without the strings `keys` in its tuples
    and lists.
    """
    spans, starts = [], [0]
    for line in source.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def at(node: ast.AST, end: bool = False) -> int:
        return starts[(node.end_lineno if end else node.lineno) - 1] + (node.end_col_offset if end else node.col_offset)

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Dict):
            entries = [
                (at(k), at(v, True), bool(_names(v) & names)) for k, v in zip(node.keys, node.values) if k is not None
            ]
        elif isinstance(node, (ast.Tuple, ast.List)):
            entries = [(at(e), at(e, True), isinstance(e, ast.Constant) and e.value in keys) for e in node.elts]
        else:
            continue
        for i, (begin, end, is_cut) in enumerate(entries):
            kept_before = [end for _, end, is_cut in entries[:i] if not is_cut]
            kept_behind = [begin for begin, _, is_cut in entries[i:] if not is_cut]
            if is_cut:
                spans.append(
                    (begin, kept_behind[0]) if kept_behind else (kept_before[-1] if kept_before else begin, end)
                )
    raw, kept = source.encode(), bytearray()
    for i, byte in enumerate(raw):
        if not any(begin <= i < end for begin, end in spans):
            kept.append(byte)
    return kept.decode()
