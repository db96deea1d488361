"""An attack bound to its victim: the callable that training and evaluation use."""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torchattacks.attack import Attack

from .routes import HeldVictim, clean_route
from .victim import Victim

# What rounding may add to images in [0, 1] that were normalised and brought back.
_ROUNDING = 1e-4


class NonFiniteImagesError(ValueError):
    """An attack gave images that are not finite."""


class BoundAttack:
    """An attack and the victim it attacks; made by :func:`build_attack`.

    It runs with the victim in eval mode and without parameter gradients, restored afterwards
    whatever happens inside, also when the caller is under ``no_grad`` or ``inference_mode``.

    Args:
        name (str): Name of the attack in ``ATTACKS``.
        attack (Attack): The attack, built on ``victim``, or on ``held`` where that is given.
        victim (Victim): The attacked model.
        eps (float, optional): Radius of its threat model; None if it has none.
        soft_labels (bool): Whether class probabilities will do for labels.
        own_seed (bool): Whether the config set the attack's ``seed``.
        held (HeldVictim, optional): The view of ``victim`` that the attack was built on, if it shall run with the
            route of each image held at the clean one. It then runs once for each route among the clean images.
        norm (str): Norm in which ``eps`` is. Defaults to ``'Linf'``.
    """

    def __init__(
        self,
        name: str,
        attack: Attack,
        victim: Victim,
        eps: float | None = None,
        soft_labels: bool = False,
        own_seed: bool = False,
        held: HeldVictim | None = None,
        norm: str = 'Linf',
    ) -> None:
        self.name = name
        self.norm = norm
        self.eps = eps
        self.victim = victim
        label_parameter = inspect.signature(attack.forward).parameters.get('labels')
        self.needs_labels = label_parameter is None or label_parameter.default is not None
        self.soft_labels = soft_labels or not self.needs_labels
        self._attack = attack
        parts = {id(part): part for part in (attack, *attack._attacks.values())}.values()
        self._seeded = [part for part in parts if hasattr(part, 'seed')]
        # torchattacks' APGD, FAB and Square set the global seed to their own at each call.
        self._resets_seed = any(part.seed is not None for part in self._seeded)
        self._own_seed = own_seed
        self._held = held

    def __repr__(self) -> str:
        return f'BoundAttack({self._attack!r})'

    def __call__(self, images: Tensor, labels: Tensor | None = None, seed: int | None = None) -> Tensor:
        """Attack a batch.

        Args:
            images (Tensor): (B, C, H, W), floating point, in [0, 1].
            labels (Tensor, optional): (B,) class indices; or (B, K) class probabilities where
                ``soft_labels``. None where not ``needs_labels``.
            seed (int, optional): Makes the outcome a function of images, labels and seed, and
                leaves the random state of the caller as it is. None draws from that state.

        Returns:
            Tensor: Adversarial images, detached, of the shape and type of ``images``.

        Raises:
            TypeError: ``images`` or ``labels`` are of a kind that no attack takes.
            ValueError: Images are outside [0, 1], ``eps`` is larger than they can differ, or labels are missing, out
                of range or soft where the attack takes none.
            NonFiniteImagesError: The attack gave numbers that are not finite.
        """
        # Inference tensors cannot be saved for a backward pass; a clone made outside can.
        with torch.inference_mode(False), torch.enable_grad(), self.victim.frozen():
            images = self._checked_images(images)
            labels = self._checked_labels(labels, len(images))
            with self._random_state(images.device, seed):
                self._attack.set_device(images.device)
                adversarial = self._run(images, labels).detach()
        if not torch.isfinite(adversarial).all():
            raise NonFiniteImagesError(
                f'attack type={self.name!r} gave images that are not finite: '
                'the logits of the model or their gradient are not finite'
            )
        return adversarial

    def _run(self, images: Tensor, labels: Tensor | None) -> Tensor:
        if self._held is None:
            return self._attack(images, labels)
        routes, which = clean_route(self.victim, images).unique(dim=0, return_inverse=True)
        adversarial = torch.empty_like(images)
        for number, route in enumerate(routes):
            rows = (which == number).nonzero().squeeze(1)
            with self._held.holding(route):
                adversarial[rows] = self._attack(images[rows], None if labels is None else labels[rows])
        return adversarial

    def _checked_images(self, images: Tensor) -> Tensor:
        if not torch.is_floating_point(images) or images.dim() != 4:
            raise TypeError(
                f'an attack needs floating point images (B, C, H, W), got {images.dtype} of shape {tuple(images.shape)}'
            )
        # Some attacks of torchattacks flatten images with view().
        images = images.detach().clone(memory_format=torch.contiguous_format)
        low, high = images.amin().item(), images.amax().item()
        # Written so that NaN fails too.
        if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):
            raise ValueError(
                f'an attack needs images in [0, 1], got values from {low:.4g} to {high:.4g}; '
                'normalisation belongs inside the victim (mean and std of the data_preprocessor)'
            )
        self._check_radius(images[0].numel())
        return images.clamp_(0, 1)

    def _check_radius(self, pixels: int) -> None:
        """No two images are further apart than black and white."""
        diameter = dict(Linf=1.0, L2=pixels**0.5, L1=float(pixels))[self.norm]
        if self.eps is not None and self.eps > diameter:
            raise ValueError(
                f'attack type={self.name!r}: eps={self.eps:g} in {self.norm} is above {diameter:g}, the largest '
                f'distance of two images of {pixels} numbers in [0, 1]; is it in units of 0..255?'
            )

    def _checked_labels(self, labels: Tensor | None, batch: int) -> Tensor | None:
        if labels is None:
            if self.needs_labels:
                raise ValueError(f'attack type={self.name!r} needs labels')
            return None
        labels = labels.detach().clone()
        soft = torch.is_floating_point(labels)
        if labels.dim() != 1 + soft or len(labels) != batch or labels.dtype == torch.bool:
            raise TypeError(
                f'labels must be ({batch},) class indices or ({batch}, K) class probabilities, '
                f'got {labels.dtype} of shape {tuple(labels.shape)}'
            )
        if soft:
            if not self.soft_labels:
                raise ValueError(
                    f'attack type={self.name!r} takes class indices, got soft labels of shape '
                    f'{tuple(labels.shape)} (from label smoothing or a batch augmentation); '
                    'use an attack on the cross entropy such as PGD, or TRADESAttack'
                )
            return labels
        count = self.victim.num_classes
        low, high = labels.amin().item(), labels.amax().item()
        if low < 0 or (count is not None and high >= count):
            raise ValueError(f'labels from {low} to {high} are outside [0, num_classes={count})')
        return labels.long()

    @contextmanager
    def _random_state(self, device: torch.device, seed: int | None) -> Iterator[None]:
        """Run the attack on ``seed``; or on the ambient state, which it must not reset."""
        if seed is None:
            if not self._resets_seed:
                yield
                return
            if not self._own_seed:
                seed = int(torch.randint(2**31, ()))
        accelerators = [] if device.type == 'cpu' else [device]
        kind = 'cuda' if device.type == 'cpu' else device.type
        before = random.getstate(), np.random.get_state(), [part.seed for part in self._seeded]
        try:
            with torch.random.fork_rng(accelerators, device_type=kind):
                if seed is not None:
                    torch.manual_seed(seed)
                    # Some of torchattacks' classes draw from these.
                    random.seed(seed)
                    np.random.seed(seed % 2**32)
                    for offset, part in enumerate(self._seeded):
                        part.seed = (seed + offset) % 2**31
                yield
        finally:
            python_state, numpy_state, seeds = before
            random.setstate(python_state)
            np.random.set_state(numpy_state)
            for part, own in zip(self._seeded, seeds, strict=True):
                part.seed = own
