"""One rank of a test of options that save memory: updates with each, and what is refused.

    python options_worker.py FOLDER

FOLDER/*.pt are jobs of `parallel_worker.three_updates`, which leave what came out in a folder of
the job's name. FOLDER/refused holds configurations; what `train` says of each goes to
FOLDER/refused.rank*. Run by test_memory_options_ranks.py, with torchrun's variables.
"""

import json
import sys
from pathlib import Path

import torch
from parallel_worker import three_updates
from torch.distributed import barrier

from papo_fast.cli import leave
from papo_fast.errors import InputError
from papo_fast.launch import train
from papo_fast.model import activations
from papo_fast.parallel import process_group, rank


def main(folder: Path) -> None:
    activations.LEAST = 1  # of a small model too
    with process_group(torch.device("cpu")):
        said = []
        for config in torch.load(folder / "refused", weights_only=False):
            try:
                train(config)
            except InputError as error:
                said.append(str(error))
        (folder / f"refused.rank{rank()}").write_text(json.dumps(said))
        for job in sorted(folder.glob("*.pt")):
            three_updates(torch.load(job, weights_only=False), job.with_suffix(""))
        barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave(0)
