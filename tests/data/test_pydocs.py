"""The offline corpus: what is taken from a file, what is dropped, and that the same installation gives the same
corpus.
"""

import importlib.metadata
import json
import sys
import textwrap

import pyarrow.parquet as pq
import pytest
from packaging.requirements import Requirement

from nanolab.cli import UserError
from nanolab.data import pydocs
from nanolab.data.config import DataConfig
from nanolab.data.corpus import hold_out_groups, open_data

PROSE = (
    "The quick reader will note that this is a sentence of the kind that people write when they have to explain a"
    " thing. "
)


def units(tmp_path, source, name="m.py"):
    path = tmp_path / name
    path.write_text(textwrap.dedent(source))
    return pydocs.read_units(str(path))


def test_docstrings_are_read_with_their_names_and_nothing_is_run(tmp_path):
    found = units(
        tmp_path,
        '''
        """Module words."""
        raise SystemExit("this file must not be run")
        try:
            import nothing_like_this
        except ImportError:
            pass
        else:
            def f(a, /, b, *, c=3):
                """Function words."""
        class C:
            """Class words."""
            x = 1
            @property
            async def g(self, d):
                """Method words.

                    indented
                more
                """
            class D:
                """Inner words."""
        add_docstr(thing, r"""'''
        + PROSE * 3
        + '''""".format(**common))
        short = "not long enough"
        ''',
    )
    assert found == [
        [("", "Module words.")],
        [("f(a, b, c)", "Function words.")],
        [("class C", "Class words."), ("C.g(d)", "Method words.\n\n    indented\nmore"), ("class C.D", "Inner words.")],
        [("", PROSE * 3)],
        [],
    ]


def test_long_comments_of_a_file_are_one_document(tmp_path):
    line = "# " + PROSE + "\n"
    source = f'"""Module."""\n#!x\n# short\n# one\nif a:\n    {line}    #\n    {line}    x = 1\n' + line * 3
    assert units(tmp_path, source)[1:] == [[("", f"{PROSE}\n\n{PROSE}\n"), ("", f"{PROSE}\n" * 3)]]


@pytest.mark.parametrize(
    "content", ['"""unclosed', '"""x"""\nprint "old"', '"""x\0y"""', "# -*- coding: nonsense -*-\n'''x'''"]
)
def test_files_that_do_not_parse_hold_nothing(tmp_path, content):
    assert units(tmp_path, content) == []


def test_a_description_follows_the_headers(tmp_path):
    assert units(tmp_path, "Name: x\nVersion: 1\n\n# Title\n\nWords.\n", "METADATA") == [
        [],
        [("", "# Title\n\nWords.\n")],
    ]


def test_clean_drops_sessions_code_and_the_headings_they_leave():
    text = """Words before.

    Parameters
    ----------
    x : kept

    {input}

    Examples
    --------
    >>> f(1)
    ... more
    17

    .. image:: a.png

    See Also
    --------
    more words"""
    text += "\n\n    ```python\n    x = 1\n    ```\nNotes\n=====\n\n>>> only()\n\n[![badge](x)](y)\n"
    cleaned = (
        "Words before.\n\n    Parameters\n    ----------\n    x : kept\n\n    See Also\n    --------\n    more words"
    )
    assert pydocs.clean(text) == cleaned


def test_prose_is_told_from_code_tables_and_other_languages():
    assert pydocs.is_prose(PROSE * 2)
    assert not pydocs.is_prose("x = foo(bar, baz) + qux[3] ** 2; return x.y.z\n" * 6)
    assert not pydocs.is_prose("0.1  0.2  0.3  the  4.5\n" * 12)
    assert not pydocs.is_prose(
        "Dies ist ein Satz, den jemand auf Deutsch geschrieben hat, damit er etwas erklären kann. " * 3
    )


def test_documents_are_long_enough_and_each_text_appears_once():
    def unit(*parts):
        return list(parts)

    long = [f"{word} {PROSE * 2}" for word in ("Alpha", "Beta", "Gamma")]
    same = long[0].upper().replace(" ", "\n") + " but it ends in another way."
    files = [
        ("a", [unit(("", "Short module words.")), unit(("f()", long[0])), unit(("g()", "Brief. " + PROSE))]),
        ("b", [unit(("", same)), unit(("class C", "Tiny."), ("C.h()", long[1]), ("C.i()", "Tiny."))]),
        ("c", [unit(("", "Alone."))]),
        ("d", [unit(("", long[2])), unit(("f()", "# " + "x = 1; " * 60))]),
    ]
    assert list(pydocs.gather_documents(files)) == [
        ("a", f"f()\n\n{long[0]}"),
        ("b", f"class C\n\nTiny.\n\nC.h()\n\n{long[1]}"),
        ("d", long[2]),
    ]
    licence = "Permission is hereby granted to anybody who would like to read these words.\n\nBrief."
    said = [*pydocs.gather_documents([(g, [unit(("", f"{g}{g} {PROSE * 2}\n\n{licence}"))]) for g in ("a", "b")])]
    assert said == [("a", f"aa {PROSE * 2}\n\n{licence}"), ("b", f"bb {PROSE * 2}\n\nBrief.")]
    joined = list(pydocs.gather_documents([("a", [unit(("", "Words. " + PROSE)), unit(("g()", "Brief. " + PROSE))])]))
    assert joined == [("a", f"Words. {PROSE}\n\ng()\n\nBrief. {PROSE}")]


def test_long_documents_are_cut_between_paragraphs():
    paragraphs = [f"{i} {PROSE * 9}".strip() for i in range(60)]
    pieces = list(pydocs.cut("\n\n".join(paragraphs)))
    assert "\n\n".join(pieces) == "\n\n".join(paragraphs)
    assert len(pieces) > 3 and all(14_000 < len(p) <= 16_002 for p in pieces[:-1])
    assert list(pydocs.cut("short")) == []


def test_sources_are_the_standard_library_and_required_distributions_only():
    found, _ = pydocs.required_distributions()
    required = [Requirement(r) for r in importlib.metadata.requires("nanolab")]
    names = [r.name for r in required if r.marker is None or r.marker.evaluate({"extra": ""})]
    assert {n.lower().replace("_", "-") for n in names} <= found.keys()
    assert not found.keys() & {"pytest", "hypothesis", "nanolab"}
    files, versions, _ = pydocs.source_files()
    groups = {g for g, _ in files}
    assert {"python.asyncio", "python.argparse", "numpy", "numpy.linalg"} <= groups and not groups & {
        "python.test",
        "python.site-packages",
    }
    assert versions == {name: importlib.metadata.version(name) for name in found if name != "scipy"}
    assert "scipy" in found and not {group for group in groups if group.partition(".")[0] == "scipy"}
    assert len(files) == len(set(files))


def test_groups_held_out_fit_the_cap_and_do_not_depend_on_order():
    sizes = {f"p{i}": 100 * (i % 7 + 1) for i in range(200)} | {"huge": 50_000}
    chosen = hold_out_groups(sizes)
    total = sum(sizes[g] for g in chosen)
    assert "huge" not in chosen and 0.04 * sum(sizes.values()) <= total <= 0.05 * sum(sizes.values())
    assert hold_out_groups(dict(reversed(sizes.items()))) == chosen
    assert len(hold_out_groups({str(i): 10**6 for i in range(1000)})) == 8  # of a gigabyte 10 MB at most


@pytest.fixture
def few_sources(monkeypatch):
    """The corpus from a dozen packages of the standard library: the real path in a second."""
    files, versions, left_out = pydocs.source_files()
    wanted = {
        f"python.{n}"
        for n in "asyncio email http logging unittest xml json turtle argparse typing difflib pydoc_data".split()
    }
    files = [f for f in files if f[0] in wanted]
    monkeypatch.setattr(pydocs, "source_files", lambda: (files, versions, left_out))


@pytest.mark.slow
def test_corpus_is_built_once_and_is_the_same_for_any_number_of_processes(few_sources, base_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(pydocs, "SHARD_DOCUMENTS", 150)
    data = open_data(DataConfig(), workers=2)
    folder = base_dir / "corpora" / "pydocs"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {p.name for p in folder.iterdir()} == {"manifest.json", *manifest["files"]} and len(manifest["files"]) > 2
    train, val = list(data.train[0][0].iterate()), list(data.val.iterate())
    assert len(train) + len(val) == manifest["documents"]
    assert sum(len(t.encode()) for t in train + val) == manifest["bytes"] > 500_000
    keys = [pydocs.first_letters(t) for t in train + val]
    assert len(set(keys)) == len(keys) and min(map(len, train + val)) >= 200
    groups = set(pq.read_table(folder / "val.parquet")["group"].to_pylist())
    assert groups == set(manifest["validation"]) and groups
    assert not groups & set(pq.read_table(folder / "shard_00000.parquet")["group"].to_pylist())
    assert any("Special method names" in t for t in train + val)  # pydoc's topics
    monkeypatch.setenv("NANOLAB_BASE_DIR", str(tmp_path / "second"))
    again = open_data(DataConfig(), workers=1)
    assert (again.fingerprint, again.val_fingerprint) == (data.fingerprint, data.val_fingerprint)
    monkeypatch.setattr(pydocs, "documents", None)  # a third opening builds nothing
    assert open_data(DataConfig()).fingerprint == data.fingerprint


@pytest.mark.slow
def test_a_failed_build_leaves_nothing_and_damage_is_refused(few_sources, base_dir, monkeypatch):
    def disk_full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr("nanolab.data.parquet.pq.write_table", disk_full)
        with pytest.raises(OSError):
            open_data(DataConfig())
    assert [p.name for p in (base_dir / "corpora").iterdir()] == ["pydocs.lock"]
    open_data(DataConfig())
    (base_dir / "corpora/pydocs/val.parquet").unlink()
    with pytest.raises(UserError, match="val.parquet is not the file that was built.*rm -r"):
        open_data(DataConfig())


@pytest.mark.slow
def test_the_whole_corpus_is_tens_of_megabytes_of_prose(base_dir, corpora):
    base_dir.mkdir()
    (base_dir / "corpora").symlink_to(corpora)  # the quickstart of test_readme.py builds it too
    data = open_data(DataConfig())
    texts = [*data.train[0][0].iterate(), *data.val.iterate()]
    assert sum(len(t.encode()) for t in texts) > 15e6
    assert 0.02 < data.val.n_documents / len(texts) < 0.08
    assert sum(">>>" in t for t in texts) < 0.001 * len(texts)
    assert "sys" in sys.modules and "idlelib" not in sys.modules  # read, not imported
