"""What one step of `gpu_train.py` writes down as it goes, so that a crash loses nothing."""

import json
import math
import os
import time
from contextlib import contextmanager
from pathlib import Path

import torch


class LeftOut(Exception):
    """A step, or a part of one, that cannot run here; the reason is no failure."""


class Recorder:
    """Numbers, checks and remarks of one step, on disk after every change.

    Args:
        path: JSON file.
        device: `cuda` or `cpu`, where the step runs.
        small: sizes for a machine without a GPU.
        folder: the step's own, and `shared`: what several steps may use, both temporary.
    """

    def __init__(self, path, device, small, folder, shared):
        self.path, self.small = Path(path), small
        self.folder, self.shared = Path(folder), Path(shared)
        self.content = {"numbers": {}, "checks": [], "remarks": [], "failures": []}
        self._device = device

    @property
    def device(self):
        return torch.device(self._device)

    @property
    def cuda(self):
        return self._device == "cuda"

    def write(self):
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.content, indent=1))
        os.replace(partial, self.path)

    def note(self, name, value):
        """A number (or a short text, or a dict of them) to be kept."""
        self.content["numbers"][name] = rounded(value)
        print(f"    {name}: {_short(value)}", flush=True)
        self.write()

    def check(self, name, value, most):
        """Keep a number that must be at most `most`; where it is not, the step fails at its end."""
        good = value <= most  # not for NaN
        entry = {"name": name, "value": rounded(value), "most": most, "ok": good}
        self.content["checks"].append(entry)
        verdict = "" if good else "  WRONG"
        print(f"    {name}: {_short(value)}, at most {most:g}{verdict}", flush=True)
        self.write()

    def remark(self, text):
        self.content["remarks"].append(text)
        print(f"    {text}", flush=True)
        self.write()

    @contextmanager
    def part(self, name):
        """A part whose failure is written down and does not stop the step's other parts."""
        start = time.perf_counter()
        print(f"  {name}", flush=True)
        try:
            yield
        except LeftOut as reason:
            self.remark(f"{name} is left out: {reason}")
        except Exception as error:
            import traceback

            traceback.print_exc()
            self.content["failures"].append({"part": name, "error": told(error)})
            self.write()
            if "CUDA error" in str(error):  # the context is lost: nothing else can run here
                raise
        finally:
            print(f"  {name}: {time.perf_counter() - start:.1f} s", flush=True)

    def seconds(self, call, repeat=3, warm=1):
        """Least wall-clock seconds of `call`, the device waited for."""
        times = []
        for i in range(warm + repeat):
            self.wait()
            start = time.perf_counter()
            call()
            self.wait()
            if i >= warm:
                times.append(time.perf_counter() - start)
        return min(times)

    def wait(self):
        if self.cuda:
            torch.cuda.synchronize()

    def peak_bytes(self):
        """Most bytes that torch's allocator held so far; None on the CPU or before CUDA ran."""
        if self.cuda and torch.cuda.is_initialized():
            return torch.cuda.max_memory_allocated()
        return None


def told(error, most=600):
    """Type and message of an error, its end where it is long."""
    text = f"{type(error).__name__}: {error}".strip()
    return text if len(text) <= most else text[: most // 3] + " … " + text[-2 * most // 3 :]


def rounded(value):
    """Numbers with six digits, in whatever holds them; what JSON has no number for as text."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return value


def _short(value):
    if isinstance(value, dict):
        return ", ".join(f"{k} {_short(v)}" for k, v in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def machine_facts(recorder):
    """What the machine is; and whether a process that was forked off gets at its GPU."""
    from importlib import metadata

    names = "torch triton numpy transformers tokenizers peft trl liger-kernel cut-cross-entropy"
    for name in names.split():
        try:
            recorder.note(name, metadata.version(name))
        except metadata.PackageNotFoundError:
            recorder.note(name, "not installed")
    recorder.note("cores", len(os.sched_getaffinity(0)))
    if not recorder.cuda:
        return
    total = torch.ones(1000, device="cuda").sum().item()
    recorder.note("gpu", torch.cuda.get_device_name())
    recorder.note("gpu_bytes", torch.cuda.get_device_properties(0).total_memory)
    recorder.check("error of a sum of ones", abs(total - 1000), 0)
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    seconds = recorder.seconds(lambda: a @ a, repeat=5, warm=3)
    recorder.note("bf16_matmul_tflops", 2 * 8192**3 / seconds / 1e12)
