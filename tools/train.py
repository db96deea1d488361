"""Train a model from a config, with the arguments of MMPretrain's tool of the same name."""

import argparse

from mmengine.config import Config

from mmadvmoe.runtime import check_config
from mmadvmoe.runtime.config_checks import keywords_named
from mmadvmoe.runtime.launch import (
    add_common_arguments,
    build_runner,
    check_checkpoint,
    enable_amp,
    finish_distributed,
    load_config,
    merge_common_arguments,
    prepare_distributed,
)
from mmadvmoe.runtime.preflight import check_batches
from mmadvmoe.training.dry_run import dry_run
from mmadvmoe.utils import type_name


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='train config file')
    add_common_arguments(parser)
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='go on from this checkpoint; without a path, from the latest in the work directory',
    )
    parser.add_argument('--no-validate', action='store_true', help='do not evaluate checkpoints during training')
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rates by the actual over the base batch size of the config',
    )
    parser.add_argument(
        '--no-persistent-workers',
        action='store_true',
        help='set persistent_workers=False in all data loaders',
    )
    parser.add_argument(
        '--dry-run',
        action='store_true',
        help='do not train: one turn of each group, one attacked validation batch, one save and load, then an estimate '
        'of time and memory',
    )
    args = parser.parse_args()
    if args.dry_run and args.launcher != 'none':
        parser.error(f'--dry-run is for one process; leave out --launcher {args.launcher}')
    return args


def merge_args(cfg: Config, args: argparse.Namespace) -> None:
    """Write the arguments into the config."""
    if args.no_validate:
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    if args.amp:
        enable_amp(cfg)
    if args.auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            raise ValueError(
                '--auto-scale-lr needs auto_scale_lr=dict(base_batch_size=...) in the config: '
                'the batch size that its learning rates are meant for'
            )
        cfg.auto_scale_lr.enable = True
    loaders = ('train_dataloader', 'val_dataloader', 'test_dataloader')
    for key in loaders:
        if args.no_persistent_workers and cfg.get(key) is not None:
            cfg[key].persistent_workers = False
    merge_common_arguments(cfg, args, loaders)
    if args.resume == 'auto':
        hook = (cfg.get('default_hooks') or {}).get('checkpoint') or {}
        if type_name(hook.get('type', '')) == 'SafeCheckpointHook':
            cfg.resume = 'auto'
        else:  # MMEngine's takes load_from for the checkpoint to resume from
            cfg.load_from, cfg.resume = None, True
    elif args.resume is not None:
        check_checkpoint(args.resume, '--resume')
        cfg.load_from, cfg.resume = args.resume, True


def main() -> None:
    args = parse_args()
    cfg = load_config(args.config)
    merge_args(cfg, args)
    check_config(cfg)
    if args.dry_run:
        print(dry_run(cfg))
        return
    prepare_distributed(cfg, args.launcher)
    runner = build_runner(cfg, args.verbose)
    # Data sets, loops and optimizers are built by the first lines of this.
    with keywords_named(cfg):
        check_batches(runner)
        runner.train()
    finish_distributed()


if __name__ == '__main__':
    main()
