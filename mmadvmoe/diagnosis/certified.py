"""Routes that no perturbation of a threat model can change, by linear bounds on the logits of the router.

Dimension letters: B images, D numbers of an image, N experts, H outputs of an affine map, M linear functions of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Optional

import torch
from torch import Tensor

from mmadvmoe.attacks import Victim
from mmadvmoe.moe import placement_of

from .subject import Images, ThreatModel

#: Images bounded at a time.
_BATCH = 64
#: What rounding may add to a margin of float32 logits, in units of the largest logit.
_ROUNDING = 1e-5


@torch.no_grad()
def certified_routes(victim: Victim, data: Images, threat: ThreatModel) -> Optional[Tensor]:
    """Find the images whose route provably is the same everywhere in their ball.

    The others may have a route that an attack can change, or one that the bounds are too loose for. Bounds are those of
    CROWN (Zhang et al., arXiv:1811.00866): each ReLU between two lines, carried back to the image; exact for a linear
    router.

    Args:
        victim, data, threat: The mixture, the images, and the balls around them. In L-inf, [0, 1] is made use of.

    Returns:
        (B,) bool; None where the router does not decide once for the whole image, or is not made of
        :meth:`~mmadvmoe.moe.BaseRouter.affine_maps`.
    """
    if not placement_of(victim.classifier).one_route_per_image:
        return None
    maps = victim.classifier.backbone.router.affine_maps()
    if maps is None:
        return None
    with victim.frozen():
        layers = _as_matrices([lambda x: maps[0](victim.model.normalize(x)), *maps[1:]], data.images[:1])
        parts = [_certified(layers, images.flatten(1).double(), threat) for images in data.images.split(_BATCH)]
    return torch.cat(parts).cpu()


def _as_matrices(maps: Sequence[Callable[[Tensor], Tensor]], image: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Weights (H, H of the map before) and biases (H,) of affine maps, in double precision."""
    layers, x = [], torch.zeros_like(image)
    for affine in maps:
        bias = affine(x)
        with torch.enable_grad():
            weight = torch.autograd.functional.jacobian(affine, x, vectorize=True)
        layers.append((weight.reshape(bias.numel(), -1).double(), bias.flatten().double()))
        x = torch.zeros_like(bias)
    return layers


def _certified(layers: Sequence[tuple[Tensor, Tensor]], images: Tensor, threat: ThreatModel) -> Tensor:
    """Whether the largest logit stays the largest, (B,), for images (B, D)."""
    # Of the ReLUs so far: the slopes of the lines below and above, and how high the latter is at 0, (B, 1, H) each.
    relus: list[tuple[Tensor, Tensor, Tensor]] = []

    def least(rows: Tensor, shift: Tensor) -> Tensor:
        """Lower bounds (B, M) of ``rows`` (B, M, H) times the inputs of the next layer, plus ``shift``."""
        for (below, above, height), (weight, bias) in zip(reversed(relus), reversed(layers[: len(relus)])):
            up, down = rows.clamp(min=0), rows.clamp(max=0)
            shift = shift + (down * height).sum(2)
            rows = up * below + down * above
            shift, rows = shift + rows @ bias, rows @ weight
        if threat.norm == 'Linf':
            low, high = (images - threat.eps).clamp(min=0), (images + threat.eps).clamp(max=1)
            middle, spread = (low + high) / 2, rows.abs() @ ((high - low) / 2)[:, :, None]
        else:
            dual = {'L2': 2.0, 'L1': math.inf}[threat.norm]
            middle, spread = images, threat.eps * rows.norm(p=dual, dim=2, keepdim=True)
        return (rows @ middle[:, :, None] - spread).squeeze(2) + shift

    for weight, bias in layers[:-1]:
        low, high = least(weight[None], bias), -least(-weight[None], -bias)
        chord = (high / (high - low).clamp(min=1e-300)).where(low < 0, torch.ones_like(low)).clamp(min=0)
        # Below an undecided ReLU the line of slope 0 or 1, whichever leaves less between.
        below = ((low >= 0) | (low < 0) & (high > -low)).to(images)
        relus.append(tuple(part[:, None] for part in (below, chord, (-low * chord).where(low < 0, low * 0))))
    weight, bias = layers[-1]
    point = images
    for number, (one_weight, one_bias) in enumerate(layers):
        point = (point.relu() if number else point) @ one_weight.T + one_bias
    chosen = point.argmax(1)
    margin = least(weight[chosen][:, None] - weight, bias[chosen][:, None] - bias)
    others = margin.scatter(1, chosen[:, None], torch.inf).amin(1)
    return others > _ROUNDING * point.abs().amax(1)
