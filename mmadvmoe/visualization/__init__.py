"""Figures of robustness; they know nothing of runs, files or reports."""

from .heatmap import draw_load_per_class
from .image_grid import draw_image_grid
from .lines import Line, draw_lines
from .style import png_bytes, save_png
from .training import draw_training

__all__ = [
    'Line',
    'draw_image_grid',
    'draw_lines',
    'draw_load_per_class',
    'draw_training',
    'png_bytes',
    'save_png',
]
