"""Whose turn it is: a function of the iteration number and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mmadvmoe.moe import GROUPS


@dataclass(frozen=True)
class TurnSchedule:
    """The order in which experts and router are updated.

    After ``warmup_iters`` iterations of experts only, a cycle of ``k_experts`` updates of the
    experts and ``k_router`` updates of the router repeats. An update takes as many iterations as
    its group accumulates gradients over, so a turn never ends with half an update.

    Args:
        k_experts (int): Updates of the experts in one cycle. Defaults to 1.
        k_router (int): Updates of the router in one cycle. Defaults to 1.
        warmup_iters (int): Iterations at the start that belong to the experts alone. Defaults to 0.
        reuse_batch (bool): Each iteration holds a step of the experts and, after the warm-up, a
            step of the router on the same batch, as in the public code of AdvMoE. Defaults to
            False: a new batch each turn, as in the paper (arXiv:2308.10110).
        accumulative_counts (Mapping[str, int]): Iterations per update of each group. Defaults to 1
            and 1.

    Raises:
        ValueError: A number is out of range, or the numbers do not fit each other.
    """

    k_experts: int = 1
    k_router: int = 1
    warmup_iters: int = 0
    reuse_batch: bool = False
    accumulative_counts: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(GROUPS, 1))

    def __post_init__(self) -> None:
        for key, least in (('k_experts', 1), ('k_router', 1), ('warmup_iters', 0)):
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f'AlternatingOptimHook: {key}={value!r}; it must be an integer of at least {least}')
        experts, router = (self.accumulative_counts[group] for group in GROUPS)
        if self.reuse_batch and self.k_experts != self.k_router:
            raise ValueError(
                f'AlternatingOptimHook: k_experts={self.k_experts} and k_router={self.k_router} '
                'with reuse_batch=True; both groups step on each batch, so the two must be equal'
            )
        if self.reuse_batch and experts != router:
            raise ValueError(
                f'optim_wrapper.experts.accumulative_counts={experts} and '
                f'optim_wrapper.router.accumulative_counts={router} with reuse_batch=True; both '
                'groups step on each batch, so they must be equal to give one update of the router '
                'for each of the experts'
            )
        if self.warmup_iters % experts:
            raise ValueError(
                f'AlternatingOptimHook: warmup_iters={self.warmup_iters} ends in the middle of an '
                f'update; it must be a multiple of '
                f'optim_wrapper.experts.accumulative_counts={experts}'
            )

    @property
    def lengths(self) -> tuple[int, int]:
        """Iterations of a turn of the experts and of a turn of the router."""
        counts = self.accumulative_counts
        return self.k_experts * counts['experts'], self.k_router * counts['router']

    def turn_at(self, iteration: int) -> str:
        """The group that steps in an iteration, the first one with ``reuse_batch``.

        Args:
            iteration (int): Counted from 0.
        """
        if self.reuse_batch or iteration < self.warmup_iters:
            return 'experts'
        experts, router = self.lengths
        in_cycle = (iteration - self.warmup_iters) % (experts + router)
        return 'experts' if in_cycle < experts else 'router'

    def repeats_batch(self, iteration: int) -> bool:
        """Whether a step of the router follows on the batch of this iteration."""
        return self.reuse_batch and iteration >= self.warmup_iters

    def count_before(self, group: str, iteration: int) -> int:
        """How many backward passes of ``group`` lie before an iteration.

        Args:
            group (str): ``'experts'`` or ``'router'``.
            iteration (int): Counted from 0.
        """
        after = max(iteration - self.warmup_iters, 0)
        if self.reuse_batch:
            return iteration if group == 'experts' else after
        experts, router = self.lengths
        cycles, rest = divmod(after, experts + router)
        if group == 'router':
            return cycles * router + max(rest - experts, 0)
        return iteration - after + cycles * experts + min(rest, experts)
