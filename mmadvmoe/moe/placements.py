"""Where the routers of a mixture sit: one for the network, one for each expert layer, or one for the tokens of an FFN.

A further placement is a class here, in :data:`PLACEMENTS` under the name that configs use.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from mmpretrain.models.backbones.convnext import ConvNeXtBlock
from torch import Tensor, nn

from .context import RouteContext, RoutedPass
from .expert_layers import EXPERT_LAYERS, ExpertFFN, ExpertLayer
from .matching import match_ffns, match_layers
from .routers import BaseRouter
from .routing import BaseRouting, Route, Routing


class Placement:
    """Where the routers of a backbone sit and what they decide for; by itself that of a network without routers.

    Args:
        layer_names (Sequence[str]): The converted layers, as :meth:`match` gives them.

    Attributes:
        name (str, optional): The value of ``backbone.routing``; None without routers.
        default_router (str): The type of router where the config names none.
        reads_tokens (bool): Whether routers decide for single tokens rather than for images.
        one_route_per_image (bool): Whether one decision holds for the whole network.
    """

    name: ClassVar[str | None] = None
    default_router: ClassVar[str] = ''
    reads_tokens: ClassVar[bool] = False
    one_route_per_image: ClassVar[bool] = False

    def __init__(self, layer_names: Sequence[str] = ()) -> None:
        self.layer_names = tuple(layer_names)

    @property
    def router_names(self) -> tuple[str, ...]:
        """The name of each router, for tables: that of its layer."""
        return self.layer_names

    @property
    def num_routers(self) -> int:
        """L."""
        return len(self.router_names)

    #: Finds the layers to convert.
    match = staticmethod(match_layers)

    def convert(
        self, network: nn.Module, num_experts: int, context: RouteContext, build_router: Callable[..., BaseRouter]
    ) -> BaseRouter | None:
        """Give experts, and routers, to the layers of ``network``, in place.

        Args:
            network (nn.Module): The dense network.
            num_experts (int): N >= 2.
            context (RouteContext): Shared by the backbone and its expert layers.
            build_router (Callable): Makes a router; keyword arguments go into its config.

        Returns:
            BaseRouter, optional: The router of the whole network, where there is one.
        """

    def _convert_layers(
        self,
        network: nn.Module,
        num_experts: int,
        context: RouteContext,
        build_router: Callable[[nn.Module], BaseRouter | None] = lambda dense: None,
    ) -> None:
        for name in self.layer_names:
            dense = network.get_submodule(name)
            layer = EXPERT_LAYERS[type(dense)](dense, num_experts, context, build_router(dense))
            layer.name = name
            network.set_submodule(name, layer)

    def expert_layers(self, network: nn.Module) -> list[ExpertLayer | ExpertFFN]:
        """The converted layers, in the order of the network."""
        return [network.get_submodule(name) for name in self.layer_names]

    def check_route(self, route: Route | None, batch: int) -> None:
        """Check a route given to ``batch`` images: (B,), (B, L), or a routing for each router.

        Raises:
            ValueError: It is none of these.
        """
        if route is None:
            return
        if not isinstance(route, Tensor):
            if len(route) != self.num_routers:
                raise ValueError(f'a route of {len(route)} routings was given to {self.num_routers} routers')
        elif route.shape[:1] != (batch,) or not self._fits(route):
            raise ValueError(
                f'route must have shape (B,) or (B, {"T" if self.reads_tokens else self.num_routers}) for B={batch} '
                f'images, got {tuple(route.shape)}'
            )

    def _fits(self, route: Tensor) -> bool:
        return route.dim() == 1 or route.shape[1:] == (self.num_routers,)

    def forward(self, backbone: nn.Module, x: Tensor, routes: RoutedPass) -> Any:
        """Features of ``x`` (B, C, H, W), in the order of the batch."""
        return backbone.network(x)

    def decide(self, backbone: nn.Module, x: Tensor, gated: bool) -> tuple[BaseRouting, ...]:
        """What the routers decide for ``x``; see :meth:`MoEBackbone.decide_routes`."""
        return backbone.forward_routed(x, gated=gated)[1]


class ImagePlacement(Placement):
    """One router reads the input of the network and chooses for all layers: the batch is sorted once."""

    name = 'image'
    default_router = 'ResNetRouter'
    one_route_per_image = True

    @property
    def router_names(self) -> tuple[str, ...]:
        return ('router',)

    def convert(self, network, num_experts, context, build_router):
        router = build_router()
        self._convert_layers(network, num_experts, context)
        return router

    def forward(self, backbone, x, routes):
        layout = _fast_layout(backbone, x)
        x = x.to(memory_format=layout)
        routing = routes.route(backbone.router, x)
        features = backbone.network(routing.sort(x).to(memory_format=layout))
        return map_tensors(lambda feature: routing.unsort(feature).contiguous(), features)

    def decide(self, backbone, x, gated):
        return (Routing.decide(backbone.router(x.to(memory_format=_fast_layout(backbone, x))), gate=None),)


class LayerPlacement(Placement):
    """Every expert layer has a router, which reads the input of that layer and chooses for each image."""

    name = 'layer'
    default_router = 'LayerRouter'

    def convert(self, network, num_experts, context, build_router):
        def build(dense: nn.Module) -> BaseRouter:
            if isinstance(dense, nn.Linear):
                return build_router(in_channels=dense.in_features, channels_last=True)
            return build_router(in_channels=dense.in_channels)

        self._convert_layers(network, num_experts, context, build)


class TokenPlacement(Placement):
    """Every feed-forward network that matches has a router, which chooses for each token."""

    name = 'token'
    default_router = 'TokenRouter'
    reads_tokens = True
    match = staticmethod(match_ffns)

    def convert(self, network, num_experts, context, build_router):
        # What surrounds the experts' layers (layer scale, stochastic depth, the residual connection) stays as it is.
        for name in self.layer_names:
            module = network.get_submodule(name)
            # Names inside are those below `module`, so that the parameters of a dense network are found again.
            inside = ('pointwise_conv1', 'act', 'pointwise_conv2') if isinstance(module, ConvNeXtBlock) else ('layers',)
            dense = nn.Sequential(OrderedDict((part, module.get_submodule(part)) for part in inside))
            width = next(part.in_features for part in dense.modules() if isinstance(part, nn.Linear))
            layer = ExpertFFN(dense, num_experts, context, build_router(in_channels=width))
            layer.name = name
            setattr(module, inside[0], layer)
            for part in inside[1:]:
                setattr(module, part, nn.Identity())

    def expert_layers(self, network):
        return [module for module in network.modules() if isinstance(module, ExpertFFN)]

    def _fits(self, route):
        # How many columns a route has depends on the image: that is checked when all are taken.
        return True

    def forward(self, backbone, x, routes):
        features = backbone.network(x)
        routes.check_spent()
        if not backbone.training:
            routes.check_finite()
        return features


#: The placements by the value of ``backbone.routing``.
PLACEMENTS: dict[str, type[Placement]] = {kind.name: kind for kind in (ImagePlacement, LayerPlacement, TokenPlacement)}

#: The placement of every network without routers.
NO_ROUTERS = Placement()


def placement_of(classifier: nn.Module) -> Placement:
    """The placement of the routers in a classifier's backbone, or :data:`NO_ROUTERS`."""
    return getattr(getattr(classifier, 'backbone', None), 'placement', NO_ROUTERS)


def _fast_layout(backbone: nn.Module, x: Tensor) -> torch.memory_format:
    """The memory layout in which convolutions compute fastest on images (B, C, H, W).

    On a CPU that is channels last, from which and to which oneDNN needs no copies; one made here serves the whole
    network. Else images stay as they are. Not where weights learn: with some shapes, training in this layout was seen
    to end in a heap that is corrupt (PyTorch 2.14 with oneDNN).
    """
    if x.dim() != 4 or x.device.type != 'cpu':
        return torch.preserve_format
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in backbone.parameters()):
        return torch.preserve_format
    return torch.channels_last


def map_tensors(function: Callable[..., Tensor], *values: Any) -> Any:
    """Apply ``function`` to the tensors that stand at the same place of nested tuples or lists, all of one form."""
    if isinstance(values[0], (tuple, list)):
        return type(values[0])(map_tensors(function, *items) for items in zip(*values))
    # Some networks give None in place of what they compute in training alone.
    return function(*values) if isinstance(values[0], Tensor) else values[0]
