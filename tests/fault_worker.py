"""A rank of a run that something happens to; run by test_faults.py.

python fault_worker.py die -- ARGUMENTS OF papo-fast     rank 1 is killed in its second step
python fault_worker.py nan CONFIG.pt OUT                  NaN reaches one rank's sequences only
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch

from papo_fast.cli import main
from papo_fast.errors import InputError
from papo_fast.experience import Experience, score_without_gradient
from papo_fast.parallel import process_group, rank
from papo_fast.policy import Policy
from papo_fast.trainer import Trainer
from papo_fast.update import Updater


def die(arguments):
    step = Trainer.step

    def step_or_die(self, number):
        if number == 2 and rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, number)

    Trainer.step = step_or_die
    sys.exit(main(arguments))


def nan(job_path, out):
    torch.set_num_threads(1)
    job = torch.load(job_path, weights_only=False)  # written by the test itself
    config, device = job["config"], torch.device("cpu")
    with process_group(device):
        policy = Policy.load(config.model, job["bans"], device, config.parallel)
        reference = policy.reference(config)
        updater = Updater(config, policy, reference, total_updates=9)
        good = Experience(**job["experience"])
        score_without_gradient(good, policy, reference, config, on_policy=True)
        broken = Experience(**job["experience"])
        broken.ref_logprobs = good.ref_logprobs
        broken.advantages_B = good.advantages_B.clone()
        broken.advantages_B[0] = float("nan")
        found = {"batches_with_nan": 0, "norms": [], "moved": []}
        token_batch = updater._token_batch

        def seen(experience, pieces):
            tokens, mismatch = token_batch(experience, pieces)
            found["batches_with_nan"] += int(tokens.advantages.isnan().any())
            return tokens, mismatch

        updater._token_batch = seen
        weights = list(policy.parameters())
        for experience in (broken, good, broken, broken):
            before = [(p.to_local() if hasattr(p, "to_local") else p).clone() for p in weights]
            try:
                row = updater.update(experience, range(len(good)), lambda _: None)
            except InputError as error:
                found["stopped"] = str(error)
                break
            now = [p.to_local() if hasattr(p, "to_local") else p for p in weights]
            pairs = zip(before, now, strict=True)
            found["norms"].append(row["grad_norm"])
            found["moved"].append(not all(torch.equal(a, b) for a, b in pairs))
            found["bad_updates"] = updater.bad_updates
        (Path(out) / f"rank{rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    if sys.argv[1] == "die":
        die(sys.argv[3:])
    else:
        nan(*sys.argv[2:])
