"""Any MMPretrain backbone as a sparsely gated mixture of experts, and a dense checkpoint that it begins with."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModule, PretrainedInit
from mmengine.runner import CheckpointLoader
from mmpretrain.models.backbones.base_backbone import BaseBackbone
from mmpretrain.registry import MODELS
from torch import Tensor, nn

from mmadvmoe.utils import checkpointing, choose, norms_to_eval, type_name

from .context import RouteContext
from .expert_layers import ExpertFFN, ExpertLayer
from .placements import NO_ROUTERS, PLACEMENTS, Placement
from .routers import BaseRouter
from .routing import BaseRouting, Route


@MODELS.register_module()
class MoEBackbone(BaseBackbone):
    """Turn any MMPretrain backbone into a mixture of experts with hard routing.

    The dense backbone is built from its own config and the layers whose names match become expert layers; norm
    layers and everything that does not match are shared by all experts. Only the chosen expert of each image is
    computed. A dense checkpoint named in the inner ``init_cfg`` (``dict(type='Pretrained', ...)``) is copied
    into every expert ("upcycling").

    Args:
        backbone (dict): Config of the dense backbone, with the widths of one pathway.
        num_experts (int): N >= 1. 1 is the plain backbone, without any router.
        include (Sequence[str]): Regular expressions, searched in layer names: the layers to convert.
        exclude (Sequence[str]): Regular expressions for layers not to convert. Defaults to ().
        routing (str): ``'image'``: one router reads the input of the backbone and chooses for all layers.
            ``'layer'``: every expert layer has its own router on its own input. ``'token'``: for transformers, every
            feed-forward network that matches gets experts and a router that chooses for each token; see
            :func:`~mmadvmoe.moe.matching.match_ffns`. Defaults to ``'image'``.
        router (dict, optional): Config of the router(s). Defaults to ``dict(type='ResNetRouter')`` for image-level,
            ``dict(type='LayerRouter')`` for layer-level and ``dict(type='TokenRouter')`` for token-level routing.
        gate (str): ``'softmax'`` (bounded) or ``'logit'`` (the reference code's); see :meth:`Routing.decide`.
            Token routers have settings of their own. Defaults to ``'softmax'``.
        share_stem (bool): Whether a pattern that takes in the first layer is refused, as the paper's pathways share
            it. Defaults to True.
        init_cfg (dict, optional): A whole checkpoint (``type='Pretrained'``); with one expert as in MMEngine.

    Raises:
        ValueError: ``num_experts``, ``routing``, ``gate``, ``init_cfg`` or a pattern is not allowed, or the router is
            set to give a number of logits other than ``num_experts``.

    Example:
        >>> model = dict(type='ImageClassifier', backbone=dict(
        ...     type='MoEBackbone', num_experts=2, include=[r'layer\\d.*conv\\d'],
        ...     backbone=dict(type='ResNet_CIFAR', depth=18, base_channels=32)), ...)
    """

    def __init__(
        self,
        backbone: dict,
        num_experts: int,
        include: Sequence[str],
        exclude: Sequence[str] = (),
        routing: str = 'image',
        router: dict | None = None,
        gate: str = 'softmax',
        share_stem: bool = True,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if not isinstance(num_experts, int) or num_experts < 1:
            raise ValueError(f'backbone.num_experts={num_experts!r} must be an integer of at least 1')
        placement = PLACEMENTS[choose(routing, PLACEMENTS, 'backbone.routing')]
        if placement.reads_tokens and gate != 'softmax':
            raise ValueError(
                f'backbone.gate={gate!r} is not for routing={routing!r}; see router.softmax of TokenRouter'
            )
        self.num_experts = num_experts
        self.routing = routing
        self._dense_cfg = copy.deepcopy(backbone)
        self.network: nn.Module = MODELS.build(backbone)
        found = checkpointing(self.network)
        if num_experts > 1 and found:
            module, key = found[0]
            raise ValueError(
                f'backbone.backbone sets {key}=True of {type(module).__name__}: layers would be computed anew in the '
                f'backward pass, when the routes of the forward pass are gone; set backbone.backbone.{key}=False'
            )
        if num_experts > 1 and any(
            getattr(each, 'no_custom_backward', True) is False for each in self.network.modules()
        ):
            raise ValueError(
                f'backbone.backbone: {type(self.network).__name__} computes its layers anew in a backward pass of its '
                'own, when the routes of the forward pass are gone; set backbone.backbone.no_custom_backward=True'
            )
        if num_experts > 1 and not all(map(is_pretrained, init_settings(init_cfg))):
            raise ValueError(
                f'backbone.init_cfg={init_cfg!r}: initialisers go by the type of a layer and pass over experts, so '
                "type='Pretrained' alone is allowed here; backbone.backbone.init_cfg is that of each expert"
            )
        self.context = RouteContext(num_experts, gate)
        self.router: BaseRouter | None = None
        names = placement.match(self.network, include, exclude, share_stem)
        self.placement: Placement = NO_ROUTERS
        if num_experts > 1:
            self.placement = placement(names)
            cfg = self._checked_router_cfg(router)
            self.router = self.placement.convert(
                self.network, num_experts, self.context, lambda **inputs: MODELS.build({**cfg, **inputs})
            )

    def _checked_router_cfg(self, router: dict | None) -> dict:
        cfg = dict(copy.deepcopy(router)) if router is not None else {}
        default = self.placement.default_router
        cfg.setdefault('type', default)
        kind = MODELS.get(cfg['type']) if isinstance(cfg['type'], str) else cfg['type']
        if getattr(kind, 'reads_tokens', False) != self.placement.reads_tokens:
            raise ValueError(
                f'backbone.router.type={kind.__name__} {"scores" if kind.reads_tokens else "does not score"} single '
                f'tokens, which does not fit backbone.routing={self.routing!r}; its default is {default!r}'
            )
        if getattr(kind, 'reads_images', False) and not self.placement.one_route_per_image:
            raise ValueError(
                f'backbone.router.type={kind.__name__} reads images, but with backbone.routing={self.routing!r} each '
                f'of {self.placement.num_routers} layers has a router, which reads what that layer is given; set '
                f'backbone.router=dict(_delete_=True, type={default!r})'
            )
        given = cfg.setdefault('num_experts', self.num_experts)
        if given != self.num_experts:
            raise ValueError(f'backbone.router.num_experts={given} must equal backbone.num_experts={self.num_experts}')
        return cfg

    @property
    def num_routers(self) -> int:
        """L: 0 without routing, 1 for image-level, one per expert layer for layer- and token-level routing."""
        return self.placement.num_routers

    @property
    def expert_layer_names(self) -> tuple[str, ...]:
        """The names of the converted layers."""
        return self.placement.layer_names

    def init_weights(self) -> None:
        """Initialise every expert as the dense network initialises that layer.

        The dense network is built and initialised once per expert, so fans are those of one expert, any backbone's
        own scheme holds, and a pretrained dense checkpoint ends up in every expert. Whether its names begin with
        ``'backbone.'`` is found out.

        Raises:
            ValueError: That checkpoint has none of the layers that get experts.
        """
        if self.num_experts == 1 or self.init_cfg:
            if self.init_cfg:
                check_pretrained(self, self)
            else:
                own = getattr(self.network, 'init_cfg', None)
                self.network.init_cfg = with_found_prefix(own, dict(self.network.named_parameters()))
            super().init_weights()
            return
        layers = dict(zip(self.expert_layer_names, self.expert_layers()))
        wanted = {
            f'{name}.{key}': view for name, each in layers.items() for key, view in each.expert_parameters(0).items()
        }
        if self._dense_cfg.get('init_cfg'):
            self._dense_cfg['init_cfg'] = with_found_prefix(self._dense_cfg['init_cfg'], wanted)
        with torch.no_grad():
            for expert in range(self.num_experts):
                dense: nn.Module = MODELS.build(copy.deepcopy(self._dense_cfg))
                dense._dump_init_info = lambda: None  # one report for the whole model is enough
                if hasattr(dense, 'init_weights'):
                    dense.init_weights()
                source = dense.state_dict()
                for name, layer in layers.items():
                    for key, view in layer.expert_parameters(expert).items():
                        view.copy_(source.pop(f'{name}.{key}'))
                if expert == 0:
                    shared = self.network.state_dict()
                    for key, value in source.items():
                        shared[key].copy_(value)
        for router in (self.router, *(layer.router for layer in layers.values())):
            if router is not None:
                router.init_weights()
        self._is_init = True

    def train(self, mode: bool = True) -> MoEBackbone:
        """As any module; where the wrapped backbone keeps its norms in eval mode (``norm_eval``), routers do, too."""
        super().train(mode)
        if mode and self.router is not None and getattr(self.network, 'norm_eval', False):
            norms_to_eval(self.router)
        return self

    def forward(self, x: Tensor) -> tuple:
        """Features of the wrapped backbone.

        Args:
            x (Tensor): (B, C, H, W).

        Returns:
            tuple: What the dense backbone returns, in the order of the batch.

        Raises:
            RuntimeError: It is traced or exported, of which only the routes of the example would be left.
        """
        if self.num_routers and (torch.jit.is_tracing() or torch.compiler.is_exporting()):
            raise RuntimeError(
                'a mixture of experts sorts its batch by expert: a trace or an exported graph of it would hold for the '
                'routes of the example images alone. Trace or export mmadvmoe.moe.deployable(model), which computes '
                'all experts and selects, or run tools/export.py (torchscript, onnx or torch_export)'
            )
        return self.forward_routed(x)[0]

    # A compiler that takes part of this frame would begin the pass twice; what it calls may be compiled.
    @torch.compiler.disable(recursive=False)
    def forward_routed(
        self, x: Tensor, route: Route | None = None, with_logits: bool = False, gated: bool = True
    ) -> tuple[Any, tuple[BaseRouting, ...]]:
        """Features, and the decisions that led to them.

        Args:
            x (Tensor): (B, C, H, W).
            route (Tensor or Sequence[BaseRouting], optional): Experts to take instead of the routers' choice: (B,)
                for all routers or (B, L). There is no gate then, so no gradient reaches the input through the choice.
                With token-level routing, (B,) for all tokens, or the ``decisions`` of all routings side by side; the
                weights of the experts are then those that the routers give to this choice, with their gradient. Or
                the routings of an earlier pass on the same batch, which are taken without another transfer to the
                host, but where a capacity drops tokens.
            with_logits (bool): Ask the routers for their logits although a route is given; token routers are asked
                in any case. Defaults to False.
            gated (bool): Whether the routers' choice carries the gradient of the straight-through gate. Without it,
                features have the gradient of the pathways that were taken, which is that of the function itself
                wherever the choice does not change. Defaults to True.

        Returns:
            tuple: The features, and one :class:`BaseRouting` per router.

        Raises:
            NonFiniteRouterError: A router gives logits that are not finite. Of routers for tokens that is looked at in
                eval mode alone, as it would make a GPU wait.
        """
        if not self.num_routers:
            return self.network(x), ()
        self.placement.check_route(route, len(x))
        with self.context.run(self.placement.router_names, len(x), route, with_logits, gated) as routes:
            return self.placement.forward(self, _with_contiguous_gradient(x), routes), routes.taken

    def decide_routes(self, x: Tensor, gated: bool = True) -> tuple[BaseRouting, ...]:
        """Let the routers decide. Image-level routing runs the router alone, and there is no gate.

        Args:
            x (Tensor): (B, C, H, W).
            gated (bool): Whether the decisions of earlier routers carry the gradient of their gates into the logits
                of later ones. Defaults to True.
        """
        return self.placement.decide(self, x, gated)

    def expert_layers(self) -> list[ExpertLayer | ExpertFFN]:
        """The converted layers, in the order of the network."""
        return self.placement.expert_layers(self.network)

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Depth of a parameter as the wrapped backbone tells it; routers count with the last layers.

        See MMPretrain's ``LearningRateDecayOptimWrapperConstructor``.
        """
        own = f'{prefix}network.'
        if param_name.startswith(own):
            return self.network.get_layer_depth(prefix + param_name[len(own) :], prefix)
        _, depth = self.network.get_layer_depth(prefix, prefix)
        return depth - 1, depth


def _with_contiguous_gradient(x: Tensor) -> Tensor:
    """``x`` with a gradient in one memory layout, whichever routes its images take."""
    if x.requires_grad:
        x = x.view_as(x)
        x.register_hook(Tensor.contiguous)
    return x


def forward_routed(
    classifier: nn.Module, inputs: Tensor, route: Route | None = None, with_logits: bool = False, gated: bool = True
) -> tuple[Any, tuple[BaseRouting, ...]]:
    """Class logits of an MMPretrain classifier, and the decisions that led to them.

    Args:
        classifier (nn.Module): Has ``backbone``, ``head`` and perhaps ``neck``, as ``ImageClassifier`` has.
        inputs (Tensor): Network inputs, (B, C, H, W).
        route, with_logits, gated: See :meth:`MoEBackbone.forward_routed`.

    Returns:
        tuple: What the head gives, for most heads (B, K) logits, and one :class:`BaseRouting` per router, none for a
        dense network.

    Raises:
        ValueError: A route is given to a network without routers.
    """
    if getattr(classifier.backbone, 'num_routers', 0):
        features, routings = classifier.backbone.forward_routed(inputs, route, with_logits, gated)
    elif route is not None:
        raise ValueError(f'a route was given, but {type(classifier.backbone).__name__} has no router')
    else:
        features, routings = classifier.backbone(inputs), ()
    if getattr(classifier, 'neck', None) is not None:
        features = classifier.neck(features)
    return classifier.head(features), routings


# Where the weights of a backbone stand: in a checkpoint of it alone, and in that of a classifier; of DDP, too.
_PREFIXES = (None, 'backbone.', 'module.', 'module.backbone.')
_CURE = (
    'set backbone.backbone.init_cfg=dict(type="Pretrained", checkpoint=..., prefix=...) to a checkpoint of the same '
    'dense network with the same widths, and prefix to what stands in front of its names'
)


def init_settings(init_cfg: None | Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """The settings of an ``init_cfg``, which MMEngine takes as one or as several."""
    return init_cfg if isinstance(init_cfg, (list, tuple)) else [init_cfg] if init_cfg else []


def is_pretrained(init_cfg: Mapping[str, Any]) -> bool:
    """Whether one of the settings of an ``init_cfg`` loads a checkpoint."""
    return type_name(init_cfg.get('type', '')) in ('Pretrained', PretrainedInit.__name__)


def with_found_prefix(
    init_cfg: None | Mapping[str, Any] | Sequence[Mapping[str, Any]], wanted: Mapping[str, Tensor]
) -> Any:
    """Give the ``init_cfg`` of a dense network with the prefix under which its checkpoint has the wanted layers.

    ``wanted`` are the parameters of one expert of each layer, by their names in the dense network. Whatever is not of
    type ``Pretrained`` stays as it is.

    Raises:
        ValueError: A checkpoint has none of them, under any prefix.
    """
    if isinstance(init_cfg, (list, tuple)):
        return [with_found_prefix(each, wanted) for each in init_cfg]
    if not init_cfg or not is_pretrained(init_cfg):
        return init_cfg
    file = init_cfg['checkpoint']
    content = CheckpointLoader.load_checkpoint(file, map_location='cpu', logger='silent')
    found = content.get('state_dict', content)
    given = init_cfg.get('prefix')
    for prefix in dict.fromkeys((given, *_PREFIXES)):
        before = '' if prefix is None else prefix if prefix.endswith('.') else f'{prefix}.'
        if any(getattr(found.get(before + name), 'shape', None) == value.shape for name, value in wanted.items()):
            if prefix != given:
                print_log(
                    f'{file} has the layers of the experts under prefix={prefix!r}, not {given!r}',
                    'current',
                    logging.INFO,
                )
            return {**init_cfg, 'prefix': prefix}
    name, value = next(iter(wanted.items()))
    others = [f'{key} {tuple(each.shape)}' for key, each in found.items() if key.endswith(name)]
    raise ValueError(
        f'no layer that gets experts is in the checkpoint {file!r} (prefix={given!r}): {name} {tuple(value.shape)} is '
        f'wanted, there is {others[0] if others else ", ".join(list(found)[:3]) + ", ..."}. To upcycle, {_CURE}'
    )


def check_pretrained(holder: BaseModule, model: nn.Module) -> None:
    """As :func:`check_has_experts`, of the checkpoints that ``holder.init_cfg`` loads into itself."""
    for cfg in filter(is_pretrained, init_settings(holder.init_cfg)):
        content = CheckpointLoader.load_checkpoint(cfg['checkpoint'], map_location='cpu', logger='silent')
        state, prefix = content.get('state_dict', content), cfg.get('prefix') or ''
        state = {key.removeprefix(prefix).lstrip('.'): value for key, value in state.items() if key.startswith(prefix)}
        check_has_experts(state, model, cfg['checkpoint'])


def check_has_experts(content: Mapping[str, Any], model: nn.Module, file: str) -> None:
    """Check that what is loaded into a mixture, the content of a checkpoint file, is not that of a dense network.

    Raises:
        ValueError: No parameter of an expert layer is there.
    """
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, ExpertLayer))
    wanted = [f'{name}.{key}' for name, module in layers for key, _ in module.named_parameters(recurse=False)]
    state = content.get('state_dict', content)
    if wanted and not any(name in state or f'module.{name}' in state for name in wanted):
        raise ValueError(
            f'{file!r} has no expert layer of this mixture ({wanted[0]}, ...), so that it would begin from '
            'scratch but for what is shared. To make experts of a dense network, do not load it here (load_from, '
            f'init_cfg, pretrained) and {_CURE}'
        )
