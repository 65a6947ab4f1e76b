#!/usr/bin/env bash
# verl's own FSDP engine with and without the hooks, on the CPU: differences and seconds.
#   bash bench/peers/verl.sh [DIR] [ARGUMENTS of compare_verl.py]    default DIR: a temporary one
# DIR/env gets an environment of its own: torch in the version of constraints/cpu.txt, verl without
# what it only needs on GPUs, and the transformers that verl asks for, not that of our trainer. Once
# it is there it is used again. VERL and TRANSFORMERS pick other versions. Needs Python 3.11 or 3.12.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
if [ $# -ge 1 ] && [ "${1#-}" = "$1" ]; then
  folder=$1
  shift
else
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
fi
env=$folder/env
pip=("$env/bin/python" -m pip install -qq --disable-pip-version-check)
if [ ! -e "$env/.installed" ]; then
  mkdir -p "$folder"
  "${PYTHON:-python3}" -m venv "$env"
  # torch first, alone, so that nothing else decides which build of it is installed
  "${pip[@]}" $(grep -E '^(torch|torchvision)==' "$root/constraints/cpu.txt")
  # papo_fast with all that it asks for, and what verl 0.9.1 imports for FSDP, within verl's bounds:
  # pip refuses if the two do not fit. verl itself would bring what only GPUs and loggers need.
  "${pip[@]}" "$root" "transformers==${TRANSFORMERS:-5.9.0}" 'tensordict>=0.8,<=0.10' 'ray>=2.41' \
    accelerate cachetools codetiming dill fastapi hydra-core pandas peft psutil 'pyarrow>=19' pyzmq \
    torchdata uvicorn
  "${pip[@]}" --no-deps "verl==${VERL:-0.9.1}"
  # On the CPU torchvision's wheel imports only with what this file declares; see there.
  site=$("$env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  cp "$root/papo_fast/rollout/vllm_on_cpu/sitecustomize.py" "$site/papo_fast_torchvision.py"
  echo 'import papo_fast_torchvision' > "$site/papo_fast_torchvision.pth"
  touch "$env/.installed"
fi
"${pip[@]}" --no-deps --force-reinstall "$root"  # as the tree is now
export PYTHONPATH="$root/tests" OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
"$env/bin/python" "$root/bench/peers/compare_verl.py" "$@"
