"""Test a checkpoint, with the arguments of MMPretrain's tool of the same name, also under attacks chosen by name."""

import argparse
from copy import deepcopy
from fractions import Fraction
from pathlib import Path

import mmengine
from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.evaluator import DumpResults

from mmadvmoe.attacks import STANDARD_ATTACKS
from mmadvmoe.evaluation.named_attacks import choose_attacks
from mmadvmoe.runtime.config_checks import check_options, keywords_named
from mmadvmoe.runtime.files import check_writable, in_first_process
from mmadvmoe.runtime.launch import (
    add_common_arguments,
    build_runner,
    check_checkpoint,
    finish_distributed,
    load_config,
    merge_common_arguments,
    prepare_distributed,
)
from mmadvmoe.utils import as_plain, choose, write_atomically

OUT_SUFFIXES = {
    'pred': ('.pkl', '.pickle'),
    'metrics': ('.json', '.yaml', '.yml', '.pkl', '.pickle'),
}


class AtomicDumpResults(DumpResults):
    """MMEngine's file of predictions, complete or as it was before."""

    def compute_metrics(self, results: list) -> dict:
        write_atomically(self.out_file_path, mmengine.dump(results, file_format='pkl'))
        return {}


def _radius(text: str) -> float:
    """``'0.2'`` or ``'8/255'``."""
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f'{text!r} must be a number such as 0.2 or 8/255') from None


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='test config file')
    parser.add_argument('checkpoint', help='checkpoint file or address')
    add_common_arguments(parser)
    parser.add_argument(
        '--attacks',
        nargs='+',
        metavar='NAME',
        help=f'attacks of test_cfg.attacks and standard ones ({", ".join(STANDARD_ATTACKS)}) to test under, in this '
        'order; RoutePGD is put beside them on a mixture of experts',
    )
    parser.add_argument(
        '--eps',
        type=_radius,
        help='radius of --attacks on images in [0, 1], as in 8/255 [that of test_cfg.attacks]',
    )
    parser.add_argument('--norm', help='norm of --attacks [that of test_cfg.attacks, else Linf]')
    parser.add_argument('--cascade', action='store_true', help='run each attack only on images that still stand')
    parser.add_argument(
        '--out',
        help='file to write metrics or predictions to; or, under attacks, a folder that gets the outcome of every '
        'image as it becomes known, and in which a killed test goes on where it stopped',
    )
    parser.add_argument(
        '--overwrite', action='store_true', help='delete the outcomes in the folder --out and begin anew'
    )
    parser.add_argument(
        '--out-item',
        choices=tuple(OUT_SUFFIXES),
        help='what the file --out gets: metrics, or predictions (those of the worst case where the model '
        'is tested under attacks) [pred]',
    )
    parser.add_argument('--show-dir', help='directory to save pictures of predictions in')
    parser.add_argument('--show', action='store_true', help='show predictions in a window')
    parser.add_argument('--interval', type=int, default=1, help='draw every INTERVAL-th image [1]')
    parser.add_argument('--wait-time', type=float, default=2, help='seconds to show a window for [2]')
    parser.add_argument(
        '--tta',
        action='store_true',
        help='test-time augmentation: tta_model and tta_pipeline of the config, or, without '
        'them, the mean score over an image and its mirror image',
    )
    args = parser.parse_args()
    for name in ('eps', 'norm'):
        if getattr(args, name) is not None and args.attacks is None:
            parser.error(f'--{name} is that of the attacks which --attacks names: add --attacks')
    args.out_dir = None
    if args.out is not None and args.out_item is None and _means_folder(args.out):
        args.out, args.out_dir = None, args.out
    if args.overwrite and args.out_dir is None:
        parser.error('--overwrite is about a folder of outcomes: add --out FOLDER')
    if args.out is None:
        if args.out_item is not None:
            parser.error('--out-item says what goes into the file that --out names: add --out')
    else:
        args.out_item = args.out_item or 'pred'
        allowed = OUT_SUFFIXES[args.out_item]
        if not args.out.endswith(allowed):
            parser.error(
                f'--out {args.out!r} for --out-item {args.out_item} must end in {" or ".join(allowed)}; a folder '
                'for the outcomes of all images has no ending, and no --out-item'
            )
    return args


def _means_folder(path: str) -> bool:
    return Path(path).is_dir() or path.endswith('/') or not Path(path).suffix


def merge_args(cfg: Config, args: argparse.Namespace) -> None:
    """Write the arguments into the config."""
    check_checkpoint(args.checkpoint, 'CHECKPOINT')
    if any(cfg.get(key) is None for key in ('test_dataloader', 'test_cfg', 'test_evaluator')):
        raise ValueError('the config must set test_dataloader, test_cfg and test_evaluator')
    if args.attacks is not None and args.cfg_options:
        _merge_options_of_attacks(cfg, args)
    _merge_attacks(cfg, args)
    if args.amp:
        cfg.test_cfg.fp16 = True
    if args.show or args.show_dir is not None:
        _enable_visualization(cfg, args)
    if args.tta:
        _enable_tta(cfg)
    merge_common_arguments(cfg, args, ('test_dataloader',))
    # What a config or an option says of where training begins must not change what is tested.
    cfg.load_from, cfg.resume = args.checkpoint, False
    # Processes meet when all are done, one perhaps a whole chunk of AutoAttack after another: a day, in seconds.
    if ((cfg.get('env_cfg') or {}).get('dist_cfg') or {}).get('timeout') is None:
        cfg.merge_from_dict({'env_cfg.dist_cfg.timeout': 86400})


def _merge_options_of_attacks(cfg: Config, args: argparse.Namespace) -> None:
    """Let --attacks choose among the attacks of the config as the options make them; to name one chooses nothing."""
    attack_of = {key: key.split('.')[2] if key.startswith('test_cfg.attacks.') else None for key in args.cfg_options}
    known = cfg.test_cfg.get('attacks') or {}
    for key, name in attack_of.items():
        if name is not None and name not in known:
            choose(name, args.attacks, f'--cfg-options {key}: attack')
    options = {key: value for key, value in args.cfg_options.items() if attack_of[key] in known}
    check_options(options, cfg)
    cfg.merge_from_dict(options)
    args.cfg_options = {
        key: value for key, value in args.cfg_options.items() if attack_of[key] in (None, *args.attacks)
    }


def _merge_attacks(cfg: Config, args: argparse.Namespace) -> None:
    """Choose attacks, and where their outcomes go."""
    if args.attacks is not None:
        known = cfg.test_cfg.get('attacks', {})
        attacks = choose_attacks(args.attacks, known, args.eps, args.norm)
        if not known:
            cfg.test_cfg = dict(type='RobustTestLoop')
        cfg.test_cfg.attacks = attacks
        cfg.test_cfg.add_route_attack = True
        # What speaks of attacks that are not run.
        survivors, groups = cfg.test_cfg.get('survivors_only', ()), cfg.test_cfg.get('worst_of') or {}
        cfg.test_cfg.survivors_only = [name for name in survivors if name in attacks]
        cfg.test_cfg.worst_of = {group: names for group, names in groups.items() if set(names) <= set(attacks)}
    for name, value in dict(cascade=args.cascade, out_dir=args.out_dir, overwrite=args.overwrite).items():
        if value:
            if 'attacks' not in cfg.test_cfg:
                raise ValueError(
                    f'--{name.removesuffix("_dir")} is for tests under attacks, and test_cfg.attacks has none: add '
                    '--attacks'
                )
            cfg.test_cfg[name] = value


def _enable_visualization(cfg: Config, args: argparse.Namespace) -> None:
    if 'visualization' not in cfg.get('default_hooks', {}):
        raise ValueError(
            '--show and --show-dir need default_hooks.visualization in the config: add '
            "default_hooks=dict(visualization=dict(type='VisualizationHook'))"
        )
    cfg.default_hooks.visualization.update(
        enable=True,
        show=args.show,
        wait_time=args.wait_time,
        out_dir=args.show_dir,
        interval=args.interval,
    )


def _enable_tta(cfg: Config) -> None:
    if 'attacks' in cfg.test_cfg:
        raise ValueError(
            '--tta cannot be used with test_cfg.attacks: they attack the model itself, not the '
            'mean over augmentations that would be tested then'
        )
    if 'tta_pipeline' not in cfg:
        *transforms, pack = deepcopy(cfg.test_dataloader.dataset.pipeline)
        flips = [dict(type='RandomFlip', prob=1.0), dict(type='RandomFlip', prob=0.0)]
        cfg.tta_pipeline = [*transforms, dict(type='TestTimeAug', transforms=[flips, [pack]])]
    tta_model = cfg.get('tta_model', dict(type='mmpretrain.AverageClsScoreTTA'))
    cfg.model = dict(**tta_model, module=cfg.model)
    cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline


def main() -> None:
    args = parse_args()
    cfg = load_config(args.config)
    merge_args(cfg, args)
    prepare_distributed(cfg, args.launcher)
    if args.out is not None:
        in_first_process(lambda: check_writable(args.out, '--out'))
    runner = build_runner(cfg, args.verbose)
    if args.out_item == 'pred':
        runner.test_evaluator.metrics.append(AtomicDumpResults(out_file_path=args.out))
    with keywords_named(cfg):
        metrics = runner.test()
    if args.out_item == 'metrics' and is_main_process():
        kind = Path(args.out).suffix[1:]
        content = mmengine.dump(metrics if kind.startswith('p') else as_plain(metrics), file_format=kind)
        write_atomically(args.out, content if isinstance(content, bytes) else content.encode())
    finish_distributed()


if __name__ == '__main__':
    main()
