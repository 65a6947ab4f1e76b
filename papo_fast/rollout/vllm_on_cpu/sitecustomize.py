"""Lets vLLM start where torch is a CPU build but torchvision's wheel is the CUDA one.

The package index has torchvision for CUDA only. Its compiled part then does not load, operators
that it would define are missing, and `import torchvision`, which vLLM needs for Qwen-VL, fails on
that alone; torchaudio and torchcodec fail likewise and are needed by nobody here. This file
declares the operators when torchvision is first imported, and hides the other two packages.

Python runs a `sitecustomize` on its path at start-up, and so this one reaches the processes that
vLLM starts: `papo_fast.rollout.vllm_setup` puts this folder, which holds nothing else, on the
PYTHONPATH of runs that sample with vLLM. Beside vLLM all that imports transformers needs it, so
`make` has .venv run a copy at start-up, too. Where torch is a CUDA build, or torchvision's compiled
part loads, nothing happens.
"""

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def torch_is_cpu_build() -> bool:
    """Read off torch's version file: importing torch in every process would cost a second."""
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        return False
    spec = importlib.util.spec_from_file_location("_", Path(torch.origin).with_name("version.py"))
    version = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(version)
    return version.cuda is None and getattr(version, "hip", None) is None


class DeclareOperators:
    """A finder that finds nothing: it prepares the first import of torchvision."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            spec = importlib.machinery.PathFinder.find_spec(name)
            if spec is not None:
                declare_operators(Path(spec.origin).parent)
        return None


def declare_operators(torchvision: Path) -> None:
    import torch

    try:
        for compiled in torchvision.glob("_C*.so"):
            torch.ops.load_library(str(compiled))
    except OSError:  # built against CUDA's libraries
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", SCHEMA)


def install() -> None:
    # by name: `make` copies this file into .venv, where a start-up hook imports it as well
    present = any(type(finder).__name__ == "DeclareOperators" for finder in sys.meta_path)
    if torch_is_cpu_build() and "torchvision" not in sys.modules and not present:
        sys.modules.setdefault("torchaudio", None)
        sys.modules.setdefault("torchcodec", None)
        sys.meta_path.insert(0, DeclareOperators())


install()
