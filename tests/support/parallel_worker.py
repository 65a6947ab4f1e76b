"""One rank of a test: three updates on a fixed experience; the main rank saves what came out.

With `checkpoint` in the job it keeps what stands after two updates; with `resume` it starts there;
with `nan` several ranks then write what each does with gradients that NaN reaches on one alone.

    python parallel_worker.py CONFIG.pt OUT

Run by test_parallel.py, with torchrun's variables in the environment.
"""

import dataclasses
import json
import math
import sys
from pathlib import Path

import torch
from torch.distributed import barrier
from torch.distributed.tensor import DTensor

from papo_fast.cli import leave
from papo_fast.errors import InputError
from papo_fast.experience import add_logprobs
from papo_fast.model.policy import Policy
from papo_fast.parallel import is_main, process_group, rank
from papo_fast.run.checkpoint import CheckpointStore
from papo_fast.samples import Group
from papo_fast.update import Updater


def main(job_path: str, out: str) -> None:
    job = torch.load(job_path, weights_only=False)  # written by the test itself
    with process_group(torch.device("cpu")):
        updater = three_updates(job, Path(out))
        if job.get("nan"):
            found = with_nan(updater, job["groups"])
            (Path(out) / f"rank{rank()}.json").write_text(json.dumps(found))
            barrier()


def three_updates(job: dict, out: Path) -> Updater:
    """What stands above, without NaN."""
    torch.set_num_threads(1)
    torch.manual_seed(0)  # adapters start the same however many ranks there are
    config = job["config"]
    config = dataclasses.replace(config, objective=config.objective.resolved())
    kind = job.get("kind", Policy)
    policy = kind.load(config.model, job["bans"], torch.device("cpu"), config.parallel)
    if "stand_in" in job:
        policy.stand_in = job["stand_in"]
    reference = policy.reference(config)
    groups = job["groups"]
    updater = Updater(config, policy, reference, total_updates=3)
    add_logprobs(groups, policy, reference, config)
    updater.weigher.measure(groups, policy)
    store = CheckpointStore(Path(job.get("resume") or out) / "checkpoints")
    if job.get("resume"):
        updater.restore(store.load(policy, updater.optimizer)["updater"])
    rows = []
    for i in range(updater.updates, 3):
        some = groups[2 * i : 2 * i + 2]
        rows.append(updater.update(some, lambda _: None, first=i == 0))
        if i == 1 and job.get("checkpoint"):
            state = {"score": 0.0, "updater": updater.counters()}
            store.save(2, policy, updater.optimizer, state)
    policy.save(out)
    if is_main():
        torch.save(rows, out / "rows.pt")
    return updater


def with_nan(updater: Updater, groups: list[Group]) -> dict:
    """Updates with one advantage of NaN, a good one between them, until the run would stop."""
    weights = list(updater.policy.parameters())
    found = {"batches_with_nan": 0, "norms": [], "moved": [], "stopped": ""}
    token_batch = updater._token_batch

    def seen(groups, first):
        tokens, metrics = token_batch(groups, first)
        found["batches_with_nan"] += int(tokens.advantages.isnan().any())
        return tokens, metrics

    updater._token_batch = seen
    sample = groups[0].samples[0]
    good = sample.advantage
    for broken in (True, False, True, True, True):
        sample.advantage = math.nan if broken else good
        before = [_local(p).clone() for p in weights]
        try:
            row = updater.update(groups, lambda _: None)
        except InputError as error:
            found["stopped"] = str(error)
            break
        pairs = zip(before, map(_local, weights), strict=True)
        found["norms"].append(row["grad_norm"])
        found["moved"].append(not all(torch.equal(a, b) for a, b in pairs))
    found["bad_updates"] = updater.bad_updates
    return found


def _local(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave(0)
