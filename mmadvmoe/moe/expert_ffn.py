"""Feed-forward networks of transformers with N experts, one or some of which each token takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Optional

from torch import Tensor, nn

from .context import RouteContext
from .expert_layers import EXPERT_LAYERS, MoELinear
from .grouped_linear import GroupSizes, grouped_linear
from .routers import TokenRouter


class ExpertFFN(nn.Module):
    """N experts in the place of one feed-forward network, and the router that chooses for each token.

    The experts' parameters are stacked under the names of the dense network; see
    :class:`~mmadvmoe.moe.expert_layers.ExpertLayer`.

    Args:
        dense (nn.Sequential): Linear layers, possibly in nested ``Sequential``, and functions of single elements
            between them; taken over, not copied. Expert 0 gets its parameters, the others are drawn afresh.
        num_experts (int): N >= 2.
        context (RouteContext): Shared with the backbone.
        router (TokenRouter): Chooses for each token.

    Raises:
        ValueError: ``dense`` holds something else that has parameters.
    """

    def __init__(self, dense: nn.Sequential, num_experts: int, context: RouteContext, router: TokenRouter) -> None:
        super().__init__()
        # What it is called in its network, for messages; set by those who put it there.
        self.name = 'ffn'
        self.num_experts = num_experts
        self.context = context
        self.router = router
        for name, part in list(_leaves(dense)):
            if EXPERT_LAYERS.get(type(part)) is MoELinear:
                dense.set_submodule(name, _TokenLinear(part, num_experts, context, router.top_k))
            elif any(True for _ in part.parameters()):
                raise ValueError(
                    f'{name!r} of a feed-forward network is a {type(part).__name__}, which cannot hold experts; '
                    'only linear layers can'
                )
        self.experts = dense

    def expert_parameters(self, expert: int) -> dict[str, Tensor]:
        """Views of one expert's parameters, under the dense network's names and in its shapes."""
        return {
            f'{name}.{key}': view
            for name, part in _leaves(self.experts)
            if isinstance(part, _TokenLinear)
            for key, view in part.expert_parameters(expert).items()
        }

    def forward(self, x: Tensor) -> Tensor:
        """Send each token through its experts.

        Args:
            x (Tensor): (B, ..., C), all dimensions but the first and the last being tokens.

        Returns:
            Tensor: (B, ..., C); zero for a token that every expert dropped.
        """
        tokens = x.flatten(1, -2)
        self.context.running.check_rows(self.name, x)
        routing = self.context.running.route_tokens(self.router, tokens, self.training or self.router.training)
        rows = routing.dispatch(tokens.flatten(0, 1))
        for _, part in _leaves(self.experts):
            rows = part(rows, routing.computed) if isinstance(part, _TokenLinear) else part(rows)
        return routing.combine(rows).view(*x.shape[:-1], rows.shape[-1])


class _TokenLinear(MoELinear):
    """The linear layers of all experts, ``top_k`` of which each token takes, on rows that are sorted by expert."""

    def __init__(self, dense: nn.Linear, num_experts: int, context: RouteContext, top_k: int) -> None:
        super().__init__(dense, num_experts, context)
        self.top_k = top_k

    def forward(self, x: Tensor, sizes: GroupSizes) -> Tensor:
        """x: (S, C_in), sorted by expert -> (S, C_out)."""
        return grouped_linear(x, self.weight, self.bias, sizes)


def _leaves(module: nn.Module, name: Optional[str] = None) -> Iterator[tuple[str, nn.Module]]:
    """The parts of nested ``Sequential`` in the order of computation, each as often as it is called."""
    if not isinstance(module, nn.Sequential):
        yield name or '', module
        return
    for key, part in module._modules.items():
        yield from _leaves(part, key if name is None else f'{name}.{key}')
