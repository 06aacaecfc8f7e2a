"""Who is let in: web pages of other sites, names of this server, keys, and clients that only hold a connection. Oracle:
written by hand.
"""

import json
import socket

import httpx
import pytest
from starlette.datastructures import Headers

from nanolab.cli import UserError
from nanolab.serving import api, server
from nanolab.serving.config import ServeConfig
from nanolab.serving.security import SecurityMiddleware, find_key

HI = [{"role": "user", "content": "hi"}]
CHAT = "/v1/chat/completions"
BODY = json.dumps({"model": "parrot", "messages": HI, "max_tokens": 1}).encode()


def code(answer: httpx.Response) -> tuple[int, str | None]:
    return answer.status_code, answer.json()["error"]["code"] if answer.is_error else None


def post(live, **headers: str) -> tuple[int, str | None]:
    return code(
        live.http.post(
            CHAT,
            content=BODY,
            headers={"content-type": "application/json"}
            | {name.replace("_", "-"): value for name, value in headers.items()},
        )
    )


@pytest.mark.fault("outer D1")
@pytest.mark.parametrize(
    "kind",
    [
        "text/plain",
        "text/plain; x=json",
        "text/plain;application/json",
        "text/plain; charset=application/json",
        "text/json",
        "application/jsonp",
        "TEXT/PLAIN;JSON",
        "application/x-www-form-urlencoded",
        "application/x-www-form-urlencoded; json",
        "multipart/form-data; boundary=json",
        "multipart/form-data; boundary=application/json",
        "json",
        "application/json2",
        "xapplication/json",
        "application/json, text/plain",
        "text/plain, application/json",
        "",
        ";application/json",
        "application/ld+json",
    ],
)
def test_what_a_form_or_a_page_of_another_site_can_send_is_no_json(live, kind):
    assert post(live, content_type=kind) == (415, "unsupported_media_type")


@pytest.mark.parametrize(
    "kind",
    [
        "application/json",
        "application/json; charset=utf-8",
        "Application/JSON",
        "application/json;charset=UTF-8",
        "application/json ; x=y",
    ],
)
def test_json_is_json_however_it_is_spelled(live, kind):
    assert post(live, content_type=kind) == (200, None)


OWN = "http://127.0.0.1:{port}"


@pytest.mark.fault("outer D1")
@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1"},
        {"origin": "http://127.0.0.1:1"},
        {"origin": "http://localhost:{port}"},
        {"origin": OWN + ".evil.example"},
        {"origin": "ftp://127.0.0.1:{port}"},
        {"origin": "chrome-extension://abcdef"},
        {"origin": "http://[::1"},
        {"origin": "x"},
        {"origin": "https://evil.example", "sec-fetch-site": "cross-site"},
        {"origin": "https://evil.example", "sec-fetch-mode": "navigate"},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"},
        {"sec-fetch-site": "same-site", "sec-fetch-mode": "cors"},
        {"sec-fetch-site": "cross-site"},
    ],
)
def test_a_page_of_another_site_is_refused(live, headers):
    headers = {name: value.format(port=httpx.URL(live.url).port) for name, value in headers.items()}
    assert post(live, **headers) == (403, "bad_origin")
    for path in ("/v1/models", "/health", "/metrics", "/"):
        navigates = headers.get("sec-fetch-mode") == "navigate" and "origin" not in headers
        assert code(live.http.get(path, headers=headers)) == ((200, None) if navigates else (403, "bad_origin"))


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"origin": OWN},
        {"origin": OWN, "sec-fetch-site": "same-origin", "sec-fetch-mode": "cors"},
        {"sec-fetch-site": "none", "sec-fetch-mode": "navigate"},
        {"origin": "http://localhost:{port}", "host": "localhost:{port}"},
        {"origin": "http://[::1]:{port}", "host": "[::1]:{port}"},
        {"origin": "http://LOCALHOST", "host": "localhost"},
        {"origin": "https://localhost", "host": "localhost"},
        {"origin": "http://localhost", "host": "localhost:80"},
    ],
)
def test_its_own_page_and_clients_that_are_no_browsers_are_let_in(live, headers):
    headers = {name: value.format(port=httpx.URL(live.url).port) for name, value in headers.items()}
    assert post(live, **headers) == (200, None)


def test_a_link_on_another_site_leads_to_the_page(live):
    assert code(
        live.http.get(
            "/", headers={"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
        )
    ) == (200, None)


# --- names and keys ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def public(start_server):
    """Listens everywhere, behind a reverse proxy, with a key whose variable ends with a line end, and CORS for one
    page.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KEY_FROM_A_FILE", "sesame\n")
        patch.setattr(socket, "gethostname", lambda: "Bench.lab.example")
        names = "chat.example.com, other.example:8443"
        return start_server(
            model="parrot",
            host="0.0.0.0",
            allowed_hosts=names,
            cors="http://ours.example,http://two.example/",
            api_key_env="KEY_FROM_A_FILE",
            max_rows=1,
            queue=0,
        )


@pytest.mark.fault("outer D19")
@pytest.mark.parametrize(
    ("host", "known"),
    [
        ("127.0.0.1:8000", True),
        ("192.168.7.7:8000", True),
        ("[fe80::1]:8000", True),
        ("localhost", True),
        ("bench:80", True),
        ("bench.lab.example", True),
        ("BENCH.local", True),
        ("chat.example.com", True),
        ("Chat.Example.com:443", True),
        ("chat.example.com.", True),
        ("other.example", True),
        ("evil.example", False),
        ("", False),
        ("[", False),
        ("chat.example.com.evil.example", False),
        ("xchat.example.com", False),
        ("127.0.0.1.evil.example", False),
        ("bench.evil.example", False),
        ("chat.example.com:x", False),
    ],
)
def test_a_server_for_others_knows_its_names(public, host, known):
    answer = public.http.get("/health", headers={"host": host})
    assert code(answer) == ((200, None) if known else (403, "bad_host"))
    if not known:
        text = answer.json()["error"]["message"]
        assert "--allowed-hosts" in text and "0.0.0.0" not in text


@pytest.mark.fault("outer D19")
def test_a_reverse_proxy_in_front_of_a_server_for_this_machine():
    def let_in(host: str, origin: str = "") -> bool:
        return gate.refusal("/health", Headers({"host": host} | ({"origin": origin} if origin else {}))) is None

    gate = SecurityMiddleware(None, ServeConfig(allowed_hosts="chat.example.com,other.example:8443"))
    assert (
        let_in("chat.example.com") and let_in("localhost") and not let_in("192.168.7.7") and not let_in("evil.example")
    )
    assert let_in("chat.example.com", "https://chat.example.com")  # it keeps the Host, and does TLS
    # it puts its own in
    assert let_in("127.0.0.1:8000", "https://chat.example.com") and let_in(
        "127.0.0.1:8000", "https://other.example:8443"
    )
    assert not let_in("127.0.0.1:8000", "https://other.example") and not let_in(
        "chat.example.com", "https://evil.example"
    )
    gate = SecurityMiddleware(None, ServeConfig(allowed_hosts="*"))
    assert let_in("any.example:1", "http://any.example:1") and not let_in("any.example", "http://evil.example")
    gate = SecurityMiddleware(None, ServeConfig(host="0.0.0.0"))
    assert let_in("192.168.7.7:8000") and not let_in("evil.example")


@pytest.mark.fault("outer D19")
@pytest.mark.parametrize(
    ("flags", "wrong", "typed"),
    [
        (
            {"allowed_hosts": "a.example,https://chat.example.com/x"},
            "bad-host-name",
            "--allowed-hosts chat.example.com",
        ),
        ({"allowed_hosts": "*.example.com"}, "bad-host-name", "--allowed-hosts"),
        ({"allowed_hosts": "a b"}, "bad-host-name", "--allowed-hosts"),
        ({"cors": "localhost:3000"}, "bad-origin", "--cors http://localhost:3000"),
        ({"cors": "http://a.example/page"}, "bad-origin", "--cors http://a.example"),
        ({"api_key": " \n"}, "blank-key", "NANOLAB_API_KEY=SECRET"),
    ],
)
def test_mistakes_in_names_are_told_at_the_start(flags, wrong, typed):
    with pytest.raises(UserError) as error:
        SecurityMiddleware(None, ServeConfig(**flags))
    assert error.value.code == wrong and f"type {typed}" in str(error.value)


@pytest.mark.fault("outer D19")
def test_a_key_keeps_more_than_the_routes_of_v1(public, monkeypatch):
    key, wrong = {"authorization": "Bearer sesame"}, {"authorization": "Bearer sesam"}
    assert code(public.http.get("/v1/models", headers=key)) == (200, None)
    assert (
        code(public.http.get("/metrics"))
        == code(public.http.get("/metrics", headers=wrong))
        == (401, "invalid_api_key")
    )
    assert public.http.get("/metrics", headers=key).text.startswith("#")
    monkeypatch.setattr(type(public.models["parrot"]), "errors", ["RuntimeError: /secret/path"])
    assert (
        public.http.get("/health").json() == public.http.get("/health", headers=wrong).json() == {"status": "degraded"}
    )
    assert public.http.get("/health", headers=key).json()["models"]["parrot"]["errors"] == [
        "RuntimeError: /secret/path"
    ]


def test_the_pages_of_cors_are_let_in(public):
    key = {"authorization": "Bearer sesame", "content-type": "application/json", "sec-fetch-site": "cross-site"}
    for origin, invited in (
        ("http://ours.example", True),
        ("http://two.example", True),
        ("http://evil.example", False),
        ("https://ours.example", False),
    ):
        answer = public.http.post(CHAT, content=BODY, headers=key | {"origin": origin})
        assert answer.headers.get("access-control-allow-origin") == (origin if invited else None)
        assert code(answer) == ((200, None) if invited else (403, "bad_origin"))


@pytest.mark.parametrize(("given", "key"), [("", ""), ("sesame\r\n", "sesame"), (" ses ame ", "ses ame")])
def test_blanks_around_a_key_are_not_part_of_it(given, key, monkeypatch):
    monkeypatch.setenv("NANOLAB_API_KEY", given)
    assert find_key(ServeConfig()) == key


# --- clients that only hold a connection ------------------------------------------------------------------------------


def connect(live, data: bytes) -> socket.socket:
    s = socket.create_connection(("127.0.0.1", httpx.URL(live.url).port), timeout=20)
    s.sendall(data)
    return s


def rest(s: socket.socket) -> bytes:
    """All that comes until the server closes the connection."""
    with s:
        return b"".join(iter(lambda: s.recv(65536), b""))


def received(s: socket.socket) -> bytes:
    """One response that ends with a JSON object of objects."""
    got = b""
    while not got.endswith(b"}}}"):
        got += s.recv(65536)
    return got


def head(length: int, more: str = "") -> bytes:
    return (
        f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length:"
        f" {length}\r\n{more}\r\n".encode()
    )


@pytest.mark.fault("outer D19")
def test_a_body_that_does_not_come_is_not_waited_for(live, monkeypatch):
    monkeypatch.setattr(api, "BODY_SECONDS", 0.2)
    got = rest(connect(live, head(100) + b"{"))
    assert (
        got.startswith(b"HTTP/1.1 408 ")
        and json.loads(got.partition(b"\r\n\r\n")[2])["error"]["code"] == "body_timeout"
    )


@pytest.mark.fault("outer D19")
@pytest.mark.parametrize("data", [b"", b"GET /hea", b"GET /health HTTP/1.1\r\nHost: localhost\r\n"])
def test_a_head_that_does_not_come_is_not_waited_for(live, monkeypatch, data):
    monkeypatch.setattr(server, "HEAD_SECONDS", 0.2)
    assert rest(connect(live, data)) == b""


def test_a_connection_stays_between_requests(live, monkeypatch):
    monkeypatch.setattr(server, "HEAD_SECONDS", 0.2)
    request = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n"
    s = connect(live, request + b"\r\n")
    got = b""
    while not got.endswith(b"]}"):  # head and body may come apart
        got += s.recv(65536)
    assert got.startswith(b"HTTP/1.1 200")
    s.settimeout(0.6)  # longer than a head may take
    with pytest.raises(TimeoutError):
        s.recv(1)
    s.settimeout(20)
    s.sendall(request + b"Connection: close\r\n\r\n")
    assert rest(s).startswith(b"HTTP/1.1 200")


@pytest.mark.fault("outer D19")
def test_a_body_of_a_declared_size_beyond_the_limit_is_not_read(live):
    s = connect(live, head(api.MAX_BODY + 1))
    assert s.recv(65536).startswith(b"HTTP/1.1 413 ")  # with none of it sent
    s.close()


@pytest.mark.fault("outer D19")
def test_a_full_server_refuses_before_the_body_comes(public):
    public.models["parrot"].size, before = -1, public.models["parrot"].size  # no place at all
    try:
        s = connect(public, head(1000, "Authorization: Bearer sesame\r\n"))
        assert s.recv(65536).startswith(b"HTTP/1.1 429 ")
        s.close()
    finally:
        public.models["parrot"].size = before


@pytest.mark.fault("outer D19")
def test_one_connection_too_many_is_told_so(start_server, monkeypatch):
    live = start_server(model="parrot")
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 3)
    request = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    held = [connect(live, request) for _ in range(3)]
    assert all(received(s).startswith(b"HTTP/1.1 200") for s in held)
    got = rest(connect(live, request))
    assert (
        got.startswith(b"HTTP/1.1 503 ")
        and b"retry-after: 1" in got.lower()
        and json.loads(got.partition(b"\r\n\r\n")[2])["error"]["code"] == "too_many_connections"
    )
    held[0].sendall(request)
    assert received(held[0]).startswith(b"HTTP/1.1 200")  # those that are in stay
    held.pop().close()
    while rest(connect(live, request.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))).startswith(
        b"HTTP/1.1 503"
    ):
        pass  # until the server has seen it leave
    for s in held:
        s.close()
