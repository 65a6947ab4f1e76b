#!/usr/bin/env bash
# The Triton kernels on this machine's GPU: correctness, then times, memory and block sizes.
#   bash bench/gpu.sh OUT_DIR [--quick]      under 9 minutes; --quick under 2
# Needs torch >= 2.11 and triton >= 3.6, nothing else and no network. What was measured so far is in
# OUT_DIR/gpu.json at any time; commit OUT_DIR's content as bench/results/<gpu>/.
set -euo pipefail
if [ $# -lt 1 ] || [ "${1#-}" != "$1" ]; then
  echo 'usage: bash bench/gpu.sh OUT_DIR [--quick] [--device cpu]' >&2
  exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
shift
limit=530
for argument in "$@"; do
  if [ "$argument" = --quick ]; then limit=115; fi
done
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH="$root/kernels:$root/bench:$root/tests/kernels${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1
# The program keeps to its own budgets; this is for a GPU that hangs.
exec timeout --signal=INT --kill-after=10 "$limit" "${PYTHON:-python3}" "$root/bench/gpu.py" "$out" "$@"
