"""Images that are too small for a backbone."""

from __future__ import annotations

from torch import Tensor, nn


def check_image_size(backbone: nn.Module, images: Tensor, least: int, layers: str, setting: str) -> None:
    """Refuse images of which a backbone would leave nothing.

    Args:
        backbone (nn.Module): For the message.
        images (Tensor): (B, C, H, W).
        least (int): What height and width must be at least.
        layers (str): The layers that make them smaller, for the message.
        setting (str): What in the config makes fewer of these, for the message.

    Raises:
        ValueError: Height or width is below ``least``.
    """
    height, width = images.shape[-2:]
    if min(height, width) < least:
        raise ValueError(
            f'images of {height}x{width} are too small for the {type(backbone).__name__}, whose {layers} need at least '
            f'{least}x{least}: enlarge them (a Resize in the pipeline of the data set) or {setting}'
        )
