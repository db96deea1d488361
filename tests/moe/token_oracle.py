"""The plain form of token routing: a loop over tokens, one at a time."""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

from mmadvmoe.moe import ExpertFFN, MoEBackbone


class SlowFFN(nn.Module):
    """An ``ExpertFFN`` that asks for each token in turn which experts take it, and sums up what they give."""

    def __init__(self, layer: ExpertFFN) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x):
        layer, router = self.layer, self.layer.router
        tokens = x.flatten(1, -2)
        training = layer.training or router.training
        factor = router.capacity_factor if training else router.eval_capacity_factor
        logits = [[router(tokens[b, t]) for t in range(tokens.shape[1])] for b in range(len(tokens))]
        everyone = [(b, t) for b in range(len(tokens)) for t in range(tokens.shape[1])]
        choices = {(b, t): logits[b][t].topk(router.top_k).indices.tolist() for b, t in everyone}
        size = len(everyone) if training else tokens.shape[1]
        room = math.inf if factor is None else math.ceil(factor * size * router.top_k / layer.num_experts)
        taken, outputs = {}, {place: torch.zeros_like(tokens[place]) for place in everyone}
        for rank in range(router.top_k):
            for b, t in everyone:
                expert = choices[b, t][rank]
                queue = expert if training else (expert, b)
                taken[queue] = taken.get(queue, 0) + 1
                if taken[queue] <= room:
                    weight = self.weight(logits[b][t], choices[b, t], rank)
                    outputs[b, t] = outputs[b, t] + weight * self.compute(tokens[b, t], expert)
        out = [torch.stack([outputs[b, t] for t in range(tokens.shape[1])]) for b in range(len(tokens))]
        return torch.stack(out).view_as(x)

    def weight(self, logits, chosen, rank):
        probability = logits.softmax(0)
        if self.layer.router.softmax == 'before':
            return probability[chosen[rank]]
        if len(chosen) > 1:
            return logits[chosen].softmax(0)[rank]
        return 1 + probability[chosen[0]] - probability[chosen[0]].detach()

    def compute(self, token, expert):
        first, second = sorted({key.rsplit('.', 1)[0] for key in self.layer.expert_parameters(expert)})
        own = self.layer.expert_parameters(expert)
        hidden = F.gelu(F.linear(token, own[f'{first}.weight'], own[f'{first}.bias']))
        return F.linear(hidden, own[f'{second}.weight'], own[f'{second}.bias'])


class SlowMoE(nn.Module):
    """A copy of a ``MoEBackbone`` with token-level routing in which every expert layer is a ``SlowFFN``."""

    def __init__(self, backbone: MoEBackbone) -> None:
        super().__init__()
        self.network = copy.deepcopy(backbone).network
        for name, module in list(self.network.named_modules()):
            if isinstance(module, ExpertFFN):
                self.network.set_submodule(name, SlowFFN(module))

    def forward(self, x):
        return self.network(x)

    def named_gradients(self):
        """Gradients under the parameter names of the ``MoEBackbone``."""
        return {name.replace('.layer.', '.'): p.grad for name, p in self.named_parameters()}
