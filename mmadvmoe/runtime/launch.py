"""From the command line and a config file to a Runner, for training and testing alike."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Optional

from mmengine.config import Config, DictAction
from mmengine.device import get_device, is_cuda_available
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from .dist import LAUNCHERS

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
    parser.add_argument('--launcher', choices=LAUNCHERS, default='none', help='job launcher')
    # Some launchers give the local rank as an argument instead of a variable.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)


def load_config(path: str) -> Config:
    """Read a config file.

    Raises:
        FileNotFoundError: There is no such file; the message names the nearest one beside it.
    """
    file = Path(path)
    if not file.is_file():
        beside = [each.name for each in file.parent.glob('*.py')] if file.parent.is_dir() else []
        nearest = get_close_matches(file.name, beside, n=1)
        hint = f'; did you mean {file.parent / nearest[0]}?' if nearest else ''
        raise FileNotFoundError(f'config {path!r} does not exist{hint}')
    return Config.fromfile(path)


def check_checkpoint(path: str, argument: str) -> None:
    """Check that a checkpoint can be there, before anything is built.

    Args:
        path (str): A file, or an address as MMEngine takes it (``https://...``), which is not
            checked.
        argument (str): The command line argument it comes from, for the message.

    Raises:
        FileNotFoundError: There is no such file.
    """
    if '://' not in path and not Path(path).is_file():
        raise FileNotFoundError(f'{argument}: checkpoint {path!r} does not exist')


def merge_common_arguments(cfg: Config, args: argparse.Namespace, loaders: Sequence[str]) -> None:
    """Write the arguments of :func:`add_common_arguments` into a config, ``--amp`` excepted.

    To be called last: ``--cfg-options`` wins over every other argument, and what MMPretrain's tools
    take as default for data loaders is filled in where nothing else was said. Their
    ``persistent_workers=True`` is not: the random state of such workers is in no checkpoint, so
    that no resume could be exact.

    Args:
        cfg (Config): Changed in place.
        args (argparse.Namespace): The parsed arguments, with ``config``.
        loaders (Sequence[str]): Data loaders to complete, such as ``'train_dataloader'``.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    if args.no_pin_memory:
        for loader in _present(cfg, loaders):
            loader.pin_memory = False
    if args.cfg_options is not None:
        cfg.merge_from_dict(args.cfg_options)
    if cfg.get('work_dir') is None:
        cfg.work_dir = str(Path('work_dirs') / Path(args.config).stem)
    complete_loaders(cfg, loaders)


def complete_loaders(cfg: Config, loaders: Sequence[str]) -> None:
    """Fill in what MMPretrain's tools take as default for data loaders.

    Args:
        cfg (Config): Changed in place.
        loaders (Sequence[str]): Data loaders to complete, such as ``'train_dataloader'``.
    """
    for loader in _present(cfg, loaders):
        loader.setdefault('collate_fn', dict(type='default_collate'))
        # PyTorch warns when there is no GPU to pin for.
        loader.setdefault('pin_memory', is_cuda_available())


def _present(cfg: Config, loaders: Sequence[str]) -> list[dict]:
    return [cfg[key] for key in loaders if cfg.get(key) is not None]


def enable_amp(cfg: Config) -> None:
    """Train in automatic mixed precision: every optimizer of the config gets a wrapper for it.

    On a GPU that is MMEngine's ``AmpOptimWrapper`` with dynamic loss scaling, one scale for each
    optimizer; on a CPU ``CPUAmpOptimWrapper`` (bfloat16, which needs no loss scaling).

    Args:
        cfg (Config): With one optimizer (``optim_wrapper.optimizer``) or several groups
            (``optim_wrapper.experts.optimizer``, ``optim_wrapper.router.optimizer``). Changed in
            place.

    Raises:
        ValueError: The config has no optimizer, or a wrapper whose own work would be lost.
    """
    wrappers = _optim_wrappers(cfg.get('optim_wrapper'))
    if not wrappers:
        raise ValueError('--amp needs a config with an optimizer: optim_wrapper has none')
    on_cpu = get_device() == 'cpu'
    for key, wrapper in wrappers.items():
        kind = wrapper.get('type', 'OptimWrapper')
        if kind not in _REPLACEABLE_WRAPPERS:
            raise ValueError(
                f'--amp cannot replace {key}.type={kind!r}; it replaces '
                f'{", ".join(_REPLACEABLE_WRAPPERS)}. Leave --amp out, or change {key}.type'
            )
        if on_cpu:
            wrapper['type'] = 'CPUAmpOptimWrapper'
            wrapper.pop('loss_scale', None)
        else:
            wrapper['type'] = 'AmpOptimWrapper'
            wrapper.setdefault('loss_scale', 'dynamic')


def _optim_wrappers(optim_wrapper: Optional[Mapping]) -> dict[str, dict]:
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


def build_runner(cfg: Config) -> Runner:
    """MMEngine's Runner, or the one that ``runner_type`` names."""
    return RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
