"""The plain form of a mixture of experts: compute all experts for all images, then mask."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from mmadvmoe.moe import MoEBackbone, MoEConv2d


class _Choice:
    """The mask of the forward pass under way, shared by the masked layers."""

    mask = None


class _MaskedLayer(nn.Module):
    def __init__(self, layer, choice, gate):
        super().__init__()
        self.layer, self.choice, self.gate = layer, choice, gate

    def forward(self, x):
        layer = self.layer
        mask = self.choice.mask if layer.router is None else straight_through(layer.router(x), self.gate)
        if isinstance(layer, MoEConv2d) and layer.groups == 1 and layer.padding_mode == 'zeros':
            outputs = F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation)
            outputs = outputs.unflatten(1, (layer.num_experts, -1))
        else:
            experts = [layer.expert_parameters(n) for n in range(layer.num_experts)]
            outputs = torch.stack([layer.compute(x, e['weight'], e.get('bias')) for e in experts], dim=1)
        return (outputs * mask.view(*mask.shape, *[1] * (outputs.dim() - 2))).sum(dim=1)


def straight_through(logits, gate):
    """(B, N) one-hot choice whose gradient is that of the chosen expert's score."""
    scores = logits.softmax(dim=1) if gate == 'softmax' else logits
    one_hot = F.one_hot(logits.argmax(dim=1), logits.shape[1]).to(logits.dtype)
    return one_hot * (1 + scores - scores.detach())


class MaskedMoE(nn.Module):
    """A copy of a ``MoEBackbone`` in which every expert layer computes all experts for all images."""

    def __init__(self, backbone: MoEBackbone) -> None:
        super().__init__()
        backbone = copy.deepcopy(backbone)
        self.gate, self.router, self.network = backbone.context.gate, backbone.router, backbone.network
        self.choice = _Choice()
        for name in backbone.expert_layer_names:
            layer = self.network.get_submodule(name)
            self.network.set_submodule(name, _MaskedLayer(layer, self.choice, self.gate))

    def forward(self, x):
        if self.router is not None:
            self.choice.mask = straight_through(self.router(x), self.gate)
        return self.network(x)

    def named_gradients(self):
        """Gradients under the parameter names of the ``MoEBackbone``."""
        return {name.replace('.layer.', '.'): p.grad for name, p in self.named_parameters()}
