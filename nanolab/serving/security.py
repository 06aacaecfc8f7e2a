"""Host, Origin and key checks, and the page's Content-Security-Policy.

Any web page can make a browser send requests to this server. Other origins cannot read responses (no CORS), cannot send
JSON without a preflight, and are refused by their Origin header or Sec-Fetch-Site. DNS rebinding is caught by the Host
header: an IP address there cannot be rebound, a DNS name has to be known."""

import base64
import hashlib
import hmac
import ipaddress
import os
import re
import socket
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from nanolab.cli import UserError
from nanolab.serving.config import ServeConfig
from nanolab.serving.errors import ApiError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
KEPT_BY_KEY = ("/v1/", "/metrics")  # what needs the key, where there is one
PORTS = {"http": 80, "https": 443}


class SecurityMiddleware:
    """ASGI middleware: refuses unknown Host names, requests from pages of other sites, and /v1 without the key."""

    def __init__(self, app: ASGIApp, cfg: ServeConfig):
        self.app, self.key = app, find_key(cfg)
        self.listed, self.origins = listed_hosts(cfg), allowed_origins(cfg)
        self.addresses = cfg.host not in LOOPBACK  # whether any IP address will do as Host
        self.names = {
            *LOOPBACK,
            *(own_names(cfg.host) if self.addresses else ()),
            *(host_name(host) for host in self.listed),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (error := self.refusal(scope["path"], Headers(scope=scope))):
            return await error.response(scope, receive, send)
        await self.app(scope, receive, send)

    def refusal(self, path: str, headers: Headers) -> ApiError | None:
        host = host_name(headers.get("host", ""))
        if not (host in self.names or "*" in self.listed or self.addresses and is_address(host)):
            known = f"expected {', '.join(sorted(self.names))}{' or an IP address' * self.addresses}"
            return ApiError(
                403,
                f"Host is {host[:100]!r}; {known}; if this server is meant, start it with --allowed-hosts"
                f" {host[:100] or 'NAME'}",
                code="bad_host",
            )
        if not self.is_own(headers):
            origin = headers.get("origin", "")
            seen = (
                f"the request comes from a page of {origin[:100]!r}"
                if origin
                else "the request comes from a page of another site"
            )
            return ApiError(
                403,
                f"{seen}; expected this server's own; to let that page in, start it with --cors"
                f" {origin[:100] or 'ORIGIN'}",
                code="bad_origin",
            )
        if path.startswith(KEPT_BY_KEY) and not has_key(headers, self.key):
            return ApiError(
                401,
                "the key is missing or wrong; expected the server's own as Authorization: Bearer KEY",
                code="invalid_api_key",
            )
        return None

    def is_own(self, headers: Headers) -> bool:
        """Whether no other site's page makes this request: clients that are no browsers send neither header, and links
        may be followed.
        """
        if origin := headers.get("origin"):
            own = {
                origin_of(f"{scheme}://{host}") for host in (headers.get("host", ""), *self.listed) for scheme in PORTS
            } - {None}
            return "*" in self.origins or origin.lower() in self.origins or origin_of(origin) in own
        return (
            headers.get("sec-fetch-site", "none") in ("none", "same-origin")
            or headers.get("sec-fetch-mode") == "navigate"
        )


def find_key(cfg: ServeConfig) -> str:
    """The key, "" for none; line ends and blanks around it, which files and shells leave, are not part of it. Raises
    UserError for a blank one.
    """
    given = cfg.api_key or os.environ.get(cfg.api_key_env, "")
    if given and not given.strip():
        name = "--api-key" if cfg.api_key else cfg.api_key_env
        raise UserError(
            f"{name} is blank; expected a key, or nothing at all for a server without one; type"
            f" {cfg.api_key_env}=SECRET",
            "blank-key",
            name=name,
        )
    return given.strip()


def has_key(headers: Headers, key: str) -> bool:
    given = headers.get("authorization", "").removeprefix("Bearer ").encode("latin-1")  # as the bytes came
    return not key or hmac.compare_digest(given, key.encode())


def listed_hosts(cfg: ServeConfig) -> set[str]:
    """The names of --allowed-hosts, each with its port where one is given, or "*". Raises UserError for what is no
    name.
    """
    listed = {host.strip().lower() for host in cfg.allowed_hosts.split(",") if host.strip()}
    for host in listed - {"*"}:
        if not re.fullmatch(r"[^\s/@*?#]+", host) or not host_name(host):
            hint = host_name(host.partition("://")[2] or host).replace("*", "") or "chat.example.com"
            raise UserError(
                f"--allowed-hosts has {host!r}; expected a host name, or * for any; type --allowed-hosts {hint}",
                "bad-host-name",
                host=host,
            )
    return listed


def allowed_origins(cfg: ServeConfig) -> set[str]:
    """The origins of --cors, or "*". Raises UserError for what is none."""
    origins = {origin.strip().lower().rstrip("/") for origin in cfg.cors.split(",") if origin.strip()}
    for origin in origins - {"*", "null"}:
        scheme, slashes, rest = origin.partition("://")
        if not slashes or not re.fullmatch(r"[^\s/@*?#]+", rest):
            hint = origin if slashes else f"http://{origin}"
            raise UserError(
                f"--cors has {origin!r}; expected an origin; type --cors {hint.split('/')[0]}//{urlsplit(hint).netloc}",
                "bad-origin",
                origin=origin,
            )
    return origins


def own_names(host: str) -> set[str]:
    """What others call a machine that listens on `host`."""
    name = socket.gethostname().lower()
    short = name.partition(".")[0]
    return {name, short, f"{short}.local"} | (set() if is_address(host) else {host.lower()})


def is_address(host: str) -> bool:
    try:
        return bool(ipaddress.ip_address(host))
    except ValueError:
        return False


def host_name(host: str) -> str:
    """localhost of localhost:8000, ::1 of [::1]:8000; "" of what is no host."""
    return (origin_of(f"http://{host}") or ("", "", 0))[1]


def origin_of(url: str) -> tuple[str, str, int] | None:
    """(scheme, host, port) of a web page's origin; None for what is none."""
    try:
        parts = urlsplit(url.lower())
        port = parts.port or PORTS.get(parts.scheme, 0)  # raises where it is no number
    except ValueError:
        return None
    return (parts.scheme, parts.hostname.rstrip("."), port) if parts.hostname and port else None


def page_headers(html: str) -> dict[str, str]:
    """The page may run its own inline scripts and styles, known by their hashes, and talk to this server; nothing else
    at all.
    """
    policy = [
        "default-src 'none'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
    for tag in ("script", "style"):
        inside = re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", html, re.DOTALL | re.IGNORECASE)
        hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in inside]
        policy.append(f"{tag}-src " + (" ".join(f"'sha256-{digest}'" for digest in hashes) or "'none'"))
    return {
        "Content-Security-Policy": "; ".join(policy),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
