"""The look that all figures share: sizes, colours that colour-blind readers can tell apart, and PNG files."""

from __future__ import annotations

import io
from contextlib import AbstractContextManager
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from mmadvmoe.utils import write_atomically

#: The palette of Okabe and Ito (https://jfly.uni-koeln.de/color/), without its yellow, which is too light for lines.
PALETTE = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')
#: A second mark for each line, so that nothing is told by colour alone.
MARKERS = ('o', 's', '^', 'D', 'v', 'P', 'X')
#: Maps shares in [0, 1] to colours; made to look alike with and without colour blindness.
COLORMAP = 'cividis'
#: For what went well and what did not. Their labels say so too.
GOOD, BAD = PALETTE[0], PALETTE[1]
#: Width in inches of a figure that fills a phone: at that width, text is about 8 points high.
WIDTH = 4.6
_DPI = 160
_STYLE = {
    'font.size': 9,
    'axes.titlesize': 10,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.grid': True,
    'axes.axisbelow': True,
    'grid.color': '#dddddd',
    'legend.frameon': False,
    'legend.fontsize': 8,
    'legend.handlelength': 3.2,
    'lines.markersize': 4,
    'figure.facecolor': 'white',
}


def style() -> AbstractContextManager:
    """A context in which figures have the shared look, whatever the user's settings are."""
    return matplotlib.style.context(['default', _STYLE])


def plain(text: object) -> str:
    """A text from data, such as the name of a class or a model, as a figure shows it: its ``$`` begin no formula."""
    return str(text).replace('$', r'\$')


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """An empty figure, sizes in inches, that belongs to no window and to no global list of figures."""
    return Figure(figsize=(width, height), layout='constrained')


def single_axes(height: float, title: str, xlabel: str = '', ylabel: str = '') -> tuple[Figure, Axes]:
    """A figure with one set of axes, ``height`` in inches."""
    figure = new_figure(height)
    axes = figure.add_subplot()
    axes.set(title=plain(title), xlabel=plain(xlabel), ylabel=plain(ylabel))
    return figure, axes


def png_bytes(figure: Figure) -> bytes:
    """A figure as the content of a PNG file. Equal figures give equal bytes."""
    stream = io.BytesIO()
    # Ticks are made as late as this.
    with style():
        figure.savefig(stream, format='png', dpi=_DPI, metadata={'Software': None})
    return stream.getvalue()


def save_png(figure: Figure, path: str | Path) -> np.ndarray:
    """Write a figure to a file, making its folder, and give the pixels of the file, (H, W, 3) uint8."""
    content = png_bytes(figure)
    write_atomically(path, content)
    return np.asarray(Image.open(io.BytesIO(content)).convert('RGB'))
