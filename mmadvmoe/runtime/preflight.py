"""Find mistakes in a config before any long work starts."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from mmengine.dataset import InfiniteSampler
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.optim import OptimWrapperDict
from mmengine.runner import Runner
from mmengine.utils.dl_utils import has_batch_norm
from mmpretrain.registry import HOOKS
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from mmadvmoe.attacks import Victim
from mmadvmoe.attacks.views import ROUTES
from mmadvmoe.cost import count_cost, image_must_fit
from mmadvmoe.models import AdvDataPreprocessor, RobustClassifier
from mmadvmoe.models.data_preprocessor import NO_VICTIM, check_images
from mmadvmoe.moe import placement_of, router_modules
from mmadvmoe.moe.backbone import check_has_experts, check_pretrained
from mmadvmoe.utils import bare_model, some

from .config_checks import check_config, check_mode, warn_of_ended_schedules
from .seeding import preserve_rng_state

# Images of each data set that are read ahead of training.
_PROBES = 16


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

    def __init__(self) -> None:
        self._trained_on: Sequence[str] | None = None

    def before_train(self, runner: Runner) -> None:
        """Check all that is built."""
        check_config(runner.cfg)
        model = bare_model(runner.model)
        preprocessor = model.data_preprocessor
        _check_attack(model, preprocessor)
        if isinstance(model, RobustClassifier):
            (_check_turns if isinstance(runner.optim_wrapper, OptimWrapperDict) else _check_joint)(model)
        else:
            check_pretrained(model, model)  # which a RobustClassifier does itself
        check_batches(runner)
        if runner.iter:
            warn_of_ended_schedules(runner)
        shapes, classes = {}, {}
        for key in ('train_dataloader', 'val_dataloader'):
            if key == 'val_dataloader' and runner.val_loop is None:
                continue
            classes[key] = _class_names(getattr(runner, key).dataset)
            # What a data set draws for a check must not change what it draws in training.
            with preserve_rng_state():
                shapes[key] = _check_dataset(getattr(runner, key).dataset, key, model)
        _check_class_names(classes)
        attacks = (getattr(each, 'attack', None) for each in getattr(preprocessor, '_attacks', {}).values())
        theirs = classes['train_dataloader']
        for part in (*model.modules(), *attacks):
            names = getattr(getattr(part, 'groups', None), 'classes', None)
            if names and theirs and names != list(theirs):
                raise ValueError(
                    f'{type(part).__name__}: groups go by classes={some(names, 20)}, and the data set of training has '
                    f'{some(theirs, 20)}: give classes as it numbers them'
                )
        if runner.val_loop is not None:
            check_topk(runner.val_evaluator.metrics, 'val_evaluator', _classes_of(model))
        if placement_of(model).reads_tokens:
            _check_lengths(shapes)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Note the classes that the weights were trained on, and that they are those of a mixture where they must be.

        Raises:
            ValueError: They are those of a dense network.
        """
        file = runner.cfg.get('load_from') or 'the latest of this run'
        check_has_experts(checkpoint, bare_model(runner.model), file)
        self._trained_on = (checkpoint.get('meta', {}).get('dataset_meta') or {}).get('classes')

    def before_test(self, runner: Runner) -> None:
        """Check the classes of the test set against those of training.

        Raises:
            ValueError: They are others, or in another order.
        """
        _check_class_names(
            {
                'training (meta.dataset_meta of the checkpoint)': self._trained_on,
                'test_dataloader': _class_names(runner.test_dataloader.dataset),
            }
        )


def _check_attack(model: Any, preprocessor: Any) -> None:
    if isinstance(preprocessor, AdvDataPreprocessor):
        check_mode(type(model), preprocessor.mode)
        if preprocessor.attack_cfg is not None and not preprocessor.has_victim:
            raise ValueError(NO_VICTIM)
    if isinstance(model, RobustClassifier) and getattr(preprocessor, 'attack_cfg', None) is None:
        raise ValueError(
            'data_preprocessor.attack is missing: a RobustClassifier learns from adversarial images, for example '
            "data_preprocessor=dict(type='AdvDataPreprocessor', attack=dict(type='TRADESAttack', eps=8/255))"
        )


def _check_turns(model: RobustClassifier) -> None:
    attack, of_router = model.data_preprocessor.attack_cfg or {}, model.data_preprocessor.router_attack_cfg
    if (of_router or attack).get('route') == 'held' and placement_of(model).num_routers:
        raise ValueError(
            "route='held' of the attack would be that of the router's turn, too, where nothing would attack "
            "routes: set data_preprocessor.router_attack, such as dict(type='ClassGroupAttack', ...)"
        )


def _check_joint(model: RobustClassifier) -> None:
    """Where no turns are taken, raise for what speaks of the router's turn, and for routers that nothing trains."""
    turns = "train in turns (constructor='AlternatingOptimWrapperConstructor' and AlternatingOptimHook)"
    router_attack = getattr(model.data_preprocessor, 'router_attack_cfg', None)
    for key, value in (('router_loss', model.router_loss), ('data_preprocessor.router_attack', router_attack)):
        if value is not None:
            raise ValueError(
                f"model.{key} is that of the router's turn, which joint training lacks: remove it, or {turns}"
            )
    taught = model.route == ROUTES[0] or any(objective.needs_routers for objective in model.robust_loss)
    # The gates of tokens have a gradient of their own, but for the constant one.
    routers = [each for each in router_modules(model) if getattr(each, 'softmax', 'after') == 'after']
    routers = [each for each in routers if any(p.requires_grad for p in each.parameters())]
    if not taught and any(getattr(each, 'top_k', 1) == 1 for each in routers):
        raise ValueError(
            f'model.route={model.route!r} cuts the gradient of the gate, and nothing in model.robust_loss trains '
            f'the routers: add an objective of them, such as ClassGroupLoss, or {turns}'
        )


def check_batches(runner: Runner) -> None:
    """Check that training has batches; to be called before it as well, as MMEngine counts them before any hook runs.

    Raises:
        ValueError: There is none, or one would hold a single image.
    """
    if runner.train_loop is None:
        return
    dataloader = runner.train_loop.dataloader
    batch_size = dataloader.batch_size or getattr(dataloader.batch_sampler, 'batch_size', None)
    single = has_batch_norm(runner.model)
    if batch_size == 1 and single:
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
    elif count % batch_size == 1 and single:
        raise ValueError(
            f'train_dataloader.batch_size={batch_size} leaves a last batch of a single image out of {count}; set '
            'train_dataloader.drop_last=True or another batch size'
        )


def check_data(
    dataset: Dataset,
    key: str,
    num_classes: int | None,
    samples: Sequence[dict] = (),
    of_preprocessor: int | None = None,
) -> None:
    """Check a data set, of the loader ``key``, against K and against the classes that the data preprocessor counts.

    Raises:
        ValueError: There is no image, or classes or labels do not fit.
    """
    if not len(dataset):
        raise ValueError(f'{key}.dataset ({type(dataset).__name__}) holds no image')
    if num_classes is not None:
        _check_classes(dataset, key, num_classes, of_preprocessor)
        _check_labels(dataset, samples, key, num_classes)


def _check_dataset(dataset: Dataset, key: str, model: nn.Module) -> tuple[int, ...] | None:
    """Check a data set; the shape of its images, where they were looked at."""
    # Spread over the data set.
    count = min(_PROBES, len(dataset)) if isinstance(model.data_preprocessor, AdvDataPreprocessor) else 0
    samples = [dataset[index * len(dataset) // count] for index in range(count)]
    if samples:
        check_images([sample['inputs'] for sample in samples], key)
        _check_size(samples[0]['inputs'], key, model)
    of_preprocessor = getattr(model.data_preprocessor, 'num_classes', None)
    check_data(dataset, key, _classes_of(model), samples, of_preprocessor)
    return tuple(samples[0]['inputs'].shape) if samples else None


def _check_size(image: Tensor, key: str, model: nn.Module) -> None:
    """Let the network run on one image of the data set, (C, H, W)."""
    advice = f'enlarge them, with a Resize in {key}.dataset.pipeline'
    device = next(model.parameters()).device
    victim = Victim(model)
    with victim.frozen(), torch.no_grad(), image_must_fit(image.shape, advice):
        victim(image[None].to(device) / 255)
    if victim.num_routers and key == 'train_dataloader':
        cost = count_cost(model, image.shape)
        costly = cost.router_gflops > cost.pathway_gflops
        print_log(
            f'Of one image, {victim.num_routers} router(s) take {cost.router_gflops * 1e3:.4f} million multiply-adds '
            f'beside the {cost.pathway_gflops * 1e3:.4f} million of a pathway'
            + (': routing costs more than it can save. Take a smaller backbone.router' * costly),
            logger='current',
            level=logging.WARNING if costly else logging.INFO,
        )


def _check_lengths(shapes: Mapping[str, tuple[int, ...] | None]) -> None:
    """Refuse to choose the best checkpoint at a sequence length that token routers never met in training."""
    if len(set(shapes.values())) > 1:
        found = ', '.join(f'{key}.dataset.pipeline gives images of {shape}' for key, shape in shapes.items())
        raise ValueError(
            f"backbone.routing='token' needs sequences of one length in training and validation, but {found}; set the "
            'same crop_size or scale in both'
        )


def _classes_of(model: nn.Module) -> int | None:
    return getattr(getattr(model, 'head', None), 'num_classes', None)


def check_topk(metrics: Sequence[Any], key: str, num_classes: int | None) -> None:
    """Check that metrics look for the label among no more classes than there are; ``key`` is that of the evaluator.

    Raises:
        ValueError: One does not.
    """
    for metric in metrics:
        most = max(getattr(metric, 'topk', None) or (0,))
        if num_classes is not None and most > num_classes:
            raise ValueError(
                f'{key}: {type(metric).__name__} with topk={metric.topk} looks for the label among the best {most} of '
                f'{num_classes} classes; set topk to at most {num_classes}'
            )


def _class_names(dataset: Dataset) -> Sequence[str] | None:
    return (getattr(dataset, 'metainfo', None) or {}).get('classes')


def _check_class_names(found: Mapping[str, Sequence[str] | None]) -> None:
    """Refuse data sets, by their keys, whose labels mean something else; those that name no classes are left out."""
    known = {key: list(names) for key, names in found.items() if names is not None}
    for (first, ours), (second, theirs) in pairwise(known.items()):
        if ours == theirs:
            continue
        label = next((i for i, pair in enumerate(zip(ours, theirs)) if len(set(pair)) > 1), min(len(ours), len(theirs)))
        names = [repr(each[label]) if label < len(each) else 'no class' for each in (ours, theirs)]
        raise ValueError(
            f'label {label} is {names[0]} in {first} and {names[1]} in {second}, so that accuracy means nothing: give '
            f'both the same order with dataset.metainfo=dict(classes=[...]) (CustomDataset numbers folders by name)'
        )


def _labels(dataset: Dataset, rows: Sequence[int] | None = None) -> set[int] | None:
    """The labels of a data set, or of its ``rows``; None where one inside cannot tell them without its images."""
    rows = range(len(dataset)) if rows is None else rows
    if hasattr(dataset, 'get_cat_ids'):
        return {label for row in rows for label in dataset.get_cat_ids(row)}
    if hasattr(dataset, 'datasets'):
        parts = [_labels(part) for part in dataset.datasets]
        return None if None in parts else set().union(*parts)
    if isinstance(dataset, Subset):
        return _labels(dataset.dataset, [dataset.indices[row] for row in rows])
    # A wrapper of somebody else may give labels of its own.
    known = type(dataset).__module__.startswith(('mmengine.', 'mmpretrain.', 'mmadvmoe.'))
    return _labels(dataset.dataset) if known and hasattr(dataset, 'dataset') else None


def _check_classes(dataset: Dataset, key: str, num_classes: int, of_preprocessor: int | None) -> None:
    if of_preprocessor not in (None, num_classes):
        raise ValueError(
            f'model.head.num_classes={num_classes} differs from data_preprocessor.num_classes={of_preprocessor}'
        )
    classes = _class_names(dataset)
    if classes is not None and len(classes) != num_classes:
        raise ValueError(
            f'model.head.num_classes={num_classes} differs from the {len(classes)} classes of {key}.dataset '
            f'({type(dataset).__name__})'
        )


def _check_labels(dataset: Dataset, samples: Sequence[dict], key: str, num_classes: int) -> None:
    labels = _labels(dataset)
    if labels is not None:
        missing = sorted(set(range(num_classes)) - labels)
        names = _class_names(dataset) or range(num_classes)
        if missing:
            print_log(
                f'{key}.dataset ({type(dataset).__name__}) has no image of {len(missing)} of {num_classes} classes: '
                f'{", ".join(str(names[label]) for label in missing[:5])}{", ..." if len(missing) > 5 else ""}. '
                'Accuracy on it says nothing of them; the first images of a sorted data set (indices=...) are of one '
                'class',
                logger='current',
                level=logging.WARNING,
            )
    # Of a data set that cannot tell its labels without its images, these alone.
    labels = set() if labels is None else labels
    for sample in samples:
        if 'gt_label' in sample['data_samples']:
            labels.update(sample['data_samples'].gt_label.tolist())
    wrong = sorted(label for label in labels if not 0 <= label < num_classes)
    if wrong:
        raise ValueError(
            f'{key}.dataset ({type(dataset).__name__}) has labels {wrong[:5]} outside [0, {num_classes}), the range of '
            'model.head.num_classes'
        )
