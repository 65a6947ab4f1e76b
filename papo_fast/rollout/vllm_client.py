"""One vLLM server over HTTP, by a port or by a socket that a path names."""

from __future__ import annotations

import json
import socket
from contextlib import suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from papo_fast.rollout.protocol import RolloutError
from papo_fast.rollout.vllm_guard import SOCKET

START = "start it with `papo-fast serve` and the options of this run"
AGAIN = "the same command with --resume goes on"


class Server:
    """One vLLM server; every failure is a `RolloutError` that names it and what to do."""

    def __init__(self, url: str, timeout: float, token: str = ""):
        self.url = url.rstrip("/")
        self.timeout = timeout
        self.headers = {"Content-Type": "application/json"}
        if token:
            self.headers["Authorization"] = f"Bearer {token}"

    def __str__(self) -> str:
        return f"the vLLM server at {self.url} (rollout.server_urls)"

    def call(self, method: str, path: str, body: dict | None = None) -> Any:
        """The JSON answer, or None where the server answers nothing."""
        connection = _connection(self.url, self.timeout)
        try:
            connection.connect()
        except OSError as error:
            raise RolloutError(f"{self} cannot be reached: {error}. {START}; {AGAIN}") from error
        try:
            text = None if body is None else json.dumps(body)
            with suppress(BrokenPipeError):  # refused before all was read: the answer says why
                connection.request(method, path, text, self.headers)
            response = connection.getresponse()
            status, content = response.status, response.read()
        except TimeoutError as error:
            raise RolloutError(
                f"{self} has not answered {path} within rollout.server_timeout = {self.timeout} "
                f"seconds: raise it, or start the server again; {AGAIN}"
            ) from error
        except (OSError, HTTPException) as error:
            raise RolloutError(
                f"{self} broke off while it answered {path} ({error!r}): its log says why. "
                f"{START}; {AGAIN}"
            ) from error
        finally:
            connection.close()
        if status == 401:
            raise RolloutError(
                f"{self} refused {path}: it asks for a token other than this run's. Give both the "
                f"same --rollout.server-token-file; {AGAIN}"
            )
        if status >= 400:
            detail = content[:500].decode(errors="replace")
            raise RolloutError(
                f"{self} refused {path} with status {status}: {detail}. If it was started "
                f"otherwise, {START}"
            )
        try:
            return json.loads(content) if content else None
        except ValueError as error:
            raise self.nonsense(path, f"no JSON but {content[:80]!r}") from error

    def nonsense(self, path: str, what: str) -> RolloutError:
        return RolloutError(
            f"{self} answered {path} with {what}: is it vLLM, of a version that pyproject.toml "
            f"allows? {START}; {AGAIN}"
        )

    def is_ready(self) -> bool:
        try:
            self.call("GET", "/health")
        except RolloutError:
            return False
        return True

    def check(self, length: int, transfer: str = "disk") -> None:
        """Raise where the server was started with options under which a run would be wrong.

        Args:
            length: tokens of the longest sequence.
            transfer: the run's `rollout.server_transfer`.
        """
        path = "/server_info?config_format=json"
        info = self.call("GET", path)
        try:
            model = info["vllm_config"]["model_config"]
            mode, longest = model["logprobs_mode"], int(model["max_model_len"])
            ways = info["vllm_config"].get("weight_transfer_config") or {"backend": "disk"}
            way = ways["backend"]
        except (KeyError, TypeError, ValueError) as error:
            raise self.nonsense(path, "no description of its model") from error
        if mode != "processed_logprobs" or longest < length:
            raise RolloutError(
                f"{self} runs with --logprobs-mode {mode} --max-model-len {longest}, but this run "
                f"needs processed_logprobs and {length}: {START}"
            )
        if transfer not in ("disk", way):
            raise RolloutError(
                f"{self} was started with rollout.server_transfer {way}, but this run has "
                f"{transfer}: {START}"
            )

    def load_weights(self, folder: Path) -> None:
        """Load what the files in `folder` hold."""
        self.call(
            "POST",
            "/collective_rpc",
            {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}},
        )

    def forget(self) -> None:
        """Drop what old weights have computed: keys and values, pictures."""
        path = "/reset_prefix_cache"
        done = self.call("POST", path)
        if not isinstance(done, dict) or done.get("success") is not True:
            raise self.nonsense(path, f"{done}, so it kept keys and values of the old weights")
        self.call("POST", "/reset_mm_cache")
        self.call("POST", "/reset_encoder_cache")


class _SocketConnection(HTTPConnection):
    """HTTP over a socket that a path names."""

    def __init__(self, path: str, timeout: float):
        super().__init__("localhost", timeout=timeout)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


def _connection(url: str, timeout: float) -> HTTPConnection:
    address = urlsplit(url)
    if address.scheme == SOCKET:
        return _SocketConnection(address.path, timeout)
    return HTTPConnection(address.hostname or "", address.port, timeout=timeout)
