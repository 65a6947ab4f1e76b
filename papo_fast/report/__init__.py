"""What a run looks like afterwards: a table in the terminal and one picture, from its files alone.

A run directory holds `config.json`, `metrics.jsonl`, `examples.jsonl`, `examples/*.png`,
`summary.json` (at the end) and `report.png` (drawn here).
"""

from papo_fast.report.figure import has_report, write_report
from papo_fast.report.table import print_run, print_summary
from papo_fast.run.files import Run, read_run, save_examples

__all__ = [
    "Run",
    "has_report",
    "print_run",
    "print_summary",
    "read_run",
    "save_examples",
    "write_report",
]
