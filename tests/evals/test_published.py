"""The published bundle, from a server of this machine that drops, sends half and sends other bytes."""

import hashlib
import importlib.util
import io
import json
import stat
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from nanolab.cli import UserError
from nanolab.data import hub
from nanolab.evals import published
from nanolab.evals.bundle import open_bundle

spec = importlib.util.spec_from_file_location("nanolab_tests_tiny_bundle", Path(__file__).with_name("tiny_bundle.py"))
tiny = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.body)))
        self.end_headers()

    def do_GET(self) -> None:
        self.server.seen.append(dict(self.headers))
        start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
        body = self.server.body[start:]
        drop = self.server.drops > 0
        self.server.drops -= 1
        self.send_response(206)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if drop else body)
        self.close_connection = True


def archive(folder: Path, **more: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:  # stored, so that a byte can be changed without breaking the format
        for path in sorted(folder.rglob("*")):
            file.write(path, Path("eval_bundle") / path.relative_to(folder))
        for name, content in more.items():
            file.writestr(name, content)
    return out.getvalue()


@pytest.fixture
def server(tmp_path, monkeypatch):
    one = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    one.body, one.drops, one.seen = archive(tiny.write(tmp_path / "source"), **{"__MACOSX/._x": b"junk"}), 0, []
    threading.Thread(target=one.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr(published, "URL", f"http://127.0.0.1:{one.server_port}/eval_bundle.zip")
    monkeypatch.setattr(hub, "BACK_OFF", 0.01)
    yield one
    one.shutdown()
    one.server_close()


def test_it_is_downloaded_once_pinned_and_said(server, tmp_path, base_dir, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server.drops = 2
    folder = published.ensure_bundle()
    assert folder == base_dir / "eval_bundle" and len(open_bundle(folder).tasks) == 4
    for path in (tmp_path / "source").rglob("*.*"):
        assert (folder / path.relative_to(tmp_path / "source")).read_bytes() == path.read_bytes()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["sha256"] == hashlib.sha256(server.body).hexdigest() and manifest["bytes"] == len(server.body)
    assert manifest["files"]["core.yaml"] == hashlib.sha256((folder / "core.yaml").read_bytes()).hexdigest()
    out = capsys.readouterr().out
    assert manifest["sha256"] in out and server.body and "its publisher names none" in out
    assert len(server.seen) == 3 and server.seen[1]["Range"] != "bytes=0-", "continued"
    assert not any("Authorization" in headers for headers in server.seen), "the hub's token is not for others"
    assert sorted(p.name for p in base_dir.iterdir()) == ["eval_bundle", "eval_bundle.lock"]
    published.ensure_bundle()
    assert len(server.seen) == 3
    (folder / "core.yaml").write_text("icl_tasks: [{label: a}]")
    with pytest.raises(
        UserError, match="core.yaml is not the file that was downloaded; expected sha256 .*; type rm -r"
    ):
        published.ensure_bundle()


def test_a_damaged_archive_leaves_nothing(server, base_dir):
    at = server.body.index(b"was too small")
    server.body = server.body[:at] + b"W" + server.body[at + 1 :]
    with pytest.raises(
        UserError, match="is damaged .*Bad CRC-32.*; expected a whole zip archive; type the same command again"
    ):
        published.ensure_bundle()
    assert [p.name for p in base_dir.iterdir()] == ["eval_bundle.lock"]
    server.body = b"<html>not here</html>"
    with pytest.raises(UserError, match="is damaged .*not a zip file"):
        published.ensure_bundle()


@pytest.mark.parametrize("name", ["../outside.txt", "/outside.txt", "eval_bundle/../../outside.txt", "link"])
def test_an_archive_that_reaches_out_is_refused(server, tmp_path, base_dir, name):
    info = zipfile.ZipInfo(name)
    if name == "link":
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
    out = io.BytesIO(server.body)
    with zipfile.ZipFile(out, "a") as file:
        file.writestr(info, str(tmp_path / "outside.txt"))
    server.body = out.getvalue()
    with pytest.raises(UserError, match="holds '.*', which is a link or lies outside of it; expected plain files"):
        published.ensure_bundle()
    assert [p.name for p in base_dir.iterdir()] == ["eval_bundle.lock"] and not list(tmp_path.rglob("outside.txt"))


@pytest.mark.fault("outer D21")
@pytest.mark.parametrize("limit", [{"MOST_BYTES": 5000}, {"MOST_FILES": 3}])
def test_an_archive_that_would_fill_the_disk_is_not_unpacked(server, base_dir, monkeypatch, limit):
    out = io.BytesIO(server.body)
    with zipfile.ZipFile(out, "a", zipfile.ZIP_DEFLATED) as file:
        for i in range(4):
            file.writestr(f"eval_bundle/zeros{i}", bytes(10**6))  # some kB in the archive
    server.body = out.getvalue()
    for name, value in limit.items():
        monkeypatch.setattr(published, name, value, raising=False)
    with pytest.raises(UserError) as error:
        published.ensure_bundle()
    assert error.value.code == "archive-too-large" and error.value.values["bytes"] > 4 * 10**6
    assert [p.name for p in base_dir.iterdir()] == ["eval_bundle.lock"]


def test_without_a_network_the_flag_is_named(monkeypatch, base_dir):
    monkeypatch.setattr(published, "URL", "http://127.0.0.1:9/eval_bundle.zip")
    with pytest.raises(
        UserError,
        match=(
            r"is not in .*eval_bundle, and http.* cannot be downloaded \(.*refused.*\); expected a network; type"
            r" --eval-bundle DIR"
        ),
    ):
        published.ensure_bundle()


def test_a_folder_of_ones_own_is_taken_as_it_is(tmp_path):
    folder = tiny.write(tmp_path / "mine")
    assert published.ensure_bundle(str(folder)) == folder
    with pytest.raises(UserError, match="--eval-bundle .*nowhere is not a folder; expected core.yaml"):
        published.ensure_bundle(str(tmp_path / "nowhere"))
