"""New weights from the main rank's GPU to those of vLLM servers, by vLLM's own transfer engines.

`nccl` makes one group of the main rank and of all workers of all servers; `ipc` has one server open
the memory of a GPU that it shares with the run. What is said goes over HTTP as everything else
does, with the token: NCCL's unique id is told that way too, so that no port of vLLM's, which would
unpickle what anybody sends it, is open. The weights themselves are not encrypted.

All ranks gather each weight in their main threads. On the main rank another thread hands them on,
so that a server that dies or hangs is noticed, and the ranks can go on to say so together.
"""

from __future__ import annotations

import base64
import pickle
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, as_completed, wait
from contextlib import suppress
from queue import Empty, Full, Queue
from typing import Any

import torch
from torch import Tensor

from papo_fast.model.policy import Policy
from papo_fast.parallel import is_main
from papo_fast.rollout.protocol import RolloutError
from papo_fast.rollout.vllm_client import AGAIN, Server
from papo_fast.rollout.vllm_setup import prepare_this_process

BUCKET_BYTES = 256 << 20
"""Weights that are sent together; a larger one is sent alone. Both sides hold two such buckets."""
_POLL = 0.05
"""Seconds after which a thread that waits looks whether another one has failed."""


def in_thread(call: Callable[..., Any], *arguments: Any) -> Future:
    """The call's result, of a thread that no end of the program waits for."""
    future: Future = Future()

    def work() -> None:
        try:
            future.set_result(call(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


class TransferClient:
    """All servers of a run as vLLM's engines for trainers see them (its `VLLMWeightSyncClient`).

    Every call asks all servers at the same time, since none of them gets on without the others.

    Attributes:
        failed: ends with the first error; whoever waits for a server stops waiting then.
    """

    def __init__(self, servers: Sequence[Server]):
        self.servers = servers
        self.failed: Future = Future()
        self._sizes: list[int] = []

    def fail(self, error: RolloutError) -> None:
        if not self.failed.done():
            self.failed.set_exception(error)

    def ask(self, method: str, path: str, bodies: Sequence[dict | None] | None = None) -> list[Any]:
        """Every server's answer; raises the first error at once, whatever others are at."""
        if self.failed.done():
            self.failed.result()
        bodies = bodies or [None] * len(self.servers)
        answers = [
            in_thread(server.call, method, path, body)
            for server, body in zip(self.servers, bodies, strict=True)
        ]
        for done in as_completed([self.failed, *answers]):
            if isinstance(error := done.exception(), RolloutError):
                self.fail(error)
            done.result()
            if all(answer.done() for answer in answers):
                break
        return [answer.result() for answer in answers]

    def world_size(self) -> int:
        """Workers of all servers, counted anew; ranks are given to them in the servers' order."""
        path = "/get_world_size"
        self._sizes = []
        for server, answer in zip(self.servers, self.ask("GET", path), strict=True):
            try:
                self._sizes.append(int(answer["world_size"]))
            except (KeyError, TypeError, ValueError) as error:
                raise server.nonsense(path, "no number of workers") from error
        return sum(self._sizes)

    def forget_group(self) -> None:
        """Have the workers leave the group of a run before."""
        self.ask("POST", "/shutdown_weight_transfer_engine")

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Each server with its own offset, where ranks are given at all."""
        infos, offset = [], init_info.get("rank_offset")
        for i in range(len(self.servers)):
            info = dict(init_info)
            if offset is not None:
                info["rank_offset"] = offset + sum(self._sizes[:i])
            infos.append({"init_info": info})
        self.ask("POST", "/init_weight_transfer_engine", infos)

    def start_weight_update(self) -> None:
        self.ask("POST", "/start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        handles = update_info.get("ipc_handles")
        if handles is not None:  # as vLLM's own client does over HTTP
            text = base64.b64encode(pickle.dumps(handles)).decode()
            update_info = {k: v for k, v in update_info.items() if k != "ipc_handles"}
            update_info["ipc_handles_pickled"] = text
        self.ask("POST", "/update_weights", [{"update_info": update_info}] * len(self.servers))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        body = None if weight_version is None else {"weight_version": weight_version}
        self.ask("POST", "/finish_weight_update", [body] * len(self.servers))


class WeightFeed:
    """Weights on their way from the thread that gathers to the one that sends.

    vLLM's engines take it for their `WeightSource`. It holds one weight besides those that either
    side is at.
    """

    def __init__(self) -> None:
        self._shapes: list[tuple[str, tuple[int, ...]]] = []
        self._dtype = torch.float32
        self._queue: Queue = Queue(maxsize=1)

    def announce(self, shapes: Iterable[tuple[str, tuple[int, ...]]], dtype: torch.dtype) -> None:
        """What will be put, in this order."""
        self._shapes, self._dtype = list(shapes), dtype

    @property
    def largest(self) -> int:
        """Bytes of the largest weight."""
        sizes = (torch.Size(shape).numel() for _, shape in self._shapes)
        return max(sizes) * self._dtype.itemsize

    def put(self, item: tuple[str, Tensor] | None, seconds: float) -> bool:
        """Whether there was room for it in time; None ends the pass."""
        try:
            self._queue.put(item, timeout=seconds)
        except Full:
            return False
        return True

    def stop(self) -> None:
        """Let whoever still takes weights end with an error."""
        with suppress(Empty):
            self._queue.get_nowait()
        self._queue.put_nowait(InterruptedError("the transfer was given up"))

    def metadata(self) -> list[Any]:
        """vLLM's `ParamMeta` of every weight."""
        from vllm.distributed.weight_transfer import ParamMeta

        return [ParamMeta(name, self._dtype, shape) for name, shape in self._shapes]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        while (item := self._queue.get()) is not None:
            if isinstance(item, InterruptedError):
                raise item
            if item[1].is_cuda:  # the stream that packs it here may be at it after we dropped it
                item[1].record_stream(torch.cuda.current_stream(item[1].device))
            yield item


class WeightTransfer:
    """Hands a policy's weights to servers; every rank has one.

    Args:
        kind: `rollout.server_transfer`, nccl or ipc.
        timeout: seconds that the servers may take to make any progress.
    """

    def __init__(self, kind: str, servers: Sequence[Server], timeout: float):
        self.kind, self.timeout = kind, timeout
        self.client = TransferClient(servers)
        self.feed = WeightFeed()
        self.engine: Any = None  # of vLLM, once the servers have joined

    def send(self, policy: Policy) -> None:
        """The policy's whole weights, gathered one at a time by all ranks.

        Raises `RolloutError` on the main rank, after all have gathered all; it alone hears of it.
        """
        weights = policy.whole_weights()
        if not is_main():
            for _ in weights:
                continue
            return
        self.feed.announce(policy.whole_shapes(), policy.dtype)
        sending = in_thread(self._send, policy.device)
        error: RolloutError | None = None
        try:
            for name, weight in weights:
                if error is None:  # else the other ranks gather what is left with us
                    error = self._hand_on(sending, (name, _readable(weight, policy.device)))
            error = error or self._hand_on(sending, None) or self._end(sending)
        except BaseException:  # of this process; its thread must not keep it from ending
            self._give_up(sending)
            raise
        if error is not None:
            raise error

    def close(self) -> None:
        if self.engine is not None:
            self.engine.shutdown()
            self.engine = None

    # --- the main thread, which waits for no server longer than it has to

    def _hand_on(self, sending: Future, item: tuple[str, Tensor] | None) -> RolloutError | None:
        deadline = time.monotonic() + self.timeout
        while not (sending.done() or self.client.failed.done() or time.monotonic() > deadline):
            if self.feed.put(item, _POLL):
                return None
        return self._give_up(sending)

    def _end(self, sending: Future) -> RolloutError | None:
        wait((sending, self.client.failed), self.timeout, FIRST_COMPLETED)
        fine = sending.done() and sending.exception() is None and not self.client.failed.done()
        return None if fine else self._give_up(sending)

    def _give_up(self, sending: Future) -> RolloutError:
        """End what still waits, here; what servers wait for ends with them."""
        how = f"(rollout.server_transfer {self.kind})"
        error: BaseException | None = None
        if self.client.failed.done():
            error = self.client.failed.exception()
        elif sending.done():
            error = sending.exception()
        if error is None:
            said = (
                f"the vLLM servers have not taken new weights {how} within rollout.server_timeout "
                f"= {self.timeout} seconds"
            )
        elif isinstance(error, RolloutError):
            said = str(error)
        else:
            what = f"{type(error).__name__}: {error}"
            said = f"new weights could not be handed to the vLLM servers {how}: {what}"
        told = RolloutError(
            f"{said}. Start the servers of this run again, which may be waiting for the rest of "
            f"the weights; {AGAIN}"
        )
        told.__cause__ = error
        self.client.fail(told)
        self.feed.stop()
        self.close()  # aborts what NCCL is at on our GPU, so that a checkpoint can be written
        return told

    # --- the thread that may have to be given up

    @torch.no_grad()
    def _send(self, device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if self.engine is None:
            prepare_this_process(on_cpu=device.type == "cpu")
            join = {"nccl": self._join_nccl, "ipc": self._join_ipc}[self.kind]
            self.engine = join(device)
        self.engine.send_weights()

    @property
    def _bucket(self) -> int:
        return max(BUCKET_BYTES, self.feed.largest)

    def _join_nccl(self, device: torch.device) -> Any:
        from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary
        from vllm.distributed.weight_transfer.nccl_common import (
            NCCLWeightTransferInitInfo,
            uid_init_process_group,
            worker_init_payload,
        )
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerWeightTransferEngine

        world = 1 + self.client.world_size()
        self.client.forget_group()
        unique_id = bytes(NCCLLibrary().ncclGetUniqueId().internal)
        info = NCCLWeightTransferInitInfo(
            rank_offset=1,
            world_size=world,
            nccl_unique_id_b64=base64.b64encode(unique_id).decode(),
            packed=True,
            packed_buffer_size_bytes=self._bucket,
        )
        engine = NCCLTrainerWeightTransferEngine(
            client=self.client,
            source=self.feed,
            packed=info.packed,
            packed_buffer_size_bytes=info.packed_buffer_size_bytes,
            packed_num_buffers=info.packed_num_buffers,
        )
        joined = in_thread(self.client.init_weight_transfer_engine, worker_init_payload(info))
        # returns when all have joined
        engine.model_update_group = uid_init_process_group(unique_id, 0, world, device.index)
        joined.result()
        return engine

    def _join_ipc(self, device: torch.device) -> Any:
        from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

        info = IPCTrainerInitInfo(rank=0, packed=True, packed_buffer_size_bytes=self._bucket)
        return WeightTransferTrainerFactory.trainer_init(info, client=self.client, source=self.feed)


def _readable(weight: Tensor, device: torch.device) -> Tensor:
    """On the GPU, and there before another stream reads it."""
    weight = weight.detach().to(device)
    if weight.is_cuda:
        torch.cuda.current_stream(weight.device).synchronize()
    return weight
