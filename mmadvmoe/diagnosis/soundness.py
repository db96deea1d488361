"""Measure what attacks of all kinds find, to be held against each other: can a robust accuracy be believed?

After Carlini et al., On evaluating adversarial robustness, arXiv:1902.06705, and Croce & Hein, arXiv:2003.01690. This
file measures; :mod:`mmadvmoe.diagnosis.soundness_checks` gives the verdicts.

Dimension letters: B images, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmadvmoe.attacks import ForcedRoutePGD, Rescaled, Victim, build_attack
from mmadvmoe.attacks import steps as ball
from mmadvmoe.runtime.seeding import preserve_rng_state
from mmadvmoe.utils import type_name

from .subject import Images, ThreatModel, percent
from .substitute import predict, train_substitute

#: Radii at which robust accuracy is measured, in units of eps; the ball that holds every image comes on top.
EPS_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
#: Steps of the attacks, in units of those of the threat model; a single step comes on top.
STEP_FACTORS = (0.1, 0.5, 1.0, 2.0)
RESTARTS = 4
#: Norms in which Square exists.
SQUARE_NORMS = ('Linf', 'L2')
#: Random points of each ball that count as one attack.
NOISE_DRAWS = 20
#: Length of the step that is tried along the gradient, as a part of eps, and the random directions it is compared with.
_STEP, _DIRECTIONS = 0.05, 10


@dataclass(frozen=True, eq=False)
class Point:
    """One point of a curve.

    Attributes:
        at: eps, steps or restarts.
        gate: Images that are robust under plain PGD, (B,) bool.
        route_pgd: Images that are robust under RoutePGD, which on a dense model is PGD, (B,) bool.
    """

    at: float
    gate: Tensor
    route_pgd: Tensor


@dataclass(eq=False)
class Measured:
    """The findings of attacks. An image is robust if it is right without an attack and under it; RA is in percent.

    Attributes:
        sa: Standard accuracy, in percent.
        is_moe: Whether the model is a mixture.
        robust: Under the name of each attack at the threat model, the robust images, (B,) bool: ``'gate'`` (PGD on the
            model as it is), ``'noise'``, ``'transfer'`` and, where it exists, ``'square'``; of a mixture also
            ``'held'``, ``'forced_<n>'`` and ``'route_pgd'``.
        eps_curve, steps_curve, restarts_curve: Points in ascending order, the first two from the same random starts.
            Restarts are of plain PGD.
        changed_at_zero: Predictions that attacks at eps 0 changed.
        outside: How far any adversarial image was outside its ball or [0, 1]; 0 if none was.
        zero_gradient: Share of images whose gradient is exactly zero.
        ascent: Share of images where a small step along the gradient gains more than random ones.
        margin: Median distance of the two largest logits.
        rescaled: RA of PGD with the route held, on the model with its logits divided by ``margin``; ``unscaled`` that
            on the model as it is.
        agreement: Clean images on which the surrogate predicts what the model predicts, in percent.
        substitute: Whether the surrogate was trained here rather than given.
    """

    sa: float
    is_moe: bool
    robust: dict[str, Tensor] = field(default_factory=dict)
    eps_curve: list[Point] = field(default_factory=list)
    steps_curve: list[Point] = field(default_factory=list)
    restarts_curve: list[Point] = field(default_factory=list)
    changed_at_zero: int = 0
    outside: float = 0.0
    zero_gradient: float = 0.0
    ascent: float = 1.0
    margin: float = 0.0
    rescaled: float = 0.0
    unscaled: float = 0.0
    agreement: float = 0.0
    substitute: bool = True

    def ra(self, *names: str) -> float:
        """RA in the worst case over some attacks, in percent."""
        return percent(torch.stack([self.robust[name] for name in names]).all(dim=0))

    @property
    def white_box(self) -> list[str]:
        """Names of the attacks that use the gradient of the model itself."""
        return [name for name in self.robust if name not in ('square', 'noise', 'transfer')]


class _Bench:
    """One model under attacks; notes how far outside the threat model they went."""

    def __init__(self, victim: Victim, data: Images) -> None:
        self.victim, self.data = victim, data
        clean = data.classified(victim, data.images)
        self.logits, self.route = clean.logits, clean.expert if victim.num_routers else None
        self.right = clean.prediction.to(data.images.device) == data.labels
        self.outside = 0.0

    def attack(
        self, name: str, threat: ThreatModel, kind: Any = 'PGD', model: Victim | None = None, **others: Any
    ) -> Tensor:
        """Find the images (B,) that are robust under an attack on ``model``; one kind has the same random starts."""
        return self.robust(self.adversarial(name, threat, kind, model, **others), threat)

    def adversarial(self, name: str, threat: ThreatModel, kind: Any, model: Victim | None, **others: Any) -> Tensor:
        """The images that an attack makes; see :meth:`attack`."""
        attack = build_attack(threat.attack(kind, **others), model or self.victim)
        return self.data.attacked(name, attack, type_name(kind))

    def robust(self, adversarial: Tensor, threat: ThreatModel, held: bool = False) -> Tensor:
        """Find the images that are right without an attack and right in ``adversarial``, (B,) bool.

        How far these go beyond the threat model is noted. ``held`` predicts with the routes of the clean images.
        """
        distance = threat.distance(adversarial, self.data.images).max() - threat.eps
        self.outside = max(self.outside, *map(float, (distance, -adversarial.min(), adversarial.max() - 1)))
        outcome = self.data.classified(self.victim, adversarial, 'an attack', self.route if held else None)
        return self.right & (outcome.prediction.to(self.right.device) == self.data.labels)


def measure(
    victim: Victim, data: Images, threat: ThreatModel, surrogate: Victim | None = None, num_queries: int = 1000
) -> Measured:
    """Attack a model in all the ways that the checks compare.

    Args:
        victim: The model, a mixture with any level of routing, or a dense one.
        data, threat: The images, and the threat model in which robust accuracy is claimed.
        surrogate: Model to make transferred adversarial images on. Defaults to one that is trained on the answers
            of ``victim``, see :func:`~mmadvmoe.diagnosis.substitute.train_substitute`.
        num_queries: Queries of Square for each image.

    Raises:
        RuntimeError: An attack fails.
        FloatingPointError: A logit is not finite.
    """
    bench = _Bench(victim, data)
    measured = Measured(percent(bench.right), victim.num_routers > 0)
    _measure_white_box(bench, threat, measured)
    _measure_curves(bench, threat, measured)
    _measure_gradients(bench, threat, measured)
    _measure_black_box(bench, threat, measured, surrogate, num_queries)
    measured.outside = bench.outside
    return measured


def _measure_white_box(bench: _Bench, threat: ThreatModel, measured: Measured) -> None:
    nothing = replace(threat.scaled(0.0), steps=2)
    for kind in ('PGD', 'RoutePGD') if measured.is_moe else ('PGD',):
        robust = bench.attack(f'{kind} at eps 0', nothing, kind)
        measured.changed_at_zero += int((robust != bench.right).sum())
    measured.robust['gate'] = bench.attack('PGD', threat)
    if not measured.is_moe:
        return
    measured.robust['held'] = bench.attack('PGD, route held', threat, route='held')
    for n in range(bench.victim.num_experts):
        measured.robust[f'forced_{n}'] = bench.attack(f'PGD, route {n} forced', threat, ForcedRoutePGD, expert=n)
    measured.robust['route_pgd'] = bench.attack('RoutePGD', threat, 'RoutePGD')


def measure_eps_curve(victim: Victim, data: Images, threat: ThreatModel) -> list[Point]:
    """Attack a model in balls of growing radius, up to the one that holds every image: the curve of :func:`measure`.

    Args:
        victim, data, threat: See :func:`measure`.
    """
    bench = _Bench(victim, data)
    return _eps_curve(bench, threat, _point(bench, threat.eps, f'eps {threat.eps:.4g}', threat))


def _point(bench: _Bench, at: float, where: str, threat: ThreatModel) -> Point:
    gate = bench.attack(f'PGD at {where}', threat)
    routed = bench.attack(f'RoutePGD at {where}', threat, 'RoutePGD') if bench.victim.num_routers else gate
    return Point(at, gate, routed)


def _eps_curve(bench: _Bench, threat: ThreatModel, at_eps: Point) -> list[Point]:
    everything = ball.largest_distance(bench.data.images[0].numel(), threat.norm)
    radii = {factor * threat.eps for factor in EPS_FACTORS if factor * threat.eps < everything} | {everything}
    curve = [Point(0.0, bench.right, bench.right), at_eps]
    curve += [_point(bench, eps, f'eps {eps:.4g}', threat.scaled(eps)) for eps in sorted(radii - {threat.eps})]
    return sorted(curve, key=lambda each: each.at)


def _measure_curves(bench: _Bench, threat: ThreatModel, measured: Measured) -> None:
    gate = measured.robust['gate']
    route_pgd = measured.robust.get('route_pgd', gate)
    measured.eps_curve = _eps_curve(bench, threat, Point(threat.eps, gate, route_pgd))
    steps_curve = [Point(threat.steps, gate, route_pgd)]
    for steps in sorted({1, *(max(1, round(factor * threat.steps)) for factor in STEP_FACTORS)} - {threat.steps}):
        steps_curve.append(_point(bench, steps, f'{steps} steps', replace(threat, steps=steps)))
    measured.steps_curve = sorted(steps_curve, key=lambda each: each.at)
    restarted = bench.attack(f'PGD with {RESTARTS} restarts', threat, restarts=RESTARTS)
    measured.restarts_curve = [Point(1, gate, gate), Point(RESTARTS, restarted, restarted)]


def _measure_gradients(bench: _Bench, threat: ThreatModel, measured: Measured) -> None:
    grad = gradients(bench.victim, bench.data, bench.route)
    measured.zero_gradient = float((grad.flatten(1) == 0).all(dim=1).double().mean())
    along, best = ascents(bench.victim, bench.data, threat, grad, bench.route)
    # Of images that are wrong as they are, nothing is left to gain.
    gains = (along > best.clamp(min=0))[bench.right]
    measured.ascent = float(gains.double().mean()) if len(gains) else 1.0
    first, second = bench.logits.topk(2, dim=1).values.unbind(1)
    measured.margin = float((first - second).median())
    if measured.margin <= 0:
        return

    def held_ra(name: str, model: Victim | None) -> float:
        adversarial = bench.adversarial(name, threat, 'PGD', model, route='held')
        return percent(bench.robust(adversarial, threat, held=True))

    measured.unscaled = held_ra('PGD, logits as they are', None)
    measured.rescaled = held_ra('PGD, logits rescaled', Rescaled(bench.victim, measured.margin))


def _measure_black_box(
    bench: _Bench, threat: ThreatModel, measured: Measured, surrogate: Victim | None, num_queries: int
) -> None:
    data = bench.data
    measured.robust['noise'] = _noise(bench, threat)
    measured.substitute = surrogate is None
    if surrogate is None:
        surrogate, measured.agreement = train_substitute(bench.victim, data.images, threat, data.seed)
    else:
        measured.agreement = percent(predict(surrogate, data.images) == predict(bench.victim, data.images))
    measured.robust['transfer'] = bench.attack('PGD on the surrogate', threat, model=surrogate)
    if threat.norm in SQUARE_NORMS:
        cfg = dict(type='Square', norm=threat.norm, eps=threat.eps, n_queries=num_queries)
        adversarial = data.attacked(f'Square, {num_queries} queries', build_attack(cfg, bench.victim))
        measured.robust['square'] = bench.robust(adversarial, threat)


def _noise(bench: _Bench, threat: ThreatModel) -> Tensor:
    """Find the images that are right at some random points of the ball, (B,) bool."""
    robust = bench.right
    with preserve_rng_state():
        torch.manual_seed(bench.data.seed)
        for _ in range(NOISE_DRAWS):
            robust = robust & bench.robust(ball.random_start(bench.data.images, threat.eps, threat.norm), threat)
    return robust


def gradients(victim: Victim, data: Images, route: Tensor | None = None) -> Tensor:
    """Compute the gradient of the cross entropy at each image, (B, C, H, W), on a route (B, D), without a gate."""
    parts = []
    with torch.enable_grad(), victim.frozen():
        for chunk, given in zip(data.chunks(), data.split(route)):
            points = chunk.images.detach().clone().requires_grad_()
            logits, _ = victim.forward_routed(points, given, with_logits=False)
            loss = F.cross_entropy(logits, chunk.labels, reduction='sum')
            parts.append(torch.autograd.grad(loss, points)[0])
    return torch.cat(parts)


@torch.no_grad()
def ascents(
    victim: Victim, data: Images, threat: ThreatModel, grad: Tensor, route: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Measure what a small step along the gradient gains, and the best of some random steps of that length.

    Gained is the margin of the best wrong class over the true one, which, unlike the cross entropy, does not saturate.
    ``grad`` and ``route`` are those of :func:`gradients`.

    Returns:
        The gains along the gradient, (B,), and the largest ones along random directions, (B,).
    """
    along, best = [], []
    generator = torch.Generator(data.images.device).manual_seed(data.seed)

    def margin(points: Tensor, labels: Tensor, given: Tensor | None) -> Tensor:
        logits, _ = victim.forward_routed(points, given, with_logits=False)
        true = logits.gather(1, labels[:, None]).squeeze(1)
        return logits.scatter(1, labels[:, None], -torch.inf).amax(1) - true

    with victim.frozen():
        for chunk, given, uphill in zip(data.chunks(), data.split(route), data.split(grad)):
            images, labels = chunk.images, chunk.labels
            noise = [torch.randn(images.shape, generator=generator, device=images.device) for _ in range(_DIRECTIONS)]
            # Not cut to [0, 1]: that would take another part of each step away.
            stepped = [ball.ascend(images, way, _STEP * threat.eps, threat.norm) for way in (uphill, *noise)]
            before = margin(images, labels, given)
            gains = torch.stack([margin(points, labels, given) - before for points in stepped])
            along.append(gains[0])
            best.append(gains[1:].amax(0))
    return torch.cat(along), torch.cat(best)


def ra_of_each(measured: Measured) -> dict[str, float]:
    """RA under each attack at the threat model, in percent."""
    return {name: measured.ra(name) for name in measured.robust}


def curves(measured: Measured) -> dict[str, list[dict]]:
    """RA against ``eps``, ``steps`` and ``restarts``: ``ra`` in the worst case that was looked for, ``gate`` by PGD."""
    points = dict(eps=measured.eps_curve, steps=measured.steps_curve, restarts=measured.restarts_curve)
    return {name: in_percent(name, curve) for name, curve in points.items()}


def in_percent(name: str, curve: Sequence[Point]) -> list[dict]:
    """The points of a curve against ``name``, as :func:`curves` gives them."""
    return [{name: each.at, 'ra': percent(each.route_pgd), 'gate': percent(each.gate)} for each in curve]
