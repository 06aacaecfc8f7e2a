"""A page of another site, in a real browser, against the server: it reaches no engine, in none of the ways that need no
leave.
"""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


@pytest.fixture
def elsewhere() -> Iterator[str]:
    """The port of an empty page of somebody else's."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<!doctype html><title>elsewhere</title>")

        def log_message(self, *args: object) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield str(server.server_port)
    server.shutdown()


ATTACK = """async ([url, body, kinds]) => {
    const seen = [];
    for (const kind of kinds) {
        const plain = {method: 'POST', mode: 'no-cors', body, headers: {'content-type': kind}};
        seen.push(await fetch(url, plain).then((answer) => answer.type, String));
    }
    const json = {method: 'POST', body, headers: {'content-type': 'application/json'}};
    seen.push(await fetch(url, json).then((answer) => answer.type, () => 'refused'));
    for (const kind of kinds)
        navigator.sendBeacon(url, new Blob([body], {type: kind}));
    const frame = document.createElement('iframe');
    frame.name = 'target';
    const form = document.createElement('form');
    Object.assign(form, {method: 'POST', enctype: 'text/plain', action: url, target: 'target'});
    const field = document.createElement('input');
    [field.name, field.value] = [body.slice(0, -1) + ', "x": "', '"}'];
    form.append(field);
    document.body.append(frame, form);
    await new Promise((done) => { frame.onload = done; form.submit(); });
    return seen;
}"""
KINDS = [
    "text/plain",
    "text/plain; x=json",
    "text/plain;application/json",
    "application/x-www-form-urlencoded; json",
    "multipart/form-data; boundary=json",
]


@pytest.mark.slow
@pytest.mark.fault("outer D1")
@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])  # another origin of the same site, and another site
def test_nothing_that_a_page_elsewhere_sends_reaches_an_engine(browser, site, elsewhere, name):
    page = browser.new_page()
    page.goto(f"http://{name}:{elsewhere}/")
    body = '{"model": "ada", "messages": [{"role": "user", "content": "sum"}], "max_tokens": 1}'
    before = site.engines["ada"].added
    seen = page.evaluate(ATTACK, [f"{site.url}/v1/chat/completions", body, KINDS])
    assert seen == ["opaque"] * len(KINDS) + ["refused"]  # the requests were sent; their answers are not to be read
    page.goto(site.url)
    status = page.evaluate(
        "async (body) => (await fetch('/v1/chat/completions', {method: 'POST', body, headers: {'content-type':"
        " 'application/json'}})).status",
        body,
    )
    page.close()
    assert (status, site.engines["ada"].added - before) == (200, 1)  # the page's own request alone
