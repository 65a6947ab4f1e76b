"""papo-fast on a rank that may be killed in its second step; run by test_faults.py.

python fault_worker.py ARGUMENTS OF papo-fast
"""

import os
import signal

from papo_fast.cli import run
from papo_fast.parallel import rank
from papo_fast.trainer import Trainer

step = Trainer.step


def step_or_die(self, number):
    if number == 2 and rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, number)


if __name__ == "__main__":
    Trainer.step = step_or_die
    run()
