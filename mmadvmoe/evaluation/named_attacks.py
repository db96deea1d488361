"""The attacks of an evaluation under their names."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping, Sequence

from mmengine.logging import print_log

from mmadvmoe.attacks import (
    STANDARD_ATTACKS,
    BoundAttack,
    RoutePGD,
    Victim,
    attack_class,
    attack_norm,
    build_attack,
    is_standard_attack,
    parts_of,
    standard_attack,
)
from mmadvmoe.attacks.settings import radius_key
from mmadvmoe.attacks.standard import values_of
from mmadvmoe.moe import placement_of
from mmadvmoe.utils import choose

from .outcomes import CLEAN, WORST

# Steps of a RoutePGD that nobody asked for, at most.
_ROUTE_STEPS = 50


def build_attacks(attacks: Mapping[str, dict], victim: Victim, key: str) -> dict[str, BoundAttack]:
    """Build attacks, each under the name that its metrics get, and warn where they say little of an MoE.

    ``key`` is the config key of ``attacks``, for errors.

    Raises:
        TypeError: ``attacks`` does not map names to configs.
        ValueError: There is no attack, or a name cannot be the prefix of a metric.
    """
    _check_configs(attacks, key)
    built = {name: build_attack(cfg, victim) for name, cfg in attacks.items()}
    for name, attack in built.items():
        attack.warn_if_short(f'{key}.{name}')
        if attack.aims_at_labels:
            raise ValueError(
                f"{key}.{name}: targeted='label' takes the labels for targets, and those of an evaluation are the true "
                "ones; use targeted='least-likely', 'random' or a function of images and labels."
            )
    if victim.num_routers and not any(map(moves_routes, attacks.values())):
        print_log(
            f'{key} ({", ".join(attacks)}) has no attack on the routes of this mixture of experts: {WORST}/ is only an '
            "upper bound of its robust accuracy, and can be far too high. Add dict(type='RoutePGD', ...).",
            logger='current',
            level=logging.WARNING,
        )
    return built


def _check_configs(attacks: Mapping[str, Mapping], key: str) -> None:
    if not isinstance(attacks, Mapping):
        raise TypeError(
            f"{key} must map names to attack configs, such as dict(pgd10=dict(type='PGD', eps=8 / 255, alpha=2 / 255, "
            f'steps=10)), but got {attacks!r}.'
        )
    if not attacks:
        raise ValueError(
            f"{key} holds no attack. To measure accuracy without attacks, use MMEngine's loop (dict(type='ValLoop') or "
            "dict(type='TestLoop'))."
        )
    for name, cfg in attacks.items():
        if name in (CLEAN, WORST) or not re.fullmatch(r'[^/\0]{1,100}', str(name)):
            raise ValueError(
                f"{key}: an attack cannot be called {name!r}. Its metrics are logged as '<name>/accuracy/top1', so the "
                f"name must have 1 to 100 characters and no '/'; {CLEAN!r} and {WORST!r} are taken by the loop."
            )
        if not isinstance(cfg, Mapping) or 'type' not in cfg:
            raise TypeError(f'{key}.{name} must be the config of an attack, a dict with a type, but got {cfg!r}.')


def check_groups(
    attacks: Collection[str], survivors_only: Sequence[str], worst_of: Mapping[str, Sequence[str]], mode: str
) -> None:
    """Check that the settings of a loop (``mode``: ``'val'`` or ``'test'``) which refer to attacks name attacks.

    Raises:
        TypeError: Attacks are not given as a list of names.
        ValueError: There is no such attack, or a group has a name that is taken.
    """
    keys = {f'{mode}_cfg.survivors_only': survivors_only}
    for group, members in worst_of.items():
        key = f'{mode}_cfg.worst_of.{group}'
        if group in (CLEAN, WORST, *attacks) or not group or '/' in group:
            raise ValueError(
                f"{key}: the worst case over some attacks needs a name of its own without '/'; taken are "
                f'{", ".join((CLEAN, WORST, *attacks))}.'
            )
        keys[key] = members
    for key, names in keys.items():
        if isinstance(names, str) or not isinstance(names, Sequence):
            raise TypeError(f'{key} must be a list of names of attacks, but got {names!r}.')
        for name in names:
            choose(name, attacks, f'{key}: attack')


def moves_routes(cfg: Mapping) -> bool:
    """Whether the config is that of an attack that knows of the routes of a mixture of experts."""
    return any(issubclass(attack_class(part['type']), RoutePGD) for part in parts_of(cfg))


def choose_attacks(
    names: Sequence[str], known: Mapping | None = None, eps: float | None = None, norm: str | None = None
) -> dict[str, dict]:
    """Look attacks up by name: those of a config, and the standard ones.

    Args:
        names: The names, in the order in which they are to run.
        known: Configs of attacks under their names. One whose norm is not ``norm`` is not taken.
        eps: Radius, in place of those of known attacks (the step size goes with it). Defaults to theirs.
        norm: Norm of the ball. Defaults to that of the known attacks, else ``'Linf'``.

    Raises:
        TypeError: ``names`` is not a list of names.
        ValueError: A name is unknown or occurs twice, or there is no ``eps`` and known attacks have none in common.
    """
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f'attacks={names!r} must be a list of names, or map names to configs of attacks')
    known = {name: dict(cfg) for name, cfg in (known or {}).items()}
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise ValueError(f'attacks={list(names)} names {", ".join(twice)} more than once')
    chosen = {}
    for name in names:
        cfg = known.get(name)
        if cfg is not None and norm in (None, attack_norm(cfg)):
            chosen[name] = cfg if eps is None else _with_radius(cfg, eps)
        elif is_standard_attack(name):
            chosen[name] = standard_attack(name, *_common_ball(name, known, eps, norm))
        else:
            where = f' in norm {norm}' if cfg else ''
            allowed = ', '.join(dict.fromkeys((*known, *STANDARD_ATTACKS)))
            raise ValueError(f'there is no attack {name!r}{where}; allowed: {allowed}')
    return chosen


def with_route_attack(attacks: Mapping[str, Mapping], victim: Victim, key: str = 'attacks') -> dict[str, dict]:
    """Put attacks on the routes beside those on a mixture of experts: ``RoutePGD``, and each with the route held.

    ``RoutePGD`` is added where there is none, with as many steps as the longest of the attacks that has any, at most
    50, and with 50 beside attacks without steps. It comes after the first attack, because a cascade is fast
    when what fools most images for its price comes early. Its radius is the largest of the attacks; of attacks in
    several norms, each gets its own. With image-level routing each attack ``<name>`` is followed by ``<name>-held``,
    the same with ``route='held'``; with a route for each layer or token, nearly every image has a route of its own and
    would have to be attacked by itself, so there the held route is left to ``RoutePGD``.

    Nothing is added for a model without routers. Raises as :func:`build_attacks`.
    """
    _check_configs(attacks, key)
    attacks = {name: dict(cfg) for name, cfg in attacks.items()}
    if not victim.num_routers:
        return attacks
    if placement_of(victim.classifier).one_route_per_image:
        both = {}
        for name, cfg in attacks.items():
            both[name] = cfg
            own_routes = [getattr(attack_class(part['type']), 'own_routes', False) for part in parts_of(cfg)]
            if 'route' not in cfg and not any(own_routes):
                both[held_name(name)] = dict(cfg, route='held')
        attacks = both
    if any(map(moves_routes, attacks.values())):
        return attacks
    radii: dict[str, float] = {}
    lengths = []
    for cfg in attacks.values():
        # Built, it knows the defaults as well.
        built = build_attack(cfg, victim)
        lengths.append(built.steps)
        if built.eps is not None:
            radii[attack_norm(cfg)] = max(built.eps, radii.get(attack_norm(cfg), 0.0))
    name = f'routepgd{min(_ROUTE_STEPS, max(filter(None, lengths), default=_ROUTE_STEPS))}'
    suffixes = {norm: '' if len(radii) == 1 else f'-{norm.lower()}' for norm in radii}
    added = {f'{name}{suffixes[norm]}': standard_attack(name, eps, norm) for norm, eps in radii.items()}
    first = next(iter(attacks))
    return {first: attacks[first]} | added | attacks


def held_name(name: str) -> str:
    """The name of an attack with the route held, beside the attack ``name``."""
    return f'{name}-held'


def _with_radius(cfg: dict, eps: float) -> dict:
    if parts_of(cfg) != [cfg]:
        return cfg | {'attacks': [_with_radius(dict(each), eps) for each in cfg['attacks']]}
    values = values_of(cfg)
    key = radius_key(values)
    if key is None:
        return cfg
    scaled = {'alpha': values['alpha'] * eps / values[key]} if 'alpha' in values and values[key] else {}
    return cfg | {key: eps} | scaled


def _common_ball(name: str, known: Mapping[str, dict], eps: float | None, norm: str | None) -> tuple[float, str]:
    """Radius and norm of a standard attack."""
    balls = set()
    for cfg in known.values():
        values = values_of(cfg)
        radius = values.get(radius_key(values))
        if radius is not None:
            balls.add((radius, attack_norm(cfg)))
    norms = {each for _, each in balls}
    if norm is None:
        norm = norms.pop() if len(norms) == 1 else 'Linf'
    if eps is None:
        radii = {radius for radius, of in balls if of == norm}
        if len(radii) != 1:
            found = f'the attacks of the config have {sorted(radii)}' if radii else 'no attack of the config has one'
            raise ValueError(f'attack {name!r} needs a radius in norm {norm} (eps, or --eps): {found}')
        (eps,) = radii
    return eps, norm
