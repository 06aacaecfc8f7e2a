#!/usr/bin/env bash
# huggingface_hub 2.4.0: a download whose process was killed begins anew in the next process; 0.36.0 goes on from its bytes.
#
# Seen: hf_hub_download of a 48 MB file over plain HTTP, killed when the server had sent half. With 0.36.0 the next process asks
# for "Range: bytes=N-" and gets the rest. With 2.4.0 it asks for the whole file, and what the first one had got stays on the disk
# under a name that nothing reads again (one more file for every kill). `resume_download` is gone, the docstring has no word of it.
# Who meets it: jobs with a time limit, a large file and a slow line: every try begins at 0.
# Output seen on Python 3.11:
#   0.36.0 second request: from the bytes that were there; left over: 0
#   2.4.0 second request: from 0; left over: 1
# Exits with 1 when any is otherwise. Downloads from a server of its own on this machine; needs a package index for pip alone.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat >"$work/try.py" <<'EOF'
import os
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

BODY = os.urandom(48 << 20)  # the client writes 10 MB at a time
ranges, half_sent, go_on = [], threading.Event(), threading.Event()


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(send=False)

    def do_GET(self):
        self.answer(send=True)

    def answer(self, send):
        if "/resolve/" not in self.path:
            self.send_error(404)
            return
        asked = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        self.send_response(206 if asked else 200)
        headers = {"ETag": '"' + "a" * 40 + '"', "X-Repo-Commit": "1" * 40, "Content-Length": str(len(BODY) - start)}
        if asked:
            headers["Content-Range"] = f"bytes {start}-{len(BODY) - 1}/{len(BODY)}"
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if not send:
            return
        ranges.append(start)
        first = len(ranges) == 1
        self.wfile.write(BODY[start : len(BODY) // 2 if first else None])
        self.wfile.flush()
        if first:
            half_sent.set()
            go_on.wait(60)


server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
cache = Path(sys.argv[1])
code = f"from huggingface_hub import hf_hub_download; print(hf_hub_download('me/data', 'big.bin', revision='{'1' * 40}'))"
env = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(cache), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
first = subprocess.Popen([sys.executable, "-c", code], env=env)
half_sent.wait(60)
for _ in range(600):  # until it has written something
    if sum(path.stat().st_size for path in cache.rglob("*.incomplete")) > 0:
        break
    time.sleep(0.05)
first.kill()
first.wait()
go_on.set()
done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
assert done.returncode == 0 and Path(done.stdout.strip()).read_bytes() == BODY, done.stderr
left = len(list(cache.rglob("*.incomplete")))
import huggingface_hub

print(huggingface_hub.__version__, "second request:", "from the bytes that were there;" if ranges[1] else "from 0;", "left over:", left)
EOF
expected="0.36.0 second request: from the bytes that were there; left over: 0
2.4.0 second request: from 0; left over: 1"
seen=
for version in 0.36.0 2.4.0; do
    python3 -m venv "$work/$version"
    "$work/$version/bin/pip" -qq install "huggingface_hub==$version"
    seen+="$("$work/$version/bin/python" "$work/try.py" "$work/cache-$version")"$'\n'
done
printf '%s' "$seen"
[ "${seen%$'\n'}" = "$expected" ]
