#!/usr/bin/env bash
# verl's own FSDP engine with and without the hooks, on the CPU: differences and seconds.
#   bash bench/peers/verl.sh [DIR] [ARGUMENTS of compare_verl.py]    default DIR: a temporary one
# DIR/env gets an environment of its own: torch in the version of constraints/cpu.txt, verl without
# what it only needs on GPUs, and the transformers that verl asks for, not that of our trainer. Once
# it is there it is used again. VERL and TRANSFORMERS pick other versions. Needs Python 3.11 or 3.12.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
if [ ! -e "$env/.installed" ]; then
  make_environment
  # papo_fast with all that it asks for, and what verl 0.9.1 imports for FSDP, within verl's bounds:
  # pip refuses if the two do not fit. verl itself would bring what only GPUs and loggers need.
  "${pip[@]}" "$root" "transformers==${TRANSFORMERS:-5.9.0}" 'tensordict>=0.8,<=0.10' 'ray>=2.41' \
    accelerate cachetools codetiming dill fastapi hydra-core pandas peft psutil 'pyarrow>=19' pyzmq \
    torchdata uvicorn
  "${pip[@]}" --no-deps "verl==${VERL:-0.9.1}"
  finish_environment
fi
compare verl "$@"
