from .backbone import MoEBackbone, forward_routed
from .class_groups import ClassGroups
from .deploy import deployable
from .expert_layers import ExpertFFN, ExpertLayer, MoEConv2d, MoELinear
from .matching import match_ffns
from .pixel_routers import ConvRouter, MLPRouter
from .placements import PLACEMENTS, Placement, placement_of
from .routers import GROUPS, BaseRouter, LayerRouter, ResNetRouter, TokenRouter, router_modules, split_parameters
from .routing import BaseRouting, NonFiniteRouterError, Route, Routing
from .token_routing import TokenRouting

__all__ = [
    'GROUPS',
    'PLACEMENTS',
    'BaseRouter',
    'BaseRouting',
    'ClassGroups',
    'ConvRouter',
    'ExpertFFN',
    'ExpertLayer',
    'LayerRouter',
    'MLPRouter',
    'MoEBackbone',
    'MoEConv2d',
    'MoELinear',
    'NonFiniteRouterError',
    'Placement',
    'ResNetRouter',
    'Route',
    'Routing',
    'TokenRouter',
    'TokenRouting',
    'deployable',
    'forward_routed',
    'match_ffns',
    'placement_of',
    'router_modules',
    'split_parameters',
]
