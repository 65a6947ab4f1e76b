"""gpu.json, which all sections of `bench/gpu.sh` write to. Knows neither torch nor a GPU."""

import json
from pathlib import Path

# How a process says that it cannot go on, though a fresh one could; and that there is no GPU.
BROKEN, HUNG, NO_GPU = 70, 71, 72


class Results:
    """The content of gpu.json, written after each change; only one process holds it at a time."""

    LISTS = (
        "sections", "checks", "states", "ceilings", "times", "profiles", "tools", "sweep",
        "winners", "clocks", "left_out", "failures",
    )  # fmt: skip

    def __init__(self, folder, fresh=False):
        self.path = Path(folder) / "gpu.json"
        self.content = {"machine": {}, **{k: [] for k in self.LISTS}, "tried": {}, "current": None}
        if self.path.exists() and not fresh:
            self.content = json.loads(self.path.read_text())

    def add(self, key, record):
        self.content[key].append(record)
        self.write()

    def write(self):
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.content, indent=1) + "\n")
        partial.replace(self.path)
