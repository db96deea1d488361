# shellcheck shell=bash
# Sourced by dist_train.sh and dist_test.sh.

# What usage messages say of the environment.
TORCHRUN_ENVIRONMENT="environment:
  NNODES       machines [1]; start this script once on each of them
  NODE_RANK    number of this machine, from 0 [0]
  MASTER_ADDR  host name of machine 0 [127.0.0.1]
  PORT         port on machine 0 [a free one on a single machine, else 29500]
  PYTHON       interpreter [python]"

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
