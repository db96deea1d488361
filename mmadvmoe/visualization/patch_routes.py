"""Which expert each patch of an image goes to, for routers of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .style import COLORMAP, PALETTE, new_figure, style

#: Patches are numbered in grids of up to so many columns; in finer ones there is no room.
_NUMBERED_COLUMNS = 10
#: Class tokens and the like, which are no part of the image and come first.
_EXTRA_TOKENS = range(4)


def patch_grid(num_tokens: int, height: int, width: int) -> tuple[int, int, int]:
    """How tokens lie on an image: so many tokens that are no patch, and rows and columns of patches.

    Args:
        num_tokens (int): T of one image.
        height, width (int): Of the image, whose proportions the patches share.

    Raises:
        ValueError: So many tokens make no such grid.
    """
    for extra in _EXTRA_TOKENS:
        rows = round(((num_tokens - extra) * height / width) ** 0.5)
        columns = rows * width // height if rows else 0
        if rows and rows * columns == num_tokens - extra and rows * width == columns * height:
            return extra, rows, columns
    raise ValueError(
        f'{num_tokens} tokens make no grid of patches with the proportions of an image of {height}x{width}'
    )


def draw_patch_routes(
    image: np.ndarray,
    adversarial: np.ndarray,
    before: Sequence[np.ndarray],
    after: Sequence[np.ndarray],
    num_experts: int,
    layers: Sequence[str],
) -> Figure:
    """Draw an image, clean and attacked, under the experts that its patches go to, a row for each layer.

    Patches that the attack sent elsewhere have a thick frame.

    Args:
        image, adversarial (np.ndarray): (H, W, 3) in [0, 1].
        before, after (Sequence[np.ndarray]): For each layer, the first choice of each token, (T,) whole numbers.
        num_experts (int): N.
        layers (Sequence[str]): Names of the layers.

    Raises:
        ValueError: The tokens of a layer make no grid of patches.
    """
    colors = _expert_colors(num_experts)
    with style():
        figure = new_figure(height=0.6 + 2.25 * len(layers))
        panels = figure.subplots(len(layers), 2, squeeze=False)
        for row, (name, old, new) in enumerate(zip(layers, before, after)):
            _draw_layer(panels[row, 0], image, old, None, colors)
            _draw_layer(panels[row, 1], adversarial, new, old, colors)
            panels[row, 0].set_ylabel(name, fontsize=8)
            panels[row, 1].set_title(f'attacked: {int((old != new).sum())} of {len(old)} tokens moved', fontsize=8)
            panels[row, 0].set_title('clean', fontsize=8)
        handles = [Rectangle((0, 0), 1, 1, color=color, label=f'expert {n}') for n, color in enumerate(colors)]
        figure.legend(handles=handles, loc='outside lower center', ncols=4)
    return figure


def _expert_colors(num_experts: int) -> list[tuple[float, float, float]]:
    if num_experts <= len(PALETTE):
        return [to_rgb(color) for color in PALETTE[:num_experts]]
    return [tuple(color[:3]) for color in colormaps[COLORMAP](np.linspace(0, 1, num_experts))]


def _draw_layer(axes: Axes, image: np.ndarray, choice: np.ndarray, old: Optional[np.ndarray], colors: list) -> None:
    height, width = image.shape[:2]
    extra, rows, columns = patch_grid(len(choice), height, width)
    axes.imshow(image, extent=(0, columns, rows, 0), interpolation='nearest')
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    for place, expert in enumerate(choice[extra:]):
        row, column = divmod(place, columns)
        axes.add_patch(Rectangle((column, row), 1, 1, facecolor=(*colors[expert], 0.55), edgecolor='white', lw=0.4))
        if old is not None and old[extra + place] != expert:
            frame = Rectangle((column + 0.06, row + 0.06), 0.88, 0.88, fill=False, edgecolor='black', lw=1.8)
            axes.add_patch(frame)
        if columns <= _NUMBERED_COLUMNS:
            axes.text(column + 0.5, row + 0.5, str(expert), ha='center', va='center', color='white', fontsize=8)
    if extra:
        told = ', '.join(str(expert) for expert in choice[:extra])
        axes.set_xlabel(f'class token: expert {told}', fontsize=8)
