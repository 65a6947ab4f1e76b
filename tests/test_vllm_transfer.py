"""New weights to vLLM servers from GPU to GPU: vLLM's own engines on both sides, without GPUs."""

from __future__ import annotations

import dataclasses
import json
import time
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from papo_fast.config import Config
from papo_fast.config_checks import check, check_processes
from papo_fast.errors import InputError
from papo_fast.launch import evaluate, serve
from papo_fast.rollout import vllm_transfer
from papo_fast.rollout.protocol import RolloutError
from papo_fast.rollout.vllm_client import Server
from papo_fast.rollout.vllm_serve import gpus_of_own_server, server_command
from papo_fast.rollout.vllm_server import VLLMServerRollout
from papo_fast.rollout.vllm_transfer import WeightTransfer
from support import SUPPORT
from support.ranks import launch
from support.stand_in_nccl import Communicator, TransferStandIn, Worker, replace_cuda
from support.standing_in import standing_in
from support.vllm_checks import CPU, disturb, needs_vllm, untrained

pytestmark = pytest.mark.xdist_group("vllm")  # which takes seconds to import

UPDATE = ["/start_weight_update", "/update_weights", "/finish_weight_update"]
FORGET = ["/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache"]


class FakePolicy:
    """Weights of several sizes and dtypes' worth of buckets; knows how many were gathered."""

    dtype, device = torch.bfloat16, CPU

    def __init__(self):
        self.weights = {f"layer.{i}.weight": torch.randn(3, i + 1) for i in range(12)}
        self.gathered = 0

    def whole_shapes(self):
        return [(name, tuple(x.shape)) for name, x in self.weights.items()]

    def whole_weights(self):
        for name, weight in self.weights.items():
            self.gathered += 1
            yield name, weight.to(self.dtype)


@pytest.fixture
def no_cuda(monkeypatch):
    replace_cuda(monkeypatch)
    monkeypatch.setattr(vllm_transfer, "BUCKET_BYTES", 64)  # several buckets


@contextmanager
def serving(kind, *sizes, encoder=None, fault=lambda handler: False):
    """[(URL, workers, paths that were asked for)] of servers with so many workers each."""
    with ExitStack() as held:
        found = []
        for size in sizes:
            workers = [Worker(kind, i, size) for i in range(size)]
            fields = {"workers": workers, "asked": [], "kind": kind}
            url = held.enter_context(standing_in(encoder, fault, base=TransferStandIn, **fields))
            found.append((url, workers, fields["asked"]))
        yield found


def with_rollout(config, **changes):
    return replace(config, rollout=replace(config.rollout, **changes))


@needs_vllm
@pytest.mark.parametrize(("kind", "sizes"), [("nccl", (2, 1)), ("ipc", (1,))])
def test_every_worker_of_every_server_gets_the_policys_weights(
    kind, sizes, no_cuda, tmp_path, monkeypatch
):
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    config, encoder, policy = untrained(tmp_path / "model", engine="vllm_server")
    with serving(kind, *sizes, encoder=encoder) as servers:
        urls = tuple(url for url, _, _ in servers)
        config = with_rollout(config, server_urls=urls, server_transfer=kind)
        engine = VLLMServerRollout(config, encoder, tmp_path)
        for _ in range(2):
            engine.load_weights(policy)
            want = dict(policy.whole_weights())
            for _, workers, _ in servers:
                for worker in workers:
                    assert list(worker.loaded) == list(want)
                    for name, weight in want.items():
                        assert torch.equal(worker.loaded[name], weight), name
            disturb(policy, seed=0)
        join = ["/get_world_size", "/shutdown_weight_transfer_engine"] if kind == "nccl" else []
        join = ["/server_info?config_format=json", *join, "/init_weight_transfer_engine"]
        for _, _, asked in servers:
            several = [UPDATE[0], *[p for p in asked[len(join) :] if p == UPDATE[1]], UPDATE[2]]
            chunks = 1 if kind == "nccl" else (len(several) - 2) // 2
            assert chunks == 1 or kind == "ipc"
            one = [UPDATE[0], *[UPDATE[1]] * chunks, UPDATE[2], *FORGET]
            assert asked == [*join, *one, *one]
        assert not (tmp_path / "server_weights").exists()
        engine.close()
        assert [c.destroyed for c in Communicator.made if c.rank == 0] == [True] * (kind == "nccl")


def lost(handler):
    """Closes without an answer, as a process that dies does."""
    handler.close_connection = True
    return True


def silent(handler):
    return handler.rfile.read(1) == b""  # until whoever asked hangs up


def refused(handler):
    return handler.answer({"error": "CUDA out of memory"}, 500)


FAULTS = [
    # the path at which a server does what, and what is said of it
    ("/get_world_size", lambda h: h.answer({"size": 2}), "no number of workers"),
    ("/shutdown_weight_transfer_engine", refused, "refused /shutdown_weight.*500.*out of memory"),
    ("/init_weight_transfer_engine", refused, "refused /init_weight_transfer_engine"),
    ("/init_weight_transfer_engine", lost, "broke off while it answered /init_weight"),
    ("/init_weight_transfer_engine", silent, "rollout.server_timeout = 1.0"),
    ("/start_weight_update", refused, "refused /start_weight_update"),
    ("/update_weights", refused, "refused /update_weights with status 500.*out of memory"),
    ("/update_weights", lost, "broke off while it answered /update_weights"),
    ("/update_weights", silent, "rollout.server_timeout = 1.0"),
    ("/finish_weight_update", lost, "broke off while it answered /finish_weight_update"),
]


@needs_vllm
@pytest.mark.parametrize(("path", "fault", "message"), FAULTS)
def test_a_server_that_fails_in_a_transfer_holds_up_nobody(path, fault, message, no_cuda):
    policy, started = FakePolicy(), time.monotonic()
    limit = 1.0 if fault is silent else 120.0
    broken = []  # of two servers one

    def at_the_first(handler):
        if handler.path == path and (not broken or broken[0] == handler.server):
            broken[:] = [handler.server]
            return fault(handler)
        return False

    with serving("nccl", 1, 1, fault=at_the_first) as servers:
        transfer = WeightTransfer("nccl", [Server(url, limit) for url, _, _ in servers], limit)
        with pytest.raises(RolloutError, match=message) as caught:
            transfer.send(policy)
        assert "Start the servers of this run again" in str(caught.value)
        assert "--resume goes on" in str(caught.value)
        assert policy.gathered == len(policy.weights), "the other ranks would wait for ever"
        assert all(c.destroyed for c in Communicator.made if c.rank == 0) or "/init" in path
        with pytest.raises(RolloutError, match=message):
            transfer.send(policy)
    assert time.monotonic() - started < 100


@needs_vllm
def test_weights_that_do_not_arrive_in_time_are_an_error(no_cuda, monkeypatch):
    monkeypatch.setattr(Communicator, "broadcast", lambda *_, **__: time.sleep(30))
    policy = FakePolicy()
    with serving("nccl", 1) as servers:
        # each answer may take longer than the transfer waits for the GPU
        transfer = WeightTransfer("nccl", [Server(servers[0][0], 60.0)], 0.5)
        with pytest.raises(RolloutError, match=r"not taken new weights .*nccl\) within .* 0\.5"):
            transfer.send(policy)
    assert policy.gathered == len(policy.weights)


@needs_vllm
def test_what_fails_on_this_side_is_an_error_of_the_run(no_cuda, monkeypatch):
    whole = Communicator.broadcast

    def broadcast(self, *arguments, **options):
        if self.rank == 0:  # a worker that failed too might be the first to say so
            raise RuntimeError("NCCL error: unhandled system error")
        return whole(self, *arguments, **options)

    monkeypatch.setattr(Communicator, "broadcast", broadcast)
    with serving("nccl", 1) as servers:
        transfer = WeightTransfer("nccl", [Server(servers[0][0], 60.0)], 60.0)
        with pytest.raises(RolloutError, match=r"handed to .* nccl\): RuntimeError: NCCL"):
            transfer.send(FakePolicy())


@needs_vllm
def test_both_ranks_gather_and_both_hear_of_a_server_that_dies(tmp_path):
    launch(2, [str(SUPPORT / "transfer_worker.py"), str(tmp_path)])
    said = [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)]
    assert said[0] == said[1] and "broke off while it answered /update_weights" in said[0]


# --- what vLLM expects of a server's options and of requests --------------------------------------


@needs_vllm
def test_vllm_has_the_paths_options_and_methods_that_are_used(monkeypatch):
    from vllm.config.weight_transfer import WeightTransferConfig
    from vllm.distributed.weight_transfer import VLLMWeightSyncClient, WeightSource
    from vllm.engine.arg_utils import EngineArgs
    from vllm.entrypoints.rl.online.api_router import router

    paths = {(method, route.path) for route in router.routes for method in route.methods}
    asked = {("POST", path) for path in UPDATE} | {("GET", "/get_world_size")}
    asked |= {("POST", f"/{x}_weight_transfer_engine") for x in ("init", "shutdown")}
    assert asked <= paths
    assert isinstance(vllm_transfer.TransferClient([]), VLLMWeightSyncClient)
    assert all(hasattr(vllm_transfer.WeightFeed, n) for n in WeightSource.__abstractmethods__)
    assert "weight_transfer_config" in {field.name for field in dataclasses.fields(EngineArgs)}
    for kind in ("nccl", "ipc"):
        assert WeightTransferConfig(backend=kind).backend == kind


def test_a_server_is_started_for_the_transfer_of_the_run(tmp_path):
    config, encoder, _ = untrained(tmp_path, engine="vllm_server")
    for kind in ("disk", "nccl", "ipc"):
        there = with_rollout(config, server_transfer=kind)
        command, environment = server_command(there, encoder, "http://node7:8123", "secret")
        given = "--weight-transfer-config" in command
        assert given == (kind != "disk")
        if given:
            at = command.index("--weight-transfer-config")
            assert json.loads(command[at + 1]) == {"backend": kind}
        assert ("VLLM_ALLOW_INSECURE_SERIALIZATION" in environment) == (kind == "ipc")


def test_a_server_that_was_started_for_another_transfer_is_refused(tmp_path):
    encoder = untrained(tmp_path, engine="vllm_server")[1]
    fields = {"workers": [], "asked": [], "kind": "ipc"}
    with standing_in(encoder, base=TransferStandIn, **fields) as url:
        server, length = Server(url, 5.0), 1
        server.check(length)
        server.check(length, "ipc")
        with pytest.raises(RolloutError, match=r"server_transfer ipc, but this .* nccl.*serve"):
            server.check(length, "nccl")
    with standing_in(encoder) as url:
        with pytest.raises(RolloutError, match="server_transfer disk, but this run has nccl"):
            Server(url, 5.0).check(length, "nccl")


def test_transfers_that_cannot_work_are_refused_before_anything_is_loaded(monkeypatch):
    plain = replace(Config(), model=replace(Config().model, path="m"))
    plain = replace(plain, data=replace(plain.data, train="t"))

    def refusal(device="auto", **rollout):
        with pytest.raises(InputError) as caught:
            check(replace(with_rollout(plain, **rollout), device=device))
        return str(caught.value)

    for kind in ("nccl", "ipc"):
        fine = {"engine": "vllm_server", "server_transfer": kind}
        check(with_rollout(plain, **fine))
        assert "rollout.engine is vllm: set it" in refusal(engine="vllm", server_transfer=kind)
        assert "the policy is on the CPU" in refusal(**fine, device="cpu")
    two = ("http://127.0.0.1:8000", "http://127.0.0.1:8001")
    assert "is for one server" in refusal(**fine, server_urls=two)
    assert "rollout.tensor_parallel is 2: take nccl" in refusal(**fine, tensor_parallel=2)
    with pytest.raises(InputError, match="there are 2: take nccl"):
        check_processes(with_rollout(plain, **fine), 2)
    # where auto is the CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for command in (evaluate, serve):
        with pytest.raises(InputError, match="the policy is on the CPU: take disk"):
            command(with_rollout(plain, **fine), Console(quiet=True))


@needs_vllm
def test_ipc_to_another_machine_is_refused(tmp_path):
    config, encoder, _ = untrained(tmp_path, engine="vllm_server")
    there = with_rollout(config, server_urls=("http://192.0.2.1:1",), server_transfer="ipc")
    with pytest.raises(RolloutError, match=r"192\.0\.2\.1:1 is not on loopback: take nccl"):
        VLLMServerRollout(there, encoder, tmp_path)


def test_an_own_server_gets_gpus_that_the_run_leaves(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for name in ("CUDA_VISIBLE_DEVICES", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def gpus(device, kind="disk", together=1):
        config = with_rollout(Config(), server_transfer=kind, tensor_parallel=together)
        return gpus_of_own_server(config, torch.device(device))

    assert gpus("cpu") is None
    assert gpus("cuda") == "1" and gpus("cuda:1", together=2) == "0,2"
    assert gpus("cuda:1", "ipc") == "1"
    assert gpus("cuda", together=4) is None, "it shares them"
    with pytest.raises(InputError, match=r"nccl.*needs 4 GPU.*but 3 of 4 are left"):
        gpus("cuda", "nccl", together=4)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert gpus("cuda", "nccl", together=2) == "2,3"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,5,3")
    assert gpus("cuda") == "3"
