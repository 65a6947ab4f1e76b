"""PAPO (Perception-Aware Policy Optimization) for vision-language models, exact and fast."""

__version__ = "0.1.0"

# before anything imports transformers, which imports torchvision where it is installed
from papo_fast.vllm_on_cpu import sitecustomize as _sitecustomize  # noqa: E402, F401
