"""Mixed precision on CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.optim import OptimWrapper
from mmpretrain.registry import OPTIM_WRAPPERS
from torch import nn


@OPTIM_WRAPPERS.register_module()
class CPUAmpOptimWrapper(OptimWrapper):
    """Run forward passes in bfloat16 on CPU, which MMEngine's ``AmpOptimWrapper`` refuses; weights stay float32.

    bfloat16 has the exponent range of float32, so no loss scaling is needed.

    Args:
        dtype (str): ``'bfloat16'``, the only type on offer. Defaults to that.
        **kwargs: As for :class:`mmengine.optim.OptimWrapper`.

    Raises:
        ValueError: Another ``dtype``.
    """

    def __init__(self, dtype: str = 'bfloat16', **kwargs) -> None:
        if dtype != 'bfloat16':
            raise ValueError(
                f"CPUAmpOptimWrapper: dtype={dtype!r}; allowed: 'bfloat16' (float16 would need loss scaling)"
            )
        super().__init__(**kwargs)

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Autocast on CPU, inside MMEngine's context for gradient accumulation."""
        with super().optim_context(model), torch.autocast('cpu', dtype=torch.bfloat16):
            yield
