#!/usr/bin/env bash
# Train on a slurm cluster, on one machine or on several.
set -euo pipefail

TOOLS=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=tools/slurm.sh
source "$TOOLS/slurm.sh"

if [ "$#" -lt 4 ]; then
    echo "usage: $0 PARTITION JOB_NAME CONFIG WORK_DIR [arguments of tools/train.py]" >&2
    echo "$SLURM_ENVIRONMENT" >&2
    exit 2
fi

run_on_slurm "$1" "$2" "$TOOLS/train.py" "$3" --work-dir "$4" --launcher slurm "${@:5}"
