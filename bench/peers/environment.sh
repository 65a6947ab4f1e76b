# What the scripts beside this one share; each of them sources it, with its own arguments.
# After that `folder` is DIR, or a temporary one, "$@" holds the arguments behind it, `env` is the
# environment in DIR, and `pip` installs into it.
case "${1:-}" in
-h | --help) # what the script says of itself at its head, before anything is installed
  sed -n '2,/^[^#]/{s/^# \{0,1\}//p;}' "$0"
  exit 0
  ;;
esac
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
if [ $# -ge 1 ] && [ "${1#-}" = "$1" ]; then
  folder=$1
  shift
else
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
fi
mkdir -p "$folder"
env=$folder/env
pip=("$env/bin/python" -m pip install -qq --disable-pip-version-check)

# An environment with torch alone, so that nothing else decides which build of it is installed.
make_environment() {
  "${PYTHON:-python3}" -m venv "$env"
  "${pip[@]}" $(grep -E '^(torch|torchvision)==' "$root/constraints/cpu.txt")
}

# The last step: an environment that has $env/.installed is whole, and used again.
finish_environment() {
  # On the CPU torchvision's wheel imports only with what this file declares; see there.
  site=$("$env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  cp "$root/papo_fast/rollout/vllm_on_cpu/sitecustomize.py" "$site/papo_fast_torchvision.py"
  echo 'import papo_fast_torchvision' > "$site/papo_fast_torchvision.pth"
  touch "$env/.installed"
}

# compare NAME ARGUMENTS: runs compare_NAME.py with papo_fast as the tree is now.
compare() {
  "${pip[@]}" --no-deps --force-reinstall "$root"
  export PYTHONPATH="${PYTHONPATH_OF_PEER:+$PYTHONPATH_OF_PEER:}$root/tests" OMP_NUM_THREADS=1
  export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
  "$env/bin/python" "$root/bench/peers/compare_$1.py" "${@:2}"
}
