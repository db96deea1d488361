"""What the configs of all attacks have in common: values that are allowed, and the class that an attack aims at.

And what must be known about torchattacks' classes, which are put into the registry here.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torchattacks
from torch import Tensor
from torchattacks.attack import Attack

from mmadvmoe.registry import ATTACKS
from mmadvmoe.utils import choose

from .steps import NORMS
from .views import Victim

# Names that torchattacks' and our classes use for the radius.
_RADII = ('eps', 'max_epsilon')
_COUNTS = (
    'steps n_restarts restarts eot_iter n_queries num_iter_set nb_iter nb_sample max_iterations binary_search_steps '
    'noise_batch_size'
).split()
_CLASS_COUNTS = ('n_classes', 'num_classes')
#: What an attack aims at: the given label, the least likely class of the model, or a random other class.
TARGETS = {
    'label': Attack.set_mode_targeted_by_label,
    'least-likely': Attack.set_mode_targeted_least_likely,
    'random': Attack.set_mode_targeted_random,
}
#: ``targeted`` in the config of an attack: a name in :data:`TARGETS`; a dict of it as ``by`` and what that method of
#: torchattacks takes; or a function of images and labels.
Targeted = str | Mapping[str, Any] | Callable

#: Attacks that hand the labels to a cross entropy and to nothing else, so that class
#: probabilities (B, K) do as well as class indices (B,).
SOFT_LABEL_ATTACKS = frozenset(
    'FGSM BIM RFGSM PGD EOTPGD FFGSM MIFGSM DIFGSM TIFGSM NIFGSM SINIFGSM VMIFGSM VNIFGSM PGDL2 PIFGSM PIFGSMPP'.split()
)

#: Attacks with an eps in another norm than L-inf and no argument that says so.
L2_ATTACKS = frozenset(['PGDL2', 'PGDRSL2'])

#: Attacks of torchattacks with a choice of norms that have none for L1; there they are parts of AutoAttack.
NO_L1 = frozenset(['FAB', 'Square'])

#: Classes of torchattacks that a config cannot build, and why.
NOT_FROM_CONFIGS = {
    'LGV': (
        torchattacks.LGV,
        'trains a copy of the model on a data loader of [0, 1] images before it attacks, to make images for other '
        'models than this; call torchattacks.LGV with what mmadvmoe.apis.load_robust_model gives',
    ),
    'MultiAttack of torchattacks': (
        torchattacks.MultiAttack,
        "takes attacks that have been built; give configs: dict(type='MultiAttack', attacks=[dict(type='PGD', ...), "
        "dict(type='Square', ...)])",
    ),
}


def with_defaults(parameters: Mapping[str, inspect.Parameter], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of an attack: those that are given, else their defaults."""
    return {key: each.default for key, each in parameters.items() if each.default is not each.empty} | dict(arguments)


def radius_key(values: Mapping[str, Any]) -> str | None:
    """The name under which an attack takes its radius; None if it has no radius."""
    return next((key for key in _RADII if key in values), None)


def fill_in_class_count(name: str, arguments: dict, parameters: Mapping, victim: Victim) -> None:
    """Give the attack the number of classes, under the name by which it takes it."""
    key = next((key for key in _CLASS_COUNTS if key in parameters), None)
    if key is None:
        return
    count = victim.num_classes
    given = arguments.get(key, count)
    if given is None:
        raise ValueError(
            f'attack type={name!r} needs {key}, which the model does not tell before its first forward pass: classify '
            f'an image first, or give {key}'
        )
    if not _is_count(given) or given < 2 or (count is not None and given > count):
        most = 'any' if count is None else count
        raise ValueError(
            f'attack type={name!r}: {key}={given!r} must be a whole number from 2 to the number of classes of the '
            f'model ({most})'
        )
    arguments[key] = given


def checked_norm(name: str, values: Mapping) -> str:
    """The norm of the threat model."""
    if 'norm' not in values:
        return 'L2' if name in L2_ATTACKS else 'Linf'
    norm = choose(values['norm'], NORMS, f'attack type={name!r}: norm')
    if norm == 'L1' and name in NO_L1:
        raise ValueError(
            f"attack type={name!r}: there is no norm='L1' for it; allowed: ('Linf', 'L2'). "
            'In L1 there are PGD, APGD, APGDT, RoutePGD, RouterAttack, TRADESAttack and AutoAttack; FAB and Square '
            "there are dict(type='AutoAttack', attacks_to_run=['fab-t', 'square'])"
        )
    return norm


def check_values(name: str, values: Mapping, norm: str) -> None:
    """Check radius, step size and counts."""
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


def check_enough_classes(name: str, cls: type, values: Mapping, victim: Victim) -> None:
    """The DLR loss looks at the third largest logit; an attack may need more (``min_classes``)."""
    needed = getattr(cls, 'min_classes', 3 if values.get('loss') == 'dlr' else 2)
    count = victim.num_classes
    if count is not None and count < needed:
        raise ValueError(
            f'attack type={name!r} needs at least {needed} classes for its loss, the model has {count}; AutoAttack '
            'leaves out what does not exist for few classes'
        )


def take_targets(name: str, arguments: dict, parameters: Mapping) -> Callable[[Attack], None] | None:
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


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def attacks_a_model(cls: type) -> bool:
    """Whether a config can build the attack: it takes a model, and has a default for all else.

    Of torchattacks' classes that leaves out those of :data:`NOT_FROM_CONFIGS`.
    """
    _, first, *others = inspect.signature(cls.__init__).parameters.values()
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return first.name == 'model' and all(other.default is not other.empty or other.kind in optional for other in others)


@ATTACKS.register_module()
class JSMA(torchattacks.JSMA):
    """torchattacks' JSMA for any number of classes: it aims at the next of K classes, not of 10.

    Args:
        model (Victim): The attacked model.
        theta (float): Change of a pixel per step. Defaults to 1.
        gamma (float): Largest share of changed pixels. Defaults to 0.1.
        n_classes (int): K; ``build_attack`` knows it. Defaults to 10.
    """

    def __init__(self, model, theta: float = 1.0, gamma: float = 0.1, n_classes: int = 10) -> None:
        super().__init__(model, theta, gamma)
        self.n_classes = n_classes
        self.set_mode_targeted_by_function(self._next_class, quiet=True)

    def _next_class(self, images: Tensor, labels: Tensor) -> Tensor:
        return (labels + 1) % self.n_classes


def register_torchattacks() -> None:
    """Register every class of torchattacks under its own name, unless this package has its own."""
    for name in torchattacks.__all__:
        cls = getattr(torchattacks, name)
        if issubclass(cls, Attack) and attacks_a_model(cls) and name not in ATTACKS.module_dict:
            ATTACKS.register_module(name=name, module=cls)
