"""One robust evaluation from its first chunk to its metrics, as the test loop and the API run it."""

from __future__ import annotations

import hashlib
import inspect
import logging
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mmengine
import mmpretrain
import numpy as np
import torch
from mmengine.dist import get_world_size, is_main_process
from mmengine.evaluator import Evaluator
from mmengine.logging import print_log
from torch import nn

from mmadvmoe.attacks import Victim, attack_class, parts_of
from mmadvmoe.datasets import ChunkSampler
from mmadvmoe.runtime.files import in_first_process
from mmadvmoe.version import __version__

from .chunks import evaluate_chunk
from .data import Chunk
from .folder import FORMAT, OutcomeFolder
from .named_attacks import build_attacks
from .outcomes import CLEAN, RobustOutcomes, compute_metrics, gather_outcomes, route_metrics

# Seconds between two messages of progress: an attack on a chunk takes from milliseconds to hours.
_INTERVAL = 10.0


class RobustEvaluation:
    """The attacks on all images of a data set: ``begin``, ``evaluate`` chunk by chunk, ``finish``.

    Args:
        victim: The model as the attacks see it.
        key: Config key of ``attacks``, for errors.
        attacks, chunk_size, seed, survivors_only, worst_of: As in :class:`~mmadvmoe.evaluation.RobustValLoop`.

    Raises:
        TypeError, ValueError: An attack cannot be built; see :func:`~mmadvmoe.evaluation.named_attacks.build_attacks`.
    """

    def __init__(
        self,
        victim: Victim,
        attacks: Mapping[str, Mapping],
        *,
        key: str = 'attacks',
        chunk_size: int = 128,
        seed: int = 0,
        survivors_only: Sequence[str] = (),
        worst_of: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.victim = victim
        self.attacks = build_attacks(attacks, victim, key)
        self._configs = attacks
        self._seed = seed
        self._chunk_size = chunk_size
        self._survivors_only = survivors_only
        self._worst_of = worst_of or {}
        self._folder: OutcomeFolder | None = None
        self._overwrite = False
        self.outcomes: RobustOutcomes | None = None

    def keep_in(self, out_dir: str | Path, overwrite: bool = False) -> None:
        """Write outcomes to a folder as they become known, and take from it what is there, or ``overwrite`` that."""
        self._folder = OutcomeFolder(out_dir, list(self.attacks))
        self._overwrite = overwrite

    def begin(self, sampler: ChunkSampler, model_cfg: Mapping | None = None) -> None:
        """Begin with a data set, in all processes, to which the sampler deals out the chunks.

        By ``model_cfg``, its config, an output folder tells a model apart from others that have the same weights.

        Raises:
            ValueError: The output folder holds the outcomes of another evaluation.
            FolderInUseError: Another process evaluates into it.
            OSError: It cannot be written to.
        """
        self._num_images = len(sampler.dataset)
        self._parts: list[RobustOutcomes] = []
        self._progress = EvaluationProgress(list(self.attacks), len(sampler), len(sampler.chunks()))
        if self._folder is None:
            return
        in_first_process(lambda: self._folder.prepare(self._description(sampler.dataset, model_cfg), self._overwrite))

    def evaluate(self, chunk: Chunk) -> RobustOutcomes:
        """Attack one chunk, or take what is on disk of it."""
        for name, attack in self.attacks.items():
            attack.check_radius(chunk.images[0].numel(), repr(name))
        try:
            with self.victim.frozen():
                part = evaluate_chunk(
                    self.victim,
                    self.attacks,
                    chunk,
                    seed=self._seed,
                    survivors_only=self._survivors_only,
                    folder=self._folder,
                    report=self._progress.report,
                )
        except Exception:
            if self._folder is not None:
                self._folder.close()
                where = repr(str(self._folder.path))
                message = (
                    f'The outcomes until now are kept in {where}: the same evaluation started again goes on from there.'
                )
                print_log(message, logger='current', level=logging.ERROR)
            raise
        self._parts.append(part)
        return part

    def finish(self, evaluator: Evaluator) -> dict:
        """Bring the outcomes of all processes together, compute the metrics and complete the output folder."""
        try:
            self.outcomes = gather_outcomes(self._parts, self._num_images)
            metrics = compute_metrics(evaluator, self.outcomes, self._worst_of)
            metrics.update(route_metrics(self.outcomes, self.victim.num_experts))
            if self._folder is not None and is_main_process():
                self._folder.finish(self.outcomes, metrics)
        finally:
            if self._folder is not None:
                self._folder.close()
        return metrics

    def _description(self, dataset: Any, model_cfg: Mapping | None) -> dict:
        """The content of ``run.json``."""
        victim = self.victim
        model = dict(
            type=type(victim.classifier).__name__,
            num_classes=victim.num_classes,
            num_experts=victim.num_experts,
            num_routers=victim.num_routers,
            sha256=model_digest(victim.classifier),
        )
        if model_cfg is not None:
            model['config'] = model_cfg
        settings = dict(
            model=model,
            data=dict(type=type(dataset).__name__, num_images=len(dataset)),
            attacks=self._configs,
            survivors_only=list(self._survivors_only),
            worst_of=self._worst_of,
            chunk_size=self._chunk_size,
            seed=self._seed,
        )
        if code := _digest_of_own(self._configs):
            settings['own_attacks'] = code
        versions = dict(
            python=platform.python_version(),
            torch=torch.__version__,
            torchattacks=version('torchattacks'),
            pyautoattack=version('pyautoattack'),
            numpy=np.__version__,
            mmengine=mmengine.__version__,
            mmpretrain=mmpretrain.__version__,
            mmadvmoe=__version__,
        )
        device = next(iter(victim.parameters()), torch.empty(0)).device
        machine = dict(device=device.type, threads=torch.get_num_threads())
        if device.type == 'cuda':
            with suppress(RuntimeError):  # where somebody has used the newer settings of PyTorch
                machine['tf32'] = torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
        return dict(format=FORMAT, settings=settings, versions=versions, machine=machine)


def _digest_of_own(configs: Mapping[str, Mapping]) -> str | None:
    """SHA-256 of the source of the user's own classes of attacks; None where there are none, or none in a file."""
    kinds = {kind for cfg in configs.values() for part in parts_of(cfg) for kind in attack_class(part['type']).__mro__}
    sources = []
    for kind in sorted(kinds, key=str):
        if kind.__module__.split('.')[0] not in ('mmadvmoe', 'torchattacks', 'builtins'):
            with suppress(OSError, TypeError):
                sources.append(inspect.getsource(kind))
    return hashlib.sha256(''.join(sources).encode()).hexdigest() if sources else None


def model_digest(model: nn.Module) -> str:
    """SHA-256 of all parameters and buffers, by their names; the same on every device."""
    digest = hashlib.sha256()
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()], key=lambda pair: pair[0]):
        digest.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}\n'.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class EvaluationProgress:
    """Log images done, robust accuracy so far and time left, every few seconds and at the end.

    Of several processes the first one logs, about its own share of images and chunks. ``clock`` gives seconds.
    """

    def __init__(
        self, names: Sequence[str], num_images: int, num_chunks: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._num_images = num_images
        self._clock, self._last = clock, clock()
        self._chunks_left = dict.fromkeys((CLEAN, *names), num_chunks)
        self._seconds: dict[str, list[float]] = {name: [] for name in self._chunks_left}
        self._last_name = (CLEAN, *names)[-1]
        self._done = self._robust = 0

    def report(self, name: str, outcomes: RobustOutcomes, seconds: float | None) -> None:
        """Note that an attack on a chunk took so long (None: its outcome was on disk), and log if it is time."""
        self._chunks_left[name] -= 1
        if seconds is not None:
            self._seconds[name].append(seconds)
        robust, size = int(outcomes.robust.sum()), len(outcomes.label)
        if name == self._last_name:
            self._done += size
            self._robust += robust
        if self._done == self._num_images or self._clock() - self._last >= _INTERVAL:
            self._last = self._clock()
            print_log(self._message(name, robust, size), logger='current')

    def seconds_left(self) -> float | None:
        """Estimate from the attacks on the chunks done; None while some attack has never run."""
        left = [(chunks, self._seconds[name]) for name, chunks in self._chunks_left.items() if chunks]
        if not all(seconds for _, seconds in left):
            return None
        return sum((chunks * sum(seconds) / len(seconds) for chunks, seconds in left), 0.0)

    def _message(self, name: str, robust: int, size: int) -> str:
        share = f' of process 0 of {get_world_size()}' if get_world_size() > 1 else ''
        parts = [f'Robust evaluation: {self._done} of {self._num_images} images{share}']
        if self._done:
            parts.append(f'robust accuracy so far {100 * self._robust / self._done:.2f}')
        if name != self._last_name:
            parts.append(f'of the next {size} images {robust} are robust after {name!r}')
        left = self.seconds_left()
        if left:
            parts.append(f'{timedelta(seconds=round(left))} left')
        return ', '.join(parts)
