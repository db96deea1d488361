"""Attack images chunk by chunk, so that the outcome of an image depends on nothing but the config.

Dimension letters: B images, K classes, L routers of the network (0 for a dense one).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches

import torch
from mmengine.dataset import pseudo_collate
from mmengine.logging import print_log
from mmpretrain.models import ClsDataPreprocessor
from torch import Tensor
from torch.utils.data import Dataset

from mmadvmoe.attacks import RoutePGD, Victim, build_attack
from mmadvmoe.evaluation import CLEAN, WORST, Outcome, RobustOutcomes
from mmadvmoe.registry import ATTACKS

#: ``attack(images, labels, seed=...) -> adversarial images``
Attack = Callable[..., Tensor]


def build_attacks(attacks: Mapping[str, dict], victim: Victim, key: str) -> dict[str, Attack]:
    """Build named attacks, and warn where they cannot judge an MoE.

    Args:
        attacks: Config of each attack under the name that its metrics get.
        victim: The model as the attacks see it.
        key: Config key of ``attacks``, for errors.

    Raises:
        TypeError: If ``attacks`` does not map names to configs.
        ValueError: If there is no attack, or a name cannot be the prefix of a metric.
    """
    if not isinstance(attacks, Mapping):
        raise TypeError(
            f"{key} must map names to attack configs, such as dict(pgd10=dict(type='PGD', "
            f'eps=8 / 255, alpha=2 / 255, steps=10)), but got {attacks!r}.'
        )
    if not attacks:
        raise ValueError(
            f"{key} holds no attack. To measure accuracy without attacks, use MMEngine's loop "
            "(dict(type='ValLoop') or dict(type='TestLoop'))."
        )
    built = {}
    for name, cfg in attacks.items():
        if name in (CLEAN, WORST) or not name or '/' in name:
            raise ValueError(
                f'{key}: an attack cannot be called {name!r}. Its metrics are logged as '
                f"'<name>/accuracy/top1', so the name must not be empty nor contain '/'; "
                f'{CLEAN!r} and {WORST!r} are taken by the loop.'
            )
        if not isinstance(cfg, Mapping) or 'type' not in cfg:
            raise TypeError(f'{key}.{name} must be the config of an attack, a dict with a type, but got {cfg!r}.')
        built[name] = build_attack(cfg, victim)
    if victim.num_routers and not any(_moves_routes(cfg) for cfg in attacks.values()):
        print_log(
            f'{key} ({", ".join(attacks)}) has no attack on the routes of this mixture of experts: '
            f'{WORST}/ is only an upper bound of its robust accuracy, and can be far too high. '
            "Add dict(type='RoutePGD', ...).",
            logger='current',
            level=logging.WARNING,
        )
    return built


def check_groups(
    attacks: Collection[str], survivors_only: Sequence[str], worst_of: Mapping[str, Sequence[str]], mode: str
) -> None:
    """Check that the settings which refer to attacks name attacks.

    Args:
        attacks: The names of the attacks.
        survivors_only, worst_of: As in :class:`~mmadvmoe.engine.RobustValLoop`.
        mode: ``'val'`` or ``'test'``, for errors.

    Raises:
        TypeError: If attacks are not given as a list of names.
        ValueError: If there is no such attack, or a group has a name that is taken.
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
            if name not in attacks:
                near = get_close_matches(str(name), attacks, n=1)
                hint = f' (did you mean {near[0]!r}?)' if near else ''
                raise ValueError(f'{key}: there is no attack {name!r}{hint}; allowed: {", ".join(attacks)}.')


def _moves_routes(cfg: Mapping) -> bool:
    kind = cfg['type']
    kind = ATTACKS.get(kind) if isinstance(kind, str) else kind
    return isinstance(kind, type) and issubclass(kind, RoutePGD)


def chunk_seed(seed: int, attack: str, chunk_index: int) -> int:
    """Mix a 32-bit seed for one attack on one chunk; the same on every machine."""
    digest = hashlib.sha256(f'{seed}/{attack}/{chunk_index}'.encode()).digest()
    return int.from_bytes(digest[:4], 'little')


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

    Returns:
        The outcomes, on the CPU.

    Raises:
        ValueError: If a label is not a class, or an attack gives images that are not in [0, 1].
        FloatingPointError: If a logit is not finite.
        RuntimeError: If an attack fails.
    """
    clean = _classify(victim, images, images, CLEAN, place)
    num_classes = clean.logits.shape[1]
    foreign = (labels < 0) | (labels >= num_classes)
    if foreign.any():
        i = int(foreign.nonzero()[0])
        raise ValueError(
            f'image {place[i]} of the data set has label {int(labels[i])}, but the model has '
            f'classes 0 to {num_classes - 1}; set num_classes of the head to that of the data set.'
        )
    outcomes = RobustOutcomes(torch.as_tensor(place), labels.cpu(), {CLEAN: clean})
    for name, attack in attacks.items():
        so_far = outcomes.worst()
        rows = torch.arange(len(images))
        if name in survivors_only:
            rows = rows[so_far.prediction == outcomes.label]
        outcome = so_far
        if len(rows):
            where = rows.to(images.device)
            outcome = so_far.put(
                rows,
                _attack(
                    victim,
                    attack,
                    images[where],
                    labels[where],
                    name=name,
                    place=[place[int(row)] for row in rows],
                    seed=chunk_seed(seed, name, chunk_index),
                ),
            )
        outcomes = replace(outcomes, by_name={**outcomes.by_name, name: outcome})
    return outcomes


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
    return _classify(victim, adversarial, images, name, place)


@torch.no_grad()
def _classify(victim: Victim, images: Tensor, clean: Tensor, name: str, place: Sequence[int]) -> Outcome:
    with victim.frozen():
        logits, routings = victim.forward_routed(images)
    finite = logits.isfinite().all(dim=1)
    if not finite.all():
        bad = [place[int(i)] for i in (~finite).nonzero()]
        raise FloatingPointError(
            f'the logits of {len(bad)} of {len(images)} images are not finite in {name!r} '
            f'(images {bad[:10]} of the data set).'
        )
    if routings:
        expert = torch.cat([routing.decisions for routing in routings], dim=1)
    else:
        expert = torch.empty(len(images), 0, dtype=torch.int64)
    distance = (images - clean).abs().flatten(1).amax(dim=1)
    return Outcome(logits.float().cpu(), expert.cpu(), distance.float().cpu())


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
