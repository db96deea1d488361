"""What a report itself finds out of a model; the other parts come from the tools that measure them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Optional

from mmengine.config import Config

from mmadvmoe.apis import load_robust_model
from mmadvmoe.attacks import RoutePGD, Victim, build_attack
from mmadvmoe.cost import count_cost
from mmadvmoe.evaluation import attack_examples
from mmadvmoe.evaluation.data import as_dataset, spread_images
from mmadvmoe.moe import placement_of
from mmadvmoe.registry import ATTACKS
from mmadvmoe.runtime.atomic import write_atomically
from mmadvmoe.runtime.launch import check_checkpoint, load_config

from .results import MODEL, PARTS, TRAINING
from .saved_examples import SavedExamples, patch_choices, save_examples
from .training_log import read_training_log

#: Images in a report, and how many are attacked to choose them from.
_SHOWN, _TRIED = 6, 64


def describe_model(folder: Path, name: str, config: str, checkpoint: str) -> None:
    """Write what the model is, and what its training logged, into its folder.

    The training log is looked for in the folder of the checkpoint, where training writes it.

    Args:
        folder (Path): Folder of the model.
        name (str): What the model is called in the report.
        config (str): Its config file, with ``test_dataloader`` and ``test_cfg.attacks``.
        checkpoint (str): Its checkpoint file.

    Raises:
        FileNotFoundError: There is no such config or checkpoint.
        ValueError: The config does not say how the model is tested, or the folder holds results of another model.
    """
    cfg = load_config(config)
    check_checkpoint(checkpoint, 'CHECKPOINT')
    if cfg.get('test_dataloader') is None or not (cfg.get('test_cfg') or {}).get('attacks'):
        raise ValueError(f'{config} must set test_dataloader and test_cfg.attacks')
    identity = dict(
        name=name,
        checkpoint_sha256=hashlib.sha256(Path(checkpoint).read_bytes()).hexdigest(),
        config_text=cfg.pretty_text,
    )
    before = folder / MODEL
    if before.is_file():
        _check_same(json.loads(before.read_text(encoding='utf-8')), identity, folder)
    victim = Victim(load_robust_model(cfg, checkpoint))
    placement = placement_of(victim.classifier)
    description = dict(
        **identity,
        config=config,
        checkpoint=checkpoint,
        work_dir=str(Path(checkpoint).parent),
        class_names=_class_names(cfg, victim),
        num_experts=victim.num_experts,
        routing=placement.name,
        routers=list(placement.router_names),
        cost=asdict(count_cost(cfg)),
    )
    _write_json(before, description)
    scalars = read_training_log(description['work_dir'])
    if scalars:
        _write_json(folder / TRAINING, scalars)


def _check_same(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    changed = [key for key, value in now.items() if before.get(key) != value]
    if changed:
        raise ValueError(
            f'{folder} holds results of another model: {", ".join(changed)} differ. Give the model another name, give '
            f'another folder, or remove {folder} to measure it anew'
        )


def make_examples(folder: Path, device: str) -> None:
    """Attack some test images, spread over the data set, and keep those that tell most.

    Args:
        folder (Path): Folder of the model, with its description.
        device (str): Where to attack.
    """
    model = json.loads((folder / MODEL).read_text(encoding='utf-8'))
    cfg = load_config(model['config'])
    victim = Victim(load_robust_model(cfg, model['checkpoint'], device))
    images, labels = spread_images(as_dataset(cfg.test_dataloader.dataset), victim.classifier.data_preprocessor, _TRIED)
    name = _shown_attack(cfg.test_cfg.attacks)
    examples = attack_examples(victim, build_attack(cfg.test_cfg.attacks[name], victim), images, labels).telling(_SHOWN)
    patches = [patch_choices(victim, view.to(device)) for view in (examples.images, examples.adversarial)]
    save_examples(folder / PARTS['examples'], SavedExamples(examples, name, *patches))


def _shown_attack(attacks: Mapping[str, Mapping]) -> str:
    """The attack that moves routes, if there is one."""
    for name, cfg in attacks.items():
        kind: Optional[type] = ATTACKS.get(cfg['type']) if isinstance(cfg['type'], str) else cfg['type']
        if kind is not None and issubclass(kind, RoutePGD):
            return name
    return next(iter(attacks))


def _class_names(cfg: Config, victim: Victim) -> list[str]:
    names = getattr(as_dataset(cfg.test_dataloader.dataset), 'metainfo', {}).get('classes') or range(victim.num_classes)
    return [str(name) for name in names]


def _write_json(path: Path, content: Any) -> None:
    write_atomically(path, (json.dumps(content, indent=1) + '\n').encode())
