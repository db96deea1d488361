#!/usr/bin/env bash
# Test on a slurm cluster, on one machine or on several.
set -euo pipefail

if [ "$#" -lt 4 ]; then
    cat >&2 <<USAGE
usage: $0 PARTITION JOB_NAME CONFIG CHECKPOINT [arguments of tools/test.py]
environment:
  GPUS           processes in all, one per GPU [8]
  GPUS_PER_NODE  processes on each machine [8]
  CPUS_PER_TASK  cores of each process [5]
  SRUN_ARGS      further arguments of srun; --gres=none for a partition without GPUs []
  MASTER_PORT    port on the first machine [from the number of the job]
  PYTHON         interpreter [python]
USAGE
    exit 2
fi

PARTITION=$1
JOB_NAME=$2
CONFIG=$3
CHECKPOINT=$4
GPUS=${GPUS:-8}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
TOOLS=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# Several arguments in one variable, split at white space.
read -r -a SRUN_EXTRA <<<"${SRUN_ARGS:-}"

PYTHONPATH="$TOOLS/..${PYTHONPATH:+:$PYTHONPATH}" \
    exec srun \
    --partition="$PARTITION" \
    --job-name="$JOB_NAME" \
    --gres="gpu:$GPUS_PER_NODE" \
    --ntasks="$GPUS" \
    --ntasks-per-node="$GPUS_PER_NODE" \
    --cpus-per-task="${CPUS_PER_TASK:-5}" \
    --kill-on-bad-exit=1 \
    ${SRUN_EXTRA[@]+"${SRUN_EXTRA[@]}"} \
    "${PYTHON:-python}" -u "$TOOLS/test.py" "$CONFIG" "$CHECKPOINT" \
    --launcher slurm "${@:5}"
