"""PAPO (Perception-Aware Policy Optimization) for vision-language models, exact and fast."""

__version__ = "0.1.0"
