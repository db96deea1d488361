"""Hooks beside the alternation: pictures of attacked images, a watch over cheap training, and what sets a run up."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_reduce, is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmpretrain.registry import HOOKS
from torch import Tensor

from mmadvmoe.attacks import Victim, build_attack
from mmadvmoe.evaluation import attack_examples
from mmadvmoe.evaluation.data import spread_images, unit_batch
from mmadvmoe.models import AdvDataPreprocessor
from mmadvmoe.runtime.config_checks import check_by_epoch
from mmadvmoe.runtime.seeding import preserve_rng_state
from mmadvmoe.utils import bare_model
from mmadvmoe.visualization import draw_image_grid, save_png

#: Folder in the work directory, and the name of the picture in the backends of the visualizer.
NAME = 'adversarial_images'


@HOOKS.register_module()
class AdversarialImagesHook(Hook):
    """Draw a grid of adversarial images every few epochs.

    The grid shows clean images, attacked images and what changed, each with the predicted class and the route. The
    images are always the same, spread evenly over the validation data, and so is the seed of the attack, so pictures of
    different epochs can be compared. Each goes to ``adversarial_images/epoch_<n>.png`` in the work directory and to all
    backends of the visualizer, there with the epoch as its step. Training stays the same bit for bit. With several
    processes the first one draws.

    Args:
        attack (dict): Config of the attack; see :func:`mmadvmoe.attacks.build_attack`.
        interval (int): Draw after every so many epochs. Defaults to 10.
        num_images (int): How many images to draw, side by side. Defaults to 8.

    Raises:
        ValueError: An argument is out of range, or the run has no validation data or is not counted in epochs.

    Examples:
        >>> custom_hooks = [dict(
        ...     type='AdversarialImagesHook', attack=dict(type='PGD', eps=8 / 255, alpha=2 / 255, steps=10))]
    """

    priority = 'LOW'

    def __init__(self, attack: Mapping, interval: int = 10, num_images: int = 8) -> None:
        for name, value in (('interval', interval), ('num_images', num_images)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f'AdversarialImagesHook: {name}={value!r}; allowed: whole numbers of at least 1')
        self.attack = attack
        self.interval = interval
        self.num_images = num_images

    def before_train(self, runner: Runner) -> None:
        """Build the attack, so that a wrong config is refused before training."""
        if runner.val_loop is None:
            raise ValueError(
                'AdversarialImagesHook shows images of val_dataloader, and the config has none; set val_dataloader, '
                'val_cfg and val_evaluator, or remove the hook'
            )
        check_by_epoch(runner, self)
        self._victim = Victim(runner.model)
        self._attack = build_attack(self.attack, self._victim)

    def after_train_epoch(self, runner: Runner) -> None:
        """Draw the grid if it is due."""
        if self.every_n_epochs(runner, self.interval) and is_main_process():
            with preserve_rng_state():
                self._draw(runner)

    def _draw(self, runner: Runner) -> None:
        dataset = runner.val_dataloader.dataset
        preprocessor = bare_model(runner.model).data_preprocessor
        images, labels = spread_images(dataset, preprocessor, self.num_images)
        examples = attack_examples(self._victim, self._attack, images, labels)
        class_names = getattr(dataset, 'metainfo', {}).get('classes')
        figure = draw_image_grid(examples, class_names, self._attack.name)
        epoch = runner.epoch + 1
        pixels = save_png(figure, Path(runner.work_dir) / NAME / f'epoch_{epoch}.png')
        runner.visualizer.add_image(NAME, pixels, step=epoch)


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
        self, attack: Mapping | None = None, drop: float = 0.2, num_images: int = 128, stop: bool = True
    ) -> None:
        if not 0 < drop < 1:
            raise ValueError(f'CatastrophicOverfittingHook: drop={drop!r}; allowed: above 0 and below 1')
        if not isinstance(num_images, int) or num_images < 1:
            raise ValueError(f'CatastrophicOverfittingHook: num_images={num_images!r}; allowed: 1 and more')
        self.attack = attack or dict(type='PGD', eps=8 / 255, alpha=2 / 255, steps=10)
        self.drop = drop
        self.num_images = num_images
        self.stop = stop
        self._batch: tuple[Tensor, Tensor] | None = None

    def before_train(self, runner: Runner) -> None:
        """Build the attack, so that a wrong config is refused before training."""
        check_by_epoch(runner, self)
        self._victim = Victim(runner.model)
        self._attack = build_attack(self.attack, self._victim)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
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


@HOOKS.register_module()
class BindVictimHook(Hook):
    """Let an :class:`AdvDataPreprocessor` attack the model it belongs to; a ``RobustClassifier`` does so by itself.

    Raises:
        TypeError: The model's data preprocessor does not attack.

    Examples:
        >>> # PGD training (arXiv:1706.06083) of an untouched ImageClassifier
        >>> model = dict(
        ...     type='ImageClassifier',
        ...     data_preprocessor=dict(
        ...         type='AdvDataPreprocessor', mode='replace',
        ...         attack=dict(type='PGD', eps=8 / 255, alpha=2 / 255, steps=10)),
        ...     backbone=..., head=...)
        >>> custom_hooks = [dict(type='BindVictimHook')]
    """

    priority = 'VERY_HIGH'

    def before_train(self, runner: Runner) -> None:
        """Bind the bare model, once it is built."""
        model = bare_model(runner.model)
        if not isinstance(model.data_preprocessor, AdvDataPreprocessor):
            raise TypeError(
                'custom_hooks: BindVictimHook needs data_preprocessor.type=AdvDataPreprocessor, got '
                f'{type(model.data_preprocessor).__name__}'
            )
        model.data_preprocessor.bind_victim(Victim(model))


@HOOKS.register_module()
class SpeedHook(Hook):
    """Let a GPU use its fast units: TF32 for products in float32, and weights in the layout of its convolutions.

    Nothing on a CPU. Mixed precision is a matter of the optimizer (``--amp``). What is not here:
    ``env_cfg.cudnn_benchmark``, which would try all algorithms anew for each number of images that an expert gets.

    Args:
        tf32 (bool): Round the factors of float32 products to 10 bits of mantissa. Defaults to True.
        channels_last (bool): Keep convolution weights in the layout NHWC. Defaults to True.

    Examples:
        >>> custom_hooks = [dict(type='SpeedHook')]
    """

    def __init__(self, tf32: bool = True, channels_last: bool = True) -> None:
        self.tf32 = tf32
        self.channels_last = channels_last

    def before_run(self, runner: Runner) -> None:
        """Change the settings of the process, and the layout of the model."""
        model = bare_model(runner.model)
        if next(model.parameters()).device.type != 'cuda':
            return
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self.tf32
        if self.channels_last:
            model.to(memory_format=torch.channels_last)
