#!/usr/bin/env bash
# Train on several GPUs of one machine or of several, or in several processes on the CPU.
set -euo pipefail

TOOLS=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=tools/torchrun.sh
source "$TOOLS/torchrun.sh"

if [ "$#" -lt 2 ]; then
    cat >&2 <<USAGE
usage: $0 CONFIG GPUS [arguments of tools/train.py]
  GPUS  processes on this machine: one per GPU, or, without a GPU, that many on the CPU
$TORCHRUN_ENVIRONMENT
USAGE
    exit 2
fi

CONFIG=$1
GPUS=$2
run_distributed "$GPUS" "$TOOLS/train.py" "$CONFIG" --launcher pytorch "${@:3}"
