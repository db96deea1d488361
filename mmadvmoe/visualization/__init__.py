"""Figures of robustness; they know nothing of runs, files or reports."""

from .charts import Line, draw_confusion, draw_lines, draw_loads, draw_parts, draw_training
from .images import draw_image_grid, draw_patch_routes, patch_grid
from .style import png_bytes, save_png

__all__ = [
    'Line',
    'draw_confusion',
    'draw_image_grid',
    'draw_lines',
    'draw_loads',
    'draw_parts',
    'draw_patch_routes',
    'draw_training',
    'patch_grid',
    'png_bytes',
    'save_png',
]
