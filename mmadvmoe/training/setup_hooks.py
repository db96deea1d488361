"""Hooks that set up a training and then leave it alone."""

from __future__ import annotations

import torch
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


@HOOKS.register_module()
class SpeedHook(Hook):
    """Let a GPU use its fast units: TF32 for products in float32, and weights in the layout of its convolutions.

    Nothing on a CPU. Mixed precision is a matter of the optimizer (``--amp``). What is not here:
    ``env_cfg.cudnn_benchmark``, which would try all algorithms anew for each number of images that an expert gets.

    Args:
        tf32 (bool): Round the factors of float32 products to 10 bits of mantissa. Defaults to True.
        channels_last (bool): Keep convolution weights in the layout NHWC. Defaults to True.

    Examples:
        >>> custom_hooks = [dict(type='SpeedHook')]
    """

    def __init__(self, tf32: bool = True, channels_last: bool = True) -> None:
        self.tf32 = tf32
        self.channels_last = channels_last

    def before_run(self, runner: Runner) -> None:
        """Change the settings of the process, and the layout of the model."""
        model = bare_model(runner.model)
        if next(model.parameters()).device.type != 'cuda':
            return
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self.tf32
        if self.channels_last:
            model.to(memory_format=torch.channels_last)
