"""The decision of a router for the tokens of a batch, and how to act on it: one linear map per expert on sorted rows.

Dimension letters as in :mod:`mmadvmoe.moe.routing`, and K choices of a token; S slots, a slot being one choice of one
token that an expert computes. Choices are laid out choice by choice: all first choices, then all second ones. For the
grouped products, S rows are sorted by expert.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .routing import BaseRouting, count, inverse_of

#: Whether gates are probabilities among all experts, or among the chosen ones.
SOFTMAX = ('before', 'after')


@dataclass(frozen=True, eq=False)
class TokenRouting(BaseRouting):
    """The decision of one token router for one batch.

    Attributes:
        expert (Tensor): (B, T, K), the choices of each token, best first.
        gate (Tensor): Weight of each choice in the output, (B, T, K); 0 for choices that were dropped.
        load (Tensor): Choices that fell on each expert, dropped ones included, (N,) int64; they sum to B * T * K.
        computed (GroupSizes): Choices that each expert computes, N numbers; they sum to S.
        order (Tensor): (S,) choices sorted by expert, indices into the (K * B * T,) layout.
        inverse (Tensor): (K * B * T,) the slot of each choice; of a dropped one any slot.
        kept (Tensor, optional): (K * B * T,) bool, choices that were not dropped; None where none was.
        threshold (Tensor): The smallest score, with noise, that was chosen, (B, T).
    """

    expert: Tensor
    gate: Tensor
    logits: Tensor
    load: Tensor
    computed: GroupSizes
    order: Tensor
    inverse: Tensor
    kept: Tensor | None
    threshold: Tensor
    noise_std: float = 0.0
    of_tokens: ClassVar[bool] = True

    @classmethod
    def decide(
        cls,
        logits: Tensor,
        top_k: int = 1,
        softmax: str = 'after',
        noise: Tensor | None = None,
        noise_std: float = 0.0,
        capacity_factor: float | None = None,
        per_image: bool = False,
        straight_through: bool = True,
    ) -> TokenRouting:
        """Send each token to the experts with the K largest scores, the logits plus the noise.

        With ``softmax='before'`` the gates are the probabilities of the chosen experts among all (V-MoE,
        arXiv:2106.05974, equation 2; Switch, arXiv:2101.03961, equation 2). With ``'after'`` they are the
        probabilities among the chosen ones and sum to 1, so experts that are equal compute what one of them does
        (arXiv:2212.05055). For K = 1 such a gate is the constant 1; the router then learns by the straight-through
        gradient of the probability among all, as in :meth:`Routing.decide`.

        Args:
            logits (Tensor): (B, T, N).
            top_k (int): K in [1, N].
            softmax (str): ``'before'`` or ``'after'``.
            noise (Tensor, optional): (B, T, N), added to the logits.
            noise_std (float): See :class:`BaseRouting`.
            capacity_factor (float, optional): An expert computes at most this many times its equal share of the
                choices, rounded up; further ones are dropped, second choices first, then late tokens. None drops
                nothing.
            per_image (bool): Count capacity in each image for itself rather than in the batch.
            straight_through (bool): Whether the constant gate of K = 1 has its straight-through gradient.
        """
        scores = logits if noise is None else logits + noise
        best = scores.topk(top_k, dim=-1)
        gate = gate_of(scores, best.indices, softmax, straight_through)
        routing = cls._of(best.indices, gate, logits, best.values[..., -1], noise_std)
        return routing._limited(capacity_factor, per_image)

    @classmethod
    def fixed(
        cls,
        expert: Tensor,
        logits: Tensor,
        softmax: str = 'after',
        noise_std: float = 0.0,
        capacity_factor: float | None = None,
        per_image: bool = False,
    ) -> TokenRouting:
        """Route by a given choice. The gates are those that the router gives to that choice.

        Gates are part of what the network computes, so their gradient is kept, but for the straight-through one.

        Args:
            expert (Tensor): (B, T, K) int64, K different experts for each token.
            logits (Tensor): (B, T, N) of the router that is overruled.
            softmax, noise_std, capacity_factor, per_image: See :meth:`decide`. What the router likes best of a choice
                counts as first.

        Raises:
            ValueError: ``expert`` names an expert that does not exist, or one twice for a token.
        """
        num_experts = logits.shape[-1]
        ranked = expert.sort(-1).values
        outside = (ranked < 0) | (ranked >= num_experts)
        if outside.any() | (ranked[..., 1:] == ranked[..., :-1]).any():
            named = expert.unique().tolist()
            raise ValueError(f'a route must name different experts in [0, {num_experts}) for each token, got {named}')
        threshold = logits.gather(-1, expert).amin(-1)
        if capacity_factor is not None:
            expert = expert.gather(-1, logits.gather(-1, expert).argsort(dim=-1, descending=True, stable=True))
        gate = gate_of(logits, expert, softmax, straight_through=False)
        return cls._of(expert, gate, logits, threshold, noise_std)._limited(capacity_factor, per_image)

    @classmethod
    def _of(cls, expert: Tensor, gate: Tensor, logits: Tensor, threshold: Tensor, noise_std: float) -> TokenRouting:
        by_choice = expert.permute(2, 0, 1).flatten()
        order = by_choice.argsort(stable=True)
        load = count(by_choice, logits.shape[-1])
        return cls(expert, gate, logits, load, GroupSizes(load), order, inverse_of(order), None, threshold, noise_std)

    def again(self, logits: Tensor, softmax: str = 'after') -> TokenRouting:
        """Route the tokens of a further pass likewise, as :meth:`fixed` does where nothing is dropped."""
        gate = gate_of(logits, self.expert, softmax, straight_through=False)
        return replace(self, gate=gate, logits=logits, threshold=logits.gather(-1, self.expert).amin(-1))

    def _limited(self, capacity_factor: float | None, per_image: bool) -> TokenRouting:
        if capacity_factor is None:
            return self
        batch, tokens, top_k = self.expert.shape
        groups = batch if per_image else 1
        capacity = math.ceil(capacity_factor * self.expert.numel() / groups / self.num_experts)
        group = torch.arange(groups, device=self.expert.device).repeat_interleave(batch * tokens // groups)
        cell = self.expert.permute(2, 0, 1).flatten() * groups + group.repeat(top_k)
        order = cell.argsort(stable=True)
        sizes = count(cell, self.num_experts * groups)
        rank = torch.arange(len(order), device=order.device) - (sizes.cumsum(0) - sizes)[cell[order]]
        within = rank < capacity
        if bool(within.all()):
            return self
        kept = torch.empty_like(within)
        kept[order] = within
        return replace(
            self,
            gate=self.gate * kept.view(top_k, batch, tokens).permute(1, 2, 0),
            computed=GroupSizes(sizes.clamp(max=capacity).view(self.num_experts, groups).sum(1)),
            order=order[within],
            inverse=inverse_of(order[within], len(order)),
            kept=kept,
        )

    @property
    def num_experts(self) -> int:
        """N."""
        return self.logits.shape[-1]

    @property
    def top_k(self) -> int:
        """K."""
        return self.expert.shape[-1]

    @property
    def counts(self) -> tuple[int, ...]:
        """See :class:`BaseRouting`; they sum to B * T * K."""
        return self.computed.counts if self.kept is None else tuple(self.load.tolist())

    @property
    def dropped(self) -> int:
        """Choices that no expert computes."""
        return self.expert.numel() - len(self.order)

    @property
    def decisions(self) -> Tensor:
        """The chosen experts of each image, (B, T * K), those of one token in ascending order."""
        return self.expert.sort(-1).values.flatten(1)

    def dispatch(self, x: Tensor) -> Tensor:
        """Bring tokens to their experts: (B * T, C) -> (S, C), sorted by expert."""
        return take_rows(x, self.order % len(x), self.inverse, self.kept)

    def combine(self, y: Tensor) -> Tensor:
        """Sum what the experts made of each token, weighted by the gates: (S, C) -> (B * T, C)."""
        rows = take_rows(y, self.inverse, self.order)
        gate = self.gate.permute(2, 0, 1).flatten(1).unsqueeze(-1).to(y.dtype)
        return (rows.unflatten(0, gate.shape[:2]) * gate).sum(0)

    def detach(self) -> TokenRouting:
        return replace(self, gate=self.gate.detach(), logits=self.logits.detach(), threshold=self.threshold.detach())

    def take(self, rows: Tensor) -> TokenRouting:
        """Give the decision for some of the images, ``rows`` (b,) int64, with nothing dropped."""
        parts = (part[rows] for part in (self.expert, self.gate, self.logits, self.threshold))
        return self._of(*parts, self.noise_std)


def gate_of(scores: Tensor, expert: Tensor, softmax: str, straight_through: bool) -> Tensor:
    """The weights (B, T, K) that scores (B, T, N) give to chosen experts (B, T, K); see :meth:`TokenRouting.decide`."""
    if softmax == 'after' and expert.shape[-1] > 1:
        return scores.gather(-1, expert).softmax(-1)
    probability = scores.softmax(-1).gather(-1, expert)
    if softmax == 'before':
        return probability
    return 1 + (probability - probability.detach()) if straight_through else torch.ones_like(probability)


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


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None, sizes: GroupSizes) -> Tensor:
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


def _products(x: Tensor, weight: Tensor, bias: Tensor | None, sizes: GroupSizes) -> Tensor:
    """One product per expert."""
    counts = sizes.counts
    biases = [None] * len(counts) if bias is None else bias.chunk(len(counts))
    return torch.cat([F.linear(*each) for each in zip(x.split(counts), weight.chunk(len(counts)), biases)])


def _one_product(x: Tensor, weight: Tensor, bias: Tensor | None, sizes: GroupSizes) -> Tensor:
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
    def forward(ctx, x: Tensor, take: Tensor, back: Tensor, kept: Tensor | None) -> Tensor:
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


def take_rows(x: Tensor, take: Tensor, back: Tensor, kept: Tensor | None = None) -> Tensor:
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
