#!/usr/bin/env bash
# Train on several GPUs of one machine or of several, or in several processes on the CPU.
set -euo pipefail

if [ "$#" -lt 2 ]; then
    cat >&2 <<USAGE
usage: $0 CONFIG GPUS [arguments of tools/train.py]
  GPUS  processes on this machine: one per GPU, or, without a GPU, that many on the CPU
environment:
  NNODES       machines [1]; start this script once on each of them
  NODE_RANK    number of this machine, from 0 [0]
  MASTER_ADDR  host name of machine 0 [127.0.0.1]
  PORT         port on machine 0 [a free one on a single machine, else 29500]
  PYTHON       interpreter [python]
USAGE
    exit 2
fi

CONFIG=$1
GPUS=$2
TOOLS=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=tools/torchrun.sh
source "$TOOLS/torchrun.sh"

run_distributed "$GPUS" "$TOOLS/train.py" "$CONFIG" --launcher pytorch "${@:3}"
