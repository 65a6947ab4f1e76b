"""A server that speaks vLLM's protocol and draws responses from the request's seed."""

from __future__ import annotations

import json
import random
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from papo_fast.presets import get_preset
from papo_fast.rollout.vllm_requests import RequestFormat

MODEL_LEN = 300 + get_preset("tiny").rollout.max_new_tokens  # prompts of `untrained`, responses


class StandIn(BaseHTTPRequestHandler):
    """Draws responses from the request's seed; `fault(path)` may answer in its place."""

    protocol_version = "HTTP/1.1"
    fault = staticmethod(lambda handler: False)
    format: RequestFormat  # knows how pictures expand

    def log_message(self, *args):
        pass

    def answer(self, content: object, status: int = 200) -> bool:
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)
        return True

    def do_GET(self):
        if self.path == "/health":
            return self.answer(b"")
        return self.fault(self) or self.answer({"vllm_config": self.model_info()})

    def model_info(self) -> dict:
        model = {"logprobs_mode": "processed_logprobs", "max_model_len": MODEL_LEN}
        return {"model_config": model}

    def do_POST(self):
        self.body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or "{}")
        if not self.fault(self):
            self.respond()

    def respond(self) -> None:
        if self.path == "/reset_prefix_cache":
            self.answer({"success": True})
        elif self.path == "/inference/v1/generate":
            self.answer(self.sampled())
        else:
            self.answer(b"")

    def sampled(self) -> dict:
        sampling, encoder = self.body["sampling_params"], self.format.encoder
        pictures, ids = len(self.body.get("content_parts", [])), self.body["token_ids"]
        at = ids.index(encoder.image_token_id) if pictures else 0
        if pictures:  # one picture of five cells
            ids = ids[:at] + [encoder.image_token_id] * 5 + ids[at + 1 :]
        choices = []
        for j in range(sampling["n"]):
            draw = random.Random(sampling["seed"] + j)
            tokens = [draw.randrange(10, 90) for _ in range(draw.randrange(1, 6))]
            content = [{"token_id": t, "logprob": -5.6} for t in tokens]
            choices.append(
                {
                    "index": j,
                    "token_ids": tokens,
                    "finish_reason": "length",
                    "logprobs": {"content": content},
                }
            )
        return {"prompt_token_ids": ids, "choices": choices[::-1]}


@contextmanager
def answering(server):
    """A server of threads answers while the block lasts; gives its port."""
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def standing_in(encoder, fault=lambda handler: False, port=0, base=StandIn, **fields):
    """URL of a server that answers as `base` does; `fields` are further attributes of it."""
    own = {"fault": staticmethod(fault), "format": RequestFormat(encoder), **fields}
    handler = type("Handler", (base,), own)
    server = ThreadingHTTPServer(("127.0.0.1", port), handler)
    with answering(server) as port:
        yield f"http://127.0.0.1:{port}"
