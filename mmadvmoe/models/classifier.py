"""An image classifier that learns from clean and adversarial images at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional, Union

import torch
from mmpretrain.models.classifiers import ImageClassifier
from mmpretrain.models.heads import ClsHead, MultiLabelClsHead
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample
from torch import Tensor, nn

from mmadvmoe.attacks import Victim
from mmadvmoe.moe import Routing, forward_routed

from .data_preprocessor import AdvDataPreprocessor
from .finite import check_finite
from .objectives import Objective, Outputs, RobustBatch

TURNS = (None, 'experts', 'router')


@dataclass(frozen=True)
class RoutingRecord:
    """The routes of the last training forward pass, without gradients, for logs.

    Attributes:
        clean, adversarial (tuple[Routing]): One per router; empty where that side was not run.
    """

    clean: tuple[Routing, ...] = ()
    adversarial: tuple[Routing, ...] = ()


@MODELS.register_module()
class RobustClassifier(ImageClassifier):
    """MMPretrain's image classifier with objectives over pairs of clean and adversarial images.

    Everything but the loss is :class:`mmpretrain.models.ImageClassifier`'s: backbones, necks, heads, prediction.
    The head's own loss (label smoothing, soft labels) is the classification loss inside the objectives.

    Args:
        robust_loss (dict or list[dict], optional): The objective, or several that are summed up; minimised in joint
            training and in the experts' turn. Defaults to ``dict(type='TRADESLoss', beta=6.)``.
        router_loss (dict or list[dict], optional): The objective of the router's turn. Defaults to None: that of
            ``robust_loss``, as in the AdvMoE paper.
        data_preprocessor (dict, optional): Defaults to ``dict(type='AdvDataPreprocessor')``.
        **kwargs: As for ``ImageClassifier``: backbone, neck, head, pretrained, train_cfg, init_cfg.

    Attributes:
        turn (str, optional): ``'experts'`` or ``'router'`` while training takes turns, None in joint training. Set
            by ``AlternatingOptimHook``.
        routing_record (RoutingRecord): Of the last training step.

    Raises:
        TypeError: The head has no single loss over one set of class logits, so it cannot serve.
        ValueError: An objective of the routers is set for a dense network.
    """

    def __init__(
        self,
        *args,
        robust_loss: Union[None, dict, Sequence[dict]] = None,
        router_loss: Union[None, dict, Sequence[dict]] = None,
        data_preprocessor: Union[None, dict, nn.Module] = None,
        **kwargs,
    ) -> None:
        if not isinstance(data_preprocessor, nn.Module):
            data_preprocessor = dict(data_preprocessor or {})
            data_preprocessor.setdefault('type', 'AdvDataPreprocessor')
        super().__init__(*args, data_preprocessor=data_preprocessor, **kwargs)
        _check_head(self.head)
        self.turn: Optional[str] = None
        self.routing_record = RoutingRecord()
        self.robust_loss = self._build_objectives('robust_loss', robust_loss or dict(type='TRADESLoss'))
        self.router_loss = None
        if router_loss is not None:
            self.router_loss = self._build_objectives('router_loss', router_loss)
        if isinstance(self.data_preprocessor, AdvDataPreprocessor):
            self.data_preprocessor.bind_victim(Victim.from_classifier(self))

    def _build_objectives(self, key: str, cfg: Union[dict, Sequence[dict]]) -> nn.ModuleList:
        cfgs = [cfg] if isinstance(cfg, dict) else list(cfg)
        objectives = nn.ModuleList(MODELS.build(item) for item in cfgs)
        for objective in objectives:
            if not isinstance(objective, Objective):
                allowed = sorted(_objective_names())
                raise TypeError(f'{key}: {type(objective).__name__} is no robust objective; allowed: {allowed}')
            if objective.needs_routers and not getattr(self.backbone, 'num_routers', 0):
                raise ValueError(
                    f'{key}: {type(objective).__name__} is about router logits, but the backbone '
                    f'{type(self.backbone).__name__} has no router'
                )
        return objectives

    def forward(
        self,
        inputs: Tensor,
        data_samples: Optional[list[DataSample]] = None,
        mode: str = 'tensor',
        adv_inputs: Optional[Tensor] = None,
    ) -> Union[Tensor, dict, list[DataSample]]:
        """As ``ImageClassifier.forward``, with the adversarial batch beside the clean one for ``mode='loss'``.

        Args:
            inputs (Tensor): Network inputs, (B, C, H, W).
            data_samples (list[DataSample], optional): B samples.
            mode (str): ``'tensor'``, ``'predict'`` or ``'loss'``.
            adv_inputs (Tensor, optional): Adversarial network inputs, (B, C, H, W).
        """
        if mode == 'loss':
            return self.loss(inputs, data_samples, adv_inputs)
        return super().forward(inputs, data_samples, mode)

    def loss(
        self, inputs: Tensor, data_samples: list[DataSample], adv_inputs: Optional[Tensor] = None
    ) -> dict[str, Tensor]:
        """Loss terms of the turn under way, named ``<turn>/<term>`` while training takes turns.

        Raises:
            ValueError: There are no adversarial inputs.
            NonFiniteError: A term or a router logit is not finite.
        """
        if adv_inputs is None:
            raise ValueError(
                "RobustClassifier needs adv_inputs: set data_preprocessor=dict(type='AdvDataPreprocessor', "
                "mode='pair', attack=...)"
            )
        in_router_turn = self.turn == 'router' and self.router_loss is not None
        objectives = self.router_loss if in_router_turn else self.robust_loss
        needs_classes = any(objective.needs_classes for objective in objectives)
        batch = RobustBatch(
            clean=self._outputs(inputs, needs_classes),
            adversarial=self._outputs(adv_inputs, needs_classes),
            target=_targets(data_samples),
            classification_loss=lambda logits: self.head._get_loss(logits, data_samples)['loss'],
        )
        self.routing_record = RoutingRecord(
            clean=tuple(routing.detach() for routing in batch.clean.routings),
            adversarial=tuple(routing.detach() for routing in batch.adversarial.routings),
        )
        losses: dict[str, Tensor] = {}
        prefix = f'{self.turn}/' if self.turn else ''
        for objective in objectives:
            losses.update({prefix + name: value for name, value in objective(batch).items()})
        check_finite(losses, (*batch.clean.routings, *batch.adversarial.routings))
        return losses

    def _outputs(self, inputs: Tensor, needs_classes: bool) -> Outputs:
        if needs_classes:
            return Outputs(*forward_routed(self, inputs))
        logits = self.backbone.route_logits(inputs)
        return Outputs(None, tuple(Routing.decide(item, gate=None) for item in logits))


def _targets(data_samples: list[DataSample]) -> Tensor:
    if 'gt_score' in data_samples[0]:
        return torch.stack([sample.gt_score for sample in data_samples])
    return torch.cat([sample.gt_label for sample in data_samples])


def _check_head(head: Optional[nn.Module]) -> None:
    if not isinstance(head, ClsHead) or isinstance(head, MultiLabelClsHead):
        raise TypeError(
            f'head: {type(head).__name__} cannot serve a RobustClassifier, which needs one set of class logits per '
            'image: use a head derived from ClsHead, such as LinearClsHead'
        )
    if type(head).loss is not ClsHead.loss:
        raise TypeError(
            f'head: {type(head).__name__} computes its loss from features and cannot serve a RobustClassifier; use a '
            'head that keeps ClsHead.loss, such as LinearClsHead'
        )
    if getattr(head.loss_module, 'use_sigmoid', False):
        raise TypeError(
            f'head.loss: {type(head.loss_module).__name__} with use_sigmoid=True treats classes as independent; the '
            'KL of a RobustClassifier is over one softmax'
        )


def _objective_names() -> list[str]:
    return [name for name, kind in MODELS.module_dict.items() if isinstance(kind, type) and issubclass(kind, Objective)]
