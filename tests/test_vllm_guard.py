"""Who gets an answer from a vLLM server: the guard in front of it, and the file of its token."""

from __future__ import annotations

import asyncio

import pytest

from papo_fast.errors import InputError
from papo_fast.rollout.vllm_guard import HOST, TOKEN, Guard, read_or_make_token

TOKEN_HEADER = ("authorization", "Bearer secret")
JSON = ("content-type", "application/json")
HOST_HEADER = ("host", "node7:8123")
ALLOWED = [TOKEN_HEADER, JSON, HOST_HEADER]


def answered(monkeypatch, method, path, headers, kind="http"):
    """Status of the guard's answer, or "passed" where the request went through."""
    monkeypatch.setenv(TOKEN, "secret")
    monkeypatch.setenv(HOST, "node7")
    passed, sent = [], []

    async def app(scope, receive, send):
        passed.append(scope)

    async def send(message):
        sent.append(message)

    scope = {"type": kind, "method": method, "path": path}
    scope["headers"] = [(name.encode(), value.encode()) for name, value in headers]
    asyncio.run(Guard(app)(scope, None, send))
    return "passed" if passed else sent[0].get("status", sent[0]["type"])


@pytest.mark.parametrize(
    "path", ["/collective_rpc", "/update_weights", "/inference/v1/generate", "/health"]
)
def test_a_web_page_or_another_user_gets_nothing_from_a_server(monkeypatch, path):
    def status(*headers, method="POST"):
        return answered(monkeypatch, method, path, headers)

    assert status(*ALLOWED) == "passed"
    assert status(JSON, HOST_HEADER) == 401
    for wrong in ("Bearer secre", "Bearer secret2", "Basic secret", "secret", "Bearer ", ""):
        assert status(("authorization", wrong), JSON, HOST_HEADER) == 401
    assert status(TOKEN_HEADER, *ALLOWED) == 401, "two tokens"
    # what a page can send without asking first
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        assert status(TOKEN_HEADER, HOST_HEADER, ("content-type", kind)) == 415
    assert status(TOKEN_HEADER, HOST_HEADER) == 415
    # a name that its owner has led to our address
    for host in ("evil.example", "evil.example:8123", "node7.evil.example", "", "[", "a@node8"):
        assert status(TOKEN_HEADER, JSON, ("host", host)) == 421
    assert status(TOKEN_HEADER, JSON) == 421
    for host in ("NODE7:8123", "127.0.0.1:8123", "localhost", "[::1]:8123"):
        assert status(TOKEN_HEADER, JSON, ("host", host)) == "passed"
    assert status(JSON, HOST_HEADER, method="OPTIONS") == 401


def test_only_the_question_whether_a_server_is_well_needs_no_token(monkeypatch):
    assert answered(monkeypatch, "GET", "/health", []) == "passed"
    for path in ("/health/../server_info", "/server_info", "/metrics", "//health", "/"):
        assert answered(monkeypatch, "GET", path, [HOST_HEADER]) == 401
    assert answered(monkeypatch, "GET", "/metrics", [HOST_HEADER, TOKEN_HEADER]) == "passed"
    assert answered(monkeypatch, None, "/", ALLOWED, kind="websocket") == "websocket.close"
    assert answered(monkeypatch, None, "/", [], kind="lifespan") == "passed"


def test_a_token_file_is_for_its_owner_alone(tmp_path):
    path = tmp_path / "new" / "token"
    token = read_or_make_token(str(path))
    assert path.stat().st_mode & 0o777 == 0o600 and len(token) == 64
    assert read_or_make_token(str(path)) == token
    path.chmod(0o644)
    with pytest.raises(InputError, match=r"can be read or changed by others \(mode 644\)"):
        read_or_make_token(str(path))
    path.chmod(0o600)
    for nonsense in ("", "short", "two words of thirty letters...", "ä" * 20, "a" * 20 + "\nb"):
        path.write_text(nonsense)
        with pytest.raises(InputError, match="holds no token"):
            read_or_make_token(str(path))
