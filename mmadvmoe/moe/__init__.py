from .backbone import MoEBackbone
from .classify import forward_routed
from .convert import convert_layers, match_layers
from .convert_ffn import convert_ffns, match_ffns
from .expert_ffn import ExpertFFN
from .expert_layers import ExpertLayer, MoEConv2d, MoELinear, weights_held
from .routers import GROUPS, BaseRouter, LayerRouter, ResNetRouter, router_modules, split_parameters
from .routing import Routing
from .token_router import TokenRouter
from .token_routing import TokenRouting

__all__ = [
    'GROUPS',
    'BaseRouter',
    'ExpertFFN',
    'ExpertLayer',
    'LayerRouter',
    'MoEBackbone',
    'MoEConv2d',
    'MoELinear',
    'ResNetRouter',
    'Routing',
    'TokenRouter',
    'TokenRouting',
    'convert_ffns',
    'convert_layers',
    'forward_routed',
    'match_ffns',
    'match_layers',
    'router_modules',
    'split_parameters',
    'weights_held',
]
