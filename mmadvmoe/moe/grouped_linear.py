"""One linear map per expert, applied to rows that are sorted by expert.

Dimension letters: S rows (a token once for each expert that it goes to), N experts.
"""

from __future__ import annotations

from functools import cached_property
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class GroupSizes:
    """How many rows each expert has: on the device, and on the host from the first time on that somebody asks.

    Args:
        load (Tensor): (N,) int64, the rows of each expert; they sum to S.
    """

    def __init__(self, load: Tensor) -> None:
        self.load = load

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """N numbers; the first to ask waits for the device."""
        return tuple(self.load.tolist())

    def __len__(self) -> int:
        return len(self.load)


def grouped_linear(x: Tensor, weight: Tensor, bias: Optional[Tensor], sizes: GroupSizes) -> Tensor:
    """Apply to each row the linear map of its expert.

    One grouped matrix product where torch has a kernel for the device and the type (bfloat16 on CUDA devices of compute
    capability 9.0 and more), one product per expert otherwise. An expert without rows has a zero gradient.

    Args:
        x (Tensor): (S, C_in), sorted by expert.
        weight (Tensor): (N * C_out, C_in), expert by expert.
        bias (Tensor, optional): (N * C_out,), expert by expert.
        sizes (GroupSizes): The rows of each expert.

    Returns:
        Tensor: (S, C_out), in the type of the ambient autocast, if any.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    return (_one_product if _has_grouped_kernel(x, weight, len(sizes)) else _products)(x, weight, bias, sizes)


def _has_grouped_kernel(x: Tensor, weight: Tensor, num_experts: int) -> bool:
    if x.device.type != 'cuda' or x.dtype != torch.bfloat16 or not hasattr(F, 'grouped_mm'):
        return False
    widths = weight.shape[1], weight.shape[0] // num_experts
    # Rows of the operands must start at multiples of 16 bytes.
    return torch.cuda.get_device_capability(x.device)[0] >= 9 and all(width % 8 == 0 for width in widths)


def _products(x: Tensor, weight: Tensor, bias: Optional[Tensor], sizes: GroupSizes) -> Tensor:
    """One product per expert."""
    counts = sizes.counts
    biases = [None] * len(counts) if bias is None else bias.chunk(len(counts))
    return torch.cat([F.linear(*each) for each in zip(x.split(counts), weight.chunk(len(counts)), biases)])


def _one_product(x: Tensor, weight: Tensor, bias: Optional[Tensor], sizes: GroupSizes) -> Tensor:
    """All experts in one product, without the host having to know how many rows each has."""
    load = sizes.load
    stacked = weight.unflatten(0, (len(load), -1))
    out = F.grouped_mm(x.contiguous(), stacked.transpose(1, 2), offs=load.cumsum(0, dtype=torch.int32))
    if bias is None:
        return out
    # In float32, in which the gradient then sums over the rows.
    rows = bias.float().view(len(load), -1).repeat_interleave(load, 0, output_size=len(x))
    return out + rows.to(out.dtype)


class _TakeRows(torch.autograd.Function):
    """``x[take]``, whose gradient is gathered by ``back`` rather than scattered."""

    @staticmethod
    def forward(ctx, x: Tensor, take: Tensor, back: Tensor, kept: Optional[Tensor]) -> Tensor:
        ctx.save_for_backward(back, kept)
        ctx.num_rows = len(x)
        return x.index_select(0, take)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        back, kept = ctx.saved_tensors
        rows = grad.index_select(0, back)
        if kept is not None:
            rows = torch.where(kept[:, None], rows, 0)
        # A row that was taken for several slots gets the sum over them: slots are laid out choice by choice.
        copies = len(rows) // max(ctx.num_rows, 1)
        return (rows if copies <= 1 else rows.unflatten(0, (copies, -1)).sum(0)), None, None, None


def take_rows(x: Tensor, take: Tensor, back: Tensor, kept: Optional[Tensor] = None) -> Tensor:
    """Take rows of ``x`` for slots, with a gradient that needs no scatter.

    Scattering adds row by row, on CPU without threads and on CUDA in no fixed order; gathering does neither.

    Args:
        x (Tensor): (R, C).
        take (Tensor): (S,) int64, the row of each slot.
        back (Tensor): (M * R,) int64, where the gradients of the rows are: entry m * R + r is the m-th slot that
            took row r.
        kept (Tensor, optional): (M * R,) bool, which entries of ``back`` count. Defaults to all.

    Returns:
        Tensor: (S, C).
    """
    return _TakeRows.apply(x, take, back, kept)
