"""Flags of the server. Imports no torch."""

from dataclasses import dataclass
from typing import Annotated

from nanolab.cli import Bounds, Condition, Count, NonNegativeFloat, NonNegativeInt, Share


@dataclass(frozen=True)
class ServeConfig:
    """Serve models over HTTP: a chat page in the browser, and OpenAI's API under /v1."""

    model: str = ""  # NAME[@STEP|best], or several joined by commas; default: the newest finished run
    host: str = "127.0.0.1"  # address to listen on; 0.0.0.0: every one of this machine, better with a key
    port: Annotated[int, Bounds(0, 65535)] = 8000  # port to listen on; 0: one that is free
    api_key: str = ""  # what requests under /v1 must send as Authorization: Bearer KEY; empty: they need none
    # environment variable that holds the key instead, where other users of the machine do not see it
    api_key_env: str = "NANOLAB_API_KEY"
    # names that requests may call this server by, besides IP addresses and the machine's own, joined by commas; *: any
    allowed_hosts: str = ""
    # origins of other web pages that may use the API, joined by commas, for example http://localhost:3000; *: all of
    # them
    cors: str = ""
    max_rows: Count = 32  # replies that a replica generates at once
    queue: NonNegativeInt = 64  # replies that wait for a place; beyond them requests are refused with 429
    int8: bool = False  # weights in 8 bits, which changes results a little; needs torchao
    replicas: Count = 1  # engines of each model: on CUDA one per device, on a CPU that many threads
    # memory of each replica for beginnings of conversations that need not be read again; 0: none
    prefix_mb: NonNegativeInt = 256
    drain_seconds: NonNegativeFloat = 30.0  # after SIGTERM or Ctrl-C, running replies may take that long
    temperature: NonNegativeFloat = 0.8  # sampling temperature; 0: the likeliest token each time
    top_k: NonNegativeInt = 50  # sample from the k likeliest tokens; 0: from all
    top_p: Share = 1.0  # sample from the likeliest tokens that have this probability together; 1: from all
    max_tokens: Count = 512  # tokens of a reply at most
    tool: str = "calculator"  # calculator | python: what answers the calls in chat replies; empty: nothing
    # run code that a model writes even where the sandbox lacks landlock or seccomp: it can then do what you can
    allow_unsandboxed: bool = False
    log_conversations: str = ""  # JSONL file that conversations are appended to; empty: they are kept nowhere
    device_type: str = ""  # cuda | mps | cpu; default: the best there is

    GROUPS = {
        "": "model host port log_conversations device_type int8",
        "access": "api_key api_key_env allowed_hosts cors",
        "load": "max_rows queue replicas prefix_mb drain_seconds",
        "reply": "temperature top_k top_p max_tokens tool allow_unsandboxed",
    }
    CONDITIONS = [Condition("api_key_env", "api_key", lambda c: not c.api_key, "one of the two")]
