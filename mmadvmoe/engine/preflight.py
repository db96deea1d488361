"""Find mistakes in a config before any long work starts."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Optional

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from mmpretrain.registry import HOOKS, MODELS

from mmadvmoe.models import AdvDataPreprocessor, RobustClassifier

from .optim_constructor import check_param_scheduler

_ALTERNATING = 'AlternatingOptimWrapperConstructor'


def check_config(cfg: Mapping[str, Any]) -> None:
    """Check what a config alone can tell.

    Args:
        cfg (Mapping): A whole training config.

    Raises:
        ValueError: A group of a training in turns has no schedule or an unknown name, or clean and adversarial images
            go to a classifier that takes only one of them.
    """
    optim_wrapper = cfg.get('optim_wrapper') or {}
    if optim_wrapper.get('constructor') == _ALTERNATING and cfg.get('param_scheduler') is not None:
        check_param_scheduler(cfg['param_scheduler'])
    model = cfg.get('model') or {}
    preprocessor = model.get('data_preprocessor') or cfg.get('data_preprocessor') or {}
    if model.get('type') and preprocessor.get('type') == 'AdvDataPreprocessor':
        _check_mode(MODELS.get(model['type']), preprocessor.get('mode', 'pair'))


@HOOKS.register_module()
class PreflightHook(Hook):
    """Checks model and data of a training run against each other, before its first iteration.

    Raises:
        ValueError: Labels and classes do not fit, the attack has no victim, or a batch would hold a single image.
    """

    priority = 'HIGHEST'

    def before_run(self, runner: Runner) -> None:
        """Check the config."""
        if runner.cfg:
            check_config(runner.cfg)

    def before_train_epoch(self, runner: Runner) -> None:
        """Check what is built, when all other hooks have prepared it."""
        if runner.iter > 0 and not runner.cfg.get('resume'):
            return
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        preprocessor = model.data_preprocessor
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
        _check_batches(runner.train_dataloader)
        for key in ('train_dataloader', 'val_dataloader'):
            if key == 'val_dataloader' and runner.val_loop is None:
                continue
            dataset = getattr(runner, key).dataset
            _check_labels(dataset, key, _num_classes(model))


def _check_mode(classifier: Optional[type], mode: str) -> None:
    if classifier is None:
        return
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


def _num_classes(model: Any) -> Optional[int]:
    return getattr(getattr(model, 'head', None), 'num_classes', None)


def _check_batches(dataloader: Any) -> None:
    batch_size = dataloader.batch_size or getattr(dataloader.batch_sampler, 'batch_size', None)
    if batch_size == 1:
        raise ValueError(
            'train_dataloader.batch_size=1: batch statistics do not exist for a single image; use at least 2'
        )
    if batch_size is None or dataloader.drop_last or getattr(dataloader.batch_sampler, 'drop_last', False):
        if len(dataloader) == 0:
            raise ValueError(
                f'train_dataloader.batch_size={batch_size} is more than the {len(dataloader.sampler)} images of '
                'train_dataloader.dataset, and drop_last=True leaves no batch'
            )
        return
    if len(dataloader.sampler) % batch_size == 1:
        raise ValueError(
            f'train_dataloader.batch_size={batch_size} leaves a last batch of a single image out of '
            f'{len(dataloader.sampler)}; set train_dataloader.drop_last=True or another batch size'
        )


def _check_labels(dataset: Any, key: str, num_classes: Optional[int]) -> None:
    classes = (getattr(dataset, 'metainfo', None) or {}).get('classes')
    if num_classes is None:
        return
    if classes is not None and len(classes) != num_classes:
        raise ValueError(
            f'model.head.num_classes={num_classes} differs from the {len(classes)} classes of {key}.dataset '
            f'({type(dataset).__name__})'
        )
    if not hasattr(dataset, 'get_cat_ids'):
        return
    labels = {label for index in range(len(dataset)) for label in dataset.get_cat_ids(index)}
    wrong = sorted(label for label in labels if not 0 <= label < num_classes)
    if wrong:
        raise ValueError(
            f'{key}.dataset ({type(dataset).__name__}) has labels {wrong[:5]} outside [0, {num_classes}), the range of '
            'model.head.num_classes'
        )
