"""How time, extra memory and errors of a `Way` are taken."""

import contextlib
import ctypes
import gc
import math
import platform
from pathlib import Path

import torch

from papo_kernels import record_certificates, token_stats

GRADIENTS = ("dH", "dH_aug", "dW")


class PeakMemory:
    """Bytes that the process, or the GPU, held at most since `start`, beyond what it held then.

    On the CPU by the kernel's own high-water mark of resident memory (Linux), which no sampling can
    miss; memory that was freed before is handed back first, so that using it again counts.
    """

    def __init__(self, device="cpu"):
        self.cuda = torch.device(device).type == "cuda"
        self.before = None

    def start(self):
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        self.before = _status("VmRSS")

    def read(self):
        if self.cuda:
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - self.before
        return max(0, _status("VmHWM") - self.before)


def _status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(key)) * 1024


def size(tensors):
    return sum(x.numel() * x.element_size() for x in tensors)


class Exact:
    """Float64 statistics of a case, and gradients of the losses that ways differentiate."""

    def __init__(self, case):
        self.case = case
        self.leaves = [x.detach().double().requires_grad_() for x in case.leaves]
        hidden, aug_hidden, weight = self.leaves
        stats = token_stats(
            hidden, weight, case.targets, aug_hidden=aug_hidden, backend="reference"
        )
        self.outputs = stats._asdict()
        self.known = {}

    def gradients(self, kind):
        if kind not in self.known:
            upstream = self.case.upstream(kind)
            self.known[kind] = torch.autograd.grad(
                [self.outputs[o] for o in upstream],
                self.leaves,
                [u.double() for u in upstream.values()],
                retain_graph=True,
            )
        return self.known[kind]

    def errors(self, way):
        """{name: error} of one call of `way` on the case, and what `record_certificates` saw.

        Statistics: largest error relative to max(1, |value|). Gradients: relative Frobenius norm.
        """
        with record_certificates() as certificate:
            outputs, grads = way(self.case)
        found = {o: statistic_error(x, self.outputs[o]) for o, x in outputs.items()}
        if way.upstream is not None:
            exact = self.gradients(way.upstream)
            for name, got, want in zip(GRADIENTS, grads, exact, strict=True):
                found[name] = gradient_error(got, want)
        kept = certificate.kept if certificate.rows else None
        return found, kept


def statistic_error(got, want):
    want = want.detach()
    return ((got.double() - want).abs() / want.abs().clamp_min(1)).max().item()


def gradient_error(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


def worst(errors, names):
    """Largest of the named errors that exist; None without any. NaN is larger than all."""
    found = [errors[n] for n in names if n in errors]
    if any(math.isnan(x) for x in found):
        return math.nan
    return max(found, default=None)


def machine(device="cpu"):
    """What a reader needs to judge a time by; names no host and no path."""
    about = {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    with contextlib.suppress(ImportError):
        import triton

        about["triton"] = triton.__version__
    if torch.device(device).type == "cuda":
        about["gpu"] = torch.cuda.get_device_name()
        about["cuda"] = torch.version.cuda or torch.version.hip
    return about


def _processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        return platform.processor()
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), "")
