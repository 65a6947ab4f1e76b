#!/usr/bin/env bash
# TRL's own trainer with and without the hooks, on the CPU: differences and seconds.
#   bash bench/peers/trl.sh [DIR] [ARGUMENTS of compare_trl.py]    default DIR: a temporary one
# DIR/env gets an environment of its own: torch in the version of constraints/cpu.txt, and TRL's
# newest release with whatever it asks for. Once it is there it is used again. TRL picks another
# version. Needs Python 3.11 or later.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
if [ ! -e "$env/.installed" ]; then
  make_environment
  "${pip[@]}" "$root" "trl${TRL:+==$TRL}" peft
  finish_environment
fi
compare trl "$@"
