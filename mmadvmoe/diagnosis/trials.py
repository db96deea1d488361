"""Attack images that are in memory, chunk by chunk, one attack at a time.

Dimension letters: B images, D decisions of the routers for one image (0 for a dense model).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Optional

import torch
from mmengine.logging import print_log
from torch import Tensor

from mmadvmoe.attacks import Victim
from mmadvmoe.evaluation.chunks import chunk_seed, classify
from mmadvmoe.evaluation.outcomes import CLEAN, Outcome

#: ``attack(images, labels, seed=...) -> adversarial images``
Attack = Callable[..., Tensor]


def percent(mask: Tensor) -> float:
    """Share of (B,) bool, in percent."""
    return 100.0 * float(mask.double().mean())


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Draw from ``seed`` inside, and leave the random state of the caller as it is."""
    on_cpu = device.type == 'cpu'
    with torch.random.fork_rng([] if on_cpu else [device], device_type='cuda' if on_cpu else device.type):
        torch.manual_seed(seed)
        yield


@dataclass(frozen=True, eq=False)
class Images:
    """Labelled images, and the chunks in which they are attacked.

    Attributes:
        images: (B, 3, H, W) in [0, 1].
        labels: True classes, (B,) int64.
        chunk_size: Images attacked at a time.
        seed: What an attack draws is a function of this, its name and the number of the chunk.
    """

    images: Tensor
    labels: Tensor
    chunk_size: int = 128
    seed: int = 0

    def __len__(self) -> int:
        return len(self.images)

    def chunks(self) -> Iterator[slice]:
        """The rows of each chunk."""
        for start in range(0, len(self), self.chunk_size):
            yield slice(start, min(start + self.chunk_size, len(self)))

    def attacked(self, name: str, attack: Attack, draw: Optional[str] = None) -> Tensor:
        """Attack all images.

        Args:
            name: Name of the attack, for the log.
            attack: The attack.
            draw: Name for its seeds; attacks of one name draw the same. Defaults to ``name``.

        Returns:
            Adversarial images, (B, 3, H, W).

        Raises:
            RuntimeError: The attack fails; the message names it and the images.
        """
        parts = []
        for index, rows in enumerate(self.chunks()):
            started = time.monotonic()
            try:
                part = attack(self.images[rows], self.labels[rows], seed=chunk_seed(self.seed, draw or name, index))
            except Exception as error:
                raise RuntimeError(
                    f'attack {name!r} failed on images {rows.start} to {rows.stop - 1}: {type(error).__name__}: {error}'
                ) from error
            parts.append(part)
            print_log(
                f'{name}: {rows.stop} of {len(self)} images, {time.monotonic() - started:.1f} s',
                logger='current',
                level=logging.INFO,
            )
        return torch.cat(parts)

    def classified(self, victim: Victim, images: Tensor, name: str = CLEAN, route: Optional[Tensor] = None) -> Outcome:
        """What a model makes of all images, or of what an attack made of them.

        Args:
            victim: The model.
            images: Attacked ones, (B, 3, H, W), or ``self.images``.
            name: Name of the attack, or ``'clean'``.
            route: Experts to take in place of the routers' choice, (B,) or (B, D).

        Raises:
            FloatingPointError: A logit is not finite.
        """
        return Outcome.cat(
            [
                classify(
                    victim,
                    images[rows],
                    self.images[rows],
                    name,
                    range(rows.start, rows.stop),
                    None if route is None else route[rows].to(images.device),
                )
                for rows in self.chunks()
            ]
        )
