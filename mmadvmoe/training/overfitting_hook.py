"""Watch over cheap adversarial training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Optional

import torch
from mmengine.dist import all_reduce
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmpretrain.registry import HOOKS
from torch import Tensor

from mmadvmoe.attacks import Victim, build_attack
from mmadvmoe.evaluation.data import unit_batch
from mmadvmoe.runtime.config_checks import check_by_epoch
from mmadvmoe.runtime.seeding import preserve_rng_state
from mmadvmoe.utils import bare_model

#: Under which the highest accuracy so far is kept in checkpoints.
_BEST = 'catastrophic_overfitting_best'


@HOOKS.register_module()
class CatastrophicOverfittingHook(Hook):
    """Stop training, or warn, when images of the training set are no longer safe from a strong attack.

    Training against one step of attack can, within an epoch, learn to resist that step alone. Robust accuracy under a
    strong attack then falls to near 0 while the loss goes on falling. At the end of each epoch the last training batch
    is attacked; the result is logged as ``train/strong_accuracy``, in [0, 1]. A fall by more than ``drop`` below the
    highest value so far is what this hook is about. Wong et al., "Fast is better than free", arXiv:2001.03994, section
    5.4; Rice et al., arXiv:2002.11569.

    Args:
        attack (dict): Config of the strong attack; see :func:`mmadvmoe.attacks.build_attack`. Defaults to PGD-10 at
            8/255.
        drop (float): In (0, 1). Defaults to 0.2.
        num_images (int): Most images to attack, on each process. Defaults to 128.
        stop (bool): End the training after that epoch, rather than warn alone. Defaults to True.

    Raises:
        ValueError: An argument is out of range, or the training is not counted in epochs.

    Examples:
        >>> custom_hooks = [dict(type='CatastrophicOverfittingHook')]
    """

    priority = 'LOW'

    def __init__(
        self, attack: Optional[Mapping] = None, drop: float = 0.2, num_images: int = 128, stop: bool = True
    ) -> None:
        if not 0 < drop < 1:
            raise ValueError(f'CatastrophicOverfittingHook: drop={drop!r}; allowed: above 0 and below 1')
        if not isinstance(num_images, int) or num_images < 1:
            raise ValueError(f'CatastrophicOverfittingHook: num_images={num_images!r}; allowed: 1 and more')
        self.attack = attack or dict(type='PGD', eps=8 / 255, alpha=2 / 255, steps=10)
        self.drop = drop
        self.num_images = num_images
        self.stop = stop
        self._batch: Optional[tuple[Tensor, Tensor]] = None

    def before_train(self, runner: Runner) -> None:
        """Build the attack, so that a wrong config is refused before training."""
        check_by_epoch(runner, self)
        self._victim = Victim(runner.model)
        self._attack = build_attack(self.attack, self._victim)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Optional[dict] = None
    ) -> None:
        """Keep the last batch of an epoch."""
        if self.is_last_train_iter(runner) or self.end_of_epoch(runner.train_dataloader, batch_idx):
            first = {key: data_batch[key][: self.num_images] for key in ('inputs', 'data_samples')}
            indices = range(len(first['inputs']))
            self._batch = unit_batch(bare_model(runner.model).data_preprocessor, first, indices, 'train_dataloader')

    def after_train_epoch(self, runner: Runner) -> None:
        """Attack the batch, and compare with the best so far."""
        (images, labels), self._batch = self._batch, None
        with preserve_rng_state():
            adversarial = self._attack(images, labels)
        with self._victim.frozen(), torch.no_grad():
            right = (self._victim(adversarial).argmax(1) == labels).double()
        counts = torch.stack([right.sum(), right.new_tensor(len(right))])
        all_reduce(counts)
        accuracy = (counts[0] / counts[1]).item()
        hub = runner.message_hub
        hub.update_scalar('train/strong_accuracy', accuracy)
        best = max(hub.get_info(_BEST, accuracy), accuracy)
        hub.update_info(_BEST, best)
        if best - accuracy <= self.drop:
            return
        advice = 'Use a smaller step or radius, more steps, or TRADES, or go on from an earlier checkpoint with them'
        runner.logger.warning(
            f'Catastrophic overfitting in epoch {runner.epoch + 1}: accuracy under {self._attack.name} on a training '
            f'batch fell from {best:.1%} to {accuracy:.1%}. {advice}'
        )
        if self.stop:
            runner.train_loop.stop_training = True
