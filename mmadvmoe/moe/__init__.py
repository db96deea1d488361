from .backbone import MoEBackbone
from .classify import forward_routed
from .convert import convert_layers, match_layers
from .expert_layers import ExpertLayer, MoEConv2d, MoELinear
from .routers import BaseRouter, LayerRouter, ResNetRouter, router_modules, split_parameters
from .routing import Routing

__all__ = [
    'BaseRouter',
    'ExpertLayer',
    'LayerRouter',
    'MoEBackbone',
    'MoEConv2d',
    'MoELinear',
    'ResNetRouter',
    'Routing',
    'convert_layers',
    'forward_routed',
    'match_layers',
    'router_modules',
    'split_parameters',
]
