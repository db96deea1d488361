"""Whether a robust accuracy can be believed: what attacks of all kinds find, to be held against each other.

After Carlini et al., On evaluating adversarial robustness, arXiv:1902.06705, and Croce & Hein,
arXiv:2003.01690. This file measures; :mod:`mmadvmoe.diagnosis.soundness_checks` judges.

Dimension letters: B images, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Optional

import torch
from torch import Tensor

from mmadvmoe.attacks import ForcedRoutePGD, Rescaled, Victim, build_attack
from mmadvmoe.attacks import steps as ball

from .gradient_checks import ascents, gradients, median_margin
from .substitute import predict, train_substitute
from .threat_model import ThreatModel
from .trials import Images, percent, seeded

#: Radii at which robust accuracy is measured, in units of eps; the ball that holds every image comes on top.
EPS_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
#: Steps of the attacks, in units of those of the threat model; a single step comes on top.
STEP_FACTORS = (0.1, 0.5, 1.0, 2.0)
RESTARTS = 4
#: Norms in which Square exists.
SQUARE_NORMS = ('Linf', 'L2')
#: Random points of each ball that count as one attack.
NOISE_DRAWS = 20


@dataclass(frozen=True, eq=False)
class Point:
    """One point of a curve.

    Attributes:
        at: eps, steps or restarts.
        gate: Images that stand under plain PGD, (B,) bool.
        judge: Images that stand under RoutePGD, which on a dense model is PGD, (B,) bool.
    """

    at: float
    gate: Tensor
    judge: Tensor


@dataclass(eq=False)
class Measured:
    """What attacks found. Robust accuracies count images that are right without an attack and under it, in percent.

    Attributes:
        sa: Standard accuracy, in percent.
        stands: Under the name of each attack at the threat model, the images that stand, (B,) bool: ``'gate'`` (PGD
            on the model as it is), ``'noise'``, ``'transfer'`` and, where it exists, ``'square'``; of a mixture also
            ``'held'``, ``'forced_<n>'`` and ``'route_pgd'``.
        is_moe: Whether the model is a mixture.
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
    stands: dict[str, Tensor] = field(default_factory=dict)
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
        return percent(torch.stack([self.stands[name] for name in names]).all(dim=0))

    @property
    def white_box(self) -> list[str]:
        """Names of the attacks that use the gradient of the model itself."""
        return [name for name in self.stands if name not in ('square', 'noise', 'transfer')]


class _Bench:
    """Runs attacks on one model, and notes how far outside the threat model they went."""

    def __init__(self, victim: Victim, data: Images) -> None:
        self.victim, self.data = victim, data
        clean = data.classified(victim, data.images)
        self.logits, self.route = clean.logits, clean.expert if victim.num_routers else None
        self.right = clean.prediction.to(data.images.device) == data.labels
        self.outside = 0.0

    def attack(
        self, name: str, threat: ThreatModel, kind: Any = 'PGD', model: Optional[Victim] = None, **others: Any
    ) -> Tensor:
        """Adversarial images of an attack on the model, or on another one; one kind has the same random starts."""
        attack = build_attack(threat.attack(kind, **others), model or self.victim)
        draw = kind if isinstance(kind, str) else kind.__name__
        return self.made(self.data.attacked(name, attack, draw), threat)

    def made(self, adversarial: Tensor, threat: ThreatModel) -> Tensor:
        """Note how far ``adversarial`` goes beyond the threat model, and give it back."""
        beyond = [
            threat.distance(adversarial, self.data.images).max() - threat.eps,
            -adversarial.min(),
            adversarial.max() - 1,
        ]
        self.outside = max(self.outside, *map(float, beyond))
        return adversarial

    def stands(self, adversarial: Tensor, frozen: bool = False) -> Tensor:
        """Images that are right without an attack and right in ``adversarial``, (B,) bool."""
        outcome = self.data.classified(self.victim, adversarial, 'an attack', self.route if frozen else None)
        return self.right & (outcome.prediction.to(self.right.device) == self.data.labels)


def measure(
    victim: Victim,
    data: Images,
    threat: ThreatModel,
    surrogate: Optional[Victim] = None,
    num_queries: int = 1000,
) -> Measured:
    """Attack a model in all the ways that the checks compare.

    Args:
        victim: The model, a mixture with any level of routing, or a dense one.
        data: The images.
        threat: The threat model in which robust accuracy is claimed.
        surrogate: Model to make transferred adversarial images on. Defaults to one that is trained on the answers
            of ``victim``, see :func:`~mmadvmoe.diagnosis.substitute.train_substitute`.
        num_queries: Queries of Square for each image.

    Raises:
        RuntimeError: An attack fails.
        FloatingPointError: A logit is not finite.
    """
    bench = _Bench(victim, data)
    measured = Measured(percent(bench.right), victim.num_routers > 0)
    _measure_at_zero(bench, threat, measured)
    _measure_white_box(bench, threat, measured)
    _measure_curves(bench, threat, measured)
    _measure_gradients(bench, threat, measured)
    _measure_black_box(bench, threat, measured, surrogate, num_queries)
    measured.outside = bench.outside
    return measured


def _measure_at_zero(bench: _Bench, threat: ThreatModel, measured: Measured) -> None:
    nothing = replace(threat.scaled(0.0), steps=2)
    for kind in ('PGD', 'RoutePGD') if measured.is_moe else ('PGD',):
        stands = bench.stands(bench.attack(f'{kind} at eps 0', nothing, kind))
        measured.changed_at_zero += int((stands != bench.right).sum())


def _measure_white_box(bench: _Bench, threat: ThreatModel, measured: Measured) -> None:
    measured.stands['gate'] = bench.stands(bench.attack('PGD', threat))
    if not measured.is_moe:
        return
    measured.stands['held'] = bench.stands(bench.attack('PGD, route held', threat, route='held'))
    for n in range(bench.victim.num_experts):
        adversarial = bench.attack(f'PGD, route {n} forced', threat, ForcedRoutePGD, expert=n)
        measured.stands[f'forced_{n}'] = bench.stands(adversarial)
    measured.stands['route_pgd'] = bench.stands(bench.attack('RoutePGD', threat, 'RoutePGD'))


def _measure_curves(bench: _Bench, threat: ThreatModel, measured: Measured) -> None:
    def point(at: float, where: str, ball_at: ThreatModel) -> Point:
        gate = bench.stands(bench.attack(f'PGD at {where}', ball_at))
        judge = bench.stands(bench.attack(f'RoutePGD at {where}', ball_at, 'RoutePGD')) if measured.is_moe else gate
        return Point(at, gate, judge)

    gate = measured.stands['gate']
    judge = measured.stands.get('route_pgd', gate)
    everything = threat.everything(bench.data.images.shape[1:])
    radii = {factor * threat.eps for factor in EPS_FACTORS if factor * threat.eps < everything} | {everything}
    measured.eps_curve = [Point(0.0, bench.right, bench.right), Point(threat.eps, gate, judge)]
    for eps in sorted(radii - {threat.eps}):
        measured.eps_curve.append(point(eps, f'eps {eps:.4g}', threat.scaled(eps)))
    measured.steps_curve = [Point(threat.steps, gate, judge)]
    for steps in sorted({1, *(max(1, round(factor * threat.steps)) for factor in STEP_FACTORS)} - {threat.steps}):
        measured.steps_curve.append(point(steps, f'{steps} steps', replace(threat, steps=steps)))
    for curve in (measured.eps_curve, measured.steps_curve):
        curve.sort(key=lambda each: each.at)
    stands = bench.stands(bench.attack(f'PGD with {RESTARTS} restarts', threat, restarts=RESTARTS))
    measured.restarts_curve = [Point(1, gate, gate), Point(RESTARTS, stands, stands)]


def _measure_gradients(bench: _Bench, threat: ThreatModel, measured: Measured) -> None:
    grad = gradients(bench.victim, bench.data, bench.route)
    measured.zero_gradient = float((grad.flatten(1) == 0).all(dim=1).double().mean())
    along, best = ascents(bench.victim, bench.data, threat, grad, bench.route)
    # Of images that are wrong as they are, nothing is left to gain.
    gains = (along > best.clamp(min=0))[bench.right]
    measured.ascent = float(gains.double().mean()) if len(gains) else 1.0
    measured.margin = median_margin(bench.logits)
    if measured.margin > 0:
        rescaled = Rescaled(bench.victim, measured.margin)
        as_is = bench.attack('PGD, logits as they are', threat, route='held')
        measured.unscaled = percent(bench.stands(as_is, frozen=True))
        adversarial = bench.attack('PGD, logits rescaled', threat, model=rescaled, route='held')
        measured.rescaled = percent(bench.stands(adversarial, frozen=True))


def _measure_black_box(
    bench: _Bench, threat: ThreatModel, measured: Measured, surrogate: Optional[Victim], num_queries: int
) -> None:
    data = bench.data
    measured.stands['noise'] = _noise(bench, threat)
    measured.substitute = surrogate is None
    if surrogate is None:
        surrogate, measured.agreement = train_substitute(bench.victim, data.images, threat, data.seed)
    else:
        same = predict(surrogate, data.images) == predict(bench.victim, data.images)
        measured.agreement = percent(same)
    measured.stands['transfer'] = bench.stands(bench.attack('PGD on the surrogate', threat, model=surrogate))
    if threat.norm not in SQUARE_NORMS:
        return
    square = build_attack(dict(type='Square', norm=threat.norm, eps=threat.eps, n_queries=num_queries), bench.victim)
    adversarial = data.attacked(f'Square, {num_queries} queries', square)
    measured.stands['square'] = bench.stands(bench.made(adversarial, threat))


def _noise(bench: _Bench, threat: ThreatModel) -> Tensor:
    """Images that stand at some random points of the ball, (B,) bool."""
    images, stands = bench.data.images, bench.right
    with seeded(images.device, bench.data.seed):
        for _ in range(NOISE_DRAWS):
            points = bench.made(ball.random_start(images, threat.eps, threat.norm), threat)
            stands = stands & bench.stands(points)
    return stands


def ra_of_each(measured: Measured) -> dict[str, float]:
    """RA under each attack at the threat model, in percent."""
    return {name: measured.ra(name) for name in measured.stands}


def curves(measured: Measured) -> dict[str, list[dict]]:
    """RA against ``eps``, ``steps`` and ``restarts``: ``ra`` in the worst case that was looked for, ``gate`` by PGD."""
    points = dict(eps=measured.eps_curve, steps=measured.steps_curve, restarts=measured.restarts_curve)
    return {
        name: [{name: each.at, 'ra': percent(each.judge), 'gate': percent(each.gate)} for each in curve]
        for name, curve in points.items()
    }
