"""What a report itself finds out of a model; the other parts come from the tools that measure them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmadvmoe.apis import load_robust_model
from mmadvmoe.attacks import Victim, build_attack
from mmadvmoe.cost import count_cost
from mmadvmoe.diagnosis.soundness import in_percent, measure_eps_curve
from mmadvmoe.diagnosis.subject import Images, ThreatModel, attacks_of_test, write_json
from mmadvmoe.evaluation import attack_examples
from mmadvmoe.evaluation.data import as_dataset, class_names, spread_images
from mmadvmoe.evaluation.named_attacks import moves_routes
from mmadvmoe.moe import placement_of
from mmadvmoe.runtime.launch import check_checkpoint, load_config
from mmadvmoe.runtime.safe_load import load_from_local

from .results import MODEL, PARTS, TRAINING, DamagedFileError, SavedExamples, read_json, save_examples

#: Images in a report, and how many are attacked to choose them from.
_SHOWN, _TRIED = 6, 64
#: Images of a curve, if nothing else is asked for.
_ON_CURVE = 100
#: Where MMEngine's ``LocalVisBackend`` writes, below the folder that each start of a run makes for itself.
_SCALARS = '*/vis_data/scalars.json'
_COUNTERS = ('epoch', 'iter', 'step')


def describe_model(folder: Path, name: str, config: str, checkpoint: str) -> list[str]:
    """Write the description of a model, and what its training logged, into its folder.

    The config needs ``test_dataloader`` and ``test_cfg.attacks``. The training log is looked for in the folder of the
    checkpoint, where training writes it.

    Returns:
        list[str]: What is damaged of its training log: a sentence that names the file and the cure, or none.

    Raises:
        FileNotFoundError: There is no such config or checkpoint.
        DamagedFileError: ``model.json`` is there and damaged, so that nothing says whose results the folder holds.
        ValueError: The config does not say how the model is tested, or the folder holds results of another model.
    """
    cfg = load_config(config)
    check_checkpoint(checkpoint, 'CHECKPOINT')
    attacks_of_test(cfg)
    identity = dict(
        name=name,
        checkpoint_sha256=hashlib.sha256(Path(checkpoint).read_bytes()).hexdigest(),
        config_text=cfg.pretty_text,
    )
    if (folder / MODEL).is_file():
        before = read_json(folder, MODEL)
        changed = [key for key, value in identity.items() if before.get(key) != value]
        if changed:
            raise ValueError(
                f'{folder} holds results of another model: {", ".join(changed)} differ. Give the model another name, '
                f'give another folder, or remove {folder} to measure it anew'
            )
    victim = Victim(load_robust_model(cfg, checkpoint))
    placement = placement_of(victim.classifier)
    description = dict(
        **identity,
        config=config,
        checkpoint=checkpoint,
        work_dir=str(Path(checkpoint).parent),
        iteration=load_from_local(checkpoint, 'cpu').get('meta', {}).get('iter'),
        class_names=class_names(as_dataset(cfg.test_dataloader.dataset), victim.num_classes),
        num_experts=victim.num_experts,
        routing=placement.name,
        routers=list(placement.router_names),
        cost=asdict(count_cost(cfg)),
    )
    write_json(folder / MODEL, description)
    try:
        scalars = read_training_log(description['work_dir'])
    except DamagedFileError as error:
        return [str(error)]
    if scalars:
        write_json(folder / TRAINING, scalars, allow_nan=True)
    return []


def make_examples(folder: Path, device: str) -> None:
    """Attack some test images, spread over the data set, and keep those that tell most.

    The attack is the first of the config that moves routes, or else the first. The folder holds the description.
    """
    victim, images, labels, attacks = _attackable(folder, device, _TRIED)
    name = next((name for name in attacks if moves_routes(attacks[name])), next(iter(attacks)))
    examples = attack_examples(victim, build_attack(attacks[name], victim), images, labels).telling(_SHOWN)
    patches = [_patch_choices(victim, view.to(device)) for view in (examples.images, examples.adversarial)]
    save_examples(folder / PARTS['examples'], SavedExamples(examples, name, *patches))


def make_curve(folder: Path, device: str, num_images: int | None = None) -> None:
    """Measure robust accuracy over the size of the ball on some test images, spread over the data set.

    Norm, step size and steps are those of the first attack of the config that has them all. The folder holds the
    description.
    """
    victim, images, labels, attacks = _attackable(folder, device, num_images or _ON_CURVE)
    threat = ThreatModel.from_attacks(attacks)
    curve = measure_eps_curve(victim, Images(images.to(device), labels.to(device)), threat)
    content = dict(num_images=len(images), threat_model=asdict(threat), curves=dict(eps=in_percent('eps', curve)))
    write_json(folder / PARTS['curve'], dict(kind='curve', **content))


def _attackable(folder: Path, device: str, count: int) -> tuple[Victim, Tensor, Tensor, Mapping[str, Mapping]]:
    """The model that a folder describes, images of its test set, (B, 3, H, W), labels, and the attacks of its test."""
    model = read_json(folder, MODEL)
    cfg = load_config(model['config'])
    victim = Victim(load_robust_model(cfg, model['checkpoint'], device))
    images, labels = spread_images(as_dataset(cfg.test_dataloader.dataset), victim.classifier.data_preprocessor, count)
    return victim, images, labels, cfg.test_cfg.attacks


@torch.no_grad()
def _patch_choices(victim: Victim, images: Tensor) -> tuple[np.ndarray, ...]:
    """The first choice of each token, (B, T) for each layer; empty where no router reads tokens."""
    if not placement_of(victim.classifier).reads_tokens:
        return ()
    with victim.frozen():
        _, routings = victim.forward_routed(images)
    return tuple(routing.expert[..., 0].cpu().numpy() for routing in routings)


def read_training_log(work_dir: str | Path) -> dict[str, list[tuple[int, float]]]:
    """Read the scalars of a run, over all of its starts.

    A run that was interrupted and resumed has a file for each start. What a later start logged replaces what an earlier
    one had logged for the same iterations. MMEngine counts validations in epochs; here they get the iteration that was
    logged last before them.

    Returns:
        dict: For each scalar its points ``(iteration, value)`` in order. Empty where the work directory holds no log.

    Raises:
        DamagedFileError: A line of a log, other than a last one that was cut off, is not JSON or no record of scalars.
    """
    scalars: dict[str, list[tuple[int, float]]] = {}
    # The folders are named by the time of the start.
    for file in sorted(Path(work_dir).glob(_SCALARS)):
        _append(scalars, _records(file))
    return scalars


def _records(file: Path) -> list[dict]:
    lines = file.read_bytes().splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                # A killed run may leave half a line.
                break
            raise _damaged(file, number, f'not JSON: {error}') from None
        if not isinstance(record, dict) or not isinstance(record.get('step'), (int, float)):
            raise _damaged(file, number, f'no record of scalars: {line.decode()}')
        records.append(record)
    return records


def _damaged(file: Path, number: int, why: str) -> DamagedFileError:
    return DamagedFileError(f'{file}, line {number} is {why}; remove the line to have the training shown')


def _append(scalars: dict[str, list[tuple[int, float]]], records: list[dict]) -> None:
    first = next((record['iter'] for record in records if 'iter' in record), None)
    if first is not None:
        for name, points in scalars.items():
            # A start goes on after a checkpoint, and its first line covers the iterations since then.
            scalars[name] = [point for point in points if point[0] < first]
    iteration = max((points[-1][0] for points in scalars.values() if points), default=0)
    for record in records:
        if not _is_validation(record):
            iteration = record['step']
        for name, value in record.items():
            if name not in _COUNTERS and isinstance(value, (int, float)):
                scalars.setdefault(name, []).append((iteration, value))


def _is_validation(record: dict) -> bool:
    """Whether a line holds metrics of a validation, whose step is an epoch; the other lines count iterations."""
    return 'iter' not in record and not all(name.startswith('router/') for name in record if name != 'step')
