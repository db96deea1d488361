"""Mixtures as plain networks, for exporters and compilers: all experts computed, and the chosen one selected.

A mixture sorts its batch by expert and computes slices of it, whose lengths are data; a graph that is traced or
exported cannot hold that. Here nothing depends on the data but values.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from mmcv.cnn.bricks import DropPath
from torch import Tensor, nn

from .backbone import MoEBackbone
from .expert_layers import ExpertFFN, ExpertLayer, MoEConv2d
from .placements import map_tensors
from .routers import BaseRouter, TokenRouter
from .token_routing import gate_of


def deployable(model: nn.Module) -> nn.Module:
    """Copy a model, its mixtures replaced by networks that compute all experts and select.

    The copy computes what the model does in eval mode, at N times the cost of its expert layers (with image-level
    routing, of the whole network), and has neither routes to read nor straight-through gradients. It can be traced,
    exported and compiled as a whole, for any batch size. What all experts share is in it once.

    Args:
        model (nn.Module): Such as :func:`mmadvmoe.apis.load_robust_model` gives; left as it is.

    Returns:
        nn.Module: The copy, in eval mode; of a model without routers just that.

    Raises:
        ValueError: A token router has an ``eval_capacity_factor``: which tokens are dropped depends on the others.
    """
    mixtures = [module for module in model.modules() if isinstance(module, MoEBackbone) and module.num_routers]
    memo = {id(mixture): _without_routes(copy.deepcopy(mixture)) for mixture in mixtures}
    plain = copy.deepcopy(model, memo)
    plain.eval()  # of MMPretrain's backbones, this gives nothing back
    # Nothing in eval mode, but its probability, which may be a number of NumPy, breaks a compiler's graph.
    for name in [name for name, module in plain.named_modules(remove_duplicate=False) if isinstance(module, DropPath)]:
        plain.set_submodule(name, nn.Identity())
    return plain


def _without_routes(backbone: MoEBackbone) -> nn.Module:
    layers = backbone.expert_layers()
    if backbone.placement.one_route_per_image:
        experts = range(backbone.num_experts)
        dense = ({layer: _dense_layer(layer, expert) for layer in layers} for expert in experts)
        return _AllPathways(backbone.router, (_copy_with(backbone.network, replaced) for replaced in dense))
    if backbone.placement.reads_tokens:
        return _copy_with(backbone.network, {layer: _AllFFNs(layer) for layer in layers})
    dense = {layer: [_dense_layer(layer, expert) for expert in range(layer.num_experts)] for layer in layers}
    return _copy_with(backbone.network, {layer: _AllPathways(layer.router, each) for layer, each in dense.items()})


def _copy_with(network: nn.Module, replaced: dict[nn.Module, nn.Module]) -> nn.Module:
    """A copy with some modules replaced; what the replaced modules are no part of is shared."""
    memo = {id(module): other for module, other in replaced.items()}
    for module in network.modules():
        if id(module) not in memo and not any(part in replaced for part in module.modules()):
            memo[id(module)] = module
    return copy.deepcopy(network, memo)


def _dense_layer(layer: ExpertLayer, expert: int) -> nn.Module:
    """One expert of a layer, as PyTorch's own layer."""
    own = {name: nn.Parameter(value.detach().clone()) for name, value in layer.expert_parameters(expert).items()}
    bias = 'bias' in own
    if isinstance(layer, MoEConv2d):
        size = tuple(own['weight'].shape[2:])
        options = dict(groups=layer.groups, bias=bias, padding_mode=layer.padding_mode, device='meta')
        channels = layer.in_channels, layer.out_channels
        dense = nn.Conv2d(*channels, size, layer.stride, layer.padding, layer.dilation, **options)
    else:
        dense = nn.Linear(layer.in_features, layer.out_features, bias, device='meta')
    for name, value in own.items():
        setattr(dense, name, value)
    return dense


def _select(expert: Tensor, first: Tensor, *others: Tensor) -> Tensor:
    """From what each expert gave for the whole batch, what the expert of each image (B,) gave."""
    for number, output in enumerate(others, 1):
        first = torch.where((expert == number).view(-1, *[1] * (output.dim() - 1)), output, first)
    return first


class _AllPathways(nn.Module):
    """A router of images, and the N networks or layers of which it chooses one for each image."""

    def __init__(self, router: BaseRouter, pathways: Iterable[nn.Module]) -> None:
        super().__init__()
        self.router = router
        self.pathways = nn.ModuleList(pathways)

    def forward(self, x: Tensor) -> Any:
        """x: (B, ...), as the dense network or layer takes it -> what that gives, in the order of the batch."""
        return map_tensors(partial(_select, self.router(x).argmax(1)), *[pathway(x) for pathway in self.pathways])


class _AllFFNs(nn.Module):
    """A feed-forward network with a router for tokens: N dense ones, weighted by the gates of each token."""

    def __init__(self, ffn: ExpertFFN) -> None:
        super().__init__()
        if ffn.router.eval_capacity_factor is not None:
            raise ValueError(
                f'router.eval_capacity_factor={ffn.router.eval_capacity_factor} drops tokens at test, which '
                'no exported network does; set it to None'
            )
        self.router: TokenRouter = ffn.router
        linears = [module for module in ffn.experts.modules() if isinstance(module, ExpertLayer)]
        self.experts = nn.ModuleList(
            copy.deepcopy(ffn.experts, {id(layer): _dense_layer(layer, expert) for layer in linears})
            for expert in range(ffn.num_experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, ..., C) -> (B, ..., C)."""
        tokens = x.flatten(1, -2)
        logits = self.router(tokens)
        best = logits.topk(self.router.top_k, dim=-1).indices
        gate = gate_of(logits, best, self.router.softmax, straight_through=False)
        weights = torch.zeros_like(logits).scatter(-1, best, gate)
        chosen = torch.zeros_like(logits).scatter(-1, best, 1.0)
        total = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            weight = weights[..., number, None].to(tokens.dtype)
            total = total + torch.where(chosen[..., number, None] > 0, expert(tokens) * weight, 0.0)
        return total.view(x.shape)
