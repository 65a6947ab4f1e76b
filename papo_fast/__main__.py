"""`python -m papo_fast`, and so `torchrun --nproc-per-node 8 -m papo_fast train ...`."""

from papo_fast.cli import run

run()
