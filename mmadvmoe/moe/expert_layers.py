"""Layers and feed-forward networks that hold N experts and compute, for each image or token, the chosen ones alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from mmcv.cnn.bricks.wrappers import Conv2d as MMCVConv2d
from mmcv.cnn.bricks.wrappers import Linear as MMCVLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .context import RouteContext
from .routers import BaseRouter, TokenRouter
from .routing import Routing
from .token_routing import GroupSizes, grouped_linear


class _GatedConcat(torch.autograd.Function):
    """Concatenate the experts' outputs and let the straight-through gate see its gradient.

    The gate is 1 in the forward pass, so nothing is multiplied: the only price of the gate is one dot product
    per image in the backward pass. The parts are kept, not the result, so that an in-place activation may follow.
    """

    @staticmethod
    def forward(ctx, gate: Tensor, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(*parts)
        ctx.gate_dtype = gate.dtype
        return torch.cat(parts) if len(parts) > 1 else parts[0].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        parts = ctx.saved_tensors
        grads = grad.split([len(part) for part in parts])
        grad_gate = None
        if ctx.needs_input_grad[0]:
            dots = [_image_dots(g.to(ctx.gate_dtype), part.to(ctx.gate_dtype)) for g, part in zip(grads, parts)]
            grad_gate = torch.cat(dots)
        return (grad_gate, *grads)


def _image_dots(a: Tensor, b: Tensor) -> Tensor:
    """The dot product of each image of ``a`` with that of ``b``: twice (B, ...) -> (B,)."""
    if a.dim() == 4 and not a.is_contiguous():
        # Of images in channels-last layout this is a view.
        a, b = a.permute(0, 2, 3, 1), b.permute(0, 2, 3, 1)
    return torch.linalg.vecdot(a.flatten(1), b.flatten(1))


class ExpertLayer(nn.Module):
    """Base of the layers with N experts.

    The experts' parameters are stacked expert by expert along dim 0 of ``weight`` and ``bias``, under the names of
    the dense layer, so an expert that no image chose has a zero gradient rather than none.

    Args:
        dense (nn.Module): The layer to make N experts of. Expert 0 gets its parameters, the others are drawn
            afresh as the dense layer would draw its own.
        num_experts (int): N >= 2.
        context (RouteContext): Shared with the backbone.
        router (BaseRouter, optional): The layer's own router. Without one the layer expects a batch that the backbone
            has sorted by expert.
    """

    def __init__(
        self, dense: nn.Module, num_experts: int, context: RouteContext, router: BaseRouter | None = None
    ) -> None:
        super().__init__()
        # What the layer is called in its network, for messages; set by those who put it there.
        self.name = type(dense).__name__
        self.num_experts = num_experts
        self.context = context
        self.router = router
        own = dict(dense.named_parameters(recurse=False))
        draws = [{name: p.detach().clone() for name, p in own.items()}]
        for _ in range(num_experts - 1):
            dense.reset_parameters()
            draws.append({name: p.detach().clone() for name, p in own.items()})
        for name, p in own.items():
            stacked = torch.cat([draw[name] for draw in draws])
            self.register_parameter(name, nn.Parameter(stacked, requires_grad=p.requires_grad))
        if 'bias' not in own:
            self.register_parameter('bias', None)

    def expert_parameters(self, expert: int) -> dict[str, Tensor]:
        """Views of one expert's parameters, under the dense layer's names and in its shapes."""
        return {name: p.chunk(self.num_experts)[expert] for name, p in self.named_parameters(recurse=False)}

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """One expert's output for its own slice of the batch; x: (b, ...)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Apply to each image the expert it is routed to.

        Args:
            x (Tensor): (B, ...) as the dense layer takes it; sorted by expert unless the layer has a router.

        Returns:
            Tensor: (B, ...) as the dense layer gives it, in the order of ``x``.
        """
        running = self.context.running
        running.check_rows(self.name, x)
        if self.router is None:
            return self._run(x, running.current)
        routing = running.route(self.router, x)
        return routing.unsort(self._run(routing.sort(x), routing))

    def _run(self, x: Tensor, routing: Routing) -> Tensor:
        """Each expert on its slice of the sorted batch."""
        weights = self.weight.chunk(self.num_experts)
        biases = [None] * self.num_experts if self.bias is None else self.bias.chunk(self.num_experts)
        # Of an empty batch the first expert, which gives nothing in the right shape.
        experts = [n for n, count in enumerate(routing.counts) if count] or [0]
        slices = x.split(routing.counts)
        parts = [self.compute(slices[n], weights[n], biases[n]) for n in experts]
        if routing.gate is not None and torch.is_grad_enabled():
            return _GatedConcat.apply(routing.sort(routing.gate), *parts)
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def extra_repr(self) -> str:
        return f'num_experts={self.num_experts}, weight={tuple(self.weight.shape)}'


class MoEConv2d(ExpertLayer):
    """A convolution with N experts: x (B, C_in, H, W) -> (B, C_out, H', W'), weight (N*C_out, C_in/groups, k, k)."""

    def __init__(
        self, dense: nn.Conv2d, num_experts: int, context: RouteContext, router: BaseRouter | None = None
    ) -> None:
        super().__init__(dense, num_experts, context, router)
        self.in_channels, self.out_channels = dense.in_channels, dense.out_channels
        self.stride, self.padding, self.dilation = dense.stride, dense.padding, dense.dilation
        self.groups, self.padding_mode = dense.groups, dense.padding_mode
        self._edge_padding = dense._reversed_padding_repeated_twice

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x: (b, C_in, H, W) -> (b, C_out, H', W')."""
        padding = self.padding
        if self.padding_mode != 'zeros':
            x, padding = F.pad(x, self._edge_padding, mode=self.padding_mode), 0
        return F.conv2d(x, weight, bias, self.stride, padding, self.dilation, self.groups)


class MoELinear(ExpertLayer):
    """A linear layer with N experts: x (B, ..., C_in) -> (B, ..., C_out), weight (N*C_out, C_in)."""

    def __init__(
        self, dense: nn.Linear, num_experts: int, context: RouteContext, router: BaseRouter | None = None
    ) -> None:
        super().__init__(dense, num_experts, context, router)
        self.in_features, self.out_features = dense.in_features, dense.out_features

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x: (b, ..., C_in) -> (b, ..., C_out)."""
        return F.linear(x, weight, bias)


#: Dense layers that can become expert layers. Exact classes: a subclass may compute something else.
EXPERT_LAYERS: dict[type[nn.Module], type[ExpertLayer]] = {
    nn.Conv2d: MoEConv2d,
    MMCVConv2d: MoEConv2d,
    nn.Linear: MoELinear,
    MMCVLinear: MoELinear,
}


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


def _leaves(module: nn.Module, name: str | None = None) -> Iterator[tuple[str, nn.Module]]:
    """The parts of nested ``Sequential`` in the order of computation, each as often as it is called."""
    if not isinstance(module, nn.Sequential):
        yield name or '', module
        return
    for key, part in module._modules.items():
        yield from _leaves(part, key if name is None else f'{name}.{key}')
