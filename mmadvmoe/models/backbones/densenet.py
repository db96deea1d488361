"""DenseNet for small images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmpretrain.models.backbones import DenseNet
from mmpretrain.registry import MODELS
from torch import Tensor, nn

from mmadvmoe.utils import norms_to_eval

from .sizes import check_image_size, check_width


@MODELS.register_module()
class DenseNet_CIFAR(DenseNet):
    """MMPretrain's DenseNet with the stem for 32x32 images: one 3x3 convolution, no pooling.

    Huang et al., arXiv:1608.06993, section 4.2. DenseNet-BC-40-12 is ``arch=dict(growth_rate=12, depths=[6, 6, 6],
    init_channels=24)``: 40 layers, of which (40 - 4) / 3 = 12 in each block, two in each dense layer.

    Args:
        arch (dict): ``growth_rate``, ``depths`` (dense layers of each block) and ``init_channels`` (of the stem).
        in_channels (int): Channels of the image. Defaults to 3.
        out_indices (Sequence[int] or int): Blocks whose features are given; negative ones count from the end.
            Defaults to -1.
        frozen_stages (int): Freeze the stem and this many blocks; 0 freezes nothing. Defaults to 0.
        norm_eval (bool): Keep norm layers in eval mode in training. Defaults to False.
        init_cfg (dict or list[dict], optional): Defaults to He initialisation of convolutions.
        **kwargs: As for MMPretrain's DenseNet: bn_size, compression_factor, drop_rate, norm_cfg, act_cfg,
            memory_efficient.

    Raises:
        ValueError: ``growth_rate`` or ``init_channels`` is not a whole number of at least 1, or an image is smaller
            than the poolings need.
    """

    def __init__(
        self,
        arch: dict,
        in_channels: int = 3,
        out_indices: int | Sequence[int] = -1,
        frozen_stages: int = 0,
        norm_eval: bool = False,
        init_cfg: None | dict | list = None,
        **kwargs: Any,
    ) -> None:
        check_width('backbone.arch.growth_rate', arch['growth_rate'], 'each dense layer (conv2)')
        check_width('backbone.arch.init_channels', arch['init_channels'], 'the stem (stem.0)')
        self.norm_eval = norm_eval
        super().__init__(
            arch,
            in_channels=in_channels,
            # A list, because negative indices are replaced in it.
            out_indices=[out_indices] if isinstance(out_indices, int) else list(out_indices),
            init_cfg=init_cfg
            or [dict(type='Kaiming', layer=['Conv2d']), dict(type='Constant', val=1, layer=['_BatchNorm'])],
            **kwargs,
        )
        self.stem = nn.Sequential(nn.Conv2d(in_channels, self.init_channels, 3, padding=1, bias=False))
        self.min_size = 2 ** (self.num_stages - 1)
        self.frozen_stages = frozen_stages
        self._freeze_stages()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """x: (B, C, H, W) -> the features of the blocks in ``out_indices``."""
        check_image_size(self, x, self.min_size, 'transitions', 'give backbone.arch.depths fewer blocks')
        return super().forward(x)

    def _freeze_stages(self) -> None:
        if self.frozen_stages > 0:
            self.stem.eval().requires_grad_(False)
        super()._freeze_stages()

    def train(self, mode: bool = True) -> nn.Module | None:
        """As any module; frozen blocks, and with ``norm_eval`` all norm layers, stay in eval mode."""
        super().train(mode)
        if mode and self.norm_eval:
            norms_to_eval(self)
        return self
