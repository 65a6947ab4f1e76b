"""GPU types: memory that torch can see, and the data sheets' dense bfloat16 rate and bandwidth."""

from __future__ import annotations

from dataclasses import dataclass

from papo_fast.errors import InputError

GIB = 2**30


@dataclass(frozen=True)
class GPU:
    """`memory` in bytes, `flops` per second in dense bfloat16, `bandwidth` in bytes per second."""

    name: str
    memory: int
    flops: float
    bandwidth: float


GPUS = {
    name: GPU(name, int(gib * GIB), tflops * 1e12, gbs * 1e9)
    for name, gib, tflops, gbs in (
        ("a100-40g", 39.4, 312, 1555),
        ("a100", 79.1, 312, 2039),
        ("h100", 79.1, 989, 3350),
        ("h200", 139.8, 989, 4800),
        ("b200", 178.3, 2250, 8000),
        ("l40s", 44.4, 362, 864),
        ("rtx4090", 23.5, 165, 1008),
        ("mi300x", 191.7, 1307, 5300),
    )
}


def find_gpu(name: str, memory: float = 0, tflops: float = 0, bandwidth: float = 0) -> GPU:
    """A listed type, or one like it.

    Args:
        memory, tflops, bandwidth: in GiB, dense bfloat16 TFLOP/s and GB/s, where not 0 in place of
            the type's own.

    Raises `InputError` for a type that is not listed, and for numbers of no GPU.
    """
    if name.lower() not in GPUS:
        raise InputError(
            f"gpu is {name!r}: expected one of {', '.join(GPUS)}; for another, pass --gpu-memory, "
            "--gpu-tflops and --gpu-bandwidth"
        )
    given = {"memory": memory, "tflops": tflops, "bandwidth": bandwidth}
    for what, value in given.items():
        if value and not 1 <= value <= 1e6:
            raise InputError(f"gpu_{what} is {value}: expected a number from 1 to 1e6")
    known = GPUS[name.lower()]
    if not any(given.values()):
        return known
    return GPU(
        "GPU",
        int(memory * GIB) or known.memory,
        tflops * 1e12 or known.flops,
        bandwidth * 1e9 or known.bandwidth,
    )
