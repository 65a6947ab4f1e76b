#!/usr/bin/env bash
# The trainer on this machine's GPU: does each part run, is it right, how fast and how large is it.
#   bash bench/gpu_train.sh OUT_DIR [--seconds N] [--steps NAME,...] [--device cpu]
# Needs torch >= 2.11 and triton >= 3.6; what else it lacks it installs from wheels/, which
# bench/gpu_wheels.sh fills, into a folder of its own. No network. OUT_DIR/gpu_train.json holds at
# any time what is known so far; gpu_train.log has all output.
set -euo pipefail
if [ $# -lt 1 ] || [ "${1#-}" != "$1" ]; then
  echo 'usage: bash bench/gpu_train.sh OUT_DIR [--seconds N] [--steps NAME,...] [--device cpu]' >&2
  exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
shift
seconds=240
previous=
for argument in "$@"; do
  case "$previous" in --seconds) seconds=$argument ;; esac
  case "$argument" in --seconds=*) seconds=${argument#*=} ;; esac
  previous=$argument
done
python=${PYTHON:-python3}
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH="$root:$root/kernels:$root/bench${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
# whether there is a GPU is then asked of the driver's library, which leaves the process forkable
export PYTORCH_NVML_BASED_CUDA_CHECK=1
wheels=${WHEELS:-$root/wheels}
if ! compgen -G "$wheels/*.whl" > /dev/null; then
  echo "no wheels in $wheels: what is installed has to do (bench/gpu_wheels.sh collects them)"
else
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  if "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir \
    --disable-pip-version-check --target "$site" "$wheels"/*.whl; then
    export PYTHONPATH="$site:$PYTHONPATH"
    echo "installed $(ls "$wheels"/*.whl | wc -l) wheels of $wheels for this run"
  else
    echo "the wheels of $wheels could not be installed: what is installed has to do" >&2
  fi
fi
# The program keeps to its own budget; this is for a machine that hangs.
timeout --signal=INT --kill-after=10 $((seconds + 30)) "$python" "$root/bench/gpu_train.py" "$out" "$@"
