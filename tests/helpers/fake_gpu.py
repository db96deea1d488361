"""A GPU that is not there: tensors without values on another device, and an answer wherever code reads a value.

The device is called `meta`, because without a GPU autograd runs on no device called `cuda`. PyTorch's `FakeTensorMode`
checks each operation for operands on different devices. What the host reads is answered such that checks pass, every
image is of use to an attack and several experts get images.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from unittest import mock

import torch
from mmengine.model import BaseDataPreprocessor
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

DEVICE = 'meta'


class Answers(TorchFunctionMode):
    """Answers what would be read from the device.

    Args:
        rows (dict[int, tuple]): How many rows or images to deal out where so many counts are read, and whether
            these are counts of a route of images.
    """

    def __init__(self, rows: dict[int, tuple[int, bool]]) -> None:
        super().__init__()
        self.rows = rows

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, '__name__', '')
        if name in ('__bool__', 'is_nonzero'):
            return getattr(args[0], 'answer', False)
        if name in ('item', '__float__', '__int__'):
            return 0
        if name == 'nonzero':
            return torch.arange(len(args[0]), device=args[0].device)[:, None]
        if name == 'unique':
            return args[0][:1], torch.zeros(len(args[0]), dtype=torch.long, device=args[0].device)
        if name in ('__getitem__', '__setitem__') and isinstance(args[1], Tensor) and args[1].dtype == torch.bool:
            # As if the mask were true everywhere; its device counts all the same.
            args = (args[0], torch.arange(len(args[0]), device=args[1].device), *args[2:])
        result = function(*args, **kwargs)
        if isinstance(result, Tensor) and (name == 'isfinite' or name == 'all' and hasattr(args[0], 'answer')):
            result.answer = True
        return result

    def list(self, values: Tensor) -> list:
        """What `values.tolist()` gives."""
        if values.dtype == torch.bool:
            return [True] * len(values)
        if values.is_floating_point():
            return [0.0, 1.0] * (len(values) // 2)
        rows, of_route = self.rows[len(values)]
        counts = [rows - 1, 1, *[0] * (len(values) - 2 - 2 * of_route)]
        # Of the route of images, what lies below and above the experts is counted as well.
        return [0, *counts, 0] if of_route else counts


@contextmanager
def fake_gpu(images: int, tokens: int = 0, num_experts: int = 3) -> Iterator[str]:
    """Inside, tensors have no values; gives the name of the device.

    Args:
        images (int): B, dealt out to experts by the routes of images.
        tokens (int): Rows that are dealt out to experts by the routes of tokens.
        num_experts (int): N.
    """
    answers = Answers({num_experts: (tokens, False), num_experts + 2: (images, True)})
    with ExitStack() as stack:
        # Of all reads the only one that such tensors answer by themselves; and there is no autocast for the device.
        stack.enter_context(mock.patch.object(FakeTensor, 'tolist', lambda self: answers.list(self)))
        stack.enter_context(mock.patch.object(torch, 'is_autocast_enabled', lambda *_: False))
        stack.enter_context(mock.patch.object(torch, 'autocast', lambda *_, **__: nullcontext()))
        stack.enter_context(FakeTensorMode())
        stack.enter_context(answers)
        yield DEVICE


def moved(model: nn.Module) -> nn.Module:
    """A model on the device; `Module.to` cannot exchange tensors without values."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device=DEVICE))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device=DEVICE)
        if isinstance(module, BaseDataPreprocessor):
            module._device = torch.device(DEVICE)
    return model
