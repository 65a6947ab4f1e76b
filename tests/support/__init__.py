"""What several test modules share. Tests import from here, never from one another.

`fault_worker.py`, `fork_ranks.py`, `head_worker.py` and `parallel_worker.py` are programs: tests
start them by their path.
"""

from pathlib import Path

SUPPORT = Path(__file__).parent
TESTS = SUPPORT.parent
