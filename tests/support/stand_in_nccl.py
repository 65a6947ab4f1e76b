"""vLLM's own engines for weight transfer, both sides of them, with threads in the place of GPUs.

What vLLM takes from CUDA (streams, a communicator, memory of another process) is put in the place
of its names; its engines, its packing and its request classes are the real ones.
"""

from __future__ import annotations

import ctypes
import os
import queue
import sys
import threading
import types
from contextlib import nullcontext
from types import SimpleNamespace

import torch

from support.standing_in import StandIn

GPU = "GPU-of-this-machine"


class Communicator:
    """A `PyNcclCommunicator` among threads. Who waits for a rank that does not come waits on."""

    made: list[Communicator]
    _joined = threading.Condition()

    def __init__(self, unique_id, rank, world_size):
        self.unique_id, self.rank, self.destroyed = unique_id, rank, False
        self.inbox = queue.SimpleQueue()
        with self._joined:
            assert rank not in {c.rank for c in self._group()}, "two workers of one rank"
            self.made.append(self)
            self._joined.notify_all()
            self._joined.wait_for(lambda: len(self._group()) == world_size)

    def _group(self):
        return [c for c in self.made if c.unique_id == self.unique_id]

    @classmethod
    def from_unique_id_bytes(cls, unique_id, rank, world_size, device, library_path=None):
        return cls(unique_id, rank, world_size)

    def broadcast(self, tensor, src, stream=None):
        if self.rank != src:
            sent, taken = self.inbox.get()
            tensor.copy_(sent)
            taken.set()
            return
        all_taken = []
        for other in self._group():
            if other is not self:
                all_taken.append(threading.Event())
                other.inbox.put((tensor.clone(), all_taken[-1]))
        for taken in all_taken:
            taken.wait()

    def destroy(self):
        self.destroyed = True


class Library:
    """A `NCCLLibrary` that knows how to make a unique id."""

    def ncclGetUniqueId(self):
        return SimpleNamespace(internal=(ctypes.c_byte * 128).from_buffer_copy(os.urandom(128)))


class _Stream:
    def synchronize(self):
        pass


class _TorchWithoutCuda:
    """torch whose CUDA is the CPU, for the one module of vLLM that asks for it by name."""

    cuda = SimpleNamespace(
        current_stream=lambda *_: _Stream(),
        get_device_properties=lambda _: SimpleNamespace(uuid=GPU),
        stream=nullcontext,
        is_available=lambda: False,
        ipc_collect=lambda: None,
    )

    def __getattr__(self, name):
        return getattr(torch, name)

    def empty(self, *size, device=None, **options):
        return torch.empty(*size, **options)


def replace_cuda(monkeypatch):
    """Until the test ends, vLLM's engines for both sides run on the CPU."""
    from vllm.distributed.device_communicators import pynccl, pynccl_wrapper
    from vllm.distributed.weight_transfer import ipc_engine, packed_tensor

    monkeypatch.setattr(Communicator, "made", [], raising=False)
    monkeypatch.setattr(pynccl, "PyNcclCommunicator", Communicator)
    monkeypatch.setattr(pynccl_wrapper, "NCCLLibrary", Library)
    monkeypatch.setattr(packed_tensor, "_get_streams", lambda _, n: (_Stream(),) * n)
    monkeypatch.setattr(packed_tensor, "torch", _TorchWithoutCuda())
    monkeypatch.setattr(ipc_engine, "torch", _TorchWithoutCuda())
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)
    # memory that another process opens: here both are one
    shared = []

    def reduce_tensor(tensor):
        shared.append(tensor)
        return None, (len(shared) - 1, *[None] * 6)

    monkeypatch.setattr(packed_tensor, "reduce_tensor", reduce_tensor)
    monkeypatch.setattr(
        torch.multiprocessing.reductions, "rebuild_cuda_tensor", lambda i, *_: shared[i]
    )
    # vLLM's models, seconds to import, which no worker here has
    name = "vllm.model_executor.model_loader.mtp_validation"
    module = types.ModuleType(name)
    module.disable_mtp_completeness_check = nullcontext
    monkeypatch.setitem(sys.modules, name, module)


class Worker:
    """One of a server's GPUs: what it was sent, by vLLM's engine for a worker.

    Attributes:
        loaded: {name: tensor} of the update that was finished last.
    """

    def __init__(self, kind, rank, size):
        from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
        from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

        parallel = SimpleNamespace(data_parallel_index=0, world_size=size, rank=rank)
        config = SimpleNamespace(parallel_config=parallel, model_config=None)
        base = {"nccl": NCCLWeightTransferEngine, "ipc": IPCWeightTransferEngine}[kind]
        # what follows is of vLLM's layers, not of a transfer
        own = {"start_weight_update": lambda _: None, "finish_weight_update": lambda _: None}
        self.coming, self.loaded = {}, {}
        model = SimpleNamespace(load_weights=self._load)
        self.engine = type("Engine", (base,), own)(None, config, torch.device("cpu"), model)

    def _load(self, weights):
        for name, weight in weights:
            assert name not in self.coming, f"{name} came twice"
            self.coming[name] = weight.clone()

    def call(self, path, body):
        if path == "/init_weight_transfer_engine":
            self.engine.init_transfer_engine(self.engine.parse_init_info(body["init_info"]))
        elif path == "/start_weight_update":
            self.coming = {}
            self.engine.start_weight_update()
        elif path == "/update_weights":
            self.engine.update_weights(body["update_info"])
        elif path == "/finish_weight_update":
            self.engine.finish_weight_update()
            self.loaded = self.coming
        elif path == "/shutdown_weight_transfer_engine":
            self.engine.shutdown()


class TransferStandIn(StandIn):
    """`StandIn` with workers; knows the requests that it got, in their order."""

    workers: list[Worker]
    asked: list[str]
    kind: str

    def model_info(self):
        return super().model_info() | {"weight_transfer_config": {"backend": self.kind}}

    def do_GET(self):
        self.asked.append(self.path)
        if self.path.startswith("/get_world_size"):
            return self.fault(self) or self.answer({"world_size": len(self.workers)})
        return super().do_GET()

    def respond(self):
        from papo_fast.rollout.vllm_transfer import in_thread

        self.asked.append(self.path)
        body = self.body
        try:
            for done in [in_thread(w.call, self.path, body) for w in self.workers]:
                done.result()
        except Exception as error:  # as vLLM: the server stays
            self.answer({"error": str(error)}, 500)
        else:
            super().respond()
