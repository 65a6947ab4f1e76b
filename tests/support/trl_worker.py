"""One of two ranks that train TRL's trainers: FOLDER holds the model, and gets `row.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from support.trl_peer import Case, row_of

CASE = Case({"gradient_accumulation_steps": 2, "beta": 0.04}, papo={"aug": "trained"}, ranks=2)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    row = row_of(CASE, folder)
    if torch.distributed.get_rank() == 0:
        (folder / "row.json").write_text(json.dumps(row))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
