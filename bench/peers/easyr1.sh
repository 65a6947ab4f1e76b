#!/usr/bin/env bash
# EasyR1's own actor with and without the hook, on the CPU: differences and seconds.
#   bash bench/peers/easyr1.sh [DIR] [ARGUMENTS of compare_easyr1.py]    default DIR: a temporary one
# EASYR1 names a checkout; without it the commit below is cloned into DIR. DIR/env gets an
# environment of its own, with what EasyR1's actor imports and the transformers that EasyR1 asks for
# (below 5). Once it is there it is used again. Needs Python 3.11 or 3.12.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
commit=b44b311b669bf1fd1aa2fc36f2251482ba33cb16
if [ $# -ge 1 ] && [ "${1#-}" = "$1" ]; then
  folder=$1
  shift
else
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
fi
mkdir -p "$folder"
if [ -z "${EASYR1:-}" ]; then
  EASYR1=$folder/EasyR1
  if [ ! -e "$EASYR1/verl" ]; then
    git clone -q https://github.com/hiyouga/EasyR1 "$EASYR1"
    git -C "$EASYR1" checkout -q "$commit"
  fi
fi
env=$folder/env
pip=("$env/bin/python" -m pip install -qq --disable-pip-version-check)
if [ ! -e "$env/.installed" ]; then
  "${PYTHON:-python3}" -m venv "$env"
  # torch first, alone, so that nothing else decides which build of it is installed
  "${pip[@]}" $(grep -E '^(torch|torchvision)==' "$root/constraints/cpu.txt")
  # papo_fast with all that it asks for, and what EasyR1's actor imports; EasyR1's own list has
  # flash-attn and vLLM
  "${pip[@]}" "$root" "transformers${TRANSFORMERS:-<5}" tensordict 'ray>=2.41' \
    accelerate codetiming einops omegaconf pandas peft psutil torchdata
  # On the CPU torchvision's wheel imports only with what this file declares; see there.
  site=$("$env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  cp "$root/papo_fast/rollout/vllm_on_cpu/sitecustomize.py" "$site/papo_fast_torchvision.py"
  echo 'import papo_fast_torchvision' > "$site/papo_fast_torchvision.pth"
  touch "$env/.installed"
fi
"${pip[@]}" --no-deps --force-reinstall "$root"  # as the tree is now
export PYTHONPATH="$EASYR1:$root/tests" OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
"$env/bin/python" "$root/bench/peers/compare_easyr1.py" "$@"
