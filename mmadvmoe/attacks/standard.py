"""Attacks by the names under which papers report them, and several as one."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence

import torchattacks
from torch import nn

from mmadvmoe.registry import ATTACKS
from mmadvmoe.utils import type_name

from . import settings
from .autoattack import PARTS
from .builder import attack_class, build_attack
from .steps import check_norm
from .views import Victim

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


def values_of(cfg: Mapping) -> dict:
    """The arguments that a config gives an attack: its own, else the defaults of the class."""
    return settings.with_defaults(inspect.signature(attack_class(cfg['type'])).parameters, cfg)


def attack_norm(cfg: Mapping) -> str:
    """The norm of the ball that the config of an attack speaks of; of several attacks, of the first with a radius."""
    parts = [values_of(part) for part in parts_of(cfg)]
    first = next((part for part in parts if settings.radius_key(part)), parts[0])
    return settings.checked_norm(type_name(first['type']), first)


@ATTACKS.register_module()
class MultiAttack(torchattacks.MultiAttack):
    """torchattacks' MultiAttack by configs: each attack gets the images that those before it did not fool.

    Args:
        model (Victim): The attacked model.
        attacks (Sequence[Mapping]): Configs of at least two attacks, in the same norm where they have a radius.
        verbose (bool): Print the rates of success of each batch. Defaults to False.

    Raises:
        ValueError: There are fewer than two attacks, or their radii are in several norms.
    """

    def __init__(self, model: Victim | nn.Module, attacks: Sequence[Mapping], verbose: bool = False) -> None:
        if not isinstance(attacks, Sequence) or isinstance(attacks, str) or len(attacks) < 2:
            raise ValueError(f"attack type='MultiAttack': attacks={attacks!r} must be a list of at least two configs")
        victim = model if isinstance(model, Victim) else Victim(model)
        built = [build_attack(cfg, victim) for cfg in attacks]
        for cfg in attacks:
            if cfg.get('route') == 'held':
                raise ValueError(
                    "attack type='MultiAttack': give route='held' to it, for all of its attacks, rather than to "
                    f'one of them ({dict(cfg)})'
                )
        super().__init__([each.attack for each in built], verbose)
        norms = {each.norm for each in built if each.eps is not None}
        if len(norms) > 1:
            raise ValueError(
                f"attack type='MultiAttack': attacks have radii in {', '.join(sorted(norms))}; give each norm an "
                'attack of its own, the worst case over all is reported'
            )
        #: The largest radius of its attacks, and its norm.
        self.eps: float | None = max((each.eps for each in built if each.eps is not None), default=None)
        self.norm: str = norms.pop() if norms else 'Linf'


def parts_of(cfg: Mapping) -> list[Mapping]:
    """The configs of the attacks that an attack is made of; itself, if it is a single one."""
    if 'attacks' not in cfg or not issubclass(attack_class(cfg['type']), MultiAttack):
        return [cfg]
    return [part for each in cfg['attacks'] for part in parts_of(each)]
