"""What an attacker may do: the ball around an image, and how an attack walks in it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, Optional

from torch import Tensor

from mmadvmoe.attacks import attack_norm

#: What an attack must tell of its threat model.
_NEEDED = ('eps', 'alpha', 'steps')


@dataclass(frozen=True)
class ThreatModel:
    """A ball around each image, and the steps of a gradient attack in it.

    Attributes:
        norm: ``'Linf'``, ``'L2'`` or ``'L1'``.
        eps: Radius of the ball, on [0, 1] images.
        alpha: Step size, in the same unit.
        steps: Number of steps.
    """

    norm: str
    eps: float
    alpha: float
    steps: int

    @classmethod
    def from_attacks(cls, attacks: Mapping[str, Mapping], name: Optional[str] = None) -> ThreatModel:
        """Read the threat model of one of the attacks that a config tests with.

        Args:
            attacks: ``test_cfg.attacks``: the config of each attack under its name.
            name: Which of them. Defaults to the first one that has eps, alpha and steps.

        Raises:
            ValueError: There is no such attack, or none that tells eps, alpha and steps above 0.
        """
        if name is not None and name not in attacks:
            near = get_close_matches(name, attacks, n=1)
            hint = f' (did you mean {near[0]!r}?)' if near else ''
            raise ValueError(f'test_cfg.attacks has no attack {name!r}{hint}; allowed: {", ".join(attacks)}')
        for cfg in attacks.values() if name is None else [attacks[name]]:
            if all(cfg.get(key) for key in _NEEDED):
                return cls(attack_norm(cfg), *(cfg[key] for key in _NEEDED))
        where = 'test_cfg.attacks' if name is None else f'test_cfg.attacks.{name}'
        raise ValueError(
            f'{where} tells no threat model: an attack with eps, alpha and steps above 0 is needed, such as '
            "dict(type='PGD', eps=8 / 255, alpha=2 / 255, steps=50)"
        )

    def scaled(self, eps: float) -> ThreatModel:
        """The same walk in a ball of another radius, with steps as long in proportion."""
        alpha = self.alpha * eps / self.eps
        # A longer one would only be cut.
        return replace(self, eps=eps, alpha=min(alpha, 1.0) if self.norm == 'Linf' else alpha)

    def attack(self, kind: str, **others: Any) -> dict:
        """The config of a gradient attack in this ball."""
        return dict(type=kind, norm=self.norm, eps=self.eps, alpha=self.alpha, steps=self.steps, **others)

    def everything(self, shape: Sequence[int]) -> float:
        """The radius at which the ball around any image of ``shape`` (C, H, W) holds all of [0, 1]."""
        size = math.prod(shape)
        return {'Linf': 1.0, 'L2': math.sqrt(size), 'L1': float(size)}[self.norm]

    def distance(self, images: Tensor, others: Tensor) -> Tensor:
        """How far each image (B, C, H, W) is from the other one in this norm, (B,), in double precision."""
        change = (images.double() - others.double()).flatten(1)
        return change.norm(dim=1, p={'Linf': math.inf, 'L2': 2, 'L1': 1}[self.norm])
