"""Rewards that a service gives: what it is asked, what it may answer, how it may fail."""

from __future__ import annotations

import json
import time
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import BaseRequestHandler, ThreadingTCPServer

import pytest
from PIL import Image

from papo_fast.rewards import service
from papo_fast.rewards.functions import GIVE_UP
from support.asked import RIGHT, Asked, scores_of
from support.standing_in import answering


@contextmanager
def serving(answer):
    """A service on this machine; `answer(body, n)` gives status and text of the n-th request."""
    bodies = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            status, text = answer(bodies[-1], len(bodies))
            with suppress(OSError):  # whoever asked has gone
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

        def log_message(self, *args):
            pass

    with answering(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as port:
        yield f"http://127.0.0.1:{port}/judge", bodies


def test_a_service_judges_each_response_by_everything_there_is():
    def answer(body, n):
        assert body["reference"] == "2" and body["level"] == 4 and body["prompt"] == "How many?"
        assert body["images"][0].startswith("iVBOR")  # a PNG in base64
        number = len(body["response"])
        return 200, json.dumps({"reward": number} if number % 2 else number)

    asked = Asked(images=[Image.new("RGB", (2, 2))], columns={"level": 4})
    with serving(answer) as (url, bodies):
        scores, _, alarms = scores_of([f"{url}=0.5"], ["abc", "abcd"], [asked] * 2)
    assert [s.reward for s in scores] == [1.5, 2.0] and not alarms and len(bodies) == 2
    assert [s.values for s in scores] == [{"judge": 3}, {"judge": 4}]


def test_no_proxy_stands_before_a_service_of_this_machine(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    with serving(lambda body, n: (200, "1")) as (url, _):
        scores, _, alarms = scores_of([url], ["a"], http_retries=0)
    assert scores[0].reward == 1 and not alarms


def test_a_service_is_asked_again_unless_it_refuses(monkeypatch):
    monkeypatch.setattr(service, "PAUSE", 0.0)
    asked = {}

    def answer(body, n):
        word = body["response"]
        asked[word] = asked.get(word, 0) + 1
        if word == "busy":
            return (503, "") if asked[word] < 3 else (200, "0.5")
        return {"refused": (401, ""), "odd": (200, '"fine"'), "nan": (200, "NaN")}[word]

    with serving(answer) as (url, _):
        words = ["busy", "refused", "odd", "nan"]
        scores, scorer, alarms = scores_of([url], words, http_retries=2)
    assert [s.reward for s in scores] == [0.5, 0, 0, 0]
    assert asked == {"busy": 3, "refused": 1, "odd": 3, "nan": 3}
    assert (scorer.failures, scorer.timeouts) == (3, 0)
    assert "HTTP status 401" in alarms[0]


RAW = {  # what a service writes that is no answer → what is said of it
    "no http": (b"HELLO\r\n\r\n", "BadStatusLine"),
    "too many headers": (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 500, "more than 100 headers"),
    "long header": (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000 + b"\r\n\r\n1", "LineTooLong"),
    "bad chunk": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n1",
        "IncompleteRead",
    ),
    "cut off": (b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n0.5", "1 bytes early"),
    "deep": (b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 100_000, "it answered '[[["),
    "page": (b"HTTP/1.1 200 OK\r\n\r\n<html>", "it answered '<html>'"),
    "moved": (b"HTTP/1.1 302 Found\r\nLocation: /other\r\n\r\n", "HTTP status 302"),
}


@contextmanager
def writing(*parts, pause=0.0):
    """A service that writes these bytes to whoever asks, and the requests that it got."""
    asked = []

    class Handler(BaseRequestHandler):
        def handle(self):
            asked.append(self.request.recv(65536).split(b" ")[0].decode())
            with suppress(OSError):
                for part in parts:
                    self.request.sendall(part)
                    time.sleep(pause)

    with answering(ThreadingTCPServer(("127.0.0.1", 0), Handler)) as port:
        yield f"http://127.0.0.1:{port}/judge", asked


@pytest.mark.parametrize("what", RAW)
def test_what_is_no_answer_never_ends_a_run_and_gives_nothing(what):
    written, said = RAW[what]
    with writing(written) as (url, asked):
        (score,), scorer, (alarm,) = scores_of([url], [RIGHT], http_retries=0)
    assert score.reward == 0 and scorer.failures == 1 and said in alarm
    assert asked == ["POST"]  # and no GET, which would not carry the response


def test_a_service_that_drips_is_late():
    drops = (b"HTTP/1.1 200 OK\r\nContent-Length: 40\r\n\r\n", *[b" "] * 40)
    with writing(*drops, pause=0.1) as (url, _):
        started = time.monotonic()
        _, scorer, (alarm,) = scores_of([url], [RIGHT], http_timeout=0.5, http_retries=0)
        assert time.monotonic() - started < 3
    assert (scorer.timeouts, scorer.failures) == (1, 0) and "no answer within 0.5 s" in alarm


def test_a_service_that_is_silent_or_gone_costs_a_bounded_time(monkeypatch):
    monkeypatch.setattr(service, "PAUSE", 0.0)

    def answer(body, n):
        time.sleep(1)
        return 200, "1"

    with serving(answer) as (url, _):
        _, scorer, _ = scores_of([url], ["a", "b"], http_timeout=0.2, http_retries=0)
        assert (scorer.failures, scorer.timeouts) == (0, 2)
    _, scorer, alarms = scores_of([url], ["a"] * 500, http_retries=0)  # nobody listens any more
    assert scorer.failures + scorer.timeouts == 500 and scorer.failures >= GIVE_UP
    assert "refused" in alarms[0].lower()
