"""Wide residual networks."""

from __future__ import annotations

from collections.abc import Sequence

from mmcv.cnn import build_norm_layer
from mmpretrain.models.backbones.base_backbone import BaseBackbone
from mmpretrain.registry import MODELS
from torch import Tensor, nn

from mmadvmoe.utils import norms_to_eval

from .sizes import check_width

_NUM_STAGES = 3


class _Block(nn.Module):
    """Norm, ReLU, 3x3 convolution, twice, beside an identity or a 1x1 convolution where the shape changes."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, norm_cfg: dict, activate_transitions: bool
    ) -> None:
        super().__init__()
        self.changes_shape = stride > 1 or in_channels != out_channels
        self.activates = activate_transitions or not self.changes_shape
        self.norm1 = build_norm_layer(norm_cfg, in_channels)[1] if self.activates else nn.Identity()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.norm2 = build_norm_layer(norm_cfg, out_channels)[1]
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False) if self.changes_shape else None
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W)."""
        out = self.relu(self.norm1(x)) if self.activates else x
        kept = x if self.shortcut is None else self.shortcut(out)
        return kept + self.conv2(self.relu(self.norm2(self.conv1(out))))


@MODELS.register_module()
class WideResNet(BaseBackbone):
    """Wide residual network for large images: a 7x7 stem of stride 2 and a max pooling before the three stages.

    Zagoruyko and Komodakis, arXiv:1605.07146; pre-activation blocks without dropout.

    Args:
        depth (int): 6n + 4 for n blocks in each stage: 28 or 34 in the literature on robustness.
        widen_factor (int): k; the stages have k, 2k and 4k times ``base_channels``.
        in_channels (int): Channels of the image. Defaults to 3.
        base_channels (int): Width of the stem; a model scale r scales it, and all others with it. Defaults to 16.
        out_indices (Sequence[int]): Stages, of 0, 1 and 2, whose features are given. Norm and ReLU that end the
            network are applied to the last stage only. Defaults to (2, ).
        frozen_stages (int): 0 freezes the stem, i > 0 the stages up to i as well; -1 nothing. Defaults to -1.
        norm_cfg (dict): Defaults to batch norm.
        norm_eval (bool): Keep norm layers in eval mode in training. Defaults to False.
        activate_transitions (bool): Whether norm and ReLU come before the convolutions of a block that changes the
            shape, too, as in the paper. False for checkpoints of the AdvMoE reference code, whose blocks of this kind
            convolve their raw input. Defaults to True.
        init_cfg (dict or list[dict], optional): Defaults to He initialisation of convolutions.

    Raises:
        ValueError: A depth, width or stage that does not exist.
    """

    def __init__(
        self,
        depth: int,
        widen_factor: int,
        in_channels: int = 3,
        base_channels: int = 16,
        out_indices: Sequence[int] = (2,),
        frozen_stages: int = -1,
        norm_cfg: dict = dict(type='BN'),  # noqa: B006
        norm_eval: bool = False,
        activate_transitions: bool = True,
        init_cfg: None | dict | list = None,
    ) -> None:
        super().__init__(
            init_cfg
            or [dict(type='Kaiming', layer=['Conv2d']), dict(type='Constant', val=1, layer=['_BatchNorm', 'GroupNorm'])]
        )
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f'backbone.depth={depth} must be 6n + 4 with n >= 1, such as 16, 22, 28, 34 or 40')
        check_width('backbone.base_channels', base_channels, 'the stem (conv1)')
        check_width('backbone.widen_factor x base_channels', widen_factor * base_channels, 'the first stage (layer1)')
        if not out_indices or not set(out_indices) <= set(range(_NUM_STAGES)):
            raise ValueError(f'backbone.out_indices={out_indices} must name stages in [0, {_NUM_STAGES})')
        if not -1 <= frozen_stages <= _NUM_STAGES:
            raise ValueError(f'backbone.frozen_stages={frozen_stages} must lie in [-1, {_NUM_STAGES}]')
        self.out_indices = tuple(out_indices)
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self._make_stem(in_channels, base_channels, norm_cfg)
        channels = base_channels
        for stage in range(_NUM_STAGES):
            width = base_channels * widen_factor * 2**stage
            blocks = []
            for block in range((depth - 4) // 6):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(_Block(channels, width, stride, norm_cfg, activate_transitions))
                channels = width
            self.add_module(f'layer{stage + 1}', nn.Sequential(*blocks))
        self.norm = build_norm_layer(norm_cfg, channels)[1]
        self.relu = nn.ReLU(inplace=True)
        self._freeze_stages()

    def _make_stem(self, in_channels: int, channels: int, norm_cfg: dict) -> None:
        self.conv1 = nn.Conv2d(in_channels, channels, 7, 2, 3, bias=False)
        self.stem_tail: nn.Module = nn.Sequential(
            build_norm_layer(norm_cfg, channels)[1], nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """x: (B, C, H, W) -> the features of the stages in ``out_indices``."""
        x = self.stem_tail(self.conv1(x))
        outs = []
        for stage in range(_NUM_STAGES):
            x = getattr(self, f'layer{stage + 1}')(x)
            if stage in self.out_indices:
                outs.append(self.relu(self.norm(x)) if stage == _NUM_STAGES - 1 else x)
        return tuple(outs)

    def _freeze_stages(self) -> None:
        stem = [self.conv1, self.stem_tail] if self.frozen_stages >= 0 else []
        stages = [getattr(self, f'layer{stage + 1}') for stage in range(self.frozen_stages)]
        for module in (*stem, *stages):
            module.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> WideResNet:
        """As any module; frozen stages, and with ``norm_eval`` all norm layers, stay in eval mode."""
        super().train(mode)
        self._freeze_stages()
        if mode and self.norm_eval:
            norms_to_eval(self)
        return self


@MODELS.register_module()
class WideResNet_CIFAR(WideResNet):
    """Wide residual network for small images: a 3x3 stem of stride 1, no pooling. Arguments as :class:`WideResNet`."""

    def _make_stem(self, in_channels: int, channels: int, norm_cfg: dict) -> None:
        self.conv1 = nn.Conv2d(in_channels, channels, 3, 1, 1, bias=False)
        self.stem_tail = nn.Identity()
