"""Targeted attacks: which class an attack aims at, as a config says it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Optional, Union

from torchattacks.attack import Attack

from mmadvmoe.utils import choose

#: What an attack aims at: the given label, the least likely class of the model, or a random other class.
TARGETS = {
    'label': Attack.set_mode_targeted_by_label,
    'least-likely': Attack.set_mode_targeted_least_likely,
    'random': Attack.set_mode_targeted_random,
}
#: ``targeted`` in the config of an attack: a name in :data:`TARGETS`; a dict of it as ``by`` and what that method of
#: torchattacks takes; or a function of images and labels.
Targeted = Union[str, Mapping[str, Any], Callable]


def take_targets(name: str, arguments: dict, parameters: Mapping) -> Optional[Callable[[Attack], None]]:
    """Take ``targeted`` out of an attack's arguments, unless its class has an argument of that name.

    Returns:
        Callable, optional: Sets the mode of an attack that has been built; None if it is not to be targeted.

    Raises:
        TypeError, ValueError: ``targeted`` is nothing that can be aimed at.
    """
    if arguments.get('targeted') is None or 'targeted' in parameters:
        return None
    targeted: Targeted = arguments.pop('targeted')
    where = f'attack type={name!r}: targeted'
    if callable(targeted):
        return partial(_aim, where=where, by=Attack.set_mode_targeted_by_function, target_map_function=targeted)
    given = dict(targeted) if isinstance(targeted, Mapping) else dict(by=targeted)
    by, kth_min = choose(given.pop('by', None), TARGETS, where), given.pop('kth_min', 1)
    if given or not isinstance(kth_min, int) or kth_min < 1 or (kth_min > 1 and by != 'least-likely'):
        raise ValueError(
            f"{where}={targeted!r} must be one of {', '.join(TARGETS)}, dict(by='least-likely', kth_min=2) for the "
            'second least likely class (and so on), or a function of images and labels'
        )
    return partial(_aim, where=where, by=TARGETS[by], **dict(kth_min=kth_min) if by == 'least-likely' else {})


def _aim(attack: Attack, where: str, by: Callable, **settings: Any) -> None:
    if 'targeted' not in attack.supported_mode:
        raise ValueError(f'{where} is not for {type(attack).__name__}, which has no targeted mode; leave it out')
    by(attack, **settings, quiet=True)
