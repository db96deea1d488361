"""From the command line and a config file to a Runner, in one process or in many, on GPUs (NCCL) and CPUs (gloo)."""

from __future__ import annotations

import argparse
import errno
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, DictAction
from mmengine.config.config import DELETE_KEY
from mmengine.device import get_device, is_cuda_available
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from torch import distributed as torch_dist

from mmadvmoe.utils import choose, did_you_mean, type_name

from .config_checks import check_options, keywords_named
from .console import ConsoleRunner

# The variables that PyTorch reads, and those that each launcher sets in their place.
_VARIABLES = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE')
_LAUNCHER_VARIABLES = {
    'pytorch': _VARIABLES,
    'slurm': ('SLURM_PROCID', 'SLURM_LOCALID', 'SLURM_NTASKS'),
    'mpi': ('OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_LOCAL_RANK', 'OMPI_COMM_WORLD_SIZE'),
}
LAUNCHERS = ('none', *_LAUNCHER_VARIABLES)

_STARTERS = {
    'pytorch': 'torchrun, or tools/dist_train.sh and tools/dist_test.sh',
    'slurm': 'srun, or tools/slurm_train.sh and tools/slurm_test.sh',
    'mpi': 'mpirun',
}
# What --amp may replace: any other wrapper does something that would be lost.
_REPLACEABLE_WRAPPERS = ('OptimWrapper', 'AmpOptimWrapper', 'CPUAmpOptimWrapper')


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that training and testing share, named as MMPretrain's tools name them."""
    parser.add_argument('--work-dir', help='where logs and results go [work_dirs/<config name>]')
    parser.add_argument('--amp', action='store_true', help='automatic mixed precision')
    parser.add_argument('--no-pin-memory', action='store_true', help='set pin_memory=False in all data loaders')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='override settings of the config, as in train_dataloader.batch_size=64; a list is '
        'written as key="[a,b]" or key=a,b, without white space',
    )
    parser.add_argument(
        '--verbose',
        action='store_true',
        help='show environment, config, hooks and all metrics, as the log file has them',
    )
    parser.add_argument('--launcher', choices=LAUNCHERS, default='none', help='job launcher')
    # Some launchers give the local rank as an argument instead of a variable.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)


def load_config(path: str | Path) -> Config:
    """Read a config file.

    A ``_delete_=True`` that had nothing to delete, which MMEngine would leave for a constructor, is taken out.

    Raises:
        FileNotFoundError: It is not there; the message names the nearest one beside it.
    """
    file = Path(path)
    if not file.is_file():
        beside = [each.name for each in file.parent.glob('*.py')] if file.parent.is_dir() else []
        raise FileNotFoundError(f'config {str(path)!r} does not exist{did_you_mean(file.name, beside)}')
    cfg = Config.fromfile(path)
    _drop_delete(cfg._cfg_dict)
    return cfg


def _drop_delete(value: Any) -> None:
    if isinstance(value, dict):
        value.pop(DELETE_KEY, None)
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ():
        _drop_delete(each)


def check_checkpoint(path: str, argument: str) -> None:
    """Raise FileNotFoundError, naming the command line ``argument``, for a path (no URL) that is no file."""
    if '://' not in path and not Path(path).is_file():
        raise FileNotFoundError(f'{argument}: checkpoint {path!r} does not exist')


def merge_common_arguments(cfg: Config, args: argparse.Namespace, loaders: Sequence[str]) -> None:
    """Write the arguments of :func:`add_common_arguments` into a config, ``--amp`` excepted.

    To be called last: ``--cfg-options`` wins over every other argument, and what MMPretrain's tools take as default for
    data loaders is filled in where nothing else was said. Their ``persistent_workers=True`` is not: the random state of
    such workers is in no checkpoint, so that no resume could be exact.

    ``cfg`` is changed in place; ``loaders`` are as for :func:`complete_loaders`.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    if args.no_pin_memory:
        for loader in _present(cfg, loaders):
            loader.pin_memory = False
    if args.cfg_options is not None:
        check_options(args.cfg_options, cfg)
        cfg.merge_from_dict(args.cfg_options)
    if cfg.get('work_dir') is None:
        cfg.work_dir = str(Path('work_dirs') / Path(args.config).stem)
    complete_loaders(cfg, loaders)


def complete_loaders(cfg: Config, loaders: Sequence[str]) -> None:
    """Fill in, in place, what MMPretrain's tools take as default for data loaders (``'train_dataloader'``, ...)."""
    for loader in _present(cfg, loaders):
        loader.setdefault('collate_fn', dict(type='default_collate'))
        # PyTorch warns when there is no GPU to pin for.
        loader.setdefault('pin_memory', is_cuda_available())


def _present(cfg: Config, loaders: Sequence[str]) -> list[dict]:
    return [cfg[key] for key in loaders if cfg.get(key) is not None]


def enable_amp(cfg: Config) -> None:
    """Train in automatic mixed precision: every optimizer of the config gets a wrapper for it.

    On a GPU that is MMEngine's ``AmpOptimWrapper``, in bfloat16 where the GPU has it and the config names no ``dtype``,
    with dynamic loss scaling, one scale for each optimizer; on a CPU ``CPUAmpOptimWrapper`` (bfloat16, no scaling).

    Args:
        cfg (Config): With one optimizer (``optim_wrapper.optimizer``) or several groups
            (``optim_wrapper.experts.optimizer``, ``optim_wrapper.router.optimizer``). Changed in place.

    Raises:
        ValueError: The config has no optimizer, or a wrapper whose own work would be lost.
    """
    wrappers = _optim_wrappers(cfg.get('optim_wrapper'))
    if not wrappers:
        raise ValueError('--amp needs a config with an optimizer: optim_wrapper has none')
    on_cpu = get_device() == 'cpu'
    for key, wrapper in wrappers.items():
        kind = type_name(wrapper.get('type', 'OptimWrapper'))
        if kind not in _REPLACEABLE_WRAPPERS:
            raise ValueError(
                f'--amp cannot replace {key}.type={kind!r}; it replaces {", ".join(_REPLACEABLE_WRAPPERS)}. Leave '
                f'--amp out, or change {key}.type'
            )
        if on_cpu:
            wrapper['type'] = 'CPUAmpOptimWrapper'
            wrapper.pop('loss_scale', None)
        else:
            wrapper['type'] = 'AmpOptimWrapper'
            if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False):
                wrapper.setdefault('dtype', 'bfloat16')
            wrapper.setdefault('loss_scale', 'dynamic')


def _optim_wrappers(optim_wrapper: Mapping | None) -> dict[str, dict]:
    """The configs that hold an optimizer each, under their config keys."""
    if not optim_wrapper:
        return {}
    if 'optimizer' in optim_wrapper:
        return {'optim_wrapper': optim_wrapper}
    return {
        f'optim_wrapper.{name}': group
        for name, group in optim_wrapper.items()
        if isinstance(group, Mapping) and 'optimizer' in group
    }


def build_runner(cfg: Config, verbose: bool = False) -> Runner:
    """MMEngine's Runner with a short console, or, ``verbose``, with its own, or the one that ``runner_type`` names.

    Raises:
        TypeError: A part does not take a keyword, whose place in the config is named.
        ValueError: ``runner_type`` names MMEngine's FlexibleRunner, or another that is no Runner.
    """
    with keywords_named(cfg):
        if 'runner_type' in cfg:
            kind = cfg.runner_type if isinstance(cfg.runner_type, type) else RUNNERS.get(cfg.runner_type)
            if kind is not None and not issubclass(kind, Runner):
                raise ValueError(
                    f"runner_type={type_name(cfg.runner_type)!r} is not allowed: it must be 'Runner' or derived from "
                    'it. The strategies of FlexibleRunner (FSDP, DeepSpeed, ColossalAI) gather the parts of a '
                    'parameter in model.forward alone, but attacks and routers run parts of a model'
                )
            return RUNNERS.build(cfg)
        return (Runner if verbose else ConsoleRunner).from_cfg(cfg)


def prepare_distributed(cfg: Config, launcher: str) -> None:
    """Make a config, in place, and this process ready for training or testing in several processes.

    Call it before the Runner is built. With ``launcher='none'`` nothing but ``cfg.launcher`` is set. Otherwise

    - the variables of the launcher are translated to PyTorch's, on any number of machines;
    - without a GPU, the gloo process group is made here, because MMEngine's own start selects a GPU; with GPUs,
      MMEngine makes the process group (NCCL unless ``env_cfg.dist_cfg.backend`` says otherwise);
    - ``MMDistributedDataParallel`` looks for unused parameters, because those of the group whose turn it is not stay
      out of the backward pass;
    - under torchrun, this process ends when torchrun does: killed with -9, it would leave its processes training;
    - ``SyncBuffersHook`` averages norm statistics over processes before each validation and at the end of each epoch.
      Without it every process would judge, and attack, a slightly different model, and only that of process 0 would be
      saved.

    What the config itself says of the wrapper (``model_wrapper_cfg``, ``find_unused_parameters``) is kept.

    Raises:
        ValueError: The launcher is unknown, its variables are not set, or a machine has more processes than GPUs.
        OSError: The port of the process group is in use.
    """
    cfg.launcher = choose(launcher, LAUNCHERS, 'launcher')
    if launcher == 'none':
        return
    dist_cfg = cfg.get('env_cfg', {}).get('dist_cfg', {})
    _export_variables(launcher, dist_cfg.get('port'))
    if 'TORCHELASTIC_RUN_ID' in os.environ:
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    elif os.environ['RANK'] == '0':
        _check_port(int(os.environ['MASTER_PORT']))
    on_cpu = get_device() == 'cpu'
    _set_wrapper(cfg, on_cpu)
    hooks = list(cfg.get('custom_hooks') or [])
    if not any(type_name(hook['type']) == 'SyncBuffersHook' for hook in hooks):
        cfg.custom_hooks = [*hooks, dict(type='SyncBuffersHook')]
    if on_cpu:
        timeout = dist_cfg.get('timeout')
        torch_dist.init_process_group('gloo', timeout=None if timeout is None else timedelta(seconds=timeout))
        return
    local_rank, gpus = int(os.environ['LOCAL_RANK']), torch.cuda.device_count()
    if torch.cuda.is_available() and local_rank >= gpus:
        raise ValueError(
            f'process {local_rank} of this machine has no GPU: {gpus} visible. Start at most one process per GPU, or '
            'hide the GPUs with CUDA_VISIBLE_DEVICES=-1 to run on the CPU'
        )


def finish_distributed() -> None:
    """Wait for the other processes and give the process group back. Nothing without one.

    To be called after a run that succeeded: after an error the other processes do not arrive.
    """
    if torch_dist.is_available() and torch_dist.is_initialized():
        torch_dist.barrier()
        torch_dist.destroy_process_group()


def _export_variables(launcher: str, port: int | None) -> None:
    missing = [name for name in _LAUNCHER_VARIABLES[launcher] if name not in os.environ]
    if missing:
        raise ValueError(
            f'launcher={launcher!r}, but {", ".join(missing)} is not set in the environment: start the processes with '
            f'{_STARTERS[launcher]}, or use --launcher none'
        )
    for name, source in zip(_VARIABLES, _LAUNCHER_VARIABLES[launcher]):
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
            f'launcher={launcher!r}, but MASTER_ADDR is not set in the environment: set it to the host name of the '
            'machine with rank 0'
        )


def _end_with(parent: int) -> None:
    """Wait until the parent process is gone, and end this one; what it was writing is complete or absent."""
    while os.getppid() == parent:
        time.sleep(1)
    print(f'torchrun (process {parent}) is gone: process {os.getpid()} ends', file=sys.stderr, flush=True)
    os._exit(1)


def _check_port(port: int) -> None:
    """Raise OSError, naming the cure, for a port of this machine that something else listens on."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(('', port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise OSError(
                    error.errno,
                    f'MASTER_PORT={port} is in use on this machine, by another run perhaps: set MASTER_PORT (PORT of '
                    'dist_train.sh and dist_test.sh), or env_cfg.dist_cfg.port under Slurm, to a free port',
                ) from None
            raise


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
    if type_name(wrapper.setdefault('type', 'MMDistributedDataParallel')) != 'MMDistributedDataParallel':
        return
    wrapper.setdefault('find_unused_parameters', cfg.get('find_unused_parameters', True))
    # As in the Runner's own wrapper; SyncBuffersHook does it once per epoch.
    wrapper.setdefault('broadcast_buffers', False)
    if on_cpu:
        # Said outright, as the Runner would fill in the number of a GPU.
        wrapper['device_ids'] = None
    cfg.model_wrapper_cfg = wrapper
