"""The environment that vLLM needs, in this process or for one that is started."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import MutableMapping
from pathlib import Path

from papo_fast.rollout.vllm_on_cpu import sitecustomize
from papo_fast.rollout.vllm_requests import require_vllm

# Holds a sitecustomize.py for vLLM's processes, and nothing else; see there.
ON_CPU = Path(__file__).parent / "vllm_on_cpu"


def set_environment(environment: MutableMapping[str, str], *, on_cpu: bool) -> None:
    """Set in `environment` what vLLM reads from it; what the user has set stays."""
    defaults = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    if on_cpu:
        # threads are left to OMP_NUM_THREADS and torch: pinned ones would sit on each other's
        # cores, since every rank would pin its own to the same
        defaults["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        paths = environment.get("PYTHONPATH", "").split(os.pathsep)
        if str(ON_CPU) not in paths:
            environment["PYTHONPATH"] = os.pathsep.join([str(ON_CPU), *filter(None, paths)])
    for name, value in defaults.items():
        environment.setdefault(name, value)


def prepare_this_process(*, on_cpu: bool) -> None:
    """Before vLLM is first imported here.

    Raises `InputError` where it is not installed.
    """
    require_vllm()
    sitecustomize.install()
    set_environment(os.environ, on_cpu=on_cpu)
    # until vLLM has read its level from the environment, its notes about triton pass
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
    warnings.filterwarnings("ignore", "`torch.distributed.reduce_op`", FutureWarning)
    # weights go straight from the policy's tensors to the engine's: one process for both
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
