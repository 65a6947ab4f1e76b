"""One rank of a test: three updates on a fixed experience; the main rank saves what came out.

    python parallel_worker.py CONFIG.pt OUT

Run by test_parallel.py, with torchrun's variables in the environment.
"""

import sys
from pathlib import Path

import torch
from torch.distributed import barrier

from papo_fast.experience import Experience, score_without_gradient
from papo_fast.parallel import is_main, process_group, world_size
from papo_fast.policy import Policy
from papo_fast.update import Updater


def main(job_path: str, out: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)  # adapters start the same however many ranks there are
    job = torch.load(job_path, weights_only=False)  # written by the test itself
    config, device = job["config"], torch.device("cpu")
    with process_group(device):
        policy = Policy.load(config.model, job["bans"], device, config.parallel)
        reference = policy.reference(config)
        experience = Experience(**job["experience"])
        updater = Updater(config, policy, reference, total_updates=3)
        score_without_gradient(experience, policy, reference, config, on_policy=False)
        n, rows = len(experience) // 3, []
        for i in range(3):
            rows.append(updater.update(experience, range(i * n, (i + 1) * n), lambda _: None))
        policy.save(Path(out))
        if is_main():
            torch.save(rows, Path(out) / "rows.pt")
        if world_size() > 1:
            barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])
