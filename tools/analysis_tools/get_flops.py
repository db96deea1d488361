"""Print parameters and multiply-adds of a config's network, next to the dense network it belongs to."""

import argparse
from pathlib import Path

from config_files import find_dense_config
from mmengine.registry import init_default_scope

import mmadvmoe  # noqa: F401
from mmadvmoe.cost import Cost, count_cost, input_shape_of
from mmadvmoe.runtime.launch import load_config


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument(
        '--shape',
        type=int,
        nargs='+',
        help='size of the images: one number, or height and width [what the training pipeline gives]',
    )
    parser.add_argument(
        '--dense',
        metavar='CONFIG',
        help='config of the dense network to compare with [baselines/at_dense_<network>_<dataset>.py]',
    )
    args = parser.parse_args()
    if args.shape and len(args.shape) > 2:
        parser.error(f'--shape takes one or two numbers, got {len(args.shape)}')
    return args


def print_row(name: str, value: str) -> None:
    print(f'  {name:<22}{value:>20}')


def rows(cost: Cost) -> list[tuple[str, str]]:
    """The rows of one network."""
    return [
        ('parameters, total', f'{cost.params_total / 1e6:.3f} M'),
        ('parameters, active', f'{cost.params_active / 1e6:.3f} M'),
        ('  of which router', f'{cost.params_router / 1e6:.3f} M'),
        ('pathway', f'{cost.pathway_gflops:.4g} GFLOPs'),
        ('router', f'{cost.router_gflops:.4g} GFLOPs'),
        ('pathway and router', f'{cost.gflops:.4g} GFLOPs'),
    ]


def main() -> None:
    args = parse_args()
    cfg = load_config(args.config)
    init_default_scope('mmpretrain')
    shape = input_shape_of(cfg, (args.shape[0], args.shape[-1]) if args.shape else None)
    cost = count_cost(cfg, shape)
    print(f'{Path(args.config).name}, one image of {" x ".join(map(str, shape))}; 1 GFLOP = 1e9 multiply-adds')
    for name, value in rows(cost):
        print_row(name, value)
    dense_config = args.dense or find_dense_config(args.config)
    if dense_config is None:
        print('  no dense network to compare with: name its config with --dense')
        return
    dense = count_cost(load_config(dense_config), shape)
    print(f'dense network, {Path(dense_config).name}')
    print_row('parameters', f'{dense.params_total / 1e6:.3f} M')
    print_row('cost', f'{dense.gflops:.4g} GFLOPs')
    print('saving')
    print_row('pathway', f'{cost.saving(dense):.1f} %')
    print_row('pathway and router', f'{cost.saving_with_router(dense):.1f} %')


if __name__ == '__main__':
    main()
