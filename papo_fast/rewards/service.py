"""A reward by a service over HTTP, such as a judge: one POST request for each response."""

from __future__ import annotations

import base64
import io
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from PIL import Image

from papo_fast.rewards.function_worker import LARGEST
from papo_fast.rewards.workers import Outcome

PAUSE = 1.0
"""Seconds before the first repetition; twice as long before each further one."""


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

    A refusal (HTTP status 4xx save 408 and 429) is not repeated.
    """
    reason, late = "", False
    try:
        body = body_of(arguments)
    except (TypeError, ValueError, OSError) as error:  # a column that no JSON can hold
        return Outcome("failure", reason=f"{url}: the request cannot be written ({error})")
    for attempt in range(retries + 1):
        if attempt:
            time.sleep(PAUSE * 2 ** (attempt - 1))
        try:
            return Outcome("value", _post(url, body, timeout))
        except urllib.error.HTTPError as error:
            reason, late = f"HTTP status {error.code} ({error.reason})", False
            if 400 <= error.code < 500 and error.code not in (408, 429):
                break
        except TimeoutError:
            reason, late = f"no answer within {timeout:g} s", True
        except urllib.error.URLError as error:
            late = isinstance(error.reason, TimeoutError)
            reason = f"no answer within {timeout:g} s" if late else str(error.reason)
        except (ServiceError, OSError, ValueError) as error:
            reason, late = str(error) or type(error).__name__, False
    return Outcome("timeout" if late else "failure", reason=f"{url}: {reason}", late=True)


def _post(url: str, body: bytes, timeout: float) -> float:
    request = urllib.request.Request(
        url, data=body, headers={"Content-Type": "application/json"}, method="POST"
    )
    here = request.host.rpartition(":")[0] in _LOOPBACK
    handlers = [urllib.request.ProxyHandler({})] if here else []
    with urllib.request.build_opener(*handlers).open(request, timeout=timeout) as answer:
        said = json.loads(answer.read(1 << 20))
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


def body_of(arguments: Mapping[str, Any]) -> bytes:
    """A reward function's arguments as JSON; pictures as PNG in base64, what JSON lacks as text."""
    images = [base64.b64encode(_png(image)).decode() for image in arguments.get("images", ())]
    return json.dumps({**arguments, "images": images}, default=str).encode()


def _png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, format="PNG")
    return out.getvalue()
