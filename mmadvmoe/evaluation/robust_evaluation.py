"""Attack images chunk by chunk, so that the outcome of an image depends on nothing but the config.

Dimension letters: B images, K classes, L routers of the network (0 for a dense one).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Optional

import torch
from mmengine.dataset import pseudo_collate
from mmpretrain.models import ClsDataPreprocessor
from torch import Tensor
from torch.utils.data import Dataset

from mmadvmoe.attacks import Victim

from .chunks import chunk_seed, classify
from .folder import SavedChunk
from .outcomes import CLEAN, Outcome, RobustOutcomes

#: ``attack(images, labels, seed=...) -> adversarial images``
Attack = Callable[..., Tensor]

#: ``report(name, outcomes of the chunk so far, seconds that this attack took, None where its outcome was on disk)``
Report = Callable[[str, RobustOutcomes, Optional[float]], None]


def unit_batch(data_preprocessor: ClsDataPreprocessor, batch: Mapping, place: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Turn a batch of a data loader into images in [0, 1] and labels, on the model's device.

    Args:
        data_preprocessor: The preprocessor of the classifier.
        batch: What the pipeline and the loader give, with ``inputs`` and ``data_samples``.
        place: Place of each image in the data set, for errors.

    Returns:
        Images (B, 3, H, W) in [0, 1], exactly on the grid of 1/255 where they came as uint8, and
        labels (B,) int64.

    Raises:
        ValueError: If the images have several sizes, or an image has not exactly one label.
    """
    sizes = {tuple(image.shape) for image in batch['inputs']}
    if len(sizes) > 1:
        raise ValueError(
            f'images {_span(place)} of the data set have several sizes {sorted(sizes)}; '
            'add a Resize or a CenterCrop to the pipeline.'
        )
    for i, sample in zip(place, batch['data_samples']):
        if 'gt_label' not in sample or sample.gt_label.numel() != 1:
            found = sample.gt_label.tolist() if 'gt_label' in sample else 'none'
            raise ValueError(
                f'robust evaluation needs exactly one label for each image, but image {i} of the data set has {found}.'
            )
    exact = all(image.dtype == torch.uint8 for image in batch['inputs'])
    data = data_preprocessor(batch, False)
    images = _to_unit(data_preprocessor, data['inputs'])
    if exact and images.shape[1:] in sizes:
        # Undo the rounding of the way through normalisation and back.
        images = (images * 255).round() / 255
    labels = torch.cat([sample.gt_label for sample in data['data_samples']])
    return images.clamp(0, 1), labels.to(images.device)


def spread_images(dataset: Dataset, data_preprocessor: ClsDataPreprocessor, count: int) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) in [0, 1] and labels (B,), evenly spread over a data set, which may be sorted by class.

    Args:
        dataset: A data set of MMPretrain.
        data_preprocessor: The preprocessor of the classifier.
        count: How many, or all if there are fewer.

    Raises:
        ValueError: As :func:`unit_batch`.
    """
    count = min(count, len(dataset))
    place = [number * len(dataset) // count for number in range(count)]
    return unit_batch(data_preprocessor, pseudo_collate([dataset[i] for i in place]), place)


def _to_unit(data_preprocessor: ClsDataPreprocessor, inputs: Tensor) -> Tensor:
    if hasattr(data_preprocessor, 'to_unit'):
        return data_preprocessor.to_unit(inputs)
    if data_preprocessor._enable_normalize:
        inputs = inputs * data_preprocessor.std + data_preprocessor.mean
    return inputs / 255


def evaluate_chunk(
    victim: Victim,
    attacks: Mapping[str, Attack],
    images: Tensor,
    labels: Tensor,
    *,
    chunk_index: int,
    place: Sequence[int],
    seed: int = 0,
    survivors_only: Collection[str] = (),
    saved: Optional[SavedChunk] = None,
    report: Optional[Report] = None,
) -> RobustOutcomes:
    """Classify one chunk of images without an attack and under each attack.

    Args:
        victim: The model as the attacks see it.
        attacks: Built attacks under their names, each called as ``attack(images, labels, seed)``.
        images: (B, 3, H, W) in [0, 1].
        labels: True classes, (B,) int64.
        chunk_index: Number of the chunk in its data set; with ``seed`` and the name of an attack it
            decides what the attack draws.
        place: Place of each image in the data set.
        seed: Seed of the evaluation.
        survivors_only: Names of the attacks that get only the images which are right so far,
            without an attack and under all attacks before. The others keep the outcome in which
            they went wrong first.
        saved: Where the outcome under each attack is kept as soon as it is known, and taken from if it is there.
        report: Called after each attack.

    Returns:
        The outcomes, on the CPU.

    Raises:
        ValueError: If a label is not a class, or an attack gives images that are not in [0, 1].
        FloatingPointError: If a logit is not finite.
        RuntimeError: If an attack fails.
    """
    outcomes = RobustOutcomes(torch.as_tensor(place), labels.cpu(), {})
    for name in (CLEAN, *attacks):
        start = time.perf_counter()
        outcome = None if saved is None else saved.read(name)
        known = outcome is not None
        if not known:
            if name == CLEAN:
                outcome = classify(victim, images, images, CLEAN, place)
                _check_labels(labels, outcome.logits.shape[1], place)
            else:
                outcome = _outcome(
                    victim,
                    attacks[name],
                    images,
                    labels,
                    outcomes.worst(),
                    name=name,
                    place=place,
                    seed=chunk_seed(seed, name, chunk_index),
                    survivors_only=name in survivors_only,
                )
            if saved is not None:
                saved.write(name, outcome)
        outcomes = replace(outcomes, by_name={**outcomes.by_name, name: outcome})
        if report is not None:
            report(name, outcomes, None if known else time.perf_counter() - start)
    return outcomes


def _check_labels(labels: Tensor, num_classes: int, place: Sequence[int]) -> None:
    foreign = (labels < 0) | (labels >= num_classes)
    if foreign.any():
        i = int(foreign.nonzero()[0])
        raise ValueError(
            f'image {place[i]} of the data set has label {int(labels[i])}, but the model has '
            f'classes 0 to {num_classes - 1}; set num_classes of the head to that of the data set.'
        )


def _outcome(
    victim: Victim,
    attack: Attack,
    images: Tensor,
    labels: Tensor,
    so_far: Outcome,
    *,
    name: str,
    place: Sequence[int],
    seed: int,
    survivors_only: bool,
) -> Outcome:
    """The outcome under one attack, given the worst of those before it."""
    rows = torch.arange(len(images))
    if survivors_only:
        rows = rows[so_far.prediction == labels.cpu()]
    so_far = replace(so_far, attacked=torch.zeros(len(images), dtype=torch.bool))
    if not len(rows):
        return so_far
    where = rows.to(images.device)
    places = [place[int(row)] for row in rows]
    return so_far.put(rows, _attack(victim, attack, images[where], labels[where], name=name, place=places, seed=seed))


def _attack(
    victim: Victim, attack: Attack, images: Tensor, labels: Tensor, *, name: str, place: Sequence[int], seed: int
) -> Outcome:
    try:
        adversarial = attack(images, labels, seed=seed)
    except Exception as error:
        raise RuntimeError(
            f'attack {name!r} failed on images {_span(place)} of the data set: {type(error).__name__}: {error}'
        ) from error
    _check_adversarial(adversarial, images, name, place)
    return classify(victim, adversarial, images, name, place)


def _check_adversarial(adversarial: Tensor, images: Tensor, name: str, place: Sequence[int]) -> None:
    """Keep a faulty attack from passing for a strong one."""
    if adversarial.shape != images.shape:
        raise ValueError(
            f'attack {name!r} made images of shape {tuple(adversarial.shape)} '
            f'from images of shape {tuple(images.shape)}.'
        )
    # Written so that NaN fails it.
    inside = ((adversarial >= 0) & (adversarial <= 1)).flatten(1).all(dim=1)
    if not inside.all():
        bad = [place[int(i)] for i in (~inside).nonzero()]
        raise ValueError(
            f'attack {name!r} left [0, 1] or made pixels that are not finite, in images {bad[:10]} of the data set.'
        )


def _span(place: Sequence[int]) -> str:
    return f'{place[0]} to {place[-1]}'
