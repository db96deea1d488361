"""Batches for losses, and losses worked out in plain Python."""

import math

import torch
from torch import nn

from mmadvmoe.models import Outputs, RobustBatch
from mmadvmoe.moe import Routing


def leaf(*shape):
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def make_batch(clean=None, adversarial=None, clean_routers=(), adversarial_routers=(), target=None):
    def outputs(logits, routers):
        return Outputs(logits, tuple(Routing.decide(item, gate=None) for item in routers))

    return RobustBatch(
        outputs(clean, clean_routers),
        outputs(adversarial, adversarial_routers),
        target,
        lambda logits: nn.functional.cross_entropy(logits, target),
    )


def softmax(row):
    weights = [math.exp(value) for value in row]
    return [weight / sum(weights) for weight in weights]


def kl_by_hand(p_logits, q_logits):
    """Mean over the rows of sum p log(p / q), in plain Python."""
    rows = [
        sum(p * math.log(p / q) for p, q in zip(softmax(a), softmax(b)))
        for a, b in zip(p_logits.tolist(), q_logits.tolist())
    ]
    return sum(rows) / len(rows)


def ce_by_hand(logits, target):
    rows = [-math.log(softmax(row)[label]) for row, label in zip(logits.tolist(), target.tolist())]
    return sum(rows) / len(rows)
