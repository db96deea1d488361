"""The report itself: one HTML file that needs nothing else, and its figures as files beside it."""

from __future__ import annotations

import base64
import importlib.metadata
import platform
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from mmadvmoe.visualization import png_bytes

from .accuracy_sections import curves, soundness, summary
from .content import Heading, Listing, Picture, Section, Table
from .results import ModelResults
from .route_sections import dissection, images, loads, patches
from .run_sections import settings, training

_PACKAGES = ('mmadvmoe', 'torch', 'mmengine', 'mmpretrain', 'torchattacks', 'numpy', 'matplotlib')
#: Pixels of a figure for each pixel of the page: figures are sharp on fine screens and on paper.
_FINENESS = 1.6


def sections_of(models: Sequence[ModelResults]) -> list[Section]:
    """All sections that the results allow."""
    found = [
        summary(models),
        curves(models),
        dissection(models),
        loads(models),
        images(models),
        patches(models),
        soundness(models),
        training(models),
        settings(models, versions()),
    ]
    return [section for section in found if section is not None]


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    return {'python': platform.python_version(), **{name: importlib.metadata.version(name) for name in _PACKAGES}}


def write_report(out_dir: Path, models: Sequence[ModelResults]) -> Path:
    """Write ``report.html``, and its figures into ``figures/``.

    Args:
        out_dir (Path): Folder of the report.
        models (Sequence[ModelResults]): What to report on, in the order of columns and colours.

    Returns:
        Path: The HTML file.

    Raises:
        ValueError: There is no model.
    """
    if not models:
        raise ValueError('a report needs at least one model')
    figures = out_dir / 'figures'
    figures.mkdir(parents=True, exist_ok=True)
    sections = sections_of(models)
    encoded = {}
    for section in sections:
        for item in section.items:
            if isinstance(item, Picture):
                file = figures / f'{item.name}.png'
                file.write_bytes(png_bytes(item.figure))
                encoded[item.name] = _encode(file)
    environment = Environment(loader=PackageLoader('mmadvmoe.report', '.'), autoescape=True, undefined=StrictUndefined)
    environment.tests.update(
        {
            kind.__name__.lower(): lambda item, kind=kind: isinstance(item, kind)
            for kind in (Heading, Table, Picture, Listing)
        }
    )
    html = environment.get_template('report.html.jinja').render(
        names=[model.name for model in models],
        created=datetime.now(timezone.utc).strftime('%Y-%m-%d %H:%M UTC'),
        sections=sections,
        encoded=encoded,
    )
    page = out_dir / 'report.html'
    page.write_text(html, encoding='utf-8')
    return page


def _encode(file: Path) -> dict[str, object]:
    """A picture as text, and its size in pixels of the page."""
    with Image.open(file) as picture:
        width, height = (round(length / _FINENESS) for length in picture.size)
    return dict(data=base64.b64encode(file.read_bytes()).decode('ascii'), width=width, height=height)
