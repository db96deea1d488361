"""Write the tables of configs/README.md from the configs, or check that they are what the configs give."""

import argparse
import ast
from pathlib import Path

from config_files import CONFIGS, DATA_SETS, config_files, cost_of, write
from mmengine.registry import init_default_scope

from mmadvmoe.runtime.launch import load_config

README = CONFIGS / 'README.md'
BEGIN, END = '<!-- tables: tools/analysis_tools/config_table.py -->', '<!-- end of the tables -->'
NETWORKS = {
    'resnet18': 'ResNet-18',
    'wrn-28-10': 'WRN-28-10',
    'vgg16-bn': 'VGG-16-BN',
    'densenet-bc-40-12': 'DenseNet-BC-40-12',
}
#: Data sets of the paper.
PAPER_DATA_SETS = ('cifar10', 'cifar100', 'tiny-imagenet', 'imagenet')
KINDS = {'dense': 'Dense', 'sdense': 'S-Dense', 'sparse': 'Sparse', 'moe': 'MoE'}
COST_HEAD = [
    'Network',
    'Data set',
    'AdvMoE',
    'AT',
    'plain',
    'Parameters: dense',
    'MoE (active)',
    'GFLOPs: dense',
    'pathway',
    'router',
    'Saving',
]


def link(path: Path, text: str) -> str:
    return f'[{text}]({path.relative_to(CONFIGS).as_posix()})'


def links(method: str, cell: str) -> str:
    """Links to the baselines of one network and data set that exist; the last stage of several comes first."""
    found = []
    for kind, text in KINDS.items():
        name = f'{method}_{kind}_{cell}'
        for path in config_files():
            # With an underscore, because the name of one data set begins with that of another.
            if f'{path.stem}_'.startswith(f'{name}_'):
                stage = path.stem.removeprefix(name).removeprefix('_')
                found.append(link(path, f'{text} {stage}'.strip()))
    return ', '.join(found)


def cost_row(network: str, data: str) -> list[str]:
    """One network on one data set, with what it costs."""
    cell = f'{network}_{data}'
    config = CONFIGS / f'advmoe_{cell}.py'
    moe = cost_of(load_config(config))
    dense = cost_of(load_config(CONFIGS / 'baselines' / f'at_dense_{cell}.py'))
    return [
        NETWORKS[network],
        DATA_SETS[data],
        link(config, 'config'),
        links('at', cell),
        links('plain', cell),
        f'{dense.params_total / 1e6:.2f}M',
        f'{moe.params_total / 1e6:.2f}M ({moe.params_active / 1e6:.2f}M)',
        f'{dense.gflops:.3f}',
        f'{moe.pathway_gflops:.3f}',
        f'{moe.router_gflops:.3f}',
        f'{moe.saving_with_router(dense):.1f}%',
    ]


def what_differs(path: Path) -> str:
    """The first comment of a config, or the names of what it is composed of."""
    lines = path.read_text(encoding='utf-8').splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('# ')), None)
    if start is not None:
        comment = []
        for line in lines[start:]:
            if not line.startswith('# '):
                break
            comment.append(line[2:])
        return ' '.join(comment)
    bases = next(
        ast.literal_eval(node.value)
        for node in ast.parse(path.read_text(encoding='utf-8')).body
        if isinstance(node, ast.Assign) and node.targets[0].id == '_base_'
    )
    return ', '.join(f'`{Path(base).stem}`' for base in ([bases] if isinstance(bases, str) else bases))


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return '\n'.join('| ' + ' | '.join(row) + ' |' for row in (head, ['---'] * len(head), *rows))


def tables() -> str:
    """Both tables: the networks of the paper with their costs, and all other configs."""
    init_default_scope('mmpretrain')
    costs = markdown(COST_HEAD, [cost_row(network, data) for network in NETWORKS for data in PAPER_DATA_SETS])
    others = [path for path in config_files() if f']({path.relative_to(CONFIGS).as_posix()})' not in costs]
    rest = markdown(['Config', 'What it is'], [[link(path, path.stem), what_differs(path)] for path in others])
    return f'{costs}\n\nAll other configs, among them variants of the above:\n\n{rest}'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--check', action='store_true', help='change nothing; fail if the tables differ')
    args = parser.parse_args()
    text = README.read_text(encoding='utf-8')
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    write({README: f'{before}{BEGIN}\n\n{tables()}\n\n{END}{after}'}, args.check)


if __name__ == '__main__':
    main()
