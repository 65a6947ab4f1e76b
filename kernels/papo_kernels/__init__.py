"""Exact per-token statistics of one or two policies over a large vocabulary."""

from papo_kernels.api import TokenStats, token_stats

__all__ = ["TokenStats", "token_stats"]
