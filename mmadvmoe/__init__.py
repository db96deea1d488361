"""Adversarial training of mixture-of-experts networks, as a plugin for MMPretrain."""

from ._requirements import check_requirements
from .version import __version__

check_requirements()

# After the check, so that a wrong environment is named instead of failing somewhere in an import.
from . import attacks, datasets, engine, models, moe, pruning  # noqa: E402
from .engine.safe_load import enable_safe_loading  # noqa: E402

enable_safe_loading()

__all__ = ['__version__', 'attacks', 'datasets', 'engine', 'models', 'moe', 'pruning']
