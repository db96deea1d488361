# shellcheck shell=bash
# Sourced by dist_train.sh and dist_test.sh.

# run_distributed PROCESSES SCRIPT [ARGUMENT...]: PROCESSES processes of SCRIPT on this machine.
run_distributed() {
    local processes=$1
    shift
    if ! [[ "$processes" =~ ^[1-9][0-9]*$ ]]; then
        echo "GPUS must be a whole number of at least 1, got '$processes'" >&2
        return 2
    fi

    local rendezvous
    if [ "${NNODES:-1}" -eq 1 ] && [ -z "${PORT:-}" ]; then
        # A free port, so that jobs can share the machine.
        rendezvous=(--standalone)
    else
        local port="${PORT:-29500}"
        # torchrun itself says so only at the end of a long traceback.
        if [ "${NODE_RANK:-0}" -eq 0 ] && (: > "/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
            echo "port $port is in use on this machine, by another run perhaps: set PORT to a free one" >&2
            return 2
        fi
        rendezvous=(
            --nnodes "${NNODES:-1}"
            --node-rank "${NODE_RANK:-0}"
            --master-addr "${MASTER_ADDR:-127.0.0.1}"
            --master-port "$port"
        )
    fi

    # torchrun would give every process one thread, and on the CPU that is what the model runs on.
    local threads=$(($(nproc) / processes))
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"

    PYTHONPATH="$TOOLS/..${PYTHONPATH:+:$PYTHONPATH}" \
        exec "${PYTHON:-python}" -m torch.distributed.run \
        "${rendezvous[@]}" --nproc-per-node "$processes" "$@"
}
