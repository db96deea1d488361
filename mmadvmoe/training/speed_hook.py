"""Settings of a GPU that trade bits for speed."""

from __future__ import annotations

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmpretrain.registry import HOOKS

from mmadvmoe.utils import bare_model


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
