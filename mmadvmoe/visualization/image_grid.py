"""Clean images, attacked images and what changed between them, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from mmadvmoe.evaluation import Examples

from .style import BAD, GOOD, new_figure, style

_LONGEST_NAME = 12


def draw_image_grid(
    examples: Examples, class_names: Optional[Sequence[str]] = None, attack_name: str = 'attacked'
) -> Figure:
    """Draw a column for each image: clean, attacked, and the difference, each with its prediction and route.

    The difference is drawn around grey, with the largest change of all shown images at the ends of the scale; that
    change is written beside it. What the attack turned wrong is marked in words, and by colour.

    Args:
        examples (Examples): The B images; 4 to 8 are readable.
        class_names (Sequence[str], optional): Names of the classes. Defaults to their numbers.
        attack_name (str): What the row of attacked images is called.

    Raises:
        ValueError: There is no image.
    """
    if not len(examples):
        raise ValueError('there is no image to draw')

    def name(label: Tensor) -> str:
        text = str(int(label)) if class_names is None else str(class_names[int(label)])
        return text if len(text) <= _LONGEST_NAME else f'{text[: _LONGEST_NAME - 1]}…'

    change = examples.adversarial - examples.images
    largest = float(change.abs().max()) or 1.0
    pictures = (examples.images, examples.adversarial, 0.5 + change / (2 * largest))
    with style():
        figure = new_figure(width=1.15 * len(examples) + 0.4, height=5.0)
        axes = figure.subplots(3, len(examples), squeeze=False)
        for column in range(len(examples)):
            right = examples.after[column] == examples.label[column]
            titles = (
                f'is {name(examples.label[column])}\nseen: {name(examples.before[column])}\n'
                f'{_route(examples.route_before[column])}',
                f'{"right" if right else "wrong"}\nseen: {name(examples.after[column])}\n'
                f'{_route(examples.route_after[column], examples.route_before[column])}',
                '',
            )
            for row, (images, title) in enumerate(zip(pictures, titles)):
                axis = axes[row, column]
                axis.imshow(_pixels(images[column]))
                axis.set_title(title, fontsize=8)
                axis.set(xticks=[], yticks=[])
                axis.spines[:].set(visible=True, color='#999999', linewidth=0.6)
            axes[1, column].title.set_color(GOOD if right else BAD)
        for axis, label in zip(axes[:, 0], ('clean', attack_name, f'change (±{largest:.3g})')):
            axis.set_ylabel(label)
    return figure


def _route(experts: Tensor, before: Optional[Tensor] = None) -> str:
    """The route of one image in a few words: the expert itself, or how many of several decisions changed."""
    if not len(experts):
        return ''
    if len(experts) == 1:
        return f'expert {int(experts[0])}'
    if before is None:
        return f'{len(experts)} choices'
    return f'{int((experts != before).sum())} of {len(experts)} moved'


def _pixels(image: Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).clamp(0, 1).numpy()
