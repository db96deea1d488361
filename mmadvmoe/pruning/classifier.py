"""A classifier that learns which of its channels to keep, and then to do without the others."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.config import Config
from mmpretrain.registry import MODELS
from torch import Tensor, nn

from mmadvmoe.cost import count_cost
from mmadvmoe.models import RobustClassifier
from mmadvmoe.moe.backbone import init_settings, is_pretrained
from mmadvmoe.utils import choose

from .channels import ChannelGroup, find_channel_groups, fit_channels, remove_channels

STAGES = ('scores', 'weights')
_IMAGE_CHANNELS = 3


class ChannelGate(nn.Module):
    """Keeps ``keep`` of the C channels of a group: those whose scores are largest in magnitude."""

    def __init__(self, group: ChannelGroup, keep: int) -> None:
        super().__init__()
        self.group = group
        self.keep = keep
        self.scores = nn.Parameter(torch.ones(group.channels))

    def kept(self) -> Tensor:
        """Indices of the channels that are kept, in ascending order."""
        return self.scores.detach().abs().topk(self.keep).indices.sort().values

    def forward(self) -> Tensor:
        """(C,): 1 for channels that are kept, else 0; in the backward pass the magnitude of the scores."""
        magnitude = self.scores.abs()
        mask = torch.zeros_like(magnitude).index_fill_(0, self.kept(), 1.0)
        return mask + (magnitude - magnitude.detach())


@dataclass(frozen=True)
class _MaskInput:
    """Forward pre-hook of a layer that reads gated channels. An object, so that a copied model masks by its own."""

    gate: ChannelGate

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        (x,) = inputs
        mask = self.gate().to(x.dtype)
        if x.dim() == 4:
            return (x * mask.view(1, -1, 1, 1),)
        return (x * mask.repeat_interleave(x.shape[1] // len(mask)),)


@MODELS.register_module()
class SparseClassifier(RobustClassifier):
    """A robust classifier whose channels are pruned to the cost of another network.

    Each group of channels that can be removed together has a score per channel; those with the largest are kept, as
    many as the cost allows. Training has two stages, each a training run of its own:

    1. ``stage='scores'``, from a checkpoint of the trained dense network: the weights are fixed and the scores, which
       start as the size of the weights, learn by the robust loss, straight through the selection.
    2. ``stage='weights'``, from a checkpoint of the first stage: scores, and so the channels, are fixed and the weights
       learn.

    As in Sehwag et al., "HYDRA: Pruning Adversarially Robust Neural Networks", arXiv:2002.10509, with channels in place
    of single weights. Norm layers adapt their statistics in both stages.

    Args:
        stage (str): ``'scores'`` or ``'weights'``.
        target (dict): What to change in this model's ``backbone``, ``neck`` and ``head`` to get the network whose cost
            is to be matched, such as ``dict(backbone=dict(base_channels=32), head=dict(in_channels=256))``.
        input_size (int): Height and width of the images, at which costs are counted.
        **kwargs: As for :class:`RobustClassifier`.

    Attributes:
        gates (nn.ModuleList): One :class:`ChannelGate` per group.

    Raises:
        ValueError: The stage is unknown, no channel can be removed, or the cost cannot be reached.
    """

    def __init__(self, *, stage: str, target: Mapping[str, Any], input_size: int, **kwargs: Any) -> None:
        # The dense network alone: no preprocessing, no objective, no training.
        parts = {key: kwargs[key] for key in ('backbone', 'neck', 'head') if kwargs.get(key) is not None}
        self._plain_cfg = dict(copy.deepcopy(parts), type='RobustClassifier')
        super().__init__(**kwargs)
        scale = {key: getattr(self.data_preprocessor, key, None) for key in ('mean', 'std')}
        scale = {key: value.flatten().tolist() for key, value in scale.items() if value is not None}
        own = self.data_preprocessor
        kept = {key: getattr(own, key) for key in ('to_rgb', 'pad_size_divisor', 'pad_value') if hasattr(own, key)}
        self._plain_cfg['data_preprocessor'] = dict(type='AdvDataPreprocessor', **scale, **kept)
        self.stage = choose(stage, STAGES, 'model.stage')
        shape = (_IMAGE_CHANNELS, input_size, input_size)
        target_cfg = Config(dict(model=copy.deepcopy(self._plain_cfg)))
        target_cfg.merge_from_dict(dict(model=target))
        goal = count_cost(target_cfg, shape)
        dense = MODELS.build(copy.deepcopy(self._plain_cfg)).eval()
        groups = find_channel_groups(dense, shape)
        if not groups:
            raise ValueError(f'backbone.type={type(self.backbone).__name__}: no channel of it can be removed by itself')
        keep = fit_channels(dense, groups, shape, goal.pathway_gflops)
        self.gates = nn.ModuleList(ChannelGate(group, count) for group, count in zip(groups, keep))
        for gate in self.gates:
            for name in gate.group.consumers:
                self.get_submodule(name).register_forward_pre_hook(_MaskInput(gate))
        for name, parameter in self.named_parameters():
            if name.startswith('gates.') != (stage == 'scores'):
                parameter.requires_grad_(False)

    def init_weights(self) -> None:
        """Initialise the network, and the scores by the weights."""
        super().init_weights()
        if any(map(is_pretrained, init_settings(self.init_cfg))):
            return  # which has set the scores, too
        state = self.state_dict()
        with torch.no_grad():
            for gate in self.gates:
                gate.scores.copy_(_sizes(gate.group, state, ''))

    def deployed(self) -> RobustClassifier:
        """The same function as a dense network that has lost its channels for good.

        Returns:
            RobustClassifier: A copy, with the narrower layers.
        """
        network = MODELS.build(copy.deepcopy(self._plain_cfg))
        network.load_state_dict({name: v for name, v in self.state_dict().items() if not name.startswith('gates.')})
        remove_channels(network, [gate.group for gate in self.gates], [gate.kept() for gate in self.gates])
        return network.to(next(self.parameters()).device)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        # A checkpoint of the dense network has no scores: they start from its weights.
        for index, gate in enumerate(self.gates):
            key = f'{prefix}gates.{index}.scores'
            if key not in state_dict and all(f'{prefix}{name}.weight' in state_dict for name in gate.group.producers):
                state_dict[key] = _sizes(gate.group, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _sizes(group: ChannelGroup, state_dict: Mapping[str, Tensor], prefix: str) -> Tensor:
    """(C,): L1 norm of the weights that produce each channel, the largest being 1."""
    sizes = sum(state_dict[f'{prefix}{name}.weight'].flatten(1).abs().sum(dim=1) for name in group.producers)
    return sizes / sizes.max().clamp(min=torch.finfo(sizes.dtype).tiny)
