"""Pictures of adversarial images in the course of training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmpretrain.registry import HOOKS

from mmadvmoe.attacks import Victim, build_attack
from mmadvmoe.evaluation import attack_examples
from mmadvmoe.evaluation.data import spread_images
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
