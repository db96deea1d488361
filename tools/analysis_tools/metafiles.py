"""Write model-index.yml and the metafiles of the configs, in OpenMMLab's form, or check that they are up to date."""

from __future__ import annotations

import argparse
from pathlib import Path

import yaml
from config_files import CONFIGS, ROOT, config_files, cost_of, data_set_of, write
from mmengine.config import Config
from mmengine.registry import init_default_scope

from mmadvmoe import __version__

INDEX = ROOT / 'model-index.yml'
#: The collection that the configs of a folder make up. Each has the paper, and one metafile.
COLLECTIONS = {
    CONFIGS: 'AdvMoE',
    CONFIGS / 'baselines': 'AdvMoE baselines',
    CONFIGS / 'study': 'Study at equal total cost',
}
PAPER = dict(
    Title='Robust Mixture-of-Expert Training for Convolutional Neural Networks',
    URL='https://arxiv.org/abs/2308.10110',
)
HEAD = '# Written by tools/analysis_tools/metafiles.py. FLOPs are multiply-adds of one image, routers included.\n'


def model_entry(path: Path, collection: str) -> dict:
    """What a metafile says of one config. No result is claimed: ``Metrics`` are empty."""
    cfg = Config.fromfile(path)
    cost = cost_of(cfg)
    data_set = data_set_of(path)
    return {
        'Name': path.stem,
        'Metadata': {
            'Training Data': data_set,
            'Epochs': cfg.train_cfg.max_epochs,
            'FLOPs': round(cost.gflops * 1e9),
            'Parameters': cost.params_total,
        },
        'In Collection': collection,
        'Results': [{'Task': 'Image Classification', 'Dataset': data_set, 'Metrics': None}],
        'Config': path.relative_to(ROOT).as_posix(),
    }


def metafile(folder: Path, paths: list[Path]) -> str:
    """The metafile of a folder: its collection, and the configs."""
    collection = {
        'Name': COLLECTIONS[folder],
        'Paper': PAPER,
        'README': 'configs/README.md',
        'Code': {'URL': 'mmadvmoe/moe/backbone.py', 'Version': f'v{__version__}'},
    }
    models = [model_entry(path, COLLECTIONS[folder]) for path in paths]
    return HEAD + yaml.safe_dump({'Collections': [collection], 'Models': models}, sort_keys=False, width=120)


def metafiles() -> dict[Path, str]:
    """Every file that this tool writes, with its contents."""
    init_default_scope('mmpretrain')
    files = {
        folder / 'metafile.yml': metafile(folder, [path for path in config_files() if path.parent == folder])
        for folder in COLLECTIONS
    }
    imports = [path.relative_to(ROOT).as_posix() for path in files]
    return {**files, INDEX: yaml.safe_dump({'Import': imports})}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--check', action='store_true', help='change nothing; fail if a file differs')
    write(metafiles(), parser.parse_args().check)


if __name__ == '__main__':
    main()
