"""A page of sections with texts, tables and figures: one HTML file that needs nothing else, its figures beside it."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure
from PIL import Image

from mmadvmoe.utils import write_atomically
from mmadvmoe.visualization import png_bytes

#: Pixels of a figure for each pixel of the page: figures are sharp on fine screens and on paper.
_FINENESS = 1.6
#: In place of a number that is not known.
ABSENT = '–'


@dataclass(frozen=True)
class Table:
    """A table of texts, whose first column names the rows; ``wide`` if it takes the whole width of a page."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    wide: bool = False


@dataclass(frozen=True)
class Picture:
    """A figure, and the ``name`` of its file; ``alt`` tells its most important numbers to those who cannot see it."""

    name: str
    figure: Figure
    caption: str
    alt: str


@dataclass(frozen=True)
class Heading:
    """The name of the model that the next items are of, where there are several."""

    text: str


@dataclass(frozen=True)
class Listing:
    """A long text that is shown when asked for, such as a config."""

    title: str
    text: str


Item = Heading | Table | Picture | Listing


@dataclass
class Section:
    """A section of a page: its anchor, its heading, a paragraph on how to read it, and its items in order."""

    name: str
    title: str
    intro: str
    items: list[Item] = field(default_factory=list)

    def add_model(self, name: str, items: Sequence[Item]) -> None:
        """Add what there is of a model, under its name."""
        if items:
            self.items += [Heading(name), *items]


def as_count(value: int | None) -> str:
    """A whole number as text, or that it is not known."""
    return ABSENT if value is None else f'{value:,}'


def as_percent(value: float) -> str:
    """A number that is in percent already, as text."""
    return f'{value:.1f}%'


def share(value: float) -> str:
    """A share in [0, 1], as text in percent."""
    return as_percent(100 * value)


def slug(name: str) -> str:
    """A name as part of a file name: ``'AT(MoE)'`` gives ``'at_moe'``."""
    return '_'.join(''.join(letter if letter.isalnum() else ' ' for letter in name.lower()).split())


def write_page(out_dir: Path, names: Sequence[str], sections: Sequence[Section]) -> Path:
    """Write ``report.html`` on the models of these names, and its figures into ``figures/``; return the HTML file."""
    figures = out_dir / 'figures'
    # Each picture as text, and its size in pixels of the page.
    encoded = {}
    for picture in (item for section in sections for item in section.items if isinstance(item, Picture)):
        file = figures / f'{picture.name}.png'
        write_atomically(file, png_bytes(picture.figure))
        with Image.open(file) as image:
            width, height = (round(length / _FINENESS) for length in image.size)
        data = base64.b64encode(file.read_bytes()).decode('ascii')
        encoded[picture.name] = dict(data=data, width=width, height=height)
    environment = Environment(loader=PackageLoader('mmadvmoe.report', '.'), autoescape=True, undefined=StrictUndefined)
    for kind in (Heading, Table, Picture, Listing):
        environment.tests[kind.__name__.lower()] = lambda item, kind=kind: isinstance(item, kind)
    html = environment.get_template('report.html.jinja').render(
        names=names, created=f'{datetime.now(timezone.utc):%Y-%m-%d %H:%M UTC}', sections=sections, encoded=encoded
    )
    page = out_dir / 'report.html'
    write_atomically(page, html.encode())
    return page
