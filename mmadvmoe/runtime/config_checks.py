"""Find mistakes in the keys of a config, and in how long its schedules are."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import EpochBasedTrainLoop, Runner
from mmpretrain.registry import MODELS

from mmadvmoe.models import RobustClassifier
from mmadvmoe.models.backbones import check_widths
from mmadvmoe.moe import GROUPS
from mmadvmoe.utils import did_you_mean, type_name

# What MMEngine and the tools read of a config beside the arguments of a Runner.
_FURTHER_KEYS = (
    'activation_checkpointing compile custom_imports efficient_conv_bn_eval env_cfg find_unused_parameters '
    'model_wrapper_cfg runner_type sync_bn tta_model tta_pipeline'
).split()
# Not imported: training is a layer above this one.
_TURNS_CONSTRUCTOR = 'AlternatingOptimWrapperConstructor'
_KEYWORD = re.compile(r"unexpected keyword argument '(\w+)'")


def check_config(cfg: Mapping[str, Any]) -> None:
    """Check what a whole training config alone can tell, before anything is built.

    Raises:
        ValueError: A group of a training in turns has no schedule or an unknown name, a schedule begins after training
            ends, clean and adversarial images go to a classifier that takes only one of them, there are two data
            preprocessors, or a width is no whole number.
    """
    constructor = (cfg.get('optim_wrapper') or {}).get('constructor')
    scheduler = cfg.get('param_scheduler')
    # One per group, which MMEngine's Runner looks up before any hook runs, to stop with a bare KeyError. A list or a
    # single scheduler applies to both groups.
    if type_name(constructor or '') == _TURNS_CONSTRUCTOR and isinstance(scheduler, dict) and 'type' not in scheduler:
        check_groups('param_scheduler', scheduler)
    check_schedules(cfg)
    model = cfg.get('model') or {}
    check_widths(model)
    outer = cfg.get('data_preprocessor') or {}
    preprocessor = model.get('data_preprocessor') or outer
    if outer and model.get('data_preprocessor', outer) != outer:
        raise ValueError(
            'data_preprocessor is set in model and at the top level, which MMEngine does not read then: write all to '
            'model.data_preprocessor, and data_preprocessor=None'
        )
    kind = model.get('type')
    if isinstance(kind, str):
        kind = MODELS.get(kind)
    default = 'AdvDataPreprocessor' if kind is RobustClassifier else ''
    if kind is not None and type_name(preprocessor.get('type', default)) == 'AdvDataPreprocessor':
        check_mode(kind, preprocessor.get('mode', 'pair'))


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


def check_mode(classifier: type, mode: str) -> None:
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


def check_options(options: Mapping[str, Any], cfg: Mapping[str, Any]) -> None:
    """Check that ``--cfg-options``, values by dotted key, are about something that is there.

    Raises:
        ValueError: The first part of a key is not in the config and read by nothing; or the config file has handed it
            on to its settings, as it does ``train_attack``, so that a change comes too late.
    """
    known = sorted({*inspect.signature(Runner.__init__).parameters, *_FURTHER_KEYS} - {'self', 'cfg'})
    read = {name: value for name, value in cfg.items() if name in known}
    for key in options:
        first, *rest = key.split('.')
        if first not in (*known, *cfg):
            raise ValueError(
                f'--cfg-options {key}: nothing reads {first!r}{did_you_mean(first, [*known, *cfg])}; the config has '
                f'{", ".join(cfg)}'
            )
        if first in known or not cfg[first]:
            continue
        plain = not isinstance(cfg[first], (Mapping, list, tuple))  # the same number may be there for another reason
        used = [path for path, name, value in _walk(read) if value == cfg[first] and (name == first or not plain)]
        if used:
            places = ' and '.join('.'.join([re.sub(r'\[(\d+)\]', r'.\1', path), *rest]) for path in used)
            raise ValueError(f'--cfg-options {key}: the config file has read {first!r} already; set {places} instead')


@contextmanager
def keywords_named(cfg: Mapping[str, Any]) -> Iterator[None]:
    """While building from a config, name the key of a keyword argument that its class does not take.

    Raises:
        TypeError: With the path of the key in the message.
    """
    try:
        yield
    except TypeError as error:
        found = _KEYWORD.search(str(error))
        # A Config is no Mapping.
        paths = [path for path, name, _ in _walk(dict(cfg.items())) if found and name == found[1]]
        if not paths:
            raise
        raise TypeError(f'the config has {" and ".join(paths)}, which nothing takes there. {error}') from error


def _walk(part: Any, path: str = '') -> Iterator[tuple[str, Any, Any]]:
    """Path, key and value of all that stands in nested dicts and lists."""
    inner = enumerate(part) if isinstance(part, (list, tuple)) else part.items() if isinstance(part, Mapping) else ()
    for name, value in inner:
        here = f'{path}[{name}]' if isinstance(name, int) else f'{path}.{name}' if path else str(name)
        yield here, name, value
        yield from _walk(value, here)


def schedules(param_scheduler: Any) -> dict[str, Sequence[Any]]:
    """The schedulers of a config or a Runner by their key in the config: one for all, or one for each optimizer."""
    if isinstance(param_scheduler, Mapping) and 'type' not in param_scheduler:
        parts = {f'param_scheduler.{name}': part for name, part in param_scheduler.items()}
    else:
        parts = {'param_scheduler': param_scheduler}
    return {key: part if isinstance(part, (list, tuple)) else [part] for key, part in parts.items() if part is not None}


def check_schedules(cfg: Mapping[str, Any]) -> None:
    """Check that every schedule begins before training ends, and that no hook begins after it.

    Raises:
        ValueError: One does, as a schedule that follows a warm-up which is longer than the training.
    """
    train_cfg = cfg.get('train_cfg') or {}
    lengths = {True: train_cfg.get('max_epochs'), False: train_cfg.get('max_iters')}
    for key, parts in schedules(cfg.get('param_scheduler')).items():
        for index, part in enumerate(parts):
            if not isinstance(part, Mapping):
                continue
            by_epoch = part.get('by_epoch', True)
            length, begin = lengths[by_epoch], part.get('begin', 0)
            if length is None or begin < length:
                continue
            unit, setting = ('epochs', 'max_epochs') if by_epoch else ('iterations', 'max_iters')
            before = parts[index - 1] if index else part
            raise ValueError(
                f'{key}: {_name(part)} begins after {begin} {unit} (begin={begin}), and training is {length} {unit} '
                f'long (train_cfg.{setting}); before it {_name(before)} takes {before.get("end", begin)} {unit} (end). '
                f'Shorten end and begin, or set train_cfg.{setting} to more than {begin}'
            )
    for hook in cfg.get('custom_hooks') or ():
        for key, setting in (('begin_epoch', 'max_epochs'), ('begin_iter', 'max_iters')):
            if isinstance(hook, Mapping) and (hook.get(key) or 0) > (train_cfg.get(setting) or math.inf):
                raise ValueError(
                    f'custom_hooks: {_name(hook)} begins after training, with {key}={hook[key]} and '
                    f'train_cfg.{setting}={train_cfg[setting]}; set {key} to at most {train_cfg[setting]}'
                )


def check_by_epoch(runner: Runner, hook: Hook) -> None:
    """Raise ValueError where a hook acts at the end of epochs, and training is not counted in them."""
    if not isinstance(runner.train_loop, EpochBasedTrainLoop):
        raise ValueError(
            f'train_cfg.by_epoch=False: {type(hook).__name__} acts at the end of epochs; set by_epoch=True or remove it'
        )


def warn_of_ended_schedules(runner: Runner) -> None:
    """Warn where a run goes on longer than its schedules, which are those of the run that is resumed."""
    for key, parts in schedules(runner.param_schedulers).items():
        given = schedules(runner.cfg.get('param_scheduler'))
        given = given.get(key) or given.get('param_scheduler') or [{}]
        if not parts or given[-1].get('end') is not None:
            continue
        last = parts[-1]
        length = runner.max_epochs if last.by_epoch else runner.max_iters
        if last.end < length:
            unit = 'epochs' if last.by_epoch else 'iterations'
            runner.logger.warning(
                f'{key}: the {type(last).__name__} of the run that is resumed ends after {last.end} {unit}, and '
                f'training now goes on to {length}: {last.param_name} stays where it ends. To stretch the schedule, '
                'begin anew from the weights alone: load_from=..., resume=False'
            )


def _name(part: Mapping[str, Any]) -> str:
    return type_name(part['type'])
