"""A file or folder is replaced as a whole; sha256 and locks. Oracles: hashlib, what is on disk."""

import hashlib
import threading

import pytest

from nanolab.cli import UserError
from nanolab.files import key_seed, key_shuffler, locked, replacing, sha256_file, write_text


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "new" / "a.json"
    write_text(path, "first: \u00e9")
    assert path.read_text(encoding="utf-8") == "first: \u00e9"
    with pytest.raises(KeyError), replacing(path) as fresh:
        fresh.write_text("half")
        assert fresh.suffix == ".json" and path.read_text(encoding="utf-8") == "first: \u00e9"
        raise KeyError
    assert path.read_text(encoding="utf-8") == "first: \u00e9" and [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_a_folder_appears_as_a_whole(tmp_path):
    for fails in (True, False):
        try:
            with replacing(tmp_path / "out") as fresh:
                fresh.mkdir()
                (fresh / "a").write_text("1")
                if fails:
                    raise KeyError
        except KeyError:
            assert list(tmp_path.iterdir()) == []
    assert (tmp_path / "out" / "a").read_text() == "1" and len(list(tmp_path.iterdir())) == 1


def test_what_cannot_be_written_is_the_users_error(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "full").write_text("")
    with pytest.raises(UserError):
        write_text(tmp_path / "folder", "text")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_sha256(tmp_path):
    content = bytes(range(256)) * 9000
    (tmp_path / "a").write_bytes(content)
    assert sha256_file(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_one_at_a_time(tmp_path):
    order, path = [], tmp_path / "x" / "data"

    def second():
        with locked(path):
            order.append("second")

    with locked(path):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"] and (tmp_path / "x" / "data.lock").exists()


def test_seeds_of_a_key_are_pinned():
    """Orders of data, rollouts and requests of runs that exist depend on these numbers."""
    assert key_seed("order", 42, 0) == 4147603811877951081 and key_seed(42, 1, 0, bits=31) == 1320370046
    assert key_shuffler(42, 0).permutation(8).tolist() == [1, 5, 7, 2, 6, 0, 4, 3]
