"""Attack one chunk of images, so that the outcome of an image depends on nothing but the config.

Dimension letters: B images, K classes, D decisions of the routers for one image (0 for a dense model).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from mmadvmoe.attacks import Victim
from mmadvmoe.attacks.steps import ORDERS
from mmadvmoe.attacks.views import decisions

from .data import Chunk, span
from .folder import OutcomeFolder
from .outcomes import CLEAN, Outcome, RobustOutcomes

#: ``attack(images, labels, seed=...) -> adversarial images``
AttackFunction = Callable[..., Tensor]
#: Images of a chunk whose clean logits are compared with what a folder holds.
_COMPARED = 32


def chunk_seed(seed: int, attack: str, chunk_number: int) -> int:
    """Mix a 32-bit seed for one attack on one chunk; the same on every machine."""
    digest = hashlib.sha256(f'{seed}/{attack}/{chunk_number}'.encode()).digest()
    return int.from_bytes(digest[:4], 'little')


def evaluate_chunk(
    victim: Victim,
    attacks: Mapping[str, AttackFunction],
    chunk: Chunk,
    *,
    seed: int = 0,
    survivors_only: Collection[str] = (),
    folder: OutcomeFolder | None = None,
    report: Callable[[str, RobustOutcomes, float | None], None] | None = None,
) -> RobustOutcomes:
    """Classify one chunk of images without an attack and under each attack.

    Args:
        victim, attacks, chunk: The model, built attacks under their names, and the images.
        seed: Seed of the evaluation; see :func:`chunk_seed`.
        survivors_only: Names of the attacks that get only the images which are right so far, without an attack and
            under all attacks before. The others keep the outcome in which they went wrong first.
        folder: Where each outcome is kept as soon as it is known, and taken from if it is there.
        report: Called after each attack, with its name, the outcomes so far, and the seconds it took (None where its
            outcome was on disk).

    Raises:
        ValueError: A label is not a class, an attack gives images that are not in [0, 1] or beyond its ``eps``, or
            ``folder`` holds what another model gave.
        FloatingPointError: A logit is not finite.
        RuntimeError: An attack fails.
    """
    outcomes = RobustOutcomes(torch.as_tensor(chunk.indices), chunk.labels.cpu(), {})
    for name in (CLEAN, *attacks):
        start = time.perf_counter()
        saved = None if folder is None else folder.read(chunk, name)
        if saved is not None:
            if name == CLEAN:
                _check_same_model(victim, chunk, saved, folder)
            outcome = saved
        elif name == CLEAN:
            outcome = classify(victim, chunk.images, chunk.images, CLEAN, chunk.indices)
            _check_labels(chunk, outcome.logits.shape[1])
        else:
            rows = outcomes.robust.nonzero().squeeze(1) if name in survivors_only else torch.arange(len(chunk))
            outcome = replace(outcomes.worst(), attacked=torch.zeros(len(chunk), dtype=torch.bool))
            if len(rows):
                part = chunk.take(rows)
                adversarial = run_attack(name, attacks[name], part, chunk_seed(seed, name, chunk.number))
                outcome = outcome.put(rows, classify(victim, adversarial, part.images, name, part.indices))
        if folder is not None and saved is None:
            folder.write(chunk, name, outcome)
        outcomes = replace(outcomes, by_name={**outcomes.by_name, name: outcome})
        if report is not None:
            report(name, outcomes, time.perf_counter() - start if saved is None else None)
    return outcomes


def run_attack(name: str, attack: AttackFunction, chunk: Chunk, seed: int) -> Tensor:
    """Attack the images of a chunk, and check what comes out: a faulty attack must not pass for a strong one.

    Raises:
        RuntimeError: The attack fails.
        ValueError: It gives images that are not in [0, 1], or farther away than its ``eps``.
    """
    try:
        adversarial = attack(chunk.images, chunk.labels, seed=seed)
    except Exception as error:
        raise RuntimeError(
            f'attack {name!r} failed on images {span(chunk.indices)} of the data set: {type(error).__name__}: {error}'
        ) from error
    if adversarial.shape != chunk.images.shape:
        raise ValueError(
            f'attack {name!r} made images of shape {tuple(adversarial.shape)} from images of shape '
            f'{tuple(chunk.images.shape)}.'
        )
    # Written so that NaN fails it.
    inside = ((adversarial >= 0) & (adversarial <= 1)).flatten(1).all(dim=1)
    if not inside.all():
        bad = [chunk.indices[int(row)] for row in (~inside).nonzero()]
        raise ValueError(
            f'attack {name!r} left [0, 1] or made pixels that are not finite, in images {bad[:10]} of the data set.'
        )
    # Functions have none.
    if getattr(attack, 'eps', None) is not None:
        change = (adversarial - chunk.images).flatten(1)
        distance = change.norm(ORDERS[attack.norm], dim=1).max().item()
        # Rounding alone goes beyond it, by a little.
        if distance > 1.001 * attack.eps + 1e-4:
            raise ValueError(
                f'attack {name!r} went {distance:.4g} away in {attack.norm}, beyond its eps={attack.eps:g}.'
            )
    return adversarial


@torch.no_grad()
def classify(
    victim: Victim,
    images: Tensor,
    clean: Tensor,
    name: str = CLEAN,
    indices: Sequence[int] | None = None,
    route: Tensor | None = None,
) -> Outcome:
    """Classify images, attacked or not, beside ``clean``, the same without an attack: (B, 3, H, W) in [0, 1].

    Errors name the attack and the indices of the images in the data set (default 0, 1, ...). ``route``, (B,) or (B, D),
    takes the place of the routers' choice.

    Raises:
        FloatingPointError: A logit is not finite.
    """
    with victim.frozen():
        logits, routings = victim.forward_routed(images, route)
    finite = logits.isfinite().all(dim=1)
    if not finite.all():
        rows = (~finite).nonzero().squeeze(1).tolist()
        bad = rows if indices is None else [indices[row] for row in rows]
        raise FloatingPointError(
            f'the logits of {len(bad)} of {len(images)} images are not finite in {name!r} (images {bad[:10]} of the '
            'data set).'
        )
    expert = decisions(routings, images)
    change = (images - clean).flatten(1).float()
    distance = torch.stack([change.norm(p, dim=1) for p in ORDERS.values()], dim=1)
    attacked = torch.full((len(images),), name != CLEAN)
    return Outcome(logits.float().cpu(), expert.cpu(), distance.cpu(), attacked)


def _check_same_model(victim: Victim, chunk: Chunk, saved: Outcome, folder: OutcomeFolder) -> None:
    """Compare some clean logits: a module of somebody else may hold more than its weights tell."""
    rows = torch.arange(min(_COMPARED, len(chunk)))
    logits, expected = classify(victim, chunk.images[rows], chunk.images[rows]).logits, saved.logits[rows]
    # Batch, threads and device change some of the last digits.
    if logits.shape != expected.shape or (logits - expected).abs().max() > 0.01 * expected.abs().max().clamp(min=1):
        raise ValueError(
            f'{folder.path} holds outcomes of another model, whose weights are the same: its clean logits differ. '
            'Give another folder, or overwrite this one'
        )


def _check_labels(chunk: Chunk, num_classes: int) -> None:
    foreign = (chunk.labels < 0) | (chunk.labels >= num_classes)
    if foreign.any():
        row = int(foreign.nonzero()[0])
        raise ValueError(
            f'image {chunk.indices[row]} of the data set has label {int(chunk.labels[row])}, but the model has classes '
            f'0 to {num_classes - 1}; set num_classes of the head to that of the data set.'
        )


@dataclass(frozen=True, eq=False)
class Examples:
    """B images before and after an attack. All tensors are on the CPU.

    Attributes:
        images, adversarial: Clean and attacked images, (B, 3, H, W) in [0, 1].
        label: True class, (B,) int64.
        before, after: Class predicted for the clean and for the attacked image, (B,) int64.
        route_before, route_after: Experts chosen for them, (B, D) int64, as :attr:`Routing.decisions` has them.
    """

    images: Tensor
    adversarial: Tensor
    label: Tensor
    before: Tensor
    after: Tensor
    route_before: Tensor
    route_after: Tensor

    def __len__(self) -> int:
        return len(self.images)

    @property
    def fooled(self) -> Tensor:
        """Images that are right without the attack and wrong under it, (B,) bool."""
        return (self.before == self.label) & (self.after != self.label)

    @property
    def robust(self) -> Tensor:
        """Images that are right without the attack and under it, (B,) bool."""
        return (self.before == self.label) & (self.after == self.label)

    def take(self, rows: Tensor) -> Examples:
        """Pick images by their row."""
        return Examples(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def telling(self, count: int) -> Examples:
        """Choose up to ``count`` images: first those that are fooled, half of them if so many are, then robust ones.

        Images that are wrong without an attack come last, and only where there are too few others.
        """
        masks = (self.fooled, self.robust, self.before != self.label)
        fooled, robust, wrong = (mask.nonzero().squeeze(1) for mask in masks)
        num_fooled = max(min(len(fooled), count // 2), min(count - len(robust), len(fooled)))
        rows = torch.cat([fooled[:num_fooled], robust[: count - num_fooled], wrong])
        return self.take(rows[:count])


def attack_examples(victim: Victim, attack: AttackFunction, images: Tensor, labels: Tensor) -> Examples:
    """Attack images (B, 3, H, W) in [0, 1], and note predictions and routes before and after."""
    adversarial = attack(images, labels, seed=0)
    before, after = classify(victim, images, images), classify(victim, adversarial, images)
    parts = (images, adversarial, labels, before.prediction, after.prediction, before.expert, after.expert)
    return Examples(*(part.cpu() for part in parts))
