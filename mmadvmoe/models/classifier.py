"""Image classifiers that learn from clean and adversarial images at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmpretrain.models.classifiers import ImageClassifier
from mmpretrain.models.heads import ClsHead
from mmpretrain.models.losses import FocalLoss
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample
from torch import Tensor, nn

from mmadvmoe.attacks import ClassGroupAttack, Victim
from mmadvmoe.attacks.views import ROUTES
from mmadvmoe.moe import NonFiniteRouterError, Routing, forward_routed
from mmadvmoe.moe.backbone import check_pretrained
from mmadvmoe.moe.class_groups import MODULO
from mmadvmoe.utils import choose

from .data_preprocessor import AdvDataPreprocessor, targets_of
from .losses import ROUTER_LOGITS, NonFiniteError, Objective, Outputs, RobustBatch, check_finite
from .router_losses import ClassGroupLoss

#: ``model.route`` of adversarial images that the routers send where they will, without the gradient of the gate.
FREE = 'free'


@dataclass(frozen=True)
class RoutingRecord:
    """The routes of a training step, without gradients: one per router, none where that side was not run."""

    clean: tuple[Routing, ...] = ()
    adversarial: tuple[Routing, ...] = ()


@MODELS.register_module()
class RobustClassifier(ImageClassifier):
    """MMPretrain's image classifier with objectives over pairs of clean and adversarial images.

    Everything but the loss is :class:`mmpretrain.models.ImageClassifier`'s: backbones, necks, heads, prediction.
    The head's own loss (label smoothing, soft labels) is the classification loss inside the objectives.

    Args:
        robust_loss (dict or list[dict], optional): The objective, or several that are summed up (in the log, too, where
            terms share a name); minimised in joint training and in the experts' turn. Defaults to
            ``dict(type='TRADESLoss', beta=6.)``.
        router_loss (dict or list[dict], optional): The objective of the router's turn. Defaults to None: that of
            ``robust_loss``, as in the AdvMoE paper.
        data_preprocessor (dict, optional): Defaults to ``dict(type='AdvDataPreprocessor')``.
        route (str): Of the adversarial images, in joint training and in the experts' turn. ``'gate'``: the routers
            decide, with the gradient of the gate. ``'held'``: the route of the clean image, without that gradient, so
            that a pathway learns from the images that are its own; give the training attack the same ``route``.
            ``'free'``: the routers decide, without that gradient, so that with an attack on routes (``RoutePGD``) a
            pathway also learns from the images that an attack can send it. Defaults to ``'gate'``.
        **kwargs: As for ``ImageClassifier``: backbone, neck, head, pretrained, train_cfg, init_cfg.

    Attributes:
        routing_records (dict[str or None, RoutingRecord]): Of the last training step of each turn (None: of joint
            training), until somebody takes them.

    Raises:
        TypeError: The head has no single loss over one softmax of class logits, or a loss is no config of an objective.
        ValueError: An objective is unknown, is about routers that a dense network does not have, cannot serve the
            batch augmentations, or nothing in ``robust_loss`` trains the experts; or routes or groups of classes are
            not those of the training attack.
    """

    def __init__(
        self,
        *args,
        robust_loss: None | dict | Sequence[dict] = None,
        router_loss: None | dict | Sequence[dict] = None,
        data_preprocessor: None | dict | nn.Module = None,
        route: str = 'gate',
        **kwargs,
    ) -> None:
        if not isinstance(data_preprocessor, nn.Module):
            data_preprocessor = dict(data_preprocessor or {})
            data_preprocessor.setdefault('type', 'AdvDataPreprocessor')
        super().__init__(*args, data_preprocessor=data_preprocessor, **kwargs)
        _check_head(self.head)
        self.route = choose(route, (*ROUTES, FREE), 'model.route')
        self.routing_records: dict[str | None, RoutingRecord] = {}
        robust_loss = dict(type='TRADESLoss') if robust_loss is None else robust_loss
        self.robust_loss = self._build_objectives('robust_loss', robust_loss)
        if not any(objective.needs_classes for objective in self.robust_loss):
            raise ValueError(
                f'robust_loss={robust_loss!r} is about router logits alone, from which the experts learn nothing; add '
                "dict(type='TRADESLoss') to it, or set it as router_loss"
            )
        self.router_loss = None if router_loss is None else self._build_objectives('router_loss', router_loss)
        if isinstance(self.data_preprocessor, AdvDataPreprocessor):
            self.data_preprocessor.bind_victim(Victim(self))
            self._check_attacks(self.data_preprocessor)

    def init_weights(self) -> None:
        """As MMEngine; raises ValueError where ``init_cfg`` or ``pretrained`` gives a mixture dense weights."""
        check_pretrained(self, self)
        super().init_weights()

    def _check_attacks(self, preprocessor: AdvDataPreprocessor) -> None:
        """Compare what the attacks of training are set to with what is learned from their images."""
        attack, of_router = preprocessor.attack_cfg or {}, preprocessor.router_attack_cfg
        # Where it is that of both turns, it has to move routes as well.
        if self.route == 'held' and of_router not in (None, attack) and attack.get('route') != 'held':
            raise ValueError(
                f"model.route='held', but data_preprocessor.attack.route={attack.get('route', ROUTES[0])!r}: a pathway "
                "would learn from images that were made against another; set data_preprocessor.attack.route='held', or "
                f'model.route={FREE!r}'
            )
        built = preprocessor.attack_of('router')
        if built is None or not isinstance(built.attack, ClassGroupAttack):
            return
        key, cfg = ('attack', attack) if of_router is None else ('router_attack', of_router)
        labels, num_experts = torch.arange(preprocessor.num_classes or 0), self.backbone.num_experts
        expected = built.attack.groups.experts_of(labels, num_experts)
        name = 'robust_loss' if self.router_loss is None else 'router_loss'
        for part in getattr(self, name).modules():
            if isinstance(part, ClassGroupLoss) and not part.groups.experts_of(labels, num_experts).equal(expected):
                raise ValueError(
                    f'data_preprocessor.{key}.groups={cfg.get("groups", MODULO)!r} are not the groups of model.{name}: '
                    f'by these, classes 0 to {len(labels) - 1} belong to experts '
                    f'{part.groups.experts_of(labels, num_experts).tolist()}; give both the same groups'
                )

    def _build_objectives(self, key: str, cfg: dict | Sequence[dict]) -> nn.ModuleList:
        cfgs = cfg if isinstance(cfg, (list, tuple)) else [cfg]
        if not cfgs:
            raise ValueError(f'{key}={cfg!r} must hold at least one objective; allowed: {_objective_names()}')
        objectives = nn.ModuleList(_build_objective(key, item) for item in cfgs)
        for objective in objectives:
            name = f'{key}: {type(objective).__name__}'
            if objective.needs_hard_labels and getattr(self.data_preprocessor, 'batch_augments', None) is not None:
                raise ValueError(
                    f'{name} needs class indices as labels, which the batch augmentations (train_cfg.augments, '
                    'data_preprocessor.batch_augments) mix; use TRADESLoss or drop the augmentations'
                )
            if objective.needs_routers and not getattr(self.backbone, 'num_routers', 0):
                raise ValueError(
                    f'{name} is about router logits, but the backbone {type(self.backbone).__name__} has no router; '
                    'it takes a MoEBackbone with num_experts >= 2'
                )
            objective.check_model(getattr(self.backbone, 'num_experts', 1), getattr(self.head, 'num_classes', None))
        return objectives

    def forward(
        self,
        inputs: Tensor,
        data_samples: list[DataSample] | None = None,
        mode: str = 'tensor',
        adv_inputs: Tensor | None = None,
        turn: str | None = None,
    ) -> Tensor | dict | list[DataSample]:
        """As ``ImageClassifier.forward``, with two more arguments for ``mode='loss'``.

        Args:
            inputs (Tensor): Network inputs, (B, C, H, W).
            data_samples (list[DataSample], optional): B samples.
            mode (str): ``'tensor'``, ``'predict'`` or ``'loss'``.
            adv_inputs (Tensor, optional): Adversarial network inputs, (B, C, H, W).
            turn (str, optional): ``'experts'`` or ``'router'`` where training takes turns.
        """
        if mode == 'loss':
            return self.loss(inputs, data_samples, adv_inputs, turn)
        return super().forward(inputs, data_samples, mode)

    def loss(
        self, inputs: Tensor, data_samples: list[DataSample], adv_inputs: Tensor | None = None, turn: str | None = None
    ) -> dict[str, Tensor]:
        """Loss terms by name: of ``router_loss`` in the router's turn, if it is set, else of ``robust_loss``.

        Raises:
            ValueError: There are no adversarial inputs, or a term to be learnt has no ``loss`` in its name.
            NonFiniteError: A term or a router logit is not finite.
        """
        if adv_inputs is None:
            raise ValueError(
                "RobustClassifier needs adv_inputs: set data_preprocessor=dict(type='AdvDataPreprocessor', "
                "mode='pair', attack=...)"
            )
        objectives = self.robust_loss if turn != 'router' or self.router_loss is None else self.router_loss
        needs_classes = any(objective.needs_classes for objective in objectives)
        try:
            clean, adversarial = self._sides(inputs, adv_inputs, needs_classes, turn)
        except NonFiniteRouterError as error:
            raise NonFiniteError(f'{ROUTER_LOGITS} ({error.router})', turn, 'router') from error
        batch = RobustBatch(
            clean=clean,
            adversarial=adversarial,
            target=targets_of(data_samples),
            classification_loss=lambda logits: self.head._get_loss(logits, data_samples)['loss'],
        )
        self.routing_records[turn] = RoutingRecord(
            *(tuple(routing.detach() for routing in side.routings) for side in (batch.clean, batch.adversarial))
        )
        losses: dict[str, Tensor] = {}
        for objective in objectives:
            for term, value in objective(batch).items():
                if 'loss' not in term and value.requires_grad:
                    raise ValueError(
                        f'{type(objective).__name__} has a term {term!r}, which MMEngine would log and not train: it '
                        "sums the terms that have 'loss' in their names; what is for the log alone is to be detached"
                    )
                losses[term] = losses[term] + value if term in losses else value
        check_finite(losses, (*batch.clean.routings, *batch.adversarial.routings), turn)
        return losses

    def _sides(
        self, inputs: Tensor, adv_inputs: Tensor, needs_classes: bool, turn: str | None
    ) -> tuple[Outputs, Outputs]:
        """Outputs for the clean and for the adversarial images."""
        if self.route != 'gate' and turn != 'router' and getattr(self.backbone, 'num_routers', 0):
            clean = Outputs(*forward_routed(self, inputs, gated=False))
            given = None if self.route == FREE else clean.routings
            return clean, Outputs(*forward_routed(self, adv_inputs, given, with_logits=True, gated=False))
        return self._outputs(inputs, needs_classes), self._outputs(adv_inputs, needs_classes)

    def _outputs(self, inputs: Tensor, needs_classes: bool) -> Outputs:
        if needs_classes:
            return Outputs(*forward_routed(self, inputs))
        return Outputs(None, self.backbone.decide_routes(inputs))


def _check_head(head: nn.Module | None) -> None:
    if not isinstance(head, ClsHead):
        raise TypeError(
            f'head: {type(head).__name__} cannot serve a RobustClassifier, which needs one set of class logits per '
            'image: use a head derived from ClsHead, such as LinearClsHead'
        )
    if type(head).loss is not ClsHead.loss or type(head)._get_loss is not ClsHead._get_loss:
        raise TypeError(
            f'head: {type(head).__name__} computes its loss from more than class logits and cannot serve a '
            'RobustClassifier; use a head that keeps the loss of ClsHead, such as LinearClsHead'
        )
    # LabelSmoothLoss keeps its choice in a part of its own.
    if any(isinstance(part, FocalLoss) or getattr(part, 'use_sigmoid', False) for part in head.loss_module.modules()):
        raise TypeError(
            f'head.loss: {type(head.loss_module).__name__} with a sigmoid treats classes as independent; the KL of a '
            'RobustClassifier is over one softmax, as in CrossEntropyLoss or LabelSmoothLoss'
        )


def _build_objective(key: str, cfg: Any) -> Objective:
    if not isinstance(cfg, Mapping) or 'type' not in cfg:
        raise TypeError(f"{key}={cfg!r} must be a dict with a type, such as dict(type='TRADESLoss')")
    allowed = _objective_names()
    kind = cfg['type']
    if isinstance(kind, str):
        kind = MODELS.get(kind) or choose(kind, allowed, f'{key}.type')
    if not (isinstance(kind, type) and issubclass(kind, Objective)):
        raise TypeError(f'{key}.type={cfg["type"]!r} is no robust objective; allowed: {allowed}')
    return MODELS.build(cfg)


def _objective_names() -> list[str]:
    return sorted(
        name for name, kind in MODELS.module_dict.items() if isinstance(kind, type) and issubclass(kind, Objective)
    )


@MODELS.register_module()
class FreeClassifier(ImageClassifier):
    """Step on each batch several times, and perturb the images by the gradient that each step has computed anyhow.

    The loss is the head's, on the perturbed images alone. The perturbation goes on from batch to batch; checkpoints
    hold it as ``offset``, after the first step. An epoch costs ``replays`` epochs of ordinary training; papers divide
    the number of epochs by it. Shafahi et al., "Adversarial Training for Free!", arXiv:1904.12843, algorithm 1.

    Mixtures of experts are trained jointly. It works in one process: in distributed training MMEngine's wrapper would
    step by itself.

    Args:
        eps (float): Radius of the L-inf ball, on [0, 1] images. Defaults to 8/255.
        replays (int): Steps on each batch. Defaults to 4.
        **kwargs: As for ``ImageClassifier``; ``data_preprocessor`` defaults to ``dict(type='AdvDataPreprocessor',
            mode='replace')``, without an attack.

    Raises:
        TypeError: The data preprocessor is another one, or attacks itself.
        ValueError: ``eps`` or ``replays`` is out of range.

    Examples:
        >>> model = dict(type='FreeClassifier', eps=8 / 255, replays=4, backbone=..., neck=..., head=...)
    """

    def __init__(self, *args, eps: float = 8 / 255, replays: int = 4, data_preprocessor=None, **kwargs) -> None:
        if not isinstance(replays, int) or replays < 1:
            raise ValueError(f'model.replays={replays!r} must be an integer of at least 1')
        if not 0 < eps <= 1:
            raise ValueError(f'model.eps={eps!r} must be in (0, 1]; if it is in units of 0..255, write eps={eps} / 255')
        if data_preprocessor is None or isinstance(data_preprocessor, dict):
            data_preprocessor = {'type': 'AdvDataPreprocessor', 'mode': 'replace', **(data_preprocessor or {})}
        super().__init__(*args, data_preprocessor=data_preprocessor, **kwargs)
        if not isinstance(self.data_preprocessor, AdvDataPreprocessor) or self.data_preprocessor.attack_cfg is not None:
            raise TypeError(
                'FreeClassifier perturbs images itself: set data_preprocessor=dict(type="AdvDataPreprocessor") without '
                'an attack'
            )
        self.eps = eps
        self.replays = replays
        self._offset: Tensor | None = None
        # No buffer: its shape, that of the batches, is not known before, and weight averages pair buffers by order.
        self.register_state_dict_post_hook(_save_offset)
        self.register_load_state_dict_pre_hook(_load_offset)
        self._in_step = False

    def train_step(self, data: dict, optim_wrapper: OptimWrapper) -> dict[str, Tensor]:
        """Preprocess a batch and step on it ``replays`` times; the losses are those of the last one.

        Raises:
            TypeError: The optimizers take turns.
            ValueError: Gradients are to be accumulated.
            NonFiniteError: A loss is not finite.
        """
        if isinstance(optim_wrapper, OptimWrapperDict):
            raise TypeError(
                'FreeClassifier trains all parameters together: leave out AlternatingOptimHook and its groups'
            )
        if optim_wrapper._accumulative_counts != 1:
            raise ValueError(
                f'optim_wrapper.accumulative_counts={optim_wrapper._accumulative_counts} must be 1 for a '
                'FreeClassifier, whose replays each update the weights: for more images in a step raise '
                'train_dataloader.batch_size'
            )
        with optim_wrapper.optim_context(self):
            batch = self.data_preprocessor(data, True)
        images = self.data_preprocessor.to_unit(batch['inputs'])
        # A last batch of fewer images uses the first rows of the perturbation, and leaves the others as they are.
        offset, rest = torch.zeros_like(images), images[:0]
        if self._offset is not None and self._offset.shape[1:] == images.shape[1:]:
            before = self._offset.to(images.device)
            rest = before[len(images) :]
            offset[: len(before)] = before[: len(images)]
        self._in_step = True
        try:
            for _ in range(self.replays):
                points = (images + offset).clamp(0, 1).requires_grad_()
                with optim_wrapper.optim_context(self):
                    losses = self(self.data_preprocessor.normalize(points), batch['data_samples'], mode='loss')
                check_finite(losses)
                loss, log_vars = self.parse_losses(losses)
                optim_wrapper.update_params(loss)
                offset = (offset + self.eps * points.grad.sign()).clamp(-self.eps, self.eps)
        finally:
            self._in_step = False
        self._offset = torch.cat([offset.detach(), rest])
        return log_vars

    def loss(self, inputs: Tensor, data_samples: list) -> dict[str, Tensor]:
        """The head's loss.

        Raises:
            RuntimeError: It is asked for from outside of :meth:`train_step`, as distributed training does.
        """
        if not self._in_step:
            raise RuntimeError('FreeClassifier trains in one process, by its own train_step: use --launcher none')
        return super().loss(inputs, data_samples)


def _save_offset(model: FreeClassifier, state_dict: dict, prefix: str, metadata: dict) -> None:
    if model._offset is not None:
        state_dict[f'{prefix}offset'] = model._offset


def _load_offset(model: FreeClassifier, state_dict: dict, prefix: str, *args: Any) -> None:
    model._offset = state_dict.pop(f'{prefix}offset', None)
