#!/usr/bin/env bash
# The trainer on all GPUs of this machine, or in NPROC processes.
#
#     NPROC=2 bash examples/torchrun.sh tiny
#     bash examples/torchrun.sh papo-g-7b --model.path Qwen/Qwen2.5-VL-7B-Instruct --data.train ViRL39K.parquet
#
# On several machines, the same on each with its own NODE_RANK (from 0) and the first one's address:
#
#     NNODES=2 NODE_RANK=0 MASTER=10.0.0.1:29500 bash examples/torchrun.sh papo-g-7b ...
#
# A run that was killed goes on from its last checkpoint when the same command is repeated.
set -euo pipefail
cd "$(dirname "$0")/.."

GPUS=$(nvidia-smi -L 2>/dev/null | wc -l || true)
NPROC=${NPROC:-$((GPUS > 0 ? GPUS : 1))}
where=(--standalone)
if [ "${NNODES:-1}" -gt 1 ]; then
  where=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "${MASTER%:*}" --master-port "${MASTER#*:}")
fi
exec "${PYTHON:-.venv/bin/python}" -m torch.distributed.run "${where[@]}" --nproc-per-node "$NPROC" \
  -m papo_fast train "$@" --resume
