"""Write model-index.yml and the metafiles of the configs, in OpenMMLab's form, or check that they are up to date."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import yaml
from config_files import CONFIGS, ROOT, config_files, cost_of, data_set_of, write
from mmengine.registry import init_default_scope

from mmadvmoe import __version__
from mmadvmoe.runtime.launch import load_config

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


def published() -> dict[str, dict]:
    """Weights of the zoo by the name of their config, as model_converters/publish_model.py has noted them."""
    index = ROOT / 'zoo' / 'weights.json'
    return json.loads(index.read_text(encoding='utf-8')) if index.is_file() else {}


def model_entry(path: Path, collection: str) -> dict:
    """What a metafile says of one config. ``Metrics`` are those of the weights in the zoo, empty without any."""
    cfg = load_config(path)
    cost = cost_of(cfg)
    data_set = data_set_of(path)
    metadata = {
        'Training Data': data_set,
        'Epochs': cfg.train_cfg.max_epochs,
        'FLOPs': round(cost.gflops * 1e9),
        'Parameters': cost.params_total,
    }
    weights = published().get(path.stem)
    if weights is not None:
        metadata |= {'SHA-256': weights['sha256'], 'Revision': weights['revision'], 'Seed': weights['seed']}
    entry = {
        'Name': path.stem,
        'Metadata': metadata,
        'In Collection': collection,
        'Results': [
            {'Task': 'Image Classification', 'Dataset': data_set, 'Metrics': weights['metrics'] if weights else None}
        ],
        'Config': path.relative_to(ROOT).as_posix(),
    }
    return entry if weights is None else entry | {'Weights': f'zoo/{weights["file"]}'}


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
