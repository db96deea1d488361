"""Small routers that read the pixels of every position: affine maps with ReLUs between them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch.nn.functional as F
from mmpretrain.registry import MODELS
from torch import Tensor, nn

from .routers import BaseRouter, check_channels


class _PixelRouter(BaseRouter):
    """Base of routers of images whose channels and size are known, and that are their :meth:`affine_maps`."""

    reads_images = True

    def __init__(
        self, num_experts: int, image_size: int | Sequence[int], in_channels: int, pool: int, init_cfg: dict | None
    ) -> None:
        super().__init__(num_experts, init_cfg)
        self.in_channels = in_channels
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        if pool < 1 or any(side % pool for side in self.image_size):
            raise ValueError(f'router.pool={pool} must divide router.image_size={self.image_size}')
        self.pool = pool
        #: Height and width behind the pooling.
        self.size = tuple(side // pool for side in self.image_size)

    def pixels(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) -> (B, C, H/pool, W/pool)."""
        if x.shape[-2:] != self.image_size:
            raise ValueError(f'router.image_size={self.image_size} does not fit images of {tuple(x.shape[-2:])}')
        check_channels(x, self.in_channels)
        return F.avg_pool2d(x, self.pool) if self.pool > 1 else x

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) -> logits (B, N)."""
        first, *others = self.affine_maps()
        x = first(x)
        for affine in others:
            x = affine(F.relu(x))
        return x


@MODELS.register_module()
class MLPRouter(_PixelRouter):
    """An image-level router on the pixels: one hidden layer, no norm, no pooling over all positions.

    It sees where something is, which average pooling over all positions hides, and is so small that an attack finds
    little to take hold of.

    Args:
        num_experts (int): N >= 2.
        image_size (int or Sequence[int]): Height and width of the images.
        in_channels (int): Channels of the images. Defaults to 3.
        hidden (int): Width of the hidden layer; 0 leaves a linear router. Defaults to 16.
        pool (int): Average pooling of so many pixels in height and in width in front. Defaults to 1: none.
        init_cfg (dict, optional): Defaults to None: PyTorch's initialisation of linear layers.

    Raises:
        ValueError: A size is out of range, or images are of another size than said.
    """

    def __init__(
        self,
        num_experts: int,
        image_size: int | Sequence[int],
        in_channels: int = 3,
        hidden: int = 16,
        pool: int = 1,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(num_experts, image_size, in_channels, pool, init_cfg)
        if hidden < 0:
            raise ValueError(f'router.hidden={hidden} must be at least 0')
        numbers = in_channels * math.prod(self.size)
        self.hidden = nn.Linear(numbers, hidden) if hidden else None
        self.fc = nn.Linear(hidden or numbers, num_experts)

    def affine_maps(self) -> tuple[Callable[[Tensor], Tensor], ...]:
        first, *others = (self.fc,) if self.hidden is None else (self.hidden, self.fc)
        return (lambda x: first(self.pixels(x).flatten(1)), *others)


@MODELS.register_module()
class ConvRouter(_PixelRouter):
    """An image-level router of strided 3x3 convolutions and a linear layer that reads every position.

    Args:
        num_experts, image_size, in_channels, pool, init_cfg: See :class:`MLPRouter`, also for errors.
        channels (Sequence[int]): Of each convolution; each halves height and width. Defaults to (4, 8).
    """

    def __init__(
        self,
        num_experts: int,
        image_size: int | Sequence[int],
        in_channels: int = 3,
        channels: Sequence[int] = (4, 8),
        pool: int = 1,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(num_experts, image_size, in_channels, pool, init_cfg)
        if not channels:
            raise ValueError(f'router.channels={channels} must hold at least one width; MLPRouter does without')
        widths = [in_channels, *channels]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in zip(widths, widths[1:]))
        positions = math.prod(-(-side // 2 ** len(channels)) for side in self.size)
        self.fc = nn.Linear(widths[-1] * positions, num_experts)

    def affine_maps(self) -> tuple[Callable[[Tensor], Tensor], ...]:
        first, *others = self.convs
        return (lambda x: first(self.pixels(x)), *others, lambda x: self.fc(x.flatten(1)))
