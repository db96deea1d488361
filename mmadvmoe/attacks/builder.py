"""Attacks from configs, checked before they run, and the callable that training and evaluation use."""

from __future__ import annotations

import inspect
import logging
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from mmengine.logging import print_log
from torch import Tensor, nn
from torchattacks.attack import Attack

from mmadvmoe.registry import ATTACKS
from mmadvmoe.utils import choose, type_name

from . import settings
from .model import check_range
from .settings import NOT_FROM_CONFIGS, SOFT_LABEL_ATTACKS
from .steps import largest_distance
from .views import ROUTES, HeldVictim, Victim, clean_route

# Attacks draw from the random state of the process, of which there is one: threads attack one after the other.
_RANDOM_STATE = threading.RLock()


class NonFiniteImagesError(ValueError):
    """An attack gave images that are not finite, or followed gradients that are NaN."""


def build_attack(cfg: Mapping, model: Victim | nn.Module) -> BoundAttack:
    """Build an attack on a model.

    Args:
        cfg (Mapping): ``type``, a name in ``ATTACKS`` (every class of torchattacks, and those of this package) or a
            class, and its arguments. ``eps`` and ``alpha`` are on [0, 1] images:
            ``dict(type='PGD', eps=8 / 255, alpha=2 / 255, steps=50)``. Where the attack has an argument for the number
            of classes it is filled in. Every attack but those that choose routes themselves (``RoutePGD``,
            ``RouterAttack``) also takes ``route``: ``'gate'``, the default, to attack the model as it is used; or
            ``'held'``, to hold the route of each image at the clean one. Attacks of torchattacks are then run once for
            each route among the images, which with layer- or token-level routing can mean image by image; :class:`PGD`
            is not. On a model without routers both are the same. Attacks with a targeted mode take ``targeted``:
            ``'least-likely'``, ``'random'``, a function of images and labels, or ``'label'``, to get targets for
            labels; see :func:`mmadvmoe.attacks.settings.take_targets`.
        model (Victim or nn.Module): A view, a :class:`NormalizedClassifier`, or what can become one: an MMPretrain
            classifier, with its own normalisation, or any module that maps images in [0, 1] to logits.

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
    victim = model if isinstance(model, Victim) else Victim(model)
    kind = arguments.pop('type')
    cls = attack_class(kind)
    name = type_name(kind)
    parameters = dict(inspect.signature(cls).parameters)
    parameters.pop('model', None)
    hold_routes = _takes_held_routes(name, arguments, parameters, cls) and victim.num_routers > 0
    aim = settings.take_targets(name, arguments, parameters)
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for key in arguments:
            choose(key, parameters, f'attack type={name!r}: argument')
    settings.fill_in_class_count(name, arguments, parameters, victim)
    missing = [key for key, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    for key in missing:
        if key not in arguments:
            raise ValueError(f'attack type={name!r} needs {key}')
    # Defaults are checked too: a default that does not suit this victim is as wrong.
    values = settings.with_defaults(parameters, arguments)
    norm = settings.checked_norm(name, values)
    settings.check_values(name, values, norm)
    settings.check_enough_classes(name, cls, values, victim)
    return BoundAttack(
        name,
        partial(_build, cls, arguments, aim),
        victim,
        eps=values.get(settings.radius_key(values)),
        norm=norm,
        soft_labels=aim is None and getattr(cls, 'soft_labels', name in SOFT_LABEL_ATTACKS),
        own_seed='seed' in arguments,
        hold_routes=hold_routes,
    )


def attack_class(kind: str | type) -> type[Attack]:
    """The class of an attack, by its name in ``ATTACKS`` or itself.

    Raises:
        TypeError: It is no attack.
        ValueError: There is no attack of that name.
    """
    cls = ATTACKS.get(kind) if isinstance(kind, str) else kind
    for name, (theirs, reason) in NOT_FROM_CONFIGS.items():
        if cls is theirs or (cls is None and kind == name):
            raise ValueError(f'attack type={kind!r} {reason}')
    if cls is None:
        choose(kind, sorted(ATTACKS.module_dict), 'attack type')
    if not (isinstance(cls, type) and issubclass(cls, Attack)):
        raise TypeError(f'attack type={kind!r} must be a subclass of torchattacks.attack.Attack')
    return cls


def _build(cls: type[Attack], arguments: dict, aim: Callable | None, view: Victim) -> Attack:
    attack = cls(view, **arguments)
    if aim is not None:
        aim(attack)
    return attack


def _takes_held_routes(name: str, arguments: dict, parameters: Mapping, cls: type) -> bool:
    """Whether ``route`` asks for held routes; it is taken out, unless the class knows it and does so itself."""
    if 'route' not in arguments:
        return False
    route = choose(arguments['route'], ROUTES, f'attack type={name!r}: route')
    if getattr(cls, 'own_routes', False):
        raise ValueError(f'attack type={name!r} chooses routes itself; leave out route={route!r}')
    return 'route' not in parameters and arguments.pop('route') == 'held'


class BoundAttack:
    """An attack and the model it attacks; made by :func:`build_attack`.

    It runs with the model in eval mode and without parameter gradients, restored afterwards whatever happens inside,
    also when the caller is under ``no_grad`` or ``inference_mode``. Threads that attack take turns.

    Args:
        name (str): Name of the attack in ``ATTACKS``.
        build (Callable): Builds the attack on a view.
        victim (Victim): The attacked model.
        eps (float, optional): Radius of its threat model; None if it has none.
        norm (str): Norm in which ``eps`` is. Defaults to ``'Linf'``.
        soft_labels (bool): Whether class probabilities will do for labels.
        own_seed (bool): Whether the config set the attack's ``seed``.
        hold_routes (bool): Whether the route of each image is held at the clean one. The attack then runs once for each
            route among the clean images.
    """

    def __init__(
        self,
        name: str,
        build: Callable[[Victim], Attack],
        victim: Victim,
        eps: float | None = None,
        norm: str = 'Linf',
        soft_labels: bool = False,
        own_seed: bool = False,
        hold_routes: bool = False,
    ) -> None:
        self.name = name
        self.victim = victim
        self._build = build
        #: What it runs, built on the victim.
        self.attack = build(victim)
        # An attack that is made of others knows these of them.
        self.norm = getattr(self.attack, 'norm', norm)
        self.eps = getattr(self.attack, 'eps', None) if eps is None else eps
        label_parameter = inspect.signature(self.attack.forward).parameters.get('labels')
        self.needs_labels = label_parameter is None or label_parameter.default is not None
        self.soft_labels = soft_labels or not self.needs_labels
        # torchattacks' APGD, FAB and Square set the global seed to their own at each call.
        self._resets_seed = any(part.seed is not None for part in _seeded_parts(self.attack))
        self._own_seed = own_seed
        self._hold_routes = hold_routes

    def __repr__(self) -> str:
        return f'BoundAttack({self.attack!r})'

    def __call__(self, images: Tensor, labels: Tensor | None = None, seed: int | None = None) -> Tensor:
        """Attack a batch.

        Args:
            images (Tensor): (B, C, H, W), floating point, in [0, 1].
            labels (Tensor, optional): (B,) class indices; or (B, K) class probabilities where ``soft_labels``. None
                where not ``needs_labels``.
            seed (int, optional): Makes the outcome a function of images, labels and seed, and leaves the random state
                of the caller as it is. None draws from that state.

        Returns:
            Tensor: Adversarial images, detached, of the shape and type of ``images``.

        Raises:
            TypeError: ``images`` or ``labels`` are of a kind that no attack takes.
            ValueError: Images are outside [0, 1], ``eps`` is larger than they can differ, or labels are missing, out
                of range or soft where the attack takes none.
            NonFiniteImagesError: The attack gave numbers that are not finite, or a gradient at the images was NaN, by
                which many attacks do not move.
        """
        # Inference tensors cannot be saved for a backward pass; a clone made outside can.
        with _RANDOM_STATE, torch.inference_mode(False), torch.enable_grad(), self.victim.frozen():
            images, labels = self._checked(images, labels)
            with self._random_state(images.device, seed) as seed, self.victim.model.watched_gradients() as nan:
                adversarial = self._run(images, labels, seed).detach()
        if torch.stack([~adversarial.isfinite().all(), *nan]).any():
            raise NonFiniteImagesError(
                f'attack type={self.name!r} met numbers that are not finite, in its images or the gradient there: '
                'the logits of the model or their gradient are not finite, or the attack divides by a gradient of 0'
            )
        return adversarial

    @property
    def aims_at_labels(self) -> bool:
        """Whether the labels it is given are the classes that images shall be taken for."""
        parts = (self.attack, *self.attack._attacks.values())
        return any(part.attack_mode == 'targeted(label)' for part in parts)

    @property
    def steps(self) -> int | None:
        """Iterations of the attack; None where it has none."""
        return getattr(self.attack, 'steps', None)

    def check_radius(self, num_values: int, name: str | None = None) -> None:
        """Check that the ball is not larger than the space of images of C·H·W values.

        Raises:
            ValueError: No two images in [0, 1] are as far apart as ``eps``. Names the attack by ``name``, or its type.
        """
        most = largest_distance(num_values, self.norm)
        if self.eps is not None and self.eps > most:
            raise ValueError(
                f'attack {name or f"type={self.name!r}"}: eps={self.eps:g} in {self.norm} is above {most:.4g}, the '
                f'largest distance of two images of {num_values} numbers in [0, 1]; if it is in units of 0..255, write '
                f'eps={self.eps:g} / 255'
            )

    def warn_if_short(self, key: str) -> None:
        """Warn where all steps together do not reach the radius; ``key`` is that of the attack in the config."""
        alpha, steps = (getattr(self.attack, name, None) for name in ('alpha', 'steps'))
        if self.eps and alpha is not None and steps and self.eps > alpha * steps * (1 + 1e-6):
            print_log(
                f'{key} ({self.name}): steps={steps} of alpha={alpha:.4g} do not reach the radius of {self.eps:.4g} '
                f'({self.norm}), so that the attack is weaker than it says; take alpha={self.eps / min(steps, 4):.4g}',
                logger='current',
                level=logging.WARNING,
            )

    def _run(self, images: Tensor, labels: Tensor | None, seed: int | None) -> Tensor:
        if not self._hold_routes:
            return _run_seeded(self.attack, images, labels, seed)
        routes, which = clean_route(self.victim, images).unique(dim=0, return_inverse=True)
        adversarial = torch.empty_like(images)
        for number, route in enumerate(routes):
            rows = (which == number).nonzero().squeeze(1)
            attack = self._build(HeldVictim(self.victim, route))
            adversarial[rows] = _run_seeded(attack, images[rows], None if labels is None else labels[rows], seed)
        return adversarial

    def _checked(self, images: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Copies of images and labels, after checks that take one transfer to the host."""
        if not torch.is_floating_point(images) or images.dim() != 4:
            raise TypeError(
                f'an attack needs floating point images (B, C, H, W), got {images.dtype} of shape {tuple(images.shape)}'
            )
        # Some attacks of torchattacks flatten images with view().
        images = images.detach().clone(memory_format=torch.contiguous_format)
        labels = self._checked_labels(labels, images)
        indices = [] if labels is None or torch.is_floating_point(labels) else [labels]
        bounds = [bound.float() for values in (images, *indices) for bound in (values.amin(), values.amax())]
        low, high, *of_labels = torch.stack(bounds).tolist()
        check_range(low, high, 'images of an attack')
        count = self.victim.num_classes
        if of_labels and (of_labels[0] < 0 or (count is not None and of_labels[1] >= count)):
            first, last = map(int, of_labels)
            raise ValueError(f'labels from {first} to {last} are outside [0, num_classes={count})')
        self.check_radius(images[0].numel())
        return images.clamp_(0, 1), labels

    def _checked_labels(self, labels: Tensor | None, images: Tensor) -> Tensor | None:
        """A copy of the labels beside the images, checked but for their range."""
        if labels is None:
            if self.needs_labels:
                raise ValueError(f'attack type={self.name!r} needs labels')
            return None
        labels, batch = labels.detach().to(images.device, copy=True), len(images)
        soft = torch.is_floating_point(labels)
        if labels.dim() != 1 + soft or len(labels) != batch or labels.dtype == torch.bool:
            raise TypeError(
                f'labels must be ({batch},) class indices or ({batch}, K) class probabilities, '
                f'got {labels.dtype} of shape {tuple(labels.shape)}'
            )
        if soft:
            if not self.soft_labels:
                raise ValueError(
                    f'attack type={self.name!r} takes class indices, got soft labels of shape {tuple(labels.shape)} '
                    '(from label smoothing or a batch augmentation); use an attack on the cross entropy such as PGD, '
                    'or TRADESAttack'
                )
            return labels
        return labels.long()

    @contextmanager
    def _random_state(self, device: torch.device, seed: int | None) -> Iterator[int | None]:
        """Draw from ``seed`` inside, or from the ambient state, which the attack must not reset; give the seed."""
        if seed is None and self._resets_seed and not self._own_seed:
            seed = int(torch.randint(2**31, ()))
        if seed is None and not self._resets_seed:
            yield None
            return
        before = random.getstate(), np.random.get_state()
        accelerators, kind = ([], 'cuda') if device.type == 'cpu' else ([device], device.type)
        try:
            with torch.random.fork_rng(accelerators, device_type=kind):
                if seed is not None:
                    torch.manual_seed(seed)
                    # Some of torchattacks' classes draw from these.
                    random.seed(seed)
                    np.random.seed(seed % 2**32)
                yield seed
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


def _run_seeded(attack: Attack, images: Tensor, labels: Tensor | None, seed: int | None) -> Tensor:
    """Run an attack whose parts draw from seeds of their own, if one is given."""
    attack.set_device(images.device)
    parts = _seeded_parts(attack)
    before = [part.seed for part in parts]
    try:
        if seed is not None:
            for offset, part in enumerate(parts):
                part.seed = (seed + offset) % 2**31
        return attack(images, labels)
    finally:
        for part, own in zip(parts, before, strict=True):
            part.seed = own


def _seeded_parts(attack: Attack) -> list[Attack]:
    parts = {id(part): part for part in (attack, *attack._attacks.values())}.values()
    return [part for part in parts if hasattr(part, 'seed')]
