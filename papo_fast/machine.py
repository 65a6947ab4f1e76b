"""What the machine has, and the command that installs what it lacks.

Needs nothing but Python, so that whatever misses a package can still say how to install it.
"""

from __future__ import annotations

import shutil
import subprocess


def gpu_names() -> list[str]:
    """Lines of `nvidia-smi -L`; empty where it is missing or fails, as the Makefile decides."""
    if shutil.which("nvidia-smi") is None:
        return []
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return done.stdout.splitlines() if done.returncode == 0 else []


def install_command(machine: str, extra: str = "") -> str:
    """The pip command that installs an extra, or what is always required, under the constraints.

    Args:
        machine: `cpu` or `gpu`, which have constraints of their own.
    """
    target = f"'.[{extra}]'" if extra else "."
    isolation = " --no-build-isolation" if extra == "flash" else ""
    return f"pip install -c constraints/{machine}.txt{isolation} -e {target}"
