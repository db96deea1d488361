"""VGG of any width, and the pooling between its convolutions and its linear layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmcv.cnn import ConvModule
from mmpretrain.models.backbones import VGG
from mmpretrain.registry import MODELS
from torch import Tensor, nn

from .sizes import check_image_size, check_width

_IMAGE_CHANNELS = 3


@MODELS.register_module()
class ScaledVGG(VGG):
    """MMPretrain's VGG with a width to choose, and without biases that batch norm takes away again.

    Simonyan and Zisserman, arXiv:1409.1556. The stages have 1, 2, 4, 8 and 8 times ``base_channels``; layers and
    their names are those of MMPretrain's VGG.

    Args:
        depth (int): 11, 13, 16 or 19.
        base_channels (int): Width of the first stage. Defaults to 64.
        num_stages (int): 1 to 5. Defaults to 5.
        norm_cfg (dict, optional): Defaults to batch norm.
        act_cfg (dict): Defaults to ReLU.
        with_last_pool (bool): Whether the last stage ends in a pooling, too. The networks for CIFAR do without, which
            leaves 2x2 positions of a 32x32 image. Defaults to True.
        **kwargs: out_indices, frozen_stages, norm_eval, init_cfg, as for MMPretrain's VGG.

    Raises:
        ValueError: ``base_channels`` is not a whole number of at least 1, or an image is too small for the poolings.
    """

    def __init__(
        self,
        depth: int,
        base_channels: int = 64,
        num_stages: int = 5,
        norm_cfg: dict | None = dict(type='BN'),  # noqa: B006
        act_cfg: dict = dict(type='ReLU'),  # noqa: B006
        with_last_pool: bool = True,
        **kwargs: Any,
    ) -> None:
        check_width('backbone.base_channels', base_channels, 'the first stage (features.0)')
        # The layers of full width are replaced below: without a device, they cost neither memory nor time.
        with torch.device('meta'):
            super().__init__(
                depth,
                num_classes=-1,
                num_stages=num_stages,
                dilations=(1,) * num_stages,
                ceil_mode=False,
                with_last_pool=with_last_pool,
                **kwargs,
            )
        layers: list[nn.Module] = []
        in_channels = _IMAGE_CHANNELS
        for stage, num_convs in enumerate(self.stage_blocks):
            out_channels = base_channels * min(2**stage, 8)
            for _ in range(num_convs):
                layers.append(ConvModule(in_channels, out_channels, 3, padding=1, norm_cfg=norm_cfg, act_cfg=act_cfg))
                in_channels = out_channels
            layers.append(nn.MaxPool2d(2))
        if not with_last_pool:
            layers.pop()
        self.features = nn.Sequential(*layers)
        self.min_size = 2 ** sum(isinstance(layer, nn.MaxPool2d) for layer in layers)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """x: (B, 3, H, W) -> the features of the stages in ``out_indices``."""
        check_image_size(self, x, self.min_size, 'poolings', 'set backbone.num_stages lower')
        return super().forward(x)


@MODELS.register_module()
class AdaptiveAveragePooling(nn.Module):
    """Average to a fixed number of positions and flatten, as before the linear layers of a VGG.

    Args:
        output_size (int): Positions on each side. Defaults to 2.
    """

    def __init__(self, output_size: int = 2) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(output_size)

    def forward(self, inputs: Tensor | Sequence[Tensor]) -> Tensor | tuple[Tensor, ...]:
        """(B, C, H, W), or several, -> (B, C * output_size ** 2)."""
        if isinstance(inputs, Tensor):
            return self.pool(inputs).flatten(1)
        return tuple(self.pool(x).flatten(1) for x in inputs)
