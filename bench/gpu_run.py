"""One section of `bench/gpu.sh`: its clock, its guards, and the results that all sections share.

Every item runs under `Run.attempt`. What it raises is written down and the next item runs. Where
CUDA itself is broken afterwards, or an item hangs, the process ends; `gpu.py` starts another one,
which goes on behind the item that is to blame.
"""

import contextlib
import gc
import math
import os
import subprocess
import threading
import time
import traceback
from pathlib import Path

import torch
from gpu_results import BROKEN, HUNG, Results

# Seconds that one item may take on a GPU; Triton's interpreter gets more.
ITEM_SECONDS = {"cuda": 45, "cpu": 600}
# Repetitions that took so long together are enough, however few.
LONG_SECONDS = 2.0
ROOT = Path(__file__).parents[1]
CLOCKS = "clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu,power.draw,pstate"


class Run(Results):
    """What a section's function works with; `ends` by `time.monotonic`."""

    def __init__(self, folder, section, ends, device, carried=None):
        super().__init__(folder)
        self.section, self.device, self.carried = section, torch.device(device), carried
        self.interpreted = self.device.type != "cuda"
        self.ends = ends
        self.tried = self.content["tried"].setdefault(section, [])

    @property
    def left(self):
        return self.ends - time.monotonic()

    def leave_out(self, what, reason):
        print(f"  left out: {what}: {reason}")
        self.add("left_out", {"section": self.section, "what": what, "reason": reason})

    def attempt(self, what, function, optional=False, again=False):
        """What `function()` returns; None where it failed, had no time, or broke a process before.

        optional: that it cannot run here is no failure, as with other people's programs.
        again: a process that goes on for another one does it too, as other items need it.
        """
        if what in self.tried and not again:
            return None
        if self.left <= 0:
            self.leave_out(what, "out of time")
            return None
        if what not in self.tried:
            self.tried.append(what)
        self.content["current"] = what
        self.write()
        # A kernel that never ends leaves no other way out.
        hung = threading.Timer(ITEM_SECONDS[self.device.type], os._exit, (HUNG,))
        hung.daemon = True
        hung.start()
        try:
            found = function()
            # Errors of kernels show at the next synchronisation: now, so that this item has them.
            self.synchronize()
            return found
        except Exception as error:
            self._failed(what, error, optional)
            return None
        finally:
            hung.cancel()
            self.content["current"] = None
            self.write()

    def _failed(self, what, error, optional):
        # Results are shown to others, whom this machine's folders do not concern.
        said = f"{type(error).__name__}: {error}".replace(str(ROOT), ".").strip()[:600]
        where = traceback.extract_tb(error.__traceback__)[-1]
        print(f"  {'left out' if optional else 'FAILED'}: {what}: {said.splitlines()[0][:200]}")
        record = {"section": self.section, "what": what, "error": said}
        record["where"] = f"{Path(where.filename).name}:{where.lineno}"
        self.add("left_out" if optional else "failures", record | {"reason": said})
        # The frames of the traceback hold the tensors that there was no memory for.
        traceback.clear_frames(error.__traceback__)
        if self.interpreted:
            return
        try:
            gc.collect()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except Exception as broken:
            print(f"  CUDA is broken after that ({type(broken).__name__}): a new process goes on")
            self.content["current"] = None
            self.write()
            os._exit(BROKEN)

    def check(self, what, function):
        """An item whose `function()` gives {name: (error, largest that is right)}, and judges it.

        An exception is a check that failed, and stands among the failures.
        """
        self.attempt(what, lambda: self.judge(what, function()))

    def judge(self, what, errors):
        """Writes down and prints which of {name: (error, largest that is right)} are too large."""
        bad = [n for n, (error, bound) in errors.items() if not error <= bound]
        record = {"section": self.section, "what": what, "failed": bad}
        record["errors"] = {n: list(map(_number, pair)) for n, pair in errors.items()}
        self.add("checks", record)
        print(f"  {what:58s} {'FAILED' if bad else 'ok'}", flush=True)
        for n in bad:
            print("    {}: error {:.2e}, bound {:.1e}".format(n, *errors[n]))

    def synchronize(self):
        if not self.interpreted:
            torch.cuda.synchronize()

    def clocks(self, when):
        """Notes what nvidia-smi says; it reads, and changes no setting."""
        if self.interpreted:
            return
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            said = subprocess.run(
                ["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader", "--id=0"],
                capture_output=True, text=True, timeout=10,
            ).stdout.strip()  # fmt: skip
            print(f"  clocks {when}: {said}")
            self.add("clocks", {"when": when, "section": self.section, "said": said})

    def seconds_of(self, function, least=0.3, most=8, warm=True):
        """{"seconds": median of repetitions, "fastest", "slowest"}; `warm`: after another one."""
        # Times in an interpreter mean nothing, warm or cold.
        if warm and not self.interpreted:
            function()
        times = []
        while len(times) < most and (len(times) < 3 or sum(times) < least):
            if sum(times) > LONG_SECONDS:
                break
            if self.interpreted:
                begin = time.perf_counter()
                function()
                times.append(time.perf_counter() - begin)
                break
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        times.sort()
        return {"seconds": times[len(times) // 2], "fastest": times[0], "slowest": times[-1]}


def _number(value):
    """JSON knows neither infinity nor NaN."""
    value = float(value)
    return value if math.isfinite(value) else str(value)
