#!/usr/bin/env bash
# Test on several GPUs of one machine or of several, or in several processes on the CPU.
set -euo pipefail

if [ "$#" -lt 3 ]; then
    cat >&2 <<USAGE
usage: $0 CONFIG CHECKPOINT GPUS [arguments of tools/test.py]
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
CHECKPOINT=$2
GPUS=$3
TOOLS=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=tools/torchrun.sh
source "$TOOLS/torchrun.sh"

run_distributed "$GPUS" "$TOOLS/test.py" "$CONFIG" "$CHECKPOINT" --launcher pytorch "${@:4}"
