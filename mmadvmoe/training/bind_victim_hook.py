"""Adversarial training of a classifier that knows nothing of it."""

from __future__ import annotations

from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmpretrain.registry import HOOKS

from mmadvmoe.attacks import Victim
from mmadvmoe.models import AdvDataPreprocessor
from mmadvmoe.utils import bare_model


@HOOKS.register_module()
class BindVictimHook(Hook):
    """Let an :class:`AdvDataPreprocessor` attack the model it belongs to; a ``RobustClassifier`` does so by itself.

    Raises:
        TypeError: The model's data preprocessor does not attack.

    Examples:
        >>> # PGD training (arXiv:1706.06083) of an untouched ImageClassifier
        >>> model = dict(
        ...     type='ImageClassifier',
        ...     data_preprocessor=dict(
        ...         type='AdvDataPreprocessor', mode='replace',
        ...         attack=dict(type='PGD', eps=8 / 255, alpha=2 / 255, steps=10)),
        ...     backbone=..., head=...)
        >>> custom_hooks = [dict(type='BindVictimHook')]
    """

    priority = 'VERY_HIGH'

    def before_train(self, runner: Runner) -> None:
        """Bind the bare model, once it is built."""
        model = bare_model(runner.model)
        if not isinstance(model.data_preprocessor, AdvDataPreprocessor):
            raise TypeError(
                'custom_hooks: BindVictimHook needs data_preprocessor.type=AdvDataPreprocessor, got '
                f'{type(model.data_preprocessor).__name__}'
            )
        model.data_preprocessor.bind_victim(Victim(model))
