"""Exact per-token statistics of one or two policies over a large vocabulary."""

from papo_kernels.api import TokenStats, token_stats
from papo_kernels.certificate import Certificate, record_certificates

__all__ = ["Certificate", "TokenStats", "record_certificates", "token_stats"]
