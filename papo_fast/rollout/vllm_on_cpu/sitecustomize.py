"""Mends torchvision where torch is a CPU build and the wheel, as the index has it, a CUDA one.

vLLM brings torchvision, and transformers imports it where it finds it. Its compiled part does not
load then, operators that it would define are missing, and `import torchvision` fails on that alone;
torchaudio and torchcodec fail likewise and are needed by nobody here. This file declares the
operators when torchvision is first imported, and hides the other two packages.

The command line and the vLLM engines run it (importing `papo_fast` alone does not), and `make` has
processes of .venv run a copy. Python also runs a `sitecustomize` on its path at start-up, and so
this one reaches the processes that vLLM starts:
`papo_fast.rollout.vllm_setup` puts this folder, which holds nothing else, on their PYTHONPATH.
Where torch is a CUDA build, or torchvision is not or is not there, nothing happens.
"""

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def wheels_disagree() -> bool:
    """Read off their version files: importing torch in every process would cost a second."""
    # not util.find_spec, which would ask DeclareOperators
    torch, torchvision = map(importlib.machinery.PathFinder.find_spec, ("torch", "torchvision"))
    if torch is None or torchvision is None or not torch.origin or not torchvision.origin:
        return False
    spec = importlib.util.spec_from_file_location("_", Path(torch.origin).with_name("version.py"))
    version = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(version)
    cpu = version.cuda is None and getattr(version, "hip", None) is None
    its_version = Path(torchvision.origin).with_name("version.py")
    return cpu and "+cu" in its_version.read_text(encoding="utf-8")


class DeclareOperators:
    """A finder that finds nothing: it prepares the first import of torchvision."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            declare_operators()


def declare_operators() -> None:
    import torch

    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):  # another copy of this file may have
            torch.library.define(f"torchvision::{name}", SCHEMA)


def install() -> None:
    if "torchvision" in sys.modules or not wheels_disagree():
        return
    if not any(type(finder).__name__ == "DeclareOperators" for finder in sys.meta_path):
        sys.modules.setdefault("torchaudio", None)
        sys.modules.setdefault("torchcodec", None)
        sys.meta_path.insert(0, DeclareOperators())


install()
