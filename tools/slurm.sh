# shellcheck shell=bash
# Sourced by slurm_train.sh and slurm_test.sh.

# What usage messages say of the environment.
SLURM_ENVIRONMENT="environment:
  GPUS           processes in all, one per GPU [8]
  GPUS_PER_NODE  processes on each machine [8]
  CPUS_PER_TASK  cores of each process [5]
  SRUN_ARGS      further arguments of srun; --gres=none for a partition without GPUs []
  MASTER_PORT    port on the first machine [from the number of the job]
  PYTHON         interpreter [python]"

# run_on_slurm PARTITION JOB_NAME SCRIPT [ARGUMENT...]: a job of that many processes of SCRIPT.
run_on_slurm() {
    local partition=$1 job_name=$2
    shift 2
    local gpus_per_node=${GPUS_PER_NODE:-8}
    # Several arguments in one variable, split at white space.
    local extra
    read -r -a extra <<<"${SRUN_ARGS:-}"

    PYTHONPATH="$TOOLS/..${PYTHONPATH:+:$PYTHONPATH}" \
        exec srun \
        --partition="$partition" \
        --job-name="$job_name" \
        --gres="gpu:$gpus_per_node" \
        --ntasks="${GPUS:-8}" \
        --ntasks-per-node="$gpus_per_node" \
        --cpus-per-task="${CPUS_PER_TASK:-5}" \
        --kill-on-bad-exit=1 \
        ${extra[@]+"${extra[@]}"} \
        "${PYTHON:-python}" -u "$@"
}
