"""A rank whose servers take weights twice, the second time from a server that dies in between.

transfer_worker.py FOLDER
"""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from papo_fast.model.saving import whole_shapes, whole_weights
from papo_fast.parallel import gather, is_main, process_group, rank
from papo_fast.rollout.protocol import RolloutError
from papo_fast.rollout.vllm_client import Server
from papo_fast.rollout.vllm_server import fail_together
from papo_fast.rollout.vllm_transfer import WeightTransfer
from support.stand_in_nccl import TransferStandIn, Worker, replace_cuda
from support.standing_in import standing_in


class Sharded:
    """A policy of a few layers, sharded over the ranks."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 3))
        self.whole = {name: x.detach().clone() for name, x in self.model.named_parameters()}
        fully_shard(self.model, mesh=init_device_mesh("cpu", (2,)))

    def whole_weights(self):
        return whole_weights(self.model, self.dtype)

    def whole_shapes(self):
        return whole_shapes(self.model)


def main(folder):
    policy, updates = Sharded(), []

    def dies_in_the_second(handler):
        if handler.path == "/update_weights":
            updates.append(handler.path)
            handler.close_connection = len(updates) == 2
            return handler.close_connection
        return False

    with pytest.MonkeyPatch.context() as patch:
        url = ""
        if is_main():
            replace_cuda(patch)
            worker = Worker("nccl", 0, 1)
            fields = {"workers": [worker], "asked": [], "kind": "nccl"}
            server = standing_in(None, dies_in_the_second, base=TransferStandIn, **fields)
            url = server.__enter__()
        url = gather(url)[0]
        transfer = WeightTransfer("nccl", [Server(url, 30.0)], 30.0)
        transfer.send(policy)
        if is_main():
            assert worker.loaded.keys() == policy.whole.keys()
            for name, weight in policy.whole.items():
                assert torch.equal(worker.loaded[name], weight), name
        error = None
        try:
            transfer.send(policy)
        except RolloutError as problem:
            error = problem
        assert (error is not None) == is_main()
        try:
            fail_together(error)
        except RolloutError as problem:
            (folder / f"{rank()}.txt").write_text(str(problem))


if __name__ == "__main__":
    with process_group(torch.device("cpu")):
        main(Path(sys.argv[1]))
