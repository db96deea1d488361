"""Count what makes the host wait for the device: numbers that Python reads off tensors, and tensors made from them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_READS = {
    getattr(Tensor, name)
    for name in (
        'item tolist cpu numpy nonzero unique __bool__ __int__ __float__ __index__ __contains__ __array__ '
        'bincount masked_select equal allclose is_nonzero'
    ).split()
} | {
    torch.nonzero,
    torch.unique,
    torch.bincount,
    torch.masked_select,
    torch.equal,
    torch.allclose,
    torch.is_nonzero,
    torch.unique_consecutive,
    torch.argwhere,
}
_INDEXING = (Tensor.__getitem__, Tensor.__setitem__)
_FROM_HOST = (torch.tensor, torch.as_tensor, torch.from_numpy, Tensor.new_tensor)


class HostReads(TorchFunctionMode):
    """Inside, calls that would wait for a GPU are counted, by name; on a CPU, where they cost nothing.

    Masks as indices are among them (how many there are decides the shape), copies to the CPU, and ``torch.tensor``,
    whose copy to the device waits as well.

    Attributes:
        names (list[str]): Each call, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in _READS or function in _FROM_HOST:
            self._note(function)
        elif function in _INDEXING and _has_mask(args[1], writes_number=_writes_number(function, args)):
            self._note(function)
        elif function is Tensor.to and any(
            isinstance(arg, str) and arg == 'cpu' for arg in (*args[1:], *kwargs.values())
        ):
            self._note(function)
        elif function is torch.where and len(args) == 1:
            self._note(function)
        elif function in (Tensor.repeat_interleave, torch.repeat_interleave) and 'output_size' not in kwargs:
            if any(isinstance(arg, Tensor) for arg in (*args[1:], *kwargs.values())):
                self._note(function)
        # One call is one wait, whatever it calls in turn.
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs)

    def _note(self, function) -> None:
        self.names.append(function.__name__)

    def __len__(self) -> int:
        return len(self.names)


def _has_mask(index, writes_number: bool) -> bool:
    parts = index if isinstance(index, (tuple, list)) else (index,)
    masks = [part for part in parts if isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8)]
    # x[mask] = 0 is masked_fill.
    return bool(masks) and not writes_number


def _writes_number(function, args) -> bool:
    return function is Tensor.__setitem__ and not (isinstance(args[2], Tensor) and args[2].dim())
