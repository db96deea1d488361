"""Adversarial training of mixture-of-experts networks, as a plugin for MMPretrain."""

import warnings

from ._requirements import check_requirements
from .version import __version__

check_requirements()

# After the check, so that a wrong environment is named instead of failing somewhere in an import.
with warnings.catch_warnings():
    # MMCV's, of an op that nothing here uses.
    warnings.filterwarnings('ignore', message='Fail to import ``MultiScaleDeformableAttention``')
    from . import attacks, datasets, evaluation, models, moe, pruning, runtime, training

runtime.enable_safe_loading()

__all__ = ['__version__', 'attacks', 'datasets', 'evaluation', 'models', 'moe', 'pruning', 'runtime', 'training']
