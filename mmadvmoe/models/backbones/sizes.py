"""Checks of the widths of a backbone's layers and of the sizes of its images.

A pathway of scale r has r times the channels of the dense network. In a config that is one whole number: the
``base_channels`` of a ResNet, a WideResNet or a VGG, the ``growth_rate`` of a DenseNet.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

#: Config keys that hold a number of channels, and the layers that get it.
WIDTHS = dict(
    stem_channels='the stem', init_channels='the stem', base_channels='the first stage', growth_rate='each dense layer'
)


def check_width(key: str, value: Any, layer: str) -> int:
    """Give ``value``, the width of ``layer`` in the config key ``key``, back if it is a number of channels.

    Raises:
        ValueError: It is not a whole number of at least 1; the message names the nearest one.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    nearest = ''
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        nearest = f'; the nearest is {max(1, round(value))}'
    raise ValueError(
        f'{key}={value!r} would be the width of {layer}, which must be a whole number of at least 1 channel{nearest}. '
        'A model scale r fits a network only if r times its width is such a number'
    )


def check_widths(cfg: Mapping[str, Any], key: str = 'model') -> None:
    """Check every width in the config of a model or of a part of it, before anything is built.

    Raises:
        ValueError: A width is not a whole number of at least 1.
    """
    for name, value in cfg.items():
        if name in WIDTHS:
            check_width(f'{key}.{name}', value, WIDTHS[name])
        elif isinstance(value, Mapping):
            check_widths(value, f'{key}.{name}')


def check_image_size(backbone: nn.Module, images: Tensor, least: int, layers: str, setting: str) -> None:
    """Raise ValueError for images (B, C, H, W) of which a backbone would leave nothing, below ``least`` pixels a side.

    The message names the ``layers`` that make images smaller, and the ``setting`` that makes fewer of these.
    """
    height, width = images.shape[-2:]
    if min(height, width) < least:
        raise ValueError(
            f'images of {height}x{width} are too small for the {type(backbone).__name__}, whose {layers} need at least '
            f'{least}x{least}: enlarge them (a Resize in the pipeline of the data set) or {setting}'
        )
