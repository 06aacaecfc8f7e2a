#!/usr/bin/env bash
# huggingface_hub 2.4.0: HF_HUB_OFFLINE=1 also stops InferenceClient from reaching a server of one's own at base_url.
#
# Seen: the variable is documented for the hub. With it, a chat request to a server on 127.0.0.1 that base_url names is refused before
# anything is sent (OfflineModeIsEnabled); without it the same request is answered.
# Who meets it: scripts on machines without a network that set the variable for transformers and talk to a local model.
# Output seen on Python 3.11:
#   online: hello, requests 1
#   offline: OfflineModeIsEnabled, requests 0
# Exits with 1 when either is otherwise.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip -qq --disable-pip-version-check install "huggingface_hub==2.4.0"
cat >"$work/ask.py" <<'EOF'
import json, os, threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from huggingface_hub import InferenceClient

requests = []

class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        requests.append(self.rfile.read(int(self.headers["Content-Length"])))
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "hello"}}
        body = json.dumps({"id": "1", "created": 1, "model": "m", "system_fingerprint": "", "choices": [choice],
                           "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass

server = HTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
client = InferenceClient(base_url=f"http://127.0.0.1:{server.server_port}/v1")
try:
    said = client.chat_completion([{"role": "user", "content": "hi"}], model="m").choices[0].message.content
except Exception as error:
    said = type(error).__name__
print(f"{'offline' if os.environ.get('HF_HUB_OFFLINE') else 'online'}: {said}, requests {len(requests)}")
EOF
{
    env -u HF_HUB_OFFLINE "$work/venv/bin/python" "$work/ask.py"
    HF_HUB_OFFLINE=1 "$work/venv/bin/python" "$work/ask.py"
} | tee "$work/seen"
diff "$work/seen" - <<'EOF'
online: hello, requests 1
offline: OfflineModeIsEnabled, requests 0
EOF
