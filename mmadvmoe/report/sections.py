"""What a report is made of: sections with texts, tables and figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from matplotlib.figure import Figure


@dataclass(frozen=True)
class Table:
    """A table; its first column names the rows.

    Attributes:
        caption: What it shows, and in which units.
        head: Names of the columns.
        rows: Its cells, as texts.
        wide: Whether it takes the whole width of a page.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    wide: bool = False


@dataclass(frozen=True)
class Picture:
    """A figure.

    Attributes:
        name: Name of its file, without the ending.
        figure: The figure.
        caption: What it shows.
        alt: What it shows to those who cannot see it, with its most important numbers.
    """

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


@dataclass
class Section:
    """A section of a report.

    Attributes:
        name: Its anchor.
        title: Its heading.
        intro: A paragraph on how to read it.
        items: Headings, tables, pictures and listings, in order.
    """

    name: str
    title: str
    intro: str
    items: list[Heading | Table | Picture | Listing] = field(default_factory=list)

    def add_model(self, name: str, items: Sequence[Heading | Table | Picture | Listing]) -> None:
        """Add what there is of a model, under its name."""
        if items:
            self.items += [Heading(name), *items]


def percent(value: float, digits: int = 1) -> str:
    """A number that is in percent already, as text."""
    return f'{value:.{digits}f}%'


def share(value: float) -> str:
    """A share in [0, 1], as text in percent."""
    return percent(100 * value)


def slug(name: str) -> str:
    """A name as part of a file name: ``'AT(MoE)'`` gives ``'at_moe'``."""
    words = ''.join(letter if letter.isalnum() else ' ' for letter in name.lower()).split()
    return '_'.join(words)
