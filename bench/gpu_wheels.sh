#!/usr/bin/env bash
# Collects the wheels that the trainer needs on a GPU machine without network, for gpu_train.sh.
#   bash bench/gpu_wheels.sh [DIR]      default: wheels/ of the repository, which git ignores
# They are for CPython 3.12 on x86-64 Linux, in the versions of constraints/cpu.txt. What an image
# with torch >= 2.11 and an older transformers brings (torch, triton, numpy, pyarrow, tokenizers,
# huggingface-hub, rich, matplotlib, scikit-learn, ...) is left out.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:-$root/wheels}
python=${PYTHON:-python3}
most=$((35 << 20))

wheels=(
  transformers                                           # the image's lacks mm_encoder_outputs
  tyro docstring-parser typeguard                        # the command line
  datasets dill multiprocess torchdata                   # data
  math-verify latex2sympy2-extended                      # rewards
  peft liger-kernel cut-cross-entropy trl                # optional parts, and what they compare with
)
sdists=(antlr4-python3-runtime)  # published without a wheel; pure Python, so one made here serves
platforms=(manylinux_2_28_x86_64 manylinux_2_27_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64
  manylinux1_x86_64)

pinned() {
  grep -E "^$1==" "$root/constraints/cpu.txt" || { echo "constraints/cpu.txt lacks $1" >&2; exit 1; }
}

mkdir -p "$folder"
rm -f "$folder"/*.whl  # two versions of one package would stop the installation there
names=()
for name in "${wheels[@]}"; do names+=("$(pinned "$name")"); done
"$python" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 \
  --implementation cp "${platforms[@]/#/--platform=}" -d "$folder" "${names[@]}"
for name in "${sdists[@]}"; do
  "$python" -m pip wheel -q --no-deps -w "$folder" "$(pinned "$name")"
done
ls -l "$folder" | awk 'NR > 1 { printf "%9.1f KB  %s\n", $5 / 1000, $NF }'
bytes=$(cat "$folder"/*.whl | wc -c)
echo "$(ls "$folder"/*.whl | wc -l) wheels, $((bytes / 1000000)) MB, in $folder"
if [ "$bytes" -gt "$most" ]; then
  echo "they are larger than $((most >> 20)) MB together" >&2
  exit 1
fi
