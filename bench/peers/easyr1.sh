#!/usr/bin/env bash
# EasyR1's own actor with and without the hook, on the CPU: differences and seconds.
#   bash bench/peers/easyr1.sh [DIR] [ARGUMENTS of compare_easyr1.py]    default DIR: a temporary one
# EASYR1 names a checkout; without it the commit below is cloned into DIR. DIR/env gets an
# environment of its own, with what EasyR1's actor imports and the transformers that EasyR1 asks for
# (below 5). Once it is there it is used again. Needs Python 3.11 or 3.12.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
commit=b44b311b669bf1fd1aa2fc36f2251482ba33cb16
if [ -z "${EASYR1:-}" ]; then
  EASYR1=$folder/EasyR1
  if [ ! -e "$EASYR1/verl" ]; then
    git clone -q https://github.com/hiyouga/EasyR1 "$EASYR1"
    git -C "$EASYR1" checkout -q "$commit"
  fi
fi
if [ ! -e "$env/.installed" ]; then
  make_environment
  # papo_fast with all that it asks for, and what EasyR1's actor imports; EasyR1's own list has
  # flash-attn and vLLM
  "${pip[@]}" "$root" "transformers${TRANSFORMERS:-<5}" tensordict 'ray>=2.41' \
    accelerate codetiming einops omegaconf pandas peft psutil torchdata
  finish_environment
fi
PYTHONPATH_OF_PEER=$EASYR1 compare easyr1 "$@"
