"""Attacks from configs, checked before they run."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from torchattacks.attack import Attack

from mmadvmoe.registry import ATTACKS

from .bound import BoundAttack
from .library import L2_ATTACKS, NO_L1, SOFT_LABEL_ATTACKS
from .routes import HeldVictim, check_route
from .steps import check_norm
from .victim import Victim

# Names that torchattacks' and our classes use for the same thing.
_RADII = ('eps', 'max_epsilon')
_COUNTS = (
    'steps',
    'n_restarts',
    'restarts',
    'eot_iter',
    'n_queries',
    'num_iter_set',
    'nb_iter',
    'nb_sample',
    'max_iterations',
    'binary_search_steps',
    'noise_batch_size',
)
_CLASS_COUNTS = ('n_classes', 'num_classes')


def build_attack(cfg: Mapping, victim: Victim) -> BoundAttack:
    """Build an attack on a victim.

    Args:
        cfg (Mapping): ``type``, a name in ``ATTACKS`` (every class of torchattacks, and those of
            this package) or a class, and its arguments. ``eps`` and ``alpha`` are on [0, 1] images:
            ``dict(type='PGD', eps=8 / 255, alpha=2 / 255, steps=50)``. Where the attack has an
            argument for the number of classes it is filled in. Every attack but those that choose routes
            themselves (``RoutePGD``, ``RouterAttack``) also takes ``route``: ``'gate'``, the default, to attack the
            model as it is used; or ``'held'``, to hold the route of each image at the clean one. Attacks of
            torchattacks are then run once for each route among the images, which with layer- or token-level routing
            can mean image by image; :class:`PGD` is not. On a model without routers both are the same.
        victim (Victim): The attacked model.

    Returns:
        BoundAttack: ``attack(images, labels, seed=None) -> adversarial images``.

    Raises:
        TypeError: ``cfg`` is not a dict, or names a class that is no attack.
        ValueError: The name or an argument is unknown, or a value is not allowed.
    """
    if not isinstance(cfg, Mapping):
        raise TypeError(f'attack={cfg!r} must be a dict with a type')
    arguments = dict(cfg)
    if 'type' not in arguments:
        raise ValueError(f"attack={dict(cfg)} has no type; for example type='PGD'")
    name, cls = _attack_class(arguments.pop('type'))
    parameters = dict(inspect.signature(cls).parameters)
    parameters.pop('model', None)
    held = _hold_routes(name, arguments, parameters, cls, victim)
    _check_names(name, arguments, parameters)
    _fill_in_class_count(name, arguments, parameters, victim)
    # Defaults are checked too: a default that does not suit this victim is as wrong.
    values = {key: p.default for key, p in parameters.items() if p.default is not p.empty}
    values.update(arguments)
    norm = _checked_norm(name, values)
    _check_values(name, values, norm)
    _check_enough_classes(name, values, victim)
    return BoundAttack(
        name,
        cls(victim if held is None else held, **arguments),
        victim,
        eps=next((values[key] for key in _RADII if key in values), None),
        soft_labels=getattr(cls, 'soft_labels', name in SOFT_LABEL_ATTACKS),
        own_seed='seed' in arguments,
        held=held,
        norm=norm,
    )


def _attack_class(kind: Any) -> tuple[str, type]:
    if isinstance(kind, str):
        name, cls = kind.split('.')[-1], ATTACKS.get(kind)
    else:
        name, cls = getattr(kind, '__name__', repr(kind)), kind
    if cls is None:
        known = sorted(ATTACKS.module_dict)
        near = get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f' (did you mean {near[0]!r}?)' if near else ''
        raise ValueError(f'attack type={kind!r} is unknown{hint}; allowed: {", ".join(known)}')
    if not (isinstance(cls, type) and issubclass(cls, Attack)):
        raise TypeError(f'attack type={kind!r} must be a subclass of torchattacks.attack.Attack')
    return name, cls


def _hold_routes(name: str, arguments: dict, parameters: Mapping, cls: type, victim: Victim) -> HeldVictim | None:
    """The view to attack where ``route`` asks for one; ``route`` is taken out, unless the class knows it."""
    if 'route' not in arguments:
        return None
    try:
        route = check_route(arguments['route'])
    except ValueError as error:
        raise ValueError(f'attack type={name!r}: {error}') from None
    if getattr(cls, 'own_routes', False):
        raise ValueError(f'attack type={name!r} chooses routes itself; leave out route={route!r}')
    if 'route' in parameters:
        return None
    del arguments['route']
    return HeldVictim(victim) if route == 'held' and victim.num_routers else None


def _check_names(name: str, arguments: Mapping, parameters: Mapping) -> None:
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for key in arguments:
        if key not in parameters:
            near = get_close_matches(key, parameters, n=1)
            hint = f' (did you mean {near[0]!r}?)' if near else ''
            raise ValueError(
                f'attack type={name!r} has no argument {key}={arguments[key]!r}{hint}; '
                f'allowed: {", ".join(parameters) or "none"}'
            )


def _fill_in_class_count(name: str, arguments: dict, parameters: Mapping, victim: Victim) -> None:
    key = next((key for key in _CLASS_COUNTS if key in parameters), None)
    if key is None:
        return
    count = victim.num_classes
    given = arguments.get(key, count)
    if given is None:
        raise ValueError(f'attack type={name!r} needs {key}, which the head of the model does not tell')
    if not _is_count(given) or given < 2 or (count is not None and given > count):
        most = 'any' if count is None else count
        raise ValueError(
            f'attack type={name!r}: {key}={given!r} must be a whole number from 2 to the number of '
            f'classes of the model ({most})'
        )
    arguments[key] = given


def _checked_norm(name: str, values: Mapping) -> str:
    """The norm of the threat model."""
    if 'norm' not in values:
        return 'L2' if name in L2_ATTACKS else 'Linf'
    try:
        norm = check_norm(values['norm'])
    except ValueError as error:
        raise ValueError(f'attack type={name!r}: {error}') from None
    if norm == 'L1' and name in NO_L1:
        raise ValueError(
            f"attack type={name!r}: there is no norm='L1' for it; allowed: ('Linf', 'L2'). "
            'In L1 there are PGD, APGD, APGDT, RoutePGD, RouterAttack, TRADESAttack and AutoAttack; FAB and Square '
            "there are dict(type='AutoAttack', attacks_to_run=['fab-t', 'square'])"
        )
    return norm


def _check_values(name: str, values: Mapping, norm: str) -> None:
    where = f'attack type={name!r}'
    for key in (*_RADII, 'alpha'):
        if key not in values:
            continue
        value = values[key]
        if not _is_number(value) or not value >= 0:
            raise ValueError(f'{where}: {key}={value!r} must be a number of at least 0')
        if norm == 'Linf' and value > 1:
            raise ValueError(
                f'{where}: {key}={value!r} is above 1, but images are in [0, 1]; '
                f'if it is in units of 0..255, write {key}={value:g} / 255'
            )
    for key in _COUNTS:
        if key in values and not (_is_count(values[key]) and values[key] >= 1):
            raise ValueError(f'{where}: {key}={values[key]!r} must be a whole number of at least 1')


def _check_enough_classes(name: str, values: Mapping, victim: Victim) -> None:
    """The DLR loss looks at the third largest logit, its targeted form at the fourth."""
    needed = 4 if name == 'APGDT' else 3 if values.get('loss') == 'dlr' else 2
    count = victim.num_classes
    if count is not None and count < needed:
        raise ValueError(
            f'attack type={name!r} needs at least {needed} classes for its loss, the model has '
            f'{count}; AutoAttack leaves out what does not exist for few classes'
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
