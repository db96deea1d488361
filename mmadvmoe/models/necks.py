"""A neck that keeps some of the positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Union

from mmpretrain.registry import MODELS
from torch import Tensor, nn


@MODELS.register_module()
class AdaptiveAveragePooling(nn.Module):
    """Average to a fixed number of positions and flatten, as before the linear layers of a VGG.

    Args:
        output_size (int): Positions on each side. Defaults to 2.
    """

    def __init__(self, output_size: int = 2) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(output_size)

    def forward(self, inputs: Union[Tensor, Sequence[Tensor]]) -> Union[Tensor, tuple[Tensor, ...]]:
        """(B, C, H, W), or several, -> (B, C * output_size ** 2)."""
        if isinstance(inputs, Tensor):
            return self.pool(inputs).flatten(1)
        return tuple(self.pool(x).flatten(1) for x in inputs)
