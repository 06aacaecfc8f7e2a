"""Hub corpora against a local server that speaks the hub's API and drops, truncates and corrupts what it sends."""

import hashlib
import io
import json
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, wait
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanolab.cli import UserError
from nanolab.data import hub
from nanolab.data.config import DataConfig
from nanolab.data.corpus import CORPORA, open_data
from nanolab.data.hub import HubCorpus
from nanolab.files import locked

REVISION = "1" * 40


def shard(seed: int, rows: int = 300) -> bytes:
    texts = [f"Document {seed}.{i}: " + hashlib.sha256(f"{seed}.{i}".encode()).hexdigest() * 20 for i in range(rows)]
    out = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), out, compression="none", row_group_size=100)
    return out.getvalue()


class Hub(ThreadingHTTPServer):
    """`faults[path]` is a list of what happens to the next requests for that file: drop, truncate, flip, whole, 404,
    503.
    """

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.gets, self.ranges, self.revision = files, {}, [], [], REVISION
        self.guard = threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, request, client_address) -> None:
        pass  # a client that hangs up is part of the tests


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def reply(self, body: bytes, status: int = 200, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body) if length is None else length), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        hub_: Hub = self.server
        path = unquote(urlsplit(self.path).path)
        if path.startswith("/api/datasets/me/data/tree/"):
            entries = [
                {
                    "type": "file",
                    "path": f,
                    "size": len(b),
                    "oid": hashlib.sha1(b).hexdigest(),
                    "lfs": {"oid": hashlib.sha256(b).hexdigest(), "size": len(b), "pointerSize": 130},
                }
                for f, b in hub_.files.items()
            ]
            self.reply(
                json.dumps([{"type": "file", "path": "README.md", "size": 3, "oid": "0" * 40}, *entries]).encode()
            )
        elif path.startswith("/api/datasets/me/data"):
            self.reply(json.dumps({"id": "me/data", "sha": hub_.revision}).encode())
        elif path.startswith(prefix := f"/datasets/me/data/resolve/{hub_.revision}/"):
            self.send_file(hub_, path.removeprefix(prefix))
        else:
            self.reply(b"", 404)

    def send_file(self, hub_: Hub, name: str) -> None:
        with hub_.guard:
            hub_.gets.append(name)
            faults = hub_.faults.get(name, [])
            fault = faults.pop(0) if faults else ""
        body, start = hub_.files[name], 0
        if header := self.headers.get("Range"):
            start = int(header.removeprefix("bytes=").rstrip("-"))
            with hub_.guard:
                hub_.ranges.append((name, start))
        if fault.isdigit():
            return self.reply(b"", int(fault))
        if fault == "flip":
            body = body[:-9] + bytes([body[-9] ^ 1]) + body[-8:]
        if fault == "whole":  # ignores the range
            return self.reply(body)
        body = body[start:]
        cut = len(body) // 2 if fault in ("drop", "truncate") else len(body)
        self.reply(body[:cut], 206, len(body) if fault == "drop" else cut)
        if fault == "drop":
            self.close_connection = True


@pytest.fixture
def server(monkeypatch):
    """A hub with five training shards and a validation shard, known as the corpus `toy`."""
    files = {f"data/shard_{i}.parquet": shard(i) for i in range(6)}
    hub_ = Hub(files)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub_.server_port}")
    monkeypatch.setattr(hub, "BACK_OFF", 0.01)
    toy = HubCorpus("me/data", REVISION, "data/shard_*.parquet", "data/shard_5.parquet", 5)
    monkeypatch.setitem(hub.CORPORA, "toy", toy)
    monkeypatch.setitem(CORPORA, "toy", lambda num_shards, workers: hub.ensure_corpus("toy", num_shards, workers))
    yield hub_
    hub_.shutdown()
    hub_.server_close()


def toy(n=-1):
    return open_data(DataConfig(data="toy", num_shards=n), workers=3)


def visible(base_dir):
    return {p.relative_to(base_dir / "corpora/toy").as_posix() for p in base_dir.glob("corpora/toy/data/*")}


def test_downloads_validation_first_then_the_shards_asked_for(server, base_dir):
    data = toy(3)
    assert server.gets[0] == "data/shard_5.parquet"
    assert Counter(server.gets) == {f"data/shard_{i}.parquet": 1 for i in (0, 1, 2, 5)}
    for name in visible(base_dir):
        assert (base_dir / "corpora/toy" / name).read_bytes() == server.files[name]
    assert data.train[0][0].n_documents == 900 and data.val.n_documents == 300
    assert all(t.startswith("Document 5.") for t in data.val.iterate())
    assert not any(t.startswith("Document 5.") for t in data.train[0][0].iterate())


def test_what_is_there_needs_no_network_and_more_shards_change_no_validation(server, base_dir, monkeypatch):
    data = toy()  # -1 at the first use: all five, as there are fewer than eight
    assert data.train[0][0].n_documents == 1500
    server.gets.clear()
    few = toy(2)
    assert few.train[0][0].n_documents == 600 and server.gets == []
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    again = toy()
    assert (again.fingerprint, again.val_fingerprint) == (data.fingerprint, data.val_fingerprint)
    assert few.val_fingerprint == data.val_fingerprint and few.fingerprint != data.fingerprint


def test_processes_share_one_download_and_wait_only_for_what_they_lack(server, base_dir, capsys):
    pool = ThreadPoolExecutor(3)
    opened = [f.result(60) for f in [pool.submit(toy, 2) for _ in range(3)]]
    assert len({data.fingerprint for data in opened}) == 1
    assert sorted(server.gets) == [f"data/shard_{i}.parquet" for i in (0, 1, 5)]
    assert capsys.readouterr().out.count("downloading") == 1
    with locked(base_dir / "corpora" / "toy"):  # somebody downloads more of it
        reader = pool.submit(toy, 2)
        wait([reader], timeout=20)
        assert reader.done()
    assert reader.result().fingerprint == opened[0].fingerprint


@pytest.mark.parametrize("fault", ["drop", "truncate", "flip", "503", "whole"])
def test_faults_are_survived(server, base_dir, fault):
    name = "data/shard_1.parquet"
    server.faults = {name: ["drop", fault] if fault == "whole" else [fault, fault]}
    toy(3)
    assert (base_dir / "corpora/toy" / name).read_bytes() == server.files[name]
    starts = [start for n, start in server.ranges if n == name]
    if fault in ("drop", "truncate"):  # each attempt went on where the one before stopped
        assert len(starts) == 3 and 0 == starts[0] < starts[1] < starts[2]
    if fault == "flip":
        assert starts == [0, 0, 0]
    if fault == "whole":
        assert len(starts) == 2 and starts[1] > 0


def test_a_line_that_keeps_dropping_is_followed_as_long_as_something_arrives(server, base_dir):
    name = "data/shard_1.parquet"
    server.faults = {name: ["drop"] * (hub.ATTEMPTS + 3)}
    toy(2)
    assert (base_dir / "corpora/toy" / name).read_bytes() == server.files[name]


@pytest.mark.parametrize("fault, reason", [("flip", "expected sha256"), ("503", "HTTP 503"), ("404", "HTTP 404")])
def test_files_that_fail_are_named_and_never_visible(server, base_dir, fault, reason):
    name = "data/shard_1.parquet"
    server.faults = {name: [fault] * 9}
    with pytest.raises(UserError, match=f"1 of 3 files of me/data could not be downloaded:\n  {name}: .*{reason}"):
        toy(3)
    assert visible(base_dir) == {f"data/shard_{i}.parquet" for i in (0, 2, 5)}  # the others are kept
    server.gets.clear()
    server.faults = {}
    toy(3)
    assert server.gets == [name]


def test_a_killed_download_is_continued(server, base_dir):
    name = "data/shard_0.parquet"
    body = server.files[name]
    partial = base_dir / "corpora/toy/.partial" / hashlib.sha256(body).hexdigest()
    partial.parent.mkdir(parents=True)
    partial.write_bytes(body[:12345])
    toy(1)
    assert (name, 12345) in server.ranges and (base_dir / "corpora/toy" / name).read_bytes() == body
    assert not list(partial.parent.iterdir())


def test_nothing_stands_in_for_a_missing_validation_shard(server, base_dir):
    server.faults = {"data/shard_5.parquet": ["404"]}
    with pytest.raises(UserError, match="data/shard_5.parquet: HTTP 404"):
        toy(3)
    assert visible(base_dir) == set() and set(server.gets) == {"data/shard_5.parquet"}
    toy(3)
    (base_dir / "corpora/toy/data/shard_5.parquet").unlink()
    server.faults = {"data/shard_5.parquet": ["404"]}
    with pytest.raises(UserError, match="data/shard_5.parquet: HTTP 404"):
        toy()


def test_repository_without_the_declared_files_is_refused(server):
    del server.files["data/shard_5.parquet"]
    with pytest.raises(UserError, match="5 training files .* and 0 validation files"):
        toy()
    server.files["data/shard_5.parquet"] = b""
    del server.files["data/shard_2.parquet"]
    with pytest.raises(UserError, match="has 4 training files .*; expected 5 and 1"):
        toy()


def test_revision_is_pinned_at_the_first_use(server, base_dir, monkeypatch):
    monkeypatch.setitem(hub.CORPORA, "toy", HubCorpus("me/data", "", "data/shard_*.parquet", "data/shard_5.parquet", 0))
    server.revision = "2" * 40
    toy(1)
    assert json.loads((base_dir / "corpora/toy/manifest.json").read_text())["revision"] == "2" * 40
    server.files["data/shard_6.parquet"] = shard(6)  # pushed later
    assert toy(9).train[0][0].n_documents == 1500


def test_a_damaged_file_on_disk_is_refused(server, base_dir):
    toy(1)
    path = base_dir / "corpora/toy/data/shard_0.parquet"
    path.write_bytes(shard(77))
    with pytest.raises(UserError, match="shard_0.parquet is not the file that was downloaded.*delete it"):
        toy(1)


def test_no_network(base_dir, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        UserError, match="tinystories is not downloaded and http://127.0.0.1:9 cannot be asked.*try --data pydocs"
    ):
        open_data(DataConfig(data="tinystories"))
    assert not (base_dir / "corpora/tinystories").exists()


def test_table_is_pinned():
    """Every corpus names one validation file that its own pattern finds, and all but one the commit."""
    for corpus in hub.CORPORA.values():
        assert corpus.repo.count("/") == 1 and corpus.n_train > 0
    assert [name for name, corpus in hub.CORPORA.items() if len(corpus.revision) != 40] == ["fineweb-edu"]


def test_the_command_ends_with_code_1_and_names_what_failed(server, capsys):
    from nanolab.cli import main
    from nanolab.data.config import DataBuildConfig
    from scripts.data import run

    server.faults = {"data/shard_0.parquet": ["404"]}
    with pytest.raises(SystemExit) as end:
        main(lambda: run(DataBuildConfig(data="toy", num_shards=2)))
    assert end.value.code == 1 and "shard_0.parquet: HTTP 404" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        main(lambda: run(DataBuildConfig(data="toy", num_shards=2, json=True)))
    assert end.value.code == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(s["source"], s["documents"], s["files"]) for s in report["sources"]] == [
        ("toy", 600, 2),
        ("validation", 300, 1),
    ]
    tables = [pq.read_table(io.BytesIO(server.files[f"data/shard_{i}.parquet"])) for i in (0, 1)]
    assert report["sources"][0]["bytes"] == sum(len(t) for table in tables for t in table["text"].to_pylist())
