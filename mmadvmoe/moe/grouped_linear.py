"""One linear map per expert, applied to rows that are sorted by expert.

Dimension letters: S rows (a token once for each expert that it goes to), N experts.
"""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def grouped_linear(x: Tensor, weight: Tensor, bias: Optional[Tensor], load: Tensor) -> Tensor:
    """Apply to each row the linear map of its expert.

    One grouped matrix product where torch has a kernel for the device and the type (bfloat16 on CUDA devices of
    compute capability 9.0 and more), one product per expert otherwise. Each product writes to its place in the
    result, so nothing is concatenated. An expert without rows has a zero gradient.

    Args:
        x (Tensor): (S, C_in), sorted by expert.
        weight (Tensor): (N * C_out, C_in), expert by expert.
        bias (Tensor, optional): (N * C_out,), expert by expert.
        load (Tensor): (N,) int64, the rows of each expert; they sum to S.

    Returns:
        Tensor: (S, C_out), in the type of the ambient autocast, if any.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if _has_grouped_kernel(x, weight, len(load)):
        return _PerGroup.apply(x, weight, bias, load)
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))):
        return _per_expert(x, weight, bias, load.tolist())  # where a trace can look inside
    return _PerExpert.apply(x, weight, bias, load)


def _has_grouped_kernel(x: Tensor, weight: Tensor, num_experts: int) -> bool:
    if x.device.type != 'cuda' or x.dtype != torch.bfloat16 or not hasattr(F, 'grouped_mm'):
        return False
    widths = weight.shape[1], weight.shape[0] // num_experts
    # Rows of the operands must start at multiples of 16 bytes.
    return torch.cuda.get_device_capability(x.device)[0] >= 9 and all(width % 8 == 0 for width in widths)


def _per_expert(x: Tensor, weight: Tensor, bias: Optional[Tensor], counts: list[int]) -> Tensor:
    """A product per expert, on slices."""
    out = x.new_empty(len(x), len(weight) // len(counts))
    biases = [None] * len(counts) if bias is None else bias.chunk(len(counts))
    for part, into, own, offset in zip(x.split(counts), out.split(counts), weight.chunk(len(counts)), biases):
        if offset is None:
            torch.mm(part, own.t(), out=into)
        else:
            torch.addmm(offset, part, own.t(), out=into)
    return out


class _PerExpert(torch.autograd.Function):
    """:func:`_per_expert` with its gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Optional[Tensor], load: Tensor) -> Tensor:
        counts = load.tolist()
        # An attack asks for the gradient of x alone, and should not pay for keeping x.
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.counts = counts
        return _per_expert(x, weight, bias, counts)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        counts, needs = ctx.counts, ctx.needs_input_grad
        grads = grad.split(counts)
        grad_x = grad_weight = grad_bias = None
        if needs[0]:
            grad_x = grad.new_empty(len(grad), weight.shape[1])
            for part, into, own in zip(grads, grad_x.split(counts), weight.chunk(len(counts))):
                torch.mm(part, own, out=into)
        if needs[1]:
            grad_weight = torch.empty_like(weight)
            for part, rows, into in zip(grads, x.split(counts), grad_weight.chunk(len(counts))):
                torch.mm(part.t(), rows, out=into)
        if needs[2]:
            grad_bias = torch.cat([part.sum(0) for part in grads])
        return grad_x, grad_weight, grad_bias, None


class _PerGroup(torch.autograd.Function):
    """All experts in one product, without the host having to know how many rows each has."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Optional[Tensor], load: Tensor) -> Tensor:
        stacked = weight.unflatten(0, (len(load), -1))
        ends = load.cumsum(0, dtype=torch.int32)
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, stacked, ends, load)
        out = F.grouped_mm(x.contiguous(), stacked.transpose(1, 2), offs=ends)
        if bias is not None:
            out += bias.view(len(load), -1).repeat_interleave(load, 0, output_size=len(x))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, stacked, ends, load = ctx.saved_tensors
        needs = ctx.needs_input_grad
        grad = grad.contiguous()
        grad_x = F.grouped_mm(grad, stacked, offs=ends) if needs[0] else None
        grad_weight = F.grouped_mm(grad.t(), x.contiguous(), offs=ends).flatten(0, 1) if needs[1] else None
        grad_bias = None
        if needs[2]:
            expert = torch.repeat_interleave(load, output_size=len(grad))
            grad_bias = grad.new_zeros(len(load), grad.shape[1], dtype=torch.float32)
            grad_bias = grad_bias.index_add_(0, expert, grad.float()).to(grad.dtype).flatten()
        return grad_x, grad_weight, grad_bias, None


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
        copies = len(rows) // ctx.num_rows
        return (rows if copies == 1 else rows.unflatten(0, (copies, -1)).sum(0)), None, None, None


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
