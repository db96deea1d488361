"""One robust evaluation from its first chunk to its metrics, as the test loop and the API run it."""

from __future__ import annotations

import hashlib
import logging
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Optional, Union

import mmengine
import mmpretrain
import numpy as np
import torch
from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.evaluator import Evaluator
from mmengine.logging import print_log
from torch import Tensor, nn

from mmadvmoe.attacks import Victim
from mmadvmoe.datasets import ChunkSampler
from mmadvmoe.version import __version__

from .folder import FORMAT, OutcomeFolder
from .named_attacks import build_attacks
from .outcomes import RobustOutcomes, compute_metrics, gather_outcomes, route_metrics
from .progress import EvaluationProgress
from .robust_evaluation import evaluate_chunk


class RobustEvaluation:
    """The attacks on all images of a data set.

    Args:
        victim: The model as the attacks see it.
        attacks: Config of each attack under its name.
        key: Config key of ``attacks``, for errors.
        chunk_size: Images attacked at a time.
        seed, survivors_only, worst_of: As in :class:`~mmadvmoe.evaluation.RobustValLoop`.

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
        worst_of: Optional[Mapping[str, Sequence[str]]] = None,
    ) -> None:
        self.victim = victim
        self.attacks = build_attacks(attacks, victim, key)
        self._configs = attacks
        self._seed = seed
        self._chunk_size = chunk_size
        self._survivors_only = survivors_only
        self._worst_of = worst_of or {}
        self._folder: Optional[OutcomeFolder] = None
        self._overwrite = False
        self.outcomes: Optional[RobustOutcomes] = None

    def keep_in(self, out_dir: Union[str, Path], overwrite: bool = False) -> None:
        """Write outcomes to a folder as they become known, and take from it what is there.

        Args:
            out_dir: The folder.
            overwrite: Delete the outcomes that are there and begin anew, instead of going on or refusing to.
        """
        self._folder = OutcomeFolder(out_dir, list(self.attacks))
        self._overwrite = overwrite

    def begin(self, sampler: ChunkSampler, model_cfg: Optional[Mapping] = None) -> None:
        """Begin with a data set, in all processes.

        Args:
            sampler: What decides which chunks this process attacks.
            model_cfg: Config of the model, by which an output folder tells models apart that have the same weights.

        Raises:
            ValueError: The output folder holds the outcomes of another evaluation.
            OSError: It cannot be written to.
        """
        self._sampler = sampler
        self._parts: list[RobustOutcomes] = []
        chunks = sampler.chunks()
        self._progress = EvaluationProgress(list(self.attacks), len(sampler), len(chunks))
        if self._folder is None:
            return
        error = [None]
        if is_main_process():
            try:
                self._folder.prepare(self._description(sampler.dataset, model_cfg), self._overwrite)
            except (ValueError, OSError) as raised:
                error = [raised]
        # All processes stop, or none.
        broadcast_object_list(error)
        if error[0] is not None:
            raise error[0]

    def evaluate(self, chunk_index: int, images: Tensor, labels: Tensor) -> RobustOutcomes:
        """Attack one chunk, or take what is on disk of it.

        Args:
            chunk_index: Number of the chunk in the data set.
            images: (B, C, H, W) in [0, 1].
            labels: True classes, (B,) int64.
        """
        place = self._sampler.chunk(chunk_index)
        saved = None
        for name, attack in self.attacks.items():
            attack.check_radius(images[0].numel(), repr(name))
        if self._folder is not None:
            saved = self._folder.chunk(chunk_index, place, labels, images)
        try:
            with self.victim.frozen():
                part = evaluate_chunk(
                    self.victim,
                    self.attacks,
                    images,
                    labels,
                    chunk_index=chunk_index,
                    place=place,
                    seed=self._seed,
                    survivors_only=self._survivors_only,
                    saved=saved,
                    report=self._progress.report,
                )
        except Exception:
            if self._folder is not None:
                print_log(
                    f'The outcomes until now are kept in {str(self._folder.path)!r}: the same evaluation started again '
                    'goes on from there.',
                    logger='current',
                    level=logging.ERROR,
                )
            raise
        self._parts.append(part)
        return part

    def finish(self, evaluator: Evaluator) -> dict:
        """Bring the outcomes of all processes together, compute the metrics and complete the output folder.

        Args:
            evaluator: With any metrics.

        Returns:
            As :meth:`mmadvmoe.evaluation.RobustValLoop.run`.
        """
        self.outcomes = gather_outcomes(self._parts, len(self._sampler.dataset))
        metrics = compute_metrics(evaluator, self.outcomes, self._worst_of)
        metrics.update(route_metrics(self.outcomes, self.victim.num_experts))
        if self._folder is not None and is_main_process():
            self._folder.finish(self.outcomes, metrics)
        return metrics

    def _description(self, dataset: Any, model_cfg: Optional[Mapping]) -> dict:
        """What ``run.json`` says."""
        victim = self.victim
        model = dict(
            type=type(victim.classifier).__name__,
            num_classes=victim.num_classes,
            num_experts=victim.num_experts,
            num_routers=victim.num_routers,
            sha256=model_digest(victim),
        )
        if model_cfg is not None:
            model['config'] = _plain(model_cfg)
        settings = dict(
            model=model,
            data=dict(type=type(dataset).__name__, num_images=len(dataset)),
            attacks=_plain(self._configs),
            survivors_only=list(self._survivors_only),
            worst_of=_plain(self._worst_of),
            chunk_size=self._chunk_size,
            seed=self._seed,
        )
        device = next(iter(victim.parameters()), torch.empty(0)).device
        return dict(
            format=FORMAT,
            settings=settings,
            versions=_versions(),
            machine=dict(device=device.type, threads=torch.get_num_threads()),
        )


def model_digest(model: nn.Module) -> str:
    """SHA-256 of all parameters and buffers, by their names; the same on every device."""
    digest = hashlib.sha256()
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()], key=lambda pair: pair[0]):
        digest.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}\n'.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    return dict(
        python=platform.python_version(),
        torch=torch.__version__,
        torchattacks=version('torchattacks'),
        pyautoattack=version('pyautoattack'),
        numpy=np.__version__,
        mmengine=mmengine.__version__,
        mmpretrain=mmpretrain.__version__,
        mmadvmoe=__version__,
    )


def _plain(value: Any) -> Any:
    """What JSON can hold of a config."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, type):
        return value.__name__
    return value if value is None or isinstance(value, (str, int, float, bool)) else repr(value)
