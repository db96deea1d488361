"""A stand-in for a model that shows nothing but its predictions, to attack in its place.

Papernot et al., Practical black-box attacks against machine learning, arXiv:1602.02697.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmadvmoe.attacks import Victim, build_attack
from mmadvmoe.attacks import steps as ball
from mmadvmoe.runtime.seeding import preserve_rng_state

from .subject import ThreatModel, percent

#: Rounds of training; after each but the last, its own adversarial images are put to the model as further questions.
_ROUNDS, _ATTACK_STEPS = 3, 5
_STEPS, _BATCH, _LEARNING_RATE = 120, 128, 2e-3
_CHANNELS = 32


def _network(shape: torch.Size, num_classes: int) -> nn.Module:
    """Convolutions down to 8x8 or less, and a linear layer: (B, C, H, W) -> (B, K)."""
    channels, size = shape[0], min(shape[1:])
    layers = [nn.Conv2d(channels, _CHANNELS, 3, 1, 1), nn.ReLU()]
    while size > 8:
        layers += [nn.Conv2d(_CHANNELS, _CHANNELS, 3, 2, 1), nn.ReLU()]
        size = (size + 1) // 2
    layers += [nn.Conv2d(_CHANNELS, 2 * _CHANNELS, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(2 * _CHANNELS * 16, num_classes))


def train_substitute(victim: Victim, images: Tensor, threat: ThreatModel, seed: int = 0) -> tuple[Victim, float]:
    """Train a small network to say what a model says in the balls around some images.

    The model is asked for predicted classes only, so whatever hides its gradient hides nothing here.

    Args:
        victim, threat: The model and the balls.
        images: (B, C, H, W) in [0, 1].
        seed: Seed of the training; the random state of the caller is left as it is.

    Returns:
        The substitute, and on how many of ``images`` its prediction is that of the model, in percent.
    """
    with preserve_rng_state():
        torch.manual_seed(seed)
        network = _network(images.shape[1:], victim.num_classes).to(images.device)
        substitute = Victim(network, num_classes=victim.num_classes)
        pool, answers = images, predict(victim, images)
        attack_cfg = ThreatModel(threat.norm, threat.eps, threat.eps / 2, _ATTACK_STEPS).attack('PGD')
        for number in range(_ROUNDS):
            _fit(network, victim, pool, answers, threat)
            if number < _ROUNDS - 1:
                attack = build_attack(attack_cfg, substitute)
                harder = torch.cat([attack(part, predict(victim, part)) for part in images.split(_BATCH)])
                pool, answers = torch.cat([pool, harder]), torch.cat([answers, predict(victim, harder)])
    return substitute, percent(predict(substitute, images) == answers[: len(images)])


def _fit(network: nn.Module, victim: Victim, pool: Tensor, answers: Tensor, threat: ThreatModel) -> None:
    """Adam on the pool and, half of each batch, on random points around it."""
    optimizer = torch.optim.Adam(network.parameters(), lr=_LEARNING_RATE)
    network.train()
    for _ in range(_STEPS):
        rows = torch.randint(len(pool), (min(_BATCH, len(pool)),), device=pool.device)
        images, target = pool[rows], answers[rows]
        moved = ball.random_start(images[: -(-len(rows) // 2)], threat.eps, threat.norm)
        images, target = torch.cat([images, moved]), torch.cat([target, predict(victim, moved)])
        loss = F.cross_entropy(network(images), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval()


@torch.no_grad()
def predict(victim: Victim, images: Tensor) -> Tensor:
    """Predicted classes, or of a router experts, (B,) int64, on the device of the images."""
    with victim.frozen():
        return torch.cat([victim(part).argmax(1) for part in images.split(_BATCH)])
