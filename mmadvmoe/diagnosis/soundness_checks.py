"""The verdicts on a robust accuracy, with the numbers that speak against it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from .soundness import NOISE_DRAWS, Measured, Point
from .subject import percent

PASS, WARN, SKIP = 'PASS', 'WARN', 'SKIP'

#: Differences up to this, in points, may be chance whatever the number of images.
CHANCE = 1.0
#: An attack that misses more than this, in points, is too weak to be reported alone.
GAP = 2.0
#: By how much rounding may bring an image out of its ball.
ROUNDING = 1e-6
#: Share of images without any gradient from which on something hides it, and on which it must beat random directions.
ZERO_SHARE, ASCENT_SHARE = 0.01, 0.9


@dataclass(frozen=True)
class Check:
    """One verdict.

    Attributes:
        name, title: Its name in files, and the property that should hold.
        status: ``'PASS'``, ``'WARN'``, or ``'SKIP'`` where there is nothing to check.
        message, numbers: The numbers that decided, in words and by name.
    """

    name: str
    title: str
    status: str
    message: str
    numbers: dict[str, float]


def make_checks(m: Measured) -> list[Check]:
    """Make all checks, in the order in which they are printed."""
    widest, usual, doubled = m.eps_curve[-1], *m.steps_curve[-2:]
    ra_widest, ra_usual, ra_doubled = (percent(each.route_pgd) for each in (widest, usual, doubled))
    at_zero = f'SA is {m.sa:.1f}; attacks at eps 0 changed the outcome of {m.changed_at_zero} images'
    at_most = f'in the ball of eps {widest.at:.4g}, which holds every image, RA is {ra_widest:.1f}'
    twice = f'RA is {ra_usual:.1f} at {usual.at} steps and {ra_doubled:.1f} at {doubled.at}'
    inside, outside = 'adversarial images are in the ball and in [0, 1]', max(m.outside, 0.0)
    beyond = f'adversarial images are at most {outside:.1e} outside'
    zero = f'{100 * m.zero_gradient:.1f} % of the images have a gradient of exactly zero'
    uphill = f'a small step along the gradient gains more than random ones on {100 * m.ascent:.1f} % of the images'
    surrogate = 'a substitute trained on its answers' if m.substitute else 'the given surrogate'
    transfer = f'PGD on {surrogate} (same prediction on {m.agreement:.0f} % of the images)'
    changed, drop, share = m.changed_at_zero, ra_usual - ra_doubled, m.zero_gradient
    return [
        _verdict('eps_zero', 'RA at eps 0 equals SA', changed == 0, at_zero, sa=m.sa, changed=changed),
        _falls('eps_curve', 'RA falls as eps grows', 'eps', m.eps_curve),
        _verdict('large_eps', 'RA reaches 0 at large eps', ra_widest <= CHANCE, at_most, eps=widest.at, ra=ra_widest),
        _falls('steps', 'more steps do not help the defender', 'steps', m.steps_curve),
        _falls('restarts', 'more restarts do not help the defender', 'restarts', m.restarts_curve),
        _verdict('converged', 'twice the steps find nothing new', drop <= GAP, twice, drop=drop),
        _verdict('inside', inside, m.outside <= ROUNDING, beyond, outside=m.outside),
        _verdict('zero_gradient', 'images have a gradient', share <= ZERO_SHARE, zero, share=share),
        _verdict('ascent', 'the gradient leads upwards', m.ascent >= ASCENT_SHARE, uphill, share=m.ascent),
        _logit_scale(m),
        _black_box(m, 'noise', f'the best of {NOISE_DRAWS} random points of the ball'),
        _black_box(m, 'transfer', transfer),
        _black_box(m, 'square', 'Square'),
        _routes(m),
    ]


def _verdict(name: str, title: str, good: bool, message: str, **numbers: float) -> Check:
    return Check(name, title, PASS if good else WARN, message, numbers)


def _falls(name: str, title: str, what: str, curve: Sequence[Point]) -> Check:
    """RA may not rise from one point of a curve to the next, neither that of PGD nor that of RoutePGD.

    By chance it may: if about as many images are robust at the later point alone as at the earlier one alone.
    """
    rises = []
    for before, after in pairwise(curve):
        for key in ('route_pgd', 'gate'):
            old, new = getattr(before, key), getattr(after, key)
            gained, lost = int((new & ~old).sum()), int((old & ~new).sum())
            by_chance = max(CHANCE / 100 * len(old), 2 * math.sqrt(gained + lost))
            rises.append((gained - lost - by_chance, before, after, key))
    excess, before, after, key = max(rises, key=lambda each: each[0])
    message = 'RA is ' + ', '.join(f'{percent(each.route_pgd):.1f} at {what} {each.at:.4g}' for each in curve)
    old, new = (percent(getattr(each, key)) for each in (before, after))
    if excess > 0:
        attack = 'RA by PGD' if key == 'gate' else 'RA'
        message = (
            f'from {what} {before.at:.4g} to {after.at:.4g}, {attack} rises from {old:.1f} to {new:.1f}; {message}'
        )
    return _verdict(name, title, excess <= 0, message, **{'from': old, 'to': new})


def _logit_scale(m: Measured) -> Check:
    title = 'the scale of the logits hides nothing'
    if m.margin <= 0:
        return _verdict('logit_scale', title, False, 'the two largest logits are equal on most images', margin=0.0)
    drop = m.unscaled - m.rescaled
    message = (
        f'PGD with the route held: RA {m.unscaled:.1f}, and {m.rescaled:.1f} with the logits divided by their median '
        f'margin of {m.margin:.3g}'
    )
    return _verdict('logit_scale', title, drop <= GAP, message, margin=m.margin, ra=m.unscaled, rescaled=m.rescaled)


def _black_box(m: Measured, name: str, words: str) -> Check:
    """White-box attacks must find what an attack without gradients of the model finds, but for a few images."""
    title = f'white-box attacks are not weaker than {name}'
    if name not in m.robust:
        return Check(name, title, SKIP, f'{words} does not exist in this norm', {})
    white, black = m.ra(*m.white_box), m.ra(name)
    missed = white - m.ra(*m.white_box, name)
    message = (
        f'RA {white:.1f} by white-box attacks, {black:.1f} by {words}, which fools {missed:.1f} % that they do not'
    )
    return _verdict(name, title, missed <= GAP, message, white_box=white, black_box=black, missed=missed)


def _routes(m: Measured) -> Check:
    """PGD through the gate against attacks of as many steps that know of routes, and against one without gradients."""
    title = 'the gate hides no gradient'
    if not m.is_moe:
        return Check('routes', title, SKIP, 'a dense model has no routes', {})
    ra = {name: m.ra(name) for name in m.robust if name in (*m.white_box, 'square')}
    # RoutePGD has the runs of all the others together.
    worst = min((name for name in ra if name != 'route_pgd'), key=ra.get)
    message = f'RA by attack: {", ".join(f"{name} {value:.1f}" for name, value in ra.items())}'
    gap = ra['gate'] - ra[worst]
    if gap > GAP:
        message = f'PGD through the gate is {gap:.1f} points above {worst}; {message}'
    return _verdict('routes', title, gap <= GAP, message, gap=gap, **ra)
