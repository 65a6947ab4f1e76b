"""The door of a vLLM server: who may ask it anything, and the token that both sides know.

In vLLM's development mode, which a run needs to hand over weights, a server does whatever a request
says. `Guard` is an ASGI middleware that vLLM puts before everything else (`--middleware`). A
request has to carry the token; one that a web page can make a browser send (a name of its own for
our address, a body of another type than JSON) is refused besides. Needs nothing but Python, since
the server imports it.
"""

from __future__ import annotations

import hmac
import ipaddress
import os
import secrets
import socket
import stat
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from papo_fast.errors import InputError

TOKEN, HOST = "PAPO_FAST_SERVER_TOKEN", "PAPO_FAST_SERVER_HOST"
"""Environment variables of the server's process; a command line would be everybody's to read."""
SOCKET = "unix"
"""The scheme of a URL that names a socket by its path."""
MIDDLEWARE = "papo_fast.rollout.vllm_guard.Guard"

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Guard:
    """Lets requests with the token through; `GET /health` needs none.

    Raises `RuntimeError` where the environment holds no token: the server then does not start.
    """

    def __init__(self, app: App):
        self.app = app
        self.token = os.environ.get(TOKEN, "").encode()
        self.name = os.environ.get(HOST, "").lower()
        if not self.token:
            raise RuntimeError(f"{TOKEN} is empty: start this server with papo-fast serve")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        elif refusal := self.refusal(scope):
            status, why = refusal
            head = [(b"content-type", b"text/plain"), (b"connection", b"close")]
            await send({"type": "http.response.start", "status": status, "headers": head})
            await send({"type": "http.response.body", "body": f"{why}\n".encode()})
        else:
            await self.app(scope, receive, send)

    def refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Status and reason, or None for a request that may pass."""
        if scope["method"] == "GET" and scope["path"] == "/health":
            return None
        headers: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.lower(), []).append(value)
        hosts = headers.get(b"host", [])
        if len(hosts) != 1 or not is_our_host(hosts[0].decode("latin-1"), self.name):
            return 421, "the Host header names another machine than this server's"
        given = headers.get(b"authorization", [])
        if len(given) != 1 or not hmac.compare_digest(given[0], b"Bearer " + self.token):
            return 401, "the token is missing or wrong (rollout.server_token_file)"
        types = headers.get(b"content-type", [])
        kind = types[0].split(b";")[0].strip().lower() if len(types) == 1 else b""
        if scope["method"] not in ("GET", "HEAD") and kind != b"application/json":
            return 415, "a request that changes something has to be application/json"
        return None


def is_our_host(header: str, name: str) -> bool:
    """Whether a Host header names this machine: by address, or by a name that it is known by.

    A page of another site that has its own name lead to our address sends that name, never an
    address.
    """
    try:
        host = (urlsplit(f"//{header}").hostname or "").lower()
    except ValueError:
        return False
    if host and host in (name, "localhost", socket.gethostname().lower(), socket.getfqdn().lower()):
        return True
    return is_address(host)


def is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_loopback(url: str) -> bool:
    """Whether nobody outside of this machine can ask the server at `url`."""
    host = urlsplit(url).hostname or ""
    if urlsplit(url).scheme == SOCKET:
        return True
    return host == "localhost" or (is_address(host) and ipaddress.ip_address(host).is_loopback)


def new_token() -> str:
    return secrets.token_hex(32)


def read_token(path: str) -> str:
    """The token in a file that only its owner can read.

    Raises `InputError` where there is none, or where others can read it.
    """
    try:
        with open(path, "rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            raw = file.read(4096)
    except OSError as error:
        raise InputError(
            f"rollout.server_token_file {path} cannot be read: {error}. `papo-fast serve` makes it"
        ) from error
    if mode & 0o077:
        raise InputError(
            f"rollout.server_token_file {path} can be read or changed by others (mode {mode:o}): "
            f"chmod 600 {path}"
        )
    token = raw.decode("latin-1").strip()
    if len(token) < 16 or not token.isascii() or not token.isprintable() or " " in token:
        raise InputError(
            f"rollout.server_token_file {path} holds no token: expected one line of at least 16 "
            "characters without blanks. Delete it, and `papo-fast serve` makes another"
        )
    return token


def read_or_make_token(path: str) -> str:
    """The token in a file, which is made with a random one, mode 600, where there is none."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return read_token(path)
    except OSError as error:
        raise InputError(f"rollout.server_token_file {path} cannot be made: {error}") from error
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(new_token() + "\n")
    return read_token(path)
