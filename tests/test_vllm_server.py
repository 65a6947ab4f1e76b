"""vLLM behind HTTP, a real server: it agrees with the trainer, and is named when it is killed."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
import threading
import time
from pathlib import Path

import pytest

from papo_fast.rollout.protocol import RolloutError
from papo_fast.rollout.vllm_client import Server
from papo_fast.rollout.vllm_serve import _folder_for_a_socket
from papo_fast.rollout.vllm_server import VLLMServerRollout
from support.vllm_checks import (
    check_agreement_after_every_sync,
    check_bans,
    mixed_prompts,
    needs_vllm,
    sample,
    untrained,
)

pytestmark = pytest.mark.xdist_group("vllm")  # one process, one engine at a time


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
def test_an_own_server_has_no_port_and_a_folder_that_nobody_else_can_enter(served):
    own = served[0].own
    scheme, _, path = own.url.partition(":")
    assert scheme == "unix" and stat.S_ISSOCK(os.stat(path).st_mode)
    assert stat.S_IMODE(os.stat(own.folder).st_mode) == 0o700
    open_files = set()
    for descriptor in Path(f"/proc/{own.process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed since they were listed
            open_files.add(os.readlink(descriptor))
    tables = [Path(f"/proc/{own.process.pid}/net/{name}").read_text() for name in ("tcp", "tcp6")]
    listening = {
        f"socket:[{line.split()[9]}]"
        for table in tables
        for line in table.splitlines()[1:]
        if line.split()[3] == "0A"
    }
    assert not open_files & listening


def test_the_folder_of_a_socket_has_a_short_path(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("long" * 30)))
    folder = _folder_for_a_socket()
    try:
        assert len(str(folder / "vllm")) < 107 and folder.stat().st_mode & 0o777 == 0o700
    finally:
        folder.rmdir()


@needs_vllm
def test_vllm_itself_obeys_nobody_without_the_token(served):
    url = served[0].own.url
    stranger, wrong = Server(url, 5.0), Server(url, 5.0, "0" * 64)
    assert stranger.is_ready()
    for asking in (stranger, wrong):
        for path in ("/collective_rpc", "/reset_prefix_cache", "/inference/v1/generate"):
            with pytest.raises(RolloutError, match=f"refused {path}: it asks for a token"):
                asking.call("POST", path, {"method": "determine_num_available_blocks"})
        with pytest.raises(RolloutError, match="asks for a token"):
            asking.check(1)
    Server(url, 5.0, served[0].own.token).check(1)


@needs_vllm
def test_a_server_killed_during_generation_is_named_and_waited_for_no_longer(served):
    engine, _, encoder = served
    process, url = engine.own.process, engine.own.url
    folder, killed = engine.own.folder, []
    threading.Timer(1.5, lambda: (killed.append(time.monotonic()), process.kill())).start()

    def sample_on():
        for seed in range(1000):
            sample(engine, mixed_prompts(encoder), n=8, seed=seed)

    with pytest.raises(RolloutError, match=rf"{url}.*papo-fast serve.*--resume goes on"):
        sample_on()
    assert time.monotonic() - killed[0] < 60 < engine.servers[0].timeout
    assert not engine.servers[0].is_ready()
    engine.close()
    assert not folder.exists()
