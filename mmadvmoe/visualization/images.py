"""Images before and after an attack: what changed, and which expert each patch goes to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from mmadvmoe.evaluation import Examples

from .style import BAD, COLORMAP, GOOD, PALETTE, new_figure, plain, style

_LONGEST_NAME = 12
#: In finer grids, patches have no room for a number.
_NUMBERED_COLUMNS = 10
#: How many class tokens and the like may come before the patches.
_EXTRA_TOKENS = range(4)


def draw_image_grid(
    examples: Examples, class_names: Sequence[str] | None = None, attack_name: str = 'attacked'
) -> Figure:
    """Draw a column for each image: clean, attacked, and the difference, each with its prediction and route.

    The difference is drawn around grey, with the largest change of all shown images at the ends of the scale; that
    change is written beside it. What is seen wrongly, clean or attacked, is marked by colour, and what the attack
    turned wrong in words, too.

    Args:
        examples (Examples): The B images; 4 to 8 are readable.
        class_names (Sequence[str], optional): Names of the classes. Defaults to their numbers.
        attack_name (str): Label of the row of attacked images.

    Raises:
        ValueError: There is no image.
    """
    if not len(examples):
        raise ValueError('there is no image to draw')

    def name(label: Tensor) -> str:
        text = str(int(label)) if class_names is None else str(class_names[int(label)])
        return plain(text if len(text) <= _LONGEST_NAME else f'{text[: _LONGEST_NAME - 1]}…')

    change = examples.adversarial - examples.images
    largest = float(change.abs().max()) or 1.0
    pictures = (examples.images, examples.adversarial, 0.5 + change / (2 * largest))
    with style():
        figure = new_figure(width=1.15 * len(examples) + 0.4, height=5.0)
        axes = figure.subplots(3, len(examples), squeeze=False)
        for column in range(len(examples)):
            right = examples.after[column] == examples.label[column]
            old, new = examples.route_before[column], examples.route_after[column]
            titles = (
                f'is {name(examples.label[column])}\nseen: {name(examples.before[column])}\n{_route(old)}',
                f'{"right" if right else "wrong"}\nseen: {name(examples.after[column])}\n{_route(new, old)}',
                '',
            )
            for row, (images, title) in enumerate(zip(pictures, titles)):
                axis = axes[row, column]
                # Matplotlib would colour one channel, from its lowest to its highest number.
                rgb = images[column].expand(3, -1, -1)
                axis.imshow(rgb.permute(1, 2, 0).clamp(0, 1).numpy())
                axis.set_title(title, fontsize=8)
                axis.set(xticks=[], yticks=[])
                axis.spines[:].set(visible=True, color='#999999', linewidth=0.6)
            known = examples.before[column] == examples.label[column]
            axes[0, column].title.set_color(GOOD if known else BAD)
            axes[1, column].title.set_color(GOOD if right else BAD)
        for axis, label in zip(axes[:, 0], ('clean', plain(attack_name), f'change (±{largest:.3g})')):
            axis.set_ylabel(label)
    return figure


def _route(experts: Tensor, before: Tensor | None = None) -> str:
    """The route of one image in a few words: the expert itself, or how many of several decisions changed."""
    if not len(experts):
        return ''
    if len(experts) == 1:
        return f'expert {int(experts[0])}'
    if before is None:
        return f'{len(experts)} choices'
    return f'{int((experts != before).sum())} of {len(experts)} moved'


def patch_grid(num_tokens: int, height: int, width: int) -> tuple[int, int, int]:
    """Find how the T tokens of an image lie on it: how many are no patch, and how many rows and columns of patches.

    Raises:
        ValueError: So many tokens make no grid with the proportions of the image.
    """
    for extra in _EXTRA_TOKENS:
        rows = round(((num_tokens - extra) * height / width) ** 0.5) if num_tokens > extra else 0
        columns = rows * width // height
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
        before, after (Sequence[np.ndarray]): For each of the ``layers``, the first choice of each token, (T,) int.

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
            panels[row, 0].set_ylabel(plain(name), fontsize=8)
            panels[row, 1].set_title(f'attacked: {int((old != new).sum())} of {len(old)} tokens moved', fontsize=8)
            panels[row, 0].set_title('clean', fontsize=8)
        handles = [Rectangle((0, 0), 1, 1, color=color, label=f'expert {n}') for n, color in enumerate(colors)]
        figure.legend(handles=handles, loc='outside lower center', ncols=4)
    return figure


def _expert_colors(num_experts: int) -> list[tuple[float, float, float]]:
    if num_experts <= len(PALETTE):
        return [to_rgb(color) for color in PALETTE[:num_experts]]
    return [tuple(color[:3]) for color in colormaps[COLORMAP](np.linspace(0, 1, num_experts))]


def _draw_layer(axes: Axes, image: np.ndarray, choice: np.ndarray, old: np.ndarray | None, colors: list) -> None:
    height, width = image.shape[:2]
    extra, rows, columns = patch_grid(len(choice), height, width)
    axes.imshow(image, extent=(0, columns, rows, 0), interpolation='nearest')
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    for index, expert in enumerate(choice[extra:]):
        row, column = divmod(index, columns)
        axes.add_patch(Rectangle((column, row), 1, 1, facecolor=(*colors[expert], 0.55), edgecolor='white', lw=0.4))
        if old is not None and old[extra + index] != expert:
            frame = Rectangle((column + 0.06, row + 0.06), 0.88, 0.88, fill=False, edgecolor='black', lw=1.8)
            axes.add_patch(frame)
        if columns <= _NUMBERED_COLUMNS:
            axes.text(column + 0.5, row + 0.5, str(expert), ha='center', va='center', color='white', fontsize=8)
    if extra:
        axes.set_xlabel(f'class token: expert {", ".join(str(expert) for expert in choice[:extra])}', fontsize=8)
