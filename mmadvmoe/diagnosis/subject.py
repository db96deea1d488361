"""What the analysis tools share: a trained model, the images to attack it on, and a JSON file for what comes out."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from mmengine.config import Config, DictAction
from mmengine.logging import MMLogger
from torch.utils.data import Subset

from mmadvmoe.apis import load_robust_model
from mmadvmoe.attacks import Victim
from mmadvmoe.datasets import ChunkSampler
from mmadvmoe.evaluation.data import as_dataset, read_chunks
from mmadvmoe.moe import placement_of
from mmadvmoe.runtime.atomic import write_atomically
from mmadvmoe.runtime.launch import check_checkpoint, load_config

from .threat_model import ThreatModel
from .trials import Images

#: Version of the files; to be raised when a number in them changes its meaning.
FORMAT = 1


@dataclass(frozen=True, eq=False)
class Subject:
    """What is analysed.

    Attributes:
        victim: The trained model.
        data: Test images, evenly spread over the test set.
        threat: The threat model that the config tests with.
        header: What the file of results says of all this.
    """

    victim: Victim
    data: Images
    threat: ThreatModel
    header: Mapping


def add_arguments(parser: argparse.ArgumentParser, num_images: int) -> None:
    """Add the arguments that say what to analyse.

    Args:
        parser: The parser of a tool.
        num_images: Default of ``--num-images``.
    """
    parser.add_argument('config', help='config file, with test_dataloader and test_cfg.attacks')
    parser.add_argument('checkpoint', help='checkpoint file or address')
    parser.add_argument(
        '--num-images',
        type=int,
        default=num_images,
        metavar='M',
        help='test images to attack, evenly spread over the test set [%(default)s, or all if there are fewer]',
    )
    parser.add_argument(
        '--attack',
        metavar='NAME',
        help='attack of test_cfg.attacks whose norm, eps, alpha and steps are used [the first that has them]',
    )
    parser.add_argument('--seed', type=int, default=0, help='where random starts come from [%(default)s]')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu', help='[%(default)s]')
    parser.add_argument('--out', metavar='FILE.json', help='file to write all numbers to')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE', help='override the config')


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what cannot work, before anything is loaded."""
    if args.num_images < 1:
        parser.error(f'--num-images {args.num_images} must be at least 1')
    if args.out is not None and not args.out.endswith('.json'):
        parser.error(f'--out {args.out!r} must end in .json')


def load_subject(args: argparse.Namespace, kind: str) -> Subject:
    """Load the model and the images that the arguments name.

    Args:
        args: As :func:`add_arguments` has them parsed.
        kind: What the file of results is called in itself.

    Raises:
        FileNotFoundError: There is no such config or checkpoint.
        ValueError: The config does not say how the model is tested.
    """
    # Progress is worth seeing, and MMEngine's default hides it.
    MMLogger.get_instance('mmadvmoe', logger_name='mmadvmoe', log_level='INFO')
    cfg = load_config(args.config)
    check_checkpoint(args.checkpoint, 'CHECKPOINT')
    if args.cfg_options is not None:
        cfg.merge_from_dict(args.cfg_options)
    attacks = (cfg.get('test_cfg') or {}).get('attacks')
    if cfg.get('test_dataloader') is None or not attacks:
        raise ValueError(f'{args.config} must set test_dataloader and test_cfg.attacks')
    threat = ThreatModel.from_attacks(attacks, args.attack)
    victim = Victim(load_robust_model(cfg, args.checkpoint, args.device))
    data, class_names = _test_images(cfg, victim, args)
    placement = placement_of(victim.classifier)
    header = dict(
        kind=kind,
        format=FORMAT,
        config=args.config,
        checkpoint=args.checkpoint,
        num_images=len(data),
        seed=args.seed,
        class_names=class_names,
        threat_model=asdict(threat),
        routing=placement.name,
        num_experts=victim.num_experts,
        routers=list(placement.router_names),
    )
    return Subject(victim, data, threat, header)


def _test_images(cfg: Config, victim: Victim, args: argparse.Namespace) -> tuple[Images, list[str]]:
    """Test images on the device of the model, and the names of the classes."""
    dataset = as_dataset(cfg.test_dataloader.dataset)
    count = min(args.num_images, len(dataset))
    # Data sets are often sorted by class.
    spread = Subset(dataset, [i * len(dataset) // count for i in range(count)])
    chunk_size = cfg.test_cfg.get('chunk_size', 128)
    chunks = list(read_chunks(spread, ChunkSampler(spread, chunk_size), victim))
    images, labels = (torch.cat([chunk[part] for chunk in chunks]) for part in (1, 2))
    names = dataset.metainfo.get('classes') or range(victim.num_classes)
    return Images(images, labels, chunk_size, args.seed), [str(name) for name in names]


def write_json(path: str, content: Mapping) -> None:
    """Write a file at once or not at all.

    Raises:
        OSError: It cannot be written.
    """
    write_atomically(path, (json.dumps(content, indent=1, allow_nan=False) + '\n').encode())
