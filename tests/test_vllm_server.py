"""vLLM behind HTTP: the same agreement with the trainer, and what happens when a server fails."""

from __future__ import annotations

import json
import random
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from papo_fast.config import EvalConfig, RewardConfig
from papo_fast.errors import InputError
from papo_fast.launch import serve, train
from papo_fast.presets import get_preset
from papo_fast.rollout.protocol import RolloutError
from papo_fast.rollout.vllm_requests import RequestFormat
from papo_fast.rollout.vllm_serve import server_command
from papo_fast.rollout.vllm_server import VLLMServerRollout
from support.small_runs import VOLATILE, png
from support.vllm_checks import (
    check_agreement_after_every_sync,
    check_bans,
    mixed_prompts,
    needs_vllm,
    sample,
    untrained,
)

pytestmark = pytest.mark.xdist_group("vllm")  # one process, one engine at a time
MODEL_LEN = 300 + get_preset("tiny").rollout.max_new_tokens  # prompts of `untrained`, responses


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """An engine with a server of its own; the last test of those that use it kills the server."""
    folder = tmp_path_factory.mktemp("served")
    config, encoder, policy = untrained(folder / "model", engine="vllm_server")
    engine = VLLMServerRollout(config, encoder, folder)
    engine.load_weights(policy)
    yield engine, policy, encoder
    engine.close()


@needs_vllm
def test_sampler_and_trainer_agree_after_every_sync(served):
    check_agreement_after_every_sync(*served)
    assert not any(served[0].weights.iterdir()), "weights of old updates are left behind"


@needs_vllm
def test_banned_tokens_are_never_sampled(served):
    check_bans(*served)


@needs_vllm
def test_a_server_killed_during_generation_is_named_and_waited_for_no_longer(served):
    engine, _, encoder = served
    process, url = engine.own.process, engine.own.url
    killed = []
    threading.Timer(1.5, lambda: (killed.append(time.monotonic()), process.kill())).start()

    def sample_on():
        for seed in range(1000):
            sample(engine, mixed_prompts(encoder), n=8, seed=seed)

    with pytest.raises(RolloutError, match=rf"{url}.*papo-fast serve.*--resume goes on"):
        sample_on()
    assert time.monotonic() - killed[0] < 60 < engine.servers[0].timeout
    assert not engine.servers[0].is_ready()


# --- faults, with a stand-in that speaks vLLM's protocol ------------------------------------------


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
        model = {"logprobs_mode": "processed_logprobs", "max_model_len": MODEL_LEN}
        return self.fault(self) or self.answer({"vllm_config": {"model_config": model}})

    def do_POST(self):
        self.body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or "{}")
        if self.fault(self):
            return
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
def standing_in(encoder, fault=lambda handler: False, port=0):
    own = {"fault": staticmethod(fault), "format": RequestFormat(encoder)}
    handler = type("Handler", (StandIn,), own)
    server = ThreadingHTTPServer(("127.0.0.1", port), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return untrained(tmp_path_factory.mktemp("model"), engine="vllm_server")


def at(config, *urls, **changes):
    return replace(config, rollout=replace(config.rollout, server_urls=urls, **changes))


def test_the_server_is_started_with_what_a_run_checks_for(model):
    config, _, _ = model
    command, environment = server_command(config, "http://node7:8123")
    options = dict(zip(command[3::2], command[4::2], strict=False))
    for flag, value in {
        "--host": "node7",
        "--port": "8123",
        "--dtype": "float32",
        "--max-model-len": str(MODEL_LEN),
        "--logprobs-mode": "processed_logprobs",
    }.items():
        assert options[flag] == value
    assert json.loads(options["--mm-processor-kwargs"])["size"]["shortest_edge"] == 28 * 28
    assert "--enable-scale-out" in command and environment["VLLM_SERVER_DEV_MODE"] == "1"
    for url in ("https://node7:8123", "http://node7", "node7:8123"):
        with pytest.raises(InputError, match="not of the form http://HOST:PORT"):
            server_command(config, url)
    with pytest.raises(InputError, match="start each with its own URL"):
        serve(at(config, "http://a:1", "http://b:1"), Console(quiet=True))


def test_a_server_that_is_not_there_is_an_error_that_says_what_to_start(model, tmp_path):
    config, encoder, _ = model
    with pytest.raises(RolloutError, match=r"127\.0\.0\.1:9 .*cannot be reached.*papo-fast serve"):
        VLLMServerRollout(at(config, "http://127.0.0.1:9"), encoder, tmp_path)


def break_off(handler):
    """Sends the head of an answer and closes, as a process that dies does."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"prompt_token_ids"')
    handler.close_connection = True
    return True


def changed(**fields):
    def fault(handler):
        answer = handler.sampled()
        answer["choices"][0].update(fields)
        return handler.answer(answer)

    return fault


def unscored(handler):
    answer = handler.sampled()
    answer["choices"][0]["logprobs"]["content"][0]["logprob"] = float("nan")
    return handler.answer(answer)


FAULTS = {
    "dies": (break_off, "broke off while it answered"),
    # until whoever asked hangs up
    "hangs": (lambda handler: handler.rfile.read(1) == b"", "rollout.server_timeout = 0.5"),
    "refuses": (lambda handler: handler.answer({"error": "no space"}, 500), "status 500.*no space"),
    "html": (lambda handler: handler.answer(b"<html>"), "no JSON but b'<html>'"),
    "a list": (lambda handler: handler.answer([1]), "no responses"),
    "too few": (
        lambda handler: handler.answer(handler.sampled() | {"choices": []}),
        "0 responses instead of 2",
    ),
    "no log-probs": (changed(logprobs=None), "no responses"),
    "others' log-probs": (changed(token_ids=[11, 12, 13, 14, 15, 16, 17]), "of other tokens"),
    "aborted": (changed(finish_reason="abort"), "ended for the reason 'abort'"),
    "NaN": (unscored, "numbers that are no log-probs"),
    "another prompt": (
        lambda handler: handler.answer(handler.sampled() | {"prompt_token_ids": [1, 2]}),
        "turned a prompt of .* tokens into 2 others.*data.min_pixels",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_while_generating_names_the_server_and_what_to_do(name, model, tmp_path):
    config, encoder, _ = model
    fault, message = FAULTS[name]

    def in_generation(handler):
        return handler.path == "/inference/v1/generate" and fault(handler)

    with standing_in(encoder, in_generation) as url:
        engine = VLLMServerRollout(at(config, url), encoder, tmp_path)
        assert engine.servers[0].timeout == 600
        if name == "hangs":
            engine.servers[0].timeout = 0.5
        prompts = mixed_prompts(encoder)[1:4]
        started = time.monotonic()
        with pytest.raises(RolloutError, match=message) as caught:
            sample(engine, prompts, n=2)
        assert url in str(caught.value)
        assert time.monotonic() - started < 60


def test_a_server_with_other_options_is_refused_at_once(model, tmp_path):
    config, encoder, _ = model
    raw = {"logprobs_mode": "raw_logprobs", "max_model_len": MODEL_LEN}
    other = {"vllm_config": {"model_config": raw}}
    with standing_in(encoder, lambda handler: handler.answer(other)) as url:
        with pytest.raises(RolloutError, match=f"needs processed_logprobs and {MODEL_LEN}"):
            VLLMServerRollout(at(config, url), encoder, tmp_path)
    with standing_in(encoder, lambda handler: handler.answer(b"gone", 404)) as url:
        with pytest.raises(RolloutError, match=r"refused /server_info.*papo-fast serve"):
            VLLMServerRollout(at(config, url), encoder, tmp_path)


def test_old_keys_and_values_that_stay_are_an_error(model, tmp_path):
    config, encoder, policy = model

    def keeps(handler):
        return handler.path == "/reset_prefix_cache" and handler.answer({"success": False})

    with standing_in(encoder, keeps) as url:
        engine = VLLMServerRollout(at(config, url), encoder, tmp_path)
        with pytest.raises(RolloutError, match="kept keys and values of the old weights"):
            engine.load_weights(policy)


def test_a_run_whose_server_dies_goes_on_from_the_step_before_as_if_it_had_not(model, tmp_path):
    config, encoder, _ = model
    rows = [{"problem": "1+1?", "answer": str(i), "images": [png(i, (140, 28))]} for i in range(8)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")

    def run(url, name, resume=False):
        whole = replace(
            at(config, url, prompts=4, group_size=4, dynamic_filter=False),
            out=str(tmp_path),
            name=name,
            resume=resume,
            data=replace(config.data, train=str(tmp_path / "data.parquet")),
            train=replace(config.train, update_prompts=2, steps=3),
            eval=EvalConfig(samples=1),
            reward=RewardConfig(workers=1),
        )
        return train(whole, Console(quiet=True))

    def metrics(name):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        return [{k: v for k, v in row.items() if k not in VOLATILE} for row in rows]

    with standing_in(encoder) as url:
        run(url, "unharmed")
    asked = []

    def dies_in_the_second_rollout(handler):
        if handler.path == "/inference/v1/generate":
            asked.append(handler.path)
            return len(asked) == 7 and break_off(handler)
        return False

    with standing_in(encoder, dies_in_the_second_rollout) as url:
        with pytest.raises(InputError, match=f"{url}.*broke off.*--resume goes on"):
            run(url, "harmed")
    assert [row["step"] for row in metrics("harmed")] == [1]
    assert [p.name for p in (tmp_path / "harmed" / "checkpoints").iterdir()] == ["step-1"]
    with standing_in(encoder) as url:  # at another address
        run(url, "harmed", resume=True)
    assert metrics("harmed") == metrics("unharmed")


def test_new_weights_that_cannot_be_written_are_an_error_that_names_the_folder(model, tmp_path):
    config, encoder, policy = model
    (tmp_path / "file").touch()
    with standing_in(encoder) as url:
        there = at(config, url, server_weights=str(tmp_path / "file"))
        engine = VLLMServerRollout(there, encoder, tmp_path)
        with pytest.raises(RolloutError, match=r"rollout.server_weights"):
            engine.load_weights(policy)


@needs_vllm
def test_a_server_that_does_not_start_in_time_is_ended_and_leaves_its_log(model, tmp_path):
    config, encoder, _ = model
    with pytest.raises(RolloutError, match=rf"not ready in time.*see {tmp_path}/vllm_server.log"):
        VLLMServerRollout(at(config, server_timeout=0.1), encoder, tmp_path)
