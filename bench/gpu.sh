#!/usr/bin/env bash
# The Triton kernels on this machine's GPU: correctness, then times, memory and block sizes.
#   bash bench/gpu.sh OUT_DIR [--seconds N] [--quick] [--only SECTION,SECTION] [--device cpu]
# Needs torch >= 2.11 and triton >= 3.6, nothing else and no network. It uses what lies in the
# repository's root: carried/states.pt, from bench/carry_states.py, and the peers in wheels/*.whl.
# What was measured so far is in OUT_DIR/gpu.json at any time; commit OUT_DIR's content as
# bench/results/<gpu>/.
set -euo pipefail
if [ $# -lt 1 ] || [ "${1#-}" != "$1" ]; then
  echo 'usage: bash bench/gpu.sh OUT_DIR [--seconds N] [--quick] [--only SECTION] [--device cpu]' >&2
  exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
shift
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
peers=()
# Nothing else of what lies there: a second transformers would have to fit this Python's packages.
wheels=$(compgen -G "$root/wheels/*.whl" | grep -E '/(liger_kernel|cut_cross_entropy|trl|datasets|dill|multiprocess)-' || true)
if [ -n "$wheels" ]; then
  folder=$root/wheels/installed
  rm -rf "$folder"
  if xargs -d '\n' "$python" -m pip install -q --disable-pip-version-check --no-index --no-deps \
    --no-compile --target "$folder" <<<"$wheels"; then
    peers=(--peers "$folder")
  else
    echo 'wheels/ could not be installed, so peers are only those that this Python has' >&2
  fi
else
  echo 'There are no wheels of peers in wheels/, so peers are only those that this Python has.'
fi
export PYTHONPATH="$root/kernels:$root/bench:$root/tests/kernels${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1
exec "$python" "$root/bench/gpu.py" "$out" "${peers[@]}" "$@"
