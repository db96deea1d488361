"""Attacks by the names under which papers report them."""

from __future__ import annotations

import re
from collections.abc import Mapping

from mmadvmoe.utils import type_name

from .autoattack import PARTS
from .library import L2_ATTACKS
from .multi_attack import parts_of
from .steps import check_norm

# Steps of a quarter of the radius, as in the reference evaluation (2/255 at 8/255).
_STEP = 1 / 4

#: Names that :func:`standard_attack` knows, with ``<steps>`` for a number.
STANDARD_ATTACKS = ('fgsm', 'pgd<steps>', 'routepgd<steps>', 'autoattack', *PARTS)


def is_standard_attack(name: str) -> bool:
    """Whether :func:`standard_attack` knows a name."""
    return name in ('fgsm', 'autoattack', *PARTS) or re.fullmatch(r'(route)?pgd[1-9]\d*', name) is not None


def standard_attack(name: str, eps: float, norm: str = 'Linf') -> dict:
    """The config of an attack that papers report by its name.

    ``pgd<steps>`` and ``routepgd<steps>`` start at a random point and take steps of eps / 4. The parts of AutoAttack
    (``apgd-ce``, ``apgd-dlr``, ``apgd-t``, ``fab``, ``fab-t``, ``square``) have its published settings: 100 iterations
    or 5000 queries.

    Args:
        name: One of ``STANDARD_ATTACKS``, with a number for ``<steps>``.
        eps: Radius of the ball, on [0, 1] images.
        norm: Of the ball.

    Raises:
        ValueError: There is no standard attack of that name, or not in that norm.

    Examples:
        >>> standard_attack('pgd50', 8 / 255)
        {'type': 'PGD', 'alpha': 0.00784..., 'steps': 50, 'eps': 0.03137..., 'norm': 'Linf'}
    """
    check_norm(norm)
    if not is_standard_attack(name):
        raise ValueError(f'there is no standard attack {name!r}; allowed: {", ".join(STANDARD_ATTACKS)}')
    in_ball = dict(eps=eps, norm=norm)
    if name == 'autoattack':
        return dict(type='AutoAttack') | in_ball
    if name in PARTS:
        return dict(type='AutoAttack', attacks_to_run=[name]) | in_ball
    if name == 'fgsm':
        if norm != 'Linf':
            raise ValueError(f'there is no {name!r} in norm={norm!r}; allowed: Linf')
        return dict(type='FGSM', eps=eps)
    kind = 'RoutePGD' if name.startswith('route') else 'PGD'
    return dict(type=kind, alpha=eps * _STEP, steps=int(re.sub(r'\D', '', name))) | in_ball


def attack_norm(cfg: Mapping) -> str:
    """The norm of the ball that the config of an attack speaks of."""
    cfg = parts_of(cfg)[0]
    return cfg.get('norm') or ('L2' if type_name(cfg['type']) in L2_ATTACKS else 'Linf')
