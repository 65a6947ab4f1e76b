"""Compiles the Triton kernels with every version of Triton that they have to run on.

    python tests/kernels/aot_versions.py [VERSION ...]     # installs each into a temporary folder

It prints what spills, and fails where a kernel does not compile. CI compiles with the installed
version only (`test_triton.py`).
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

VERSIONS = ("3.6.0", "3.7.1", "3.8.0", "3.9.0")
HERE = Path(__file__).parent
REPORT = """
import aot, triton
for name, row in (table := aot.measure()).items():
    if row["spills"]:
        print(f"  {name:36s}", *(f"{k} {v:6d}" for k, v in row.items()))
print(f"  triton {triton.__version__}: {len(table)} kernels compiled")
"""


def compile_with(version, folder):
    """Whether all kernels compile with that version, which goes to `folder`."""
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder]
    subprocess.run([*install, f"triton=={version}"], check=True)
    path = os.pathsep.join([folder, str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "TRITON_CACHE_DIR": f"{folder}/cache"}
    return subprocess.run([sys.executable, "-c", REPORT], env=environment).returncode == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("versions", nargs="*", default=VERSIONS, metavar="VERSION")
    wrong = []
    for version in parser.parse_args().versions:
        print(f"triton {version}:", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            if not compile_with(version, folder):
                wrong.append(version)
    if wrong:
        sys.exit(f"error: kernels do not compile with triton {', '.join(wrong)}")


if __name__ == "__main__":
    main()
