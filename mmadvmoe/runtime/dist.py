"""Process groups for every launcher, on GPUs (NCCL) and on CPUs (gloo)."""

from __future__ import annotations

import os
import subprocess
from datetime import timedelta

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.model import is_model_wrapper
from torch import distributed as torch_dist
from torch import nn

# For each launcher, the variables that it sets and the names that PyTorch reads them under.
_LAUNCHER_VARIABLES = {
    'pytorch': {'RANK': 'RANK', 'LOCAL_RANK': 'LOCAL_RANK', 'WORLD_SIZE': 'WORLD_SIZE'},
    'slurm': {
        'RANK': 'SLURM_PROCID',
        'LOCAL_RANK': 'SLURM_LOCALID',
        'WORLD_SIZE': 'SLURM_NTASKS',
    },
    'mpi': {
        'RANK': 'OMPI_COMM_WORLD_RANK',
        'LOCAL_RANK': 'OMPI_COMM_WORLD_LOCAL_RANK',
        'WORLD_SIZE': 'OMPI_COMM_WORLD_SIZE',
    },
}
LAUNCHERS = ('none', *_LAUNCHER_VARIABLES)

_STARTERS = {
    'pytorch': 'torchrun, or tools/dist_train.sh and tools/dist_test.sh',
    'slurm': 'srun, or tools/slurm_train.sh and tools/slurm_test.sh',
    'mpi': 'mpirun',
}


def prepare_distributed(cfg: Config, launcher: str) -> None:
    """Make a config, and this process, ready for training or testing in several processes.

    Call it before the Runner is built. With ``launcher='none'`` nothing but ``cfg.launcher`` is
    set. Otherwise

    - the variables of the launcher are translated to PyTorch's, on any number of machines;
    - without a GPU, the gloo process group is made here, because MMEngine's own start selects a
      GPU; with GPUs, MMEngine makes the process group (NCCL unless
      ``env_cfg.dist_cfg.backend`` says otherwise);
    - ``MMDistributedDataParallel`` looks for unused parameters, because those of the group whose
      turn it is not stay out of the backward pass;
    - ``SyncBuffersHook`` averages norm statistics over processes before each validation and at the
      end of each epoch. Without it every process would judge, and attack, a slightly different
      model, and only that of process 0 would be saved.

    What the config itself says of the wrapper (``model_wrapper_cfg``, ``find_unused_parameters``)
    is kept.

    Args:
        cfg (Config): The config of the run; changed in place.
        launcher (str): ``'none'``, ``'pytorch'`` (torchrun), ``'slurm'`` or ``'mpi'``.

    Raises:
        ValueError: The launcher is unknown, its variables are not set, or a machine has more
            processes than GPUs.
    """
    if launcher not in LAUNCHERS:
        raise ValueError(f'launcher={launcher!r} is unknown; allowed: {", ".join(LAUNCHERS)}')
    cfg.launcher = launcher
    if launcher == 'none':
        return
    dist_cfg = cfg.get('env_cfg', {}).get('dist_cfg', {})
    _export_variables(launcher, dist_cfg.get('port'))
    on_cpu = get_device() == 'cpu'
    _set_wrapper(cfg, on_cpu)
    _add_sync_buffers_hook(cfg)
    if on_cpu:
        _init_gloo(dist_cfg.get('timeout'))
    else:
        _check_gpus()


def bare_model(model: nn.Module) -> nn.Module:
    """The model itself, where a distributed wrapper may stand around it."""
    return model.module if is_model_wrapper(model) else model


def finish_distributed() -> None:
    """Wait for the other processes and give the process group back. Nothing without one.

    To be called after a run that succeeded: after an error the other processes do not arrive.
    """
    if torch_dist.is_available() and torch_dist.is_initialized():
        torch_dist.barrier()
        torch_dist.destroy_process_group()


def _export_variables(launcher: str, port: int | None) -> None:
    missing = [name for name in _LAUNCHER_VARIABLES[launcher].values() if name not in os.environ]
    if missing:
        raise ValueError(
            f'launcher={launcher!r}, but {", ".join(missing)} is not set in the environment: '
            f'start the processes with {_STARTERS[launcher]}, or use --launcher none'
        )
    for name, source in _LAUNCHER_VARIABLES[launcher].items():
        os.environ[name] = os.environ[source]
    if launcher == 'slurm':
        if 'MASTER_ADDR' not in os.environ:
            os.environ['MASTER_ADDR'] = _first_slurm_host()
        if port is None:
            # From the job's number, so that jobs which share a machine do not share a port.
            port = 20000 + int(os.environ.get('SLURM_JOB_ID', 0)) % 10000
        os.environ.setdefault('MASTER_PORT', str(port))
    os.environ.setdefault('MASTER_PORT', '29500')
    if 'MASTER_ADDR' not in os.environ:
        raise ValueError(
            f'launcher={launcher!r}, but MASTER_ADDR is not set in the environment: '
            'set it to the host name of the machine with rank 0'
        )


def _first_slurm_host() -> str:
    # The nodes of this step: a step may run on a part of its job's nodes.
    nodes = os.environ.get('SLURM_STEP_NODELIST') or os.environ.get('SLURM_NODELIST')
    if not nodes:
        raise ValueError("launcher='slurm', but neither MASTER_ADDR nor SLURM_NODELIST is set in the environment")
    hosts = subprocess.run(['scontrol', 'show', 'hostnames', nodes], check=True, capture_output=True, text=True)
    return hosts.stdout.split()[0]


def _set_wrapper(cfg: Config, on_cpu: bool) -> None:
    given = cfg.get('model_wrapper_cfg')
    if given is None and not on_cpu:
        cfg.setdefault('find_unused_parameters', True)
        return
    wrapper = given if given is not None else {}
    if wrapper.setdefault('type', 'MMDistributedDataParallel') != 'MMDistributedDataParallel':
        return
    wrapper.setdefault('find_unused_parameters', cfg.get('find_unused_parameters', True))
    # As in the Runner's own wrapper; SyncBuffersHook does it once per epoch.
    wrapper.setdefault('broadcast_buffers', False)
    if on_cpu:
        # Said outright, as the Runner would fill in the number of a GPU.
        wrapper['device_ids'] = None
    cfg.model_wrapper_cfg = wrapper


def _add_sync_buffers_hook(cfg: Config) -> None:
    hooks = list(cfg.get('custom_hooks') or [])
    if not any(hook['type'] == 'SyncBuffersHook' for hook in hooks):
        cfg.custom_hooks = [*hooks, dict(type='SyncBuffersHook')]


def _init_gloo(timeout: float | None) -> None:
    limit = {} if timeout is None else {'timeout': timedelta(seconds=timeout)}
    torch_dist.init_process_group(backend='gloo', **limit)


def _check_gpus() -> None:
    local_rank = int(os.environ['LOCAL_RANK'])
    gpus = torch.cuda.device_count()
    if torch.cuda.is_available() and local_rank >= gpus:
        raise ValueError(
            f'process {local_rank} of this machine has no GPU: {gpus} visible. '
            'Start at most one process per GPU, or hide the GPUs with CUDA_VISIBLE_DEVICES=-1 '
            'to run on the CPU'
        )
