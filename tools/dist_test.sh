#!/usr/bin/env bash
# Test on several GPUs of one machine or of several, or in several processes on the CPU.
set -euo pipefail

TOOLS=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=tools/torchrun.sh
source "$TOOLS/torchrun.sh"

if [ "$#" -lt 3 ]; then
    cat >&2 <<USAGE
usage: $0 CONFIG CHECKPOINT GPUS [arguments of tools/test.py]
  GPUS  processes on this machine: one per GPU, or, without a GPU, that many on the CPU
$TORCHRUN_ENVIRONMENT
USAGE
    exit 2
fi

CONFIG=$1
CHECKPOINT=$2
GPUS=$3
run_distributed "$GPUS" "$TOOLS/test.py" "$CONFIG" "$CHECKPOINT" --launcher pytorch "${@:4}"
