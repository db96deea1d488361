"""The configs of this repository, and what they cost: what the tools beside this file write tables and indexes from."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path

from mmengine.config import Config

import mmadvmoe  # noqa: F401
from mmadvmoe.cost import Cost, count_cost, input_shape_of

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / 'configs'
#: Data sets by the word for them in the name of a config.
DATA_SETS = {
    'cifar10': 'CIFAR-10',
    'cifar100': 'CIFAR-100',
    'tiny-imagenet': 'Tiny-ImageNet',
    'imagenet': 'ImageNet-1k',
    'digits': 'scikit-learn digits',
    'fashion-mnist': 'Fashion-MNIST',
}
#: What in the config of a model changes nothing of its network.
_TRAINING = ('data_preprocessor', 'robust_loss', 'router_loss', 'stage')
#: Classifiers that are one network with different losses.
_SAME_NETWORK = ('ImageClassifier', 'RobustClassifier')
#: What the name of a config begins with: the method. The rest names network, data set and variant.
_METHOD = re.compile(r'^(?:advmoe|(?:at|plain)(?:_(?:dense|sdense|sparse|moe))?)_')
_counted: dict[str, Cost] = {}


def config_files() -> list[Path]:
    """All configs that can be trained, sorted."""
    return sorted(path for path in CONFIGS.rglob('*.py') if '_base_' not in path.parts)


def data_set_of(path: Path) -> str:
    """The data set that the name of a config tells.

    Raises:
        ValueError: It tells none.
    """
    named = [DATA_SETS[word] for word in path.stem.split('_') if word in DATA_SETS]
    if len(named) != 1:
        raise ValueError(f'{path}: the name must hold one of {tuple(DATA_SETS)} between underscores')
    return named[0]


def cost_of(cfg: Config) -> Cost:
    """What one image costs; the networks that several configs share are counted once."""
    network = {key: value for key, value in sorted(cfg.model.items()) if key not in _TRAINING}
    if network['type'] in _SAME_NETWORK:
        del network['type']
    key = f'{network} {input_shape_of(cfg)}'
    if key not in _counted:
        _counted[key] = count_cost(cfg)
    return _counted[key]


def find_dense_config(path: str | Path) -> Path | None:
    """The config of the dense network that belongs to a config, by their names.

    ``advmoe_<network>_<dataset>_<variant>.py``, ``baselines/at_moe_<network>_<dataset>.py`` and the like belong to
    ``baselines/at_dense_<network>_<dataset>.py``. ``-moe`` behind a network says that it has experts, and is left out.

    Args:
        path (str or Path): A config file.

    Returns:
        Path or None: The file, if it exists.
    """
    path = Path(path)
    network, *others = _METHOD.sub('', path.stem).split('_')
    words = [network.removesuffix('-moe'), *others]
    for folder in (path.parent, path.parent / 'baselines', path.parent.parent / 'baselines'):
        # Whatever follows network and data set names a variant of the method.
        for end in range(len(words), 1, -1):
            dense = folder / f'at_dense_{"_".join(words[:end])}.py'
            if dense.is_file():
                return dense
    return None


def write(texts: Mapping[Path, str], check: bool) -> None:
    """Write files; with ``check`` write none, and exit with a message where one has other contents."""
    for path, text in texts.items():
        if not check:
            path.write_text(text, encoding='utf-8')
        elif not path.is_file() or path.read_text(encoding='utf-8') != text:
            sys.exit(f'{path} differs from what the configs give; run: python {Path(sys.argv[0])}')
