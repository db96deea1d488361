"""Find mistakes in a config before any long work starts."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Optional

import torch
from mmengine.dataset import InfiniteSampler
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmpretrain.registry import HOOKS, MODELS
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from mmadvmoe.attacks import Victim
from mmadvmoe.cost import size_must_fit
from mmadvmoe.models import AdvDataPreprocessor, RobustClassifier
from mmadvmoe.models.backbones import check_widths
from mmadvmoe.models.data_preprocessor import check_images
from mmadvmoe.moe import GROUPS, placement_of
from mmadvmoe.utils import bare_model, did_you_mean

from .seeding import preserve_rng_state

# Images of each data set that are read ahead of training.
_PROBES = 16
# Not imported: training is a layer above this one.
_TURNS_CONSTRUCTOR = 'AlternatingOptimWrapperConstructor'


def check_config(cfg: Mapping[str, Any]) -> None:
    """Check what a whole training config alone can tell, before anything is built.

    Raises:
        ValueError: A group of a training in turns has no schedule or an unknown name, or clean and adversarial images
            go to a classifier that takes only one of them, or a width is no whole number.
    """
    constructor = (cfg.get('optim_wrapper') or {}).get('constructor')
    scheduler = cfg.get('param_scheduler')
    # One per group, which MMEngine's Runner looks up before any hook runs, to stop with a bare KeyError. A list or a
    # single scheduler applies to both groups.
    if _names(constructor, _TURNS_CONSTRUCTOR) and isinstance(scheduler, dict) and 'type' not in scheduler:
        check_groups('param_scheduler', scheduler)
    model = cfg.get('model') or {}
    check_widths(model)
    preprocessor = model.get('data_preprocessor') or cfg.get('data_preprocessor') or {}
    kind = model.get('type')
    if isinstance(kind, str):
        kind = MODELS.get(kind)
    default = 'AdvDataPreprocessor' if kind is RobustClassifier else None
    if kind is not None and _names(preprocessor.get('type', default), 'AdvDataPreprocessor'):
        _check_mode(kind, preprocessor.get('mode', 'pair'))


def check_groups(key: str, cfg: dict) -> None:
    """Raise unless ``cfg`` has the two groups as its keys, no less and no more."""
    for name in cfg:
        if name not in GROUPS:
            raise ValueError(
                f'{key}.{name} is no parameter group{did_you_mean(name, GROUPS)}; allowed: {", ".join(GROUPS)}. '
                f'Settings go inside {key}.experts and {key}.router; replace what a _base_ config says of {key} '
                'with _delete_=True'
            )
    for name in GROUPS:
        if name not in cfg:
            raise ValueError(f'{key}.{name} is missing; each of {GROUPS} needs its own')


@HOOKS.register_module()
class PreflightHook(Hook):
    """Checks model and data of a training run against each other, before its first iteration.

    Labels of all images are looked at, a few images of each data set are read, and one of them goes through the
    network; the random state is left as it was. ``tools/train.py`` calls :func:`check_config` before anything is built;
    with other tools this hook does.

    Raises:
        ValueError: Labels and classes do not fit, the attack has no victim, there is no image or a batch would hold a
            single one, images differ in size, are too small for the network or are not in 0..255, or those of training
            and validation differ in size where tokens are routed.

    Examples:
        >>> custom_hooks = [dict(type='PreflightHook')]
    """

    # After BindVictimHook.
    priority = 'HIGH'

    def before_train(self, runner: Runner) -> None:
        """Check all that is built."""
        check_config(runner.cfg)
        model = bare_model(runner.model)
        preprocessor = model.data_preprocessor
        _check_attack(model, preprocessor)
        _check_batches(runner.train_dataloader)
        shapes = {}
        for key in ('train_dataloader', 'val_dataloader'):
            if key == 'val_dataloader' and runner.val_loop is None:
                continue
            # What a data set draws for a check must not change what it draws in training.
            with preserve_rng_state():
                shapes[key] = _check_dataset(getattr(runner, key).dataset, key, model)
        if placement_of(model).reads_tokens:
            _check_lengths(shapes)


def _names(given: Any, wanted: str) -> bool:
    """Whether the ``type`` of a config, a class or a name with or without a scope, is the class of that name."""
    return (given.split('.')[-1] if isinstance(given, str) else getattr(given, '__name__', None)) == wanted


def _check_mode(classifier: type, mode: str) -> None:
    takes_pairs = 'adv_inputs' in inspect.signature(classifier.forward).parameters
    if mode == 'pair' and not takes_pairs:
        raise ValueError(
            f"data_preprocessor.mode='pair' hands adv_inputs to {classifier.__name__}, which ignores them; use "
            "mode='replace', or model.type='RobustClassifier'"
        )
    if mode == 'replace' and takes_pairs:
        raise ValueError(
            f"data_preprocessor.mode='replace' takes the clean images away from {classifier.__name__}, which needs "
            "both; use mode='pair'"
        )


def _check_attack(model: Any, preprocessor: Any) -> None:
    if isinstance(preprocessor, AdvDataPreprocessor):
        _check_mode(type(model), preprocessor.mode)
        if preprocessor.attack_cfg is not None and not preprocessor.has_victim:
            raise ValueError(
                'data_preprocessor: AdvDataPreprocessor has no victim to attack: use a RobustClassifier, or add '
                "dict(type='BindVictimHook') to custom_hooks"
            )
    if isinstance(model, RobustClassifier) and getattr(preprocessor, 'attack_cfg', None) is None:
        raise ValueError(
            'data_preprocessor.attack is missing: a RobustClassifier learns from adversarial images, for example '
            "data_preprocessor=dict(type='AdvDataPreprocessor', attack=dict(type='TRADESAttack', eps=8/255))"
        )


def _check_batches(dataloader: DataLoader) -> None:
    batch_size = dataloader.batch_size or getattr(dataloader.batch_sampler, 'batch_size', None)
    if batch_size == 1:
        raise ValueError(
            'train_dataloader.batch_size=1: batch statistics do not exist for a single image; use at least 2'
        )
    # An endless sampler has no last batch, and a batch sampler need not tell its size.
    if batch_size is None or isinstance(dataloader.sampler, InfiniteSampler):
        return
    count = len(dataloader.sampler)
    if dataloader.drop_last or getattr(dataloader.batch_sampler, 'drop_last', False):
        if count < batch_size:
            raise ValueError(
                f'train_dataloader.batch_size={batch_size} is more than the {count} images that a process gets of '
                'train_dataloader.dataset, and drop_last=True leaves no batch'
            )
    elif count % batch_size == 1:
        raise ValueError(
            f'train_dataloader.batch_size={batch_size} leaves a last batch of a single image out of {count}; set '
            'train_dataloader.drop_last=True or another batch size'
        )


def check_data(
    dataset: Dataset,
    key: str,
    num_classes: Optional[int],
    samples: Sequence[dict] = (),
    of_preprocessor: Optional[int] = None,
) -> None:
    """Check a data set against the classes of a model.

    Args:
        key: Config key of its loader, for errors.
        num_classes: K, or None where the model does not tell.
        of_preprocessor: Classes that the data preprocessor counts, if it does.

    Raises:
        ValueError: There is no image, or classes or labels do not fit.
    """
    if not len(dataset):
        raise ValueError(f'{key}.dataset ({type(dataset).__name__}) holds no image')
    if num_classes is not None:
        _check_classes(dataset, key, num_classes, of_preprocessor)
        _check_labels(dataset, samples, key, num_classes)


def _check_dataset(dataset: Dataset, key: str, model: nn.Module) -> Optional[tuple[int, ...]]:
    """Check a data set; the shape of its images, where they were looked at."""
    # Spread over the data set.
    count = min(_PROBES, len(dataset)) if isinstance(model.data_preprocessor, AdvDataPreprocessor) else 0
    samples = [dataset[index * len(dataset) // count] for index in range(count)]
    if samples:
        check_images([sample['inputs'] for sample in samples], key)
        _check_size(samples[0]['inputs'], key, model)
    num_classes = getattr(getattr(model, 'head', None), 'num_classes', None)
    check_data(dataset, key, num_classes, samples, getattr(model.data_preprocessor, 'num_classes', None))
    return tuple(samples[0]['inputs'].shape) if samples else None


def _check_size(image: Tensor, key: str, model: nn.Module) -> None:
    """Let the network run on one image of the data set, (C, H, W)."""
    advice = f'enlarge them, with a Resize in {key}.dataset.pipeline'
    device = next(model.parameters()).device
    with Victim.from_classifier(model).frozen() as victim, torch.no_grad(), size_must_fit(image.shape, advice):
        victim(image[None].to(device) / 255)


def _check_lengths(shapes: Mapping[str, Optional[tuple[int, ...]]]) -> None:
    """Refuse to choose the best checkpoint at a sequence length that token routers never met in training."""
    if len(set(shapes.values())) > 1:
        found = ', '.join(f'{key}.dataset.pipeline gives images of {shape}' for key, shape in shapes.items())
        raise ValueError(
            f"backbone.routing='token' needs sequences of one length in training and validation, but {found}; set the "
            'same crop_size or scale in both'
        )


def _parts(dataset: Dataset) -> Iterator[Dataset]:
    """The data sets inside wrappers such as ``ConcatDataset`` and ``RepeatDataset``."""
    single = getattr(dataset, 'dataset', None)
    inner = getattr(dataset, 'datasets', [] if single is None else [single])
    if not inner:
        yield dataset
    for part in inner:
        yield from _parts(part)


def _check_classes(dataset: Dataset, key: str, num_classes: int, of_preprocessor: Optional[int]) -> None:
    if of_preprocessor not in (None, num_classes):
        raise ValueError(
            f'model.head.num_classes={num_classes} differs from data_preprocessor.num_classes={of_preprocessor}'
        )
    classes = (getattr(dataset, 'metainfo', None) or {}).get('classes')
    if classes is not None and len(classes) != num_classes:
        raise ValueError(
            f'model.head.num_classes={num_classes} differs from the {len(classes)} classes of {key}.dataset '
            f'({type(dataset).__name__})'
        )


def _check_labels(dataset: Dataset, samples: Sequence[dict], key: str, num_classes: int) -> None:
    labels = {
        label
        for part in _parts(dataset)
        if hasattr(part, 'get_cat_ids')
        for index in range(len(part))
        for label in part.get_cat_ids(index)
    }
    # Of a data set that cannot tell its labels without its images, these alone.
    for sample in samples:
        if 'gt_label' in sample['data_samples']:
            labels.update(sample['data_samples'].gt_label.tolist())
    wrong = sorted(label for label in labels if not 0 <= label < num_classes)
    if wrong:
        raise ValueError(
            f'{key}.dataset ({type(dataset).__name__}) has labels {wrong[:5]} outside [0, {num_classes}), the range of '
            'model.head.num_classes'
        )
