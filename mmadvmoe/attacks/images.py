"""Which numbers images are made of."""

from __future__ import annotations

import torch
from torch import Tensor

#: The integer types of images that files hold, with the value of white.
WHITE = {torch.uint8: 2**8 - 1, torch.uint16: 2**16 - 1}
#: What rounding may add to images in [0, 1] that were normalised and brought back.
ROUNDING = 1e-4


def as_unit(images: Tensor) -> Tensor:
    """Bring images of integers, of any shape, to [0, 1] by their type; floating point images are left as they are.

    Raises:
        TypeError: They are integers of another type than :data:`WHITE` has, whose white nobody knows.
    """
    if images.is_floating_point():
        return images
    if images.dtype not in WHITE:
        raise TypeError(
            f'images are {images.dtype}, which does not tell what is white; give floating point images in [0, 1], or '
            f'{" or ".join(map(str, WHITE))}'
        )
    return images.float() / WHITE[images.dtype]


def check_unit(images: Tensor, what: str = 'images', slack: float = ROUNDING) -> Tensor:
    """Give floating point images back if they lie in [0, 1], or ``slack`` outside, at the cost of one transfer.

    Raises:
        ValueError: They do not, or a pixel is NaN; ``what`` names them.
    """
    if not images.numel():
        return images
    check_range(*torch.stack([*images.detach().aminmax()]).tolist(), what, slack)
    return images


def check_range(low: float, high: float, what: str = 'images', slack: float = ROUNDING) -> None:
    """Raise ValueError unless the least and the largest value of images lie in [0, 1]; see :func:`check_unit`."""
    # Written so that NaN fails too.
    if not (low >= -slack and high <= 1 + slack):
        raise ValueError(
            f'{what} must be in [0, 1], got values from {low:.4g} to {high:.4g}; divide pixels in 0..255 by 255; '
            'normalisation belongs inside the model (mean and std of the data_preprocessor)'
        )
