"""A reward by a service over HTTP, such as a judge: one POST request for each response."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any

from PIL import Image

from papo_fast.rewards.function_worker import LARGEST
from papo_fast.rewards.workers import Outcome
from papo_fast.user_function import one_line

PAUSE = 1.0
"""Seconds before the first repetition; twice as long before each further one."""

LONGEST = 1 << 20
"""Bytes of an answer that are read."""

_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
"""No proxy stands between this machine and itself."""


class ServiceError(Exception):
    """An answer that holds no number."""


def ask_service(
    url: str,
    arguments: Mapping[str, Any],
    *,
    timeout: float,
    retries: int,
) -> Outcome:
    """The reward that the service at `url` gives; a failure once all requests have failed.

    A refusal (HTTP status 4xx save 408 and 429) and a redirection (3xx) are not repeated.

    Args:
        timeout: seconds in which the whole answer must have come.
    """
    reason, late = "", False
    try:
        body = body_of(arguments)
    except (TypeError, ValueError, OSError) as error:  # a column that no JSON can hold
        return Outcome("failure", reason=f"the request cannot be written ({error})")
    for attempt in range(retries + 1):
        if attempt:
            time.sleep(PAUSE * 2 ** (attempt - 1))
        try:
            return Outcome("value", _post(url, body, timeout))
        except urllib.error.HTTPError as error:
            reason, late = f"HTTP status {error.code} ({error.reason})", False
            if 300 <= error.code < 400:
                reason += ": name the place where the service itself is"
            if 300 <= error.code < 500 and error.code not in (408, 429):
                break
        except TimeoutError:
            reason, late = f"no answer within {timeout:g} s", True
        except urllib.error.URLError as error:
            late = isinstance(error.reason, TimeoutError)
            reason = f"no answer within {timeout:g} s" if late else str(error.reason)
        except (ServiceError, HTTPException, OSError, ValueError) as error:
            known = isinstance(error, ServiceError)
            reason, late = str(error) if known else one_line(error), False
    return Outcome("timeout" if late else "failure", reason=reason, late=True)


def _post(url: str, body: bytes, timeout: float) -> float:
    request = urllib.request.Request(
        url, data=body, headers={"Content-Type": "application/json"}, method="POST"
    )
    here = request.host.rpartition(":")[0] in _LOOPBACK
    with _Deadline(timeout) as deadline:
        handlers: list[urllib.request.BaseHandler] = [
            _Http(deadline), _Https(deadline), _StayHere()
        ]  # fmt: skip
        if here:
            handlers.append(urllib.request.ProxyHandler({}))
        with urllib.request.build_opener(*handlers).open(request, timeout=timeout) as answer:
            text = answer.read(LONGEST)
            if answer.length:  # read() of a number of bytes does not mind an early end
                raise ServiceError(f"its answer ended {answer.length} bytes early or is too long")
    return _number(text)


def _number(text: bytes) -> float:
    """The number that an answer holds."""
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        said = text.decode(errors="replace")
    value = said.get("reward") if isinstance(said, dict) else said
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not abs(value) <= LARGEST  # NaN is not, either
    ):
        raise ServiceError(
            f'it answered {said!r:.100}, expected a number within ±{LARGEST:g} or {{"reward": it}}'
        )
    return float(value)


class _Deadline:
    """Ends the connections in `sockets` once `seconds` have passed, and raises `TimeoutError` then.

    A socket's own limit is for each byte that it waits for: whoever sends one now and then would
    never be late.
    """

    def __init__(self, seconds: float):
        self.sockets: list[socket.socket] = []
        self.passed = False
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True

    def _end(self) -> None:
        self.passed = True
        for one in self.sockets:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> _Deadline:
        self._timer.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._timer.cancel()
        if self.passed and not isinstance(error, TimeoutError):
            raise TimeoutError from error


class _Timed:
    def __init__(self, deadline: _Deadline):
        super().__init__()
        self.deadline = deadline


class _Http(_Timed, urllib.request.HTTPHandler):
    def http_open(self, request: urllib.request.Request) -> HTTPResponse:
        return self.do_open(_noting(HTTPConnection, self.deadline), request)


class _Https(_Timed, urllib.request.HTTPSHandler):
    def https_open(self, request: urllib.request.Request) -> HTTPResponse:
        return self.do_open(_noting(HTTPSConnection, self.deadline), request)


def _noting(kind: type[HTTPConnection], deadline: _Deadline) -> Any:
    """Makes connections whose sockets `deadline` knows."""

    def make(host: str, **options: Any) -> HTTPConnection:
        connection = kind(host, **options)
        connect = connection.connect

        def noted() -> None:
            connect()
            deadline.sockets.append(connection.sock)

        connection.connect = noted  # type: ignore[method-assign]
        return connection

    return make


class _StayHere(urllib.request.HTTPRedirectHandler):
    """Follows no redirection: what came there would be a GET, without the response."""

    def redirect_request(self, *_: object) -> None:
        return None


def body_of(arguments: Mapping[str, Any]) -> bytes:
    """A reward function's arguments as JSON; pictures as PNG in base64, what JSON lacks as text."""
    images = [base64.b64encode(_png(image)).decode() for image in arguments.get("images", ())]
    return json.dumps({**arguments, "images": images}, default=str).encode()


def _png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, format="PNG")
    return out.getvalue()
