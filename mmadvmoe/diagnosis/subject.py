"""The subject of an analysis: a trained model, the images to attack it on, and the threat model.

Dimension letters: B images, D decisions of the routers for one image (0 for a dense model).
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, DictAction
from mmengine.logging import MMLogger, print_log
from mmengine.runner import set_random_seed
from torch import Tensor
from torch.utils.data import Dataset

from mmadvmoe.apis import load_robust_model
from mmadvmoe.attacks import Victim, attack_norm
from mmadvmoe.attacks.steps import ORDERS
from mmadvmoe.evaluation.chunks import AttackFunction, chunk_seed, classify, run_attack
from mmadvmoe.evaluation.data import Chunk, as_dataset, class_names, spread_images
from mmadvmoe.evaluation.outcomes import CLEAN, Outcome
from mmadvmoe.moe import placement_of
from mmadvmoe.runtime.config_checks import check_options
from mmadvmoe.runtime.files import check_writable
from mmadvmoe.runtime.launch import check_checkpoint, load_config
from mmadvmoe.runtime.seeding import preserve_rng_state
from mmadvmoe.utils import choose, write_atomically

#: Version of the files of results; to be raised when a number in them changes its meaning.
FORMAT = 1

#: What an attack must tell of its threat model.
_NEEDED = ('eps', 'alpha', 'steps')


def percent(mask: Tensor) -> float:
    """Share of (B,) bool, in percent."""
    return 100.0 * float(mask.double().mean())


@dataclass(frozen=True)
class ThreatModel:
    """A ball around each image, and the steps of a gradient attack in it.

    Attributes:
        norm: ``'Linf'``, ``'L2'`` or ``'L1'``.
        eps: Radius of the ball, on [0, 1] images.
        alpha: Step size, in the same unit.
        steps: Number of steps.
    """

    norm: str
    eps: float
    alpha: float
    steps: int

    @classmethod
    def from_attacks(cls, attacks: Mapping[str, Mapping], name: str | None = None) -> ThreatModel:
        """Read the threat model of an attack of ``test_cfg.attacks``; by default, the first that has a complete one.

        Raises:
            ValueError: There is no such attack, or none that tells eps, alpha and steps above 0.
        """
        if name is not None:
            choose(name, attacks, 'test_cfg.attacks: attack')
        for cfg in attacks.values() if name is None else [attacks[name]]:
            if all(cfg.get(key) for key in _NEEDED):
                return cls(attack_norm(cfg), *(cfg[key] for key in _NEEDED))
        where = 'test_cfg.attacks' if name is None else f'test_cfg.attacks.{name}'
        raise ValueError(
            f'{where} tells no threat model: an attack with eps, alpha and steps above 0 is needed, such as '
            "dict(type='PGD', eps=8 / 255, alpha=2 / 255, steps=50)"
        )

    def scaled(self, eps: float) -> ThreatModel:
        """The same attack in a ball of another radius, with steps as long in proportion."""
        alpha = self.alpha * eps / self.eps
        # A longer one would only be cut.
        return replace(self, eps=eps, alpha=min(alpha, 1.0) if self.norm == 'Linf' else alpha)

    def attack(self, kind: Any, **others: Any) -> dict:
        """The config of a gradient attack in this ball."""
        return dict(type=kind, norm=self.norm, eps=self.eps, alpha=self.alpha, steps=self.steps, **others)

    def distance(self, images: Tensor, others: Tensor) -> Tensor:
        """How far each image (B, C, H, W) is from the other one in this norm, (B,), in double precision."""
        change = (images.double() - others.double()).flatten(1)
        return change.norm(dim=1, p=ORDERS[self.norm])


@dataclass(frozen=True, eq=False)
class Images:
    """Labelled images in memory, attacked chunk by chunk.

    Attributes:
        images: (B, 3, H, W) in [0, 1].
        labels: True classes, (B,) int64.
        chunk_size: Images attacked at a time.
        seed: What an attack draws is a function of this, its name and the number of the chunk.
    """

    images: Tensor
    labels: Tensor
    chunk_size: int = 128
    seed: int = 0

    def __len__(self) -> int:
        return len(self.images)

    def chunks(self) -> Iterator[Chunk]:
        """The images as they are attacked."""
        for number, (images, labels) in enumerate(zip(self.split(self.images), self.split(self.labels))):
            start = number * self.chunk_size
            yield Chunk(number, range(start, start + len(images)), images, labels)

    def split(self, values: Tensor | None) -> Iterable[Tensor | None]:
        """Split what belongs to the images as they are in :meth:`chunks`; None for each where there is nothing."""
        return repeat(None) if values is None else values.to(self.images.device).split(self.chunk_size)

    def attacked(self, name: str, attack: AttackFunction, draw: str | None = None) -> Tensor:
        """Attack all images: (B, 3, H, W). Attacks with the same ``draw``, by default the ``name``, draw the same.

        Raises:
            RuntimeError: The attack fails; the message names it and the images.
        """
        parts = []
        for chunk in self.chunks():
            started = time.monotonic()
            parts.append(run_attack(name, attack, chunk, chunk_seed(self.seed, draw or name, chunk.number)))
            done, seconds = chunk.indices[-1] + 1, time.monotonic() - started
            print_log(f'{name}: {done} of {len(self)} images, {seconds:.1f} s', 'current', logging.INFO)
        return torch.cat(parts)

    def classified(self, victim: Victim, images: Tensor, name: str = CLEAN, route: Tensor | None = None) -> Outcome:
        """Classify all images, or what the attack ``name`` made of them; see :func:`classify`."""
        parts = zip(self.chunks(), self.split(images), self.split(route))
        return Outcome.cat(
            [classify(victim, part, chunk.images, name, chunk.indices, given) for chunk, part, given in parts]
        )


@dataclass(frozen=True, eq=False)
class Subject:
    """The model, the images and the threat model of an analysis.

    Attributes:
        victim: The trained model.
        data: Images, evenly spread over the test set, or over that of another loader.
        threat: The threat model that the config tests with.
        header: How the file of results begins.
        cfg: The config.
    """

    victim: Victim
    data: Images
    threat: ThreatModel
    header: Mapping
    cfg: Config

    def more_images(self, loader: str, count: int) -> Images:
        """Read ``count`` images, or all if there are fewer, of another loader of the config, augmented once.

        Raises:
            ValueError: The config has no such loader.
        """
        with preserve_rng_state():
            set_random_seed(self.data.seed)
            return read_images(self.cfg, loader, self.victim, count, self.data.seed)[0]


def parse_arguments(
    parser: argparse.ArgumentParser, num_images: int, loader: str = 'test_dataloader'
) -> argparse.Namespace:
    """Parse the arguments of a tool and those that say what to analyse; refuse what cannot work.

    ``num_images`` is the default of ``--num-images``, of the images that ``loader`` of the config has.
    """
    parser.add_argument('config', help=f'config file, with {loader} and test_cfg.attacks')
    parser.add_argument('checkpoint', help='checkpoint file or address')
    many = f'images of {loader} to attack, evenly spread over it [%(default)s, or all if there are fewer]'
    parser.add_argument('--num-images', type=int, default=num_images, metavar='M', help=many)
    which = 'attack of test_cfg.attacks whose norm, eps, alpha and steps are used [the first that has them]'
    parser.add_argument('--attack', metavar='NAME', help=which)
    parser.add_argument('--seed', type=int, default=0, help='where random starts come from [%(default)s]')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu', help='[%(default)s]')
    parser.add_argument('--out', metavar='FILE.json', help='file to write all numbers to')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE', help='override the config')
    args = parser.parse_args()
    if args.num_images < 1:
        parser.error(f'--num-images {args.num_images} must be at least 1')
    if args.out is not None and not args.out.endswith('.json'):
        parser.error(f'--out {args.out!r} must end in .json')
    return args


def load_subject(args: argparse.Namespace, kind: str, loader: str = 'test_dataloader') -> Subject:
    """Load the model, and the images of a loader of its config, for results of a kind.

    Raises:
        FileNotFoundError: There is no such config or checkpoint.
        ValueError: The config does not say how the model is tested.
        OSError: ``--out`` cannot be written.
    """
    if args.out is not None:
        check_writable(args.out, '--out')
    # Progress is worth seeing, and MMEngine's default hides it.
    MMLogger.get_instance('mmadvmoe', logger_name='mmadvmoe', log_level='INFO')
    cfg = load_config(args.config)
    check_checkpoint(args.checkpoint, 'CHECKPOINT')
    if args.cfg_options is not None:
        check_options(args.cfg_options, cfg)
        cfg.merge_from_dict(args.cfg_options)
    threat = ThreatModel.from_attacks(attacks_of_test(cfg, loader), args.attack)
    victim = Victim(load_robust_model(cfg, args.checkpoint, args.device))
    data, dataset = read_images(cfg, loader, victim, args.num_images, args.seed)
    placement = placement_of(victim.classifier)
    header = dict(
        kind=kind,
        format=FORMAT,
        config=args.config,
        checkpoint=args.checkpoint,
        num_images=len(data),
        seed=args.seed,
        class_names=class_names(dataset, victim.num_classes),
        threat_model=asdict(threat),
        routing=placement.name,
        num_experts=victim.num_experts,
        routers=list(placement.router_names),
    )
    return Subject(victim, data, threat, header, cfg)


def attacks_of_test(cfg: Config, loader: str = 'test_dataloader') -> Mapping[str, Mapping]:
    """The attacks that a config tests with.

    Raises:
        ValueError: It has none, or not the ``loader`` of the images to attack.
    """
    attacks = (cfg.get('test_cfg') or {}).get('attacks')
    if cfg.get(loader) is None or not attacks:
        raise ValueError(f'{cfg.filename} must set {loader} and test_cfg.attacks')
    return attacks


def read_images(cfg: Config, loader: str, victim: Victim, count: int, seed: int) -> tuple[Images, Dataset]:
    """Images spread over the data set of a loader of the config, and the data set.

    Raises:
        ValueError: The config has no such loader.
    """
    attacks_of_test(cfg, loader)
    dataset = as_dataset(cfg[loader].dataset)
    images, labels = spread_images(dataset, victim.classifier.data_preprocessor, count)
    return Images(images, labels, cfg.test_cfg.get('chunk_size', 128), seed), dataset


def write_json(path: str | Path, content: Mapping, allow_nan: bool = False) -> None:
    """Write a file at once or not at all.

    Raises:
        OSError: It cannot be written.
        ValueError: A number is not finite, and not allowed to be.
    """
    write_atomically(path, (json.dumps(content, indent=1, allow_nan=allow_nan) + '\n').encode())
