"""A run and its vLLM servers, with a stand-in that speaks vLLM's protocol: starts and faults."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from papo_fast.config import EvalConfig, RewardConfig
from papo_fast.errors import InputError
from papo_fast.launch import serve, train
from papo_fast.rollout.protocol import RolloutError
from papo_fast.rollout.vllm_guard import HOST, MIDDLEWARE, TOKEN, Guard, read_or_make_token
from papo_fast.rollout.vllm_serve import server_command
from papo_fast.rollout.vllm_server import VLLMServerRollout
from support.small_runs import VOLATILE, png
from support.standing_in import MODEL_LEN, standing_in
from support.vllm_checks import mixed_prompts, needs_vllm, sample, untrained

pytestmark = pytest.mark.xdist_group("vllm")  # one process, one engine at a time


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return untrained(tmp_path_factory.mktemp("model"), engine="vllm_server")


def at(config, *urls, **changes):
    return replace(config, rollout=replace(config.rollout, server_urls=urls, **changes))


def test_the_server_is_started_with_what_a_run_checks_for(model):
    config, encoder, _ = model
    command, environment = server_command(config, encoder, "http://node7:8123", "secret")
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
    assert options["--middleware"] == MIDDLEWARE
    assert environment[TOKEN] == "secret" and environment[HOST] == "node7"
    assert not any("secret" in word for word in command), "everybody can read a command line"
    # on the CPU the model runs in the engine's own process, unless there are several
    assert options["--distributed-executor-backend"] == "uni"
    assert environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    two = replace(config, rollout=replace(config.rollout, tensor_parallel=2))
    command, environment = server_command(two, encoder, "http://node7:8123", "secret")
    assert "--distributed-executor-backend" not in command
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in environment
    for url in ("https://node7:8123", "http://node7", "node7:8123"):
        with pytest.raises(InputError, match="not of the form http://HOST:PORT"):
            server_command(config, encoder, url, "secret")
    with pytest.raises(InputError, match="start each with its own URL"):
        serve(at(config, "http://a:1", "http://b:1"), Console(quiet=True))


def test_a_server_without_a_token_does_not_start(monkeypatch, model):
    monkeypatch.delenv(TOKEN, raising=False)
    with pytest.raises(RuntimeError, match=f"{TOKEN} is empty"):
        Guard(None)
    config, _, _ = model
    monkeypatch.setattr("papo_fast.launch.require_vllm", lambda: None)
    data = replace(config.data, train="unread.jsonl")
    tokenless = replace(at(config, "http://127.0.0.1:1"), data=data)
    with pytest.raises(InputError, match=r"server_token_file is empty.*--rollout\.server-token"):
        serve(tokenless, Console(quiet=True))


def test_the_token_of_the_file_goes_with_every_request(model, tmp_path):
    config, encoder, policy = model
    path = tmp_path / "token"
    token = read_or_make_token(str(path))
    heard = set()

    def asks(handler):
        heard.add(handler.path)
        right = handler.headers["Authorization"] == f"Bearer {token}"
        return not right and handler.answer(b"no", 401)

    with standing_in(encoder, asks) as url:
        engine = VLLMServerRollout(at(config, url, server_token_file=str(path)), encoder, tmp_path)
        engine.load_weights(policy)
        sample(engine, mixed_prompts(encoder)[1:2], n=2)
        assert {"/collective_rpc", "/reset_prefix_cache", "/inference/v1/generate"} <= heard
        with pytest.raises(RolloutError, match=r"same --rollout\.server-token-file"):
            VLLMServerRollout(at(config, url), encoder, tmp_path)


def test_an_address_that_is_not_loopback_is_warned_of(model, tmp_path, caplog):
    config, encoder, _ = model
    with pytest.raises(RolloutError, match="cannot be reached"):
        VLLMServerRollout(at(config, "http://localhost:9"), encoder, tmp_path)
    assert not caplog.records
    with pytest.raises(RolloutError, match="cannot be reached"):
        VLLMServerRollout(at(config, "http://0.0.0.0:9"), encoder, tmp_path)
    assert "http://0.0.0.0:9 is not on loopback" in caplog.text


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


def test_runs_that_share_a_weights_folder_have_private_folders_of_their_own(model, tmp_path):
    config, encoder, policy = model
    shared, seen = tmp_path / "shared", {}

    def looks(handler):
        if handler.path == "/collective_rpc":
            folder = Path(handler.body["kwargs"]["weights_path"])
            seen[folder.parent] = [folder.parent.stat().st_mode & 0o777, os.listdir(folder)]

    with standing_in(encoder, looks) as url:
        for run in ("a", "b", "a"):
            there = at(config, url, server_weights=str(shared))
            engine = VLLMServerRollout(there, encoder, tmp_path / run)
            if run in seen:
                (engine.weights / "left by a kill").touch()
            engine.load_weights(policy)
            engine.load_weights(policy)
            assert engine.weights.parent == shared
            engine.close()
    assert list(seen.values()) == [[0o700, ["model-00001.safetensors"]]] * 2
    assert list(shared.iterdir()) == []


def test_weights_are_not_written_through_a_symlink_or_where_others_can_swap_folders(
    model, tmp_path
):
    config, encoder, policy = model
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with standing_in(encoder) as url:
        for place, why in (("link", "is a symlink"), ("open", "others can replace")):
            there = at(config, url, server_weights=str(tmp_path / place))
            engine = VLLMServerRollout(there, encoder, tmp_path)
            with pytest.raises(RolloutError, match=f"{why}.*rollout.server_weights"):
                engine.load_weights(policy)
        there = at(config, url, server_weights=str(tmp_path / "shared"))
        engine = VLLMServerRollout(there, encoder, tmp_path)
        engine.weights.parent.mkdir()
        engine.weights.symlink_to(tmp_path / "elsewhere")
        with pytest.raises(RolloutError, match="is a symlink"):
            engine.load_weights(policy)
    assert not any((tmp_path / "elsewhere").iterdir())


@needs_vllm
def test_a_server_that_does_not_start_in_time_is_ended_and_leaves_its_log(model, tmp_path):
    config, encoder, _ = model
    with pytest.raises(RolloutError, match=rf"not ready in time.*see {tmp_path}/vllm_server.log"):
        VLLMServerRollout(at(config, server_timeout=0.1), encoder, tmp_path)
