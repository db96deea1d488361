"""A network so small that its capacity decides, and one with a branch beside it: for studies at equal cost."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmengine.model import BaseModule, Sequential
from mmpretrain.registry import MODELS
from torch import Tensor

from .sizes import check_image_size, check_width


@MODELS.register_module()
class PlainConvNet(BaseModule):
    """3x3 convolutions in a row, each with a norm and ReLU; the last map is flattened, so positions are kept.

    Args:
        widths (Sequence[int]): Channels of each convolution.
        strides (Sequence[int]): Of each convolution.
        in_channels (int): Channels of the images. Defaults to 3.
        pool (int): Average pooling of so many pixels in height and in width in front. Defaults to 1: none.
        norm_cfg (dict, optional): Defaults to group norm with one group, which treats train and test alike.
        init_cfg (dict, optional): Defaults to He initialisation of the convolutions.

    Raises:
        ValueError: A width is no whole number of channels, there are not as many strides as widths, or an image is
            smaller than the pooling.
    """

    def __init__(
        self,
        widths: Sequence[int],
        strides: Sequence[int],
        in_channels: int = 3,
        pool: int = 1,
        norm_cfg: dict | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg or dict(type='Kaiming', layer='Conv2d'))
        if len(strides) != len(widths):
            raise ValueError(f'backbone.strides={strides} must be as many as backbone.widths={widths}')
        for index, width in enumerate(widths):
            check_width(f'backbone.widths[{index}]', width, f'convolution {index}')
        norm_cfg = norm_cfg or dict(type='GN', num_groups=1)
        sizes = zip([in_channels, *widths], widths, strides)
        self.pool = pool
        self.convs = Sequential(*(ConvModule(a, b, 3, stride, 1, norm_cfg=norm_cfg) for a, b, stride in sizes))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """x: (B, C, H, W) -> (B, D), in a tuple."""
        check_image_size(self, x, self.pool, 'pooling', 'set a smaller pool')
        return (self.convs(F.avg_pool2d(x, self.pool)).flatten(1),)


@MODELS.register_module()
class SideBranch(BaseModule):
    """A backbone with a small network on the pixels beside it: what a router costs, spent on features instead.

    The branch has the layers of a :class:`mmadvmoe.moe.MLPRouter`: average pooling, and a linear layer with ReLU, whose
    outputs are appended to the features. The linear layer of the head that reads both is the rest of it.

    Args:
        backbone (dict): Config of the network. Its last features are (B, D), or (B, D, H, W) and then averaged.
        image_size (int): Height and width of the images.
        in_channels (int): Channels of the images. Defaults to 3.
        hidden (int): Outputs of the branch. Defaults to 16.
        pool (int): Average pooling of the branch. Defaults to 1: none.
        init_cfg (dict, optional): As in MMEngine.
    """

    def __init__(
        self,
        backbone: dict,
        image_size: int,
        in_channels: int = 3,
        hidden: int = 16,
        pool: int = 1,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        self.network = MODELS.build(backbone)
        self.pool = pool
        self.branch = torch.nn.Linear(in_channels * (image_size // pool) ** 2, hidden)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """x: (B, C, H, W) -> (B, D + hidden), in a tuple."""
        features = self.network(x)[-1]
        if features.dim() > 2:
            features = features.mean(dim=(2, 3))
        beside = F.relu(self.branch(F.avg_pool2d(x, self.pool).flatten(1)))
        return (torch.cat([features, beside], dim=1),)
