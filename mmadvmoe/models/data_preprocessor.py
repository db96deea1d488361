"""Data preprocessing that crafts the adversarial batch of a training step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mmengine.utils.dl_utils import has_batch_norm
from mmpretrain.models.utils import ClsDataPreprocessor
from mmpretrain.registry import MODELS, TRANSFORMS
from torch import Tensor

from mmadvmoe.attacks import BoundAttack, NonFiniteImagesError, Victim, build_attack
from mmadvmoe.attacks.model import WHITE, as_unit
from mmadvmoe.moe import GROUPS, NonFiniteRouterError
from mmadvmoe.utils import choose

from .losses import ROUTER_LOGITS, NonFiniteError

MODES = ('pair', 'replace')
_MAX_PIXEL = 255.0
#: The refusal of an attack that has nothing to attack.
NO_VICTIM = (
    'data_preprocessor: AdvDataPreprocessor has no victim to attack: use a RobustClassifier, or add '
    "dict(type='BindVictimHook') to custom_hooks"
)


@MODELS.register_module()
class AdvDataPreprocessor(ClsDataPreprocessor):
    """MMPretrain's data preprocessor, with an attack on the training batch.

    Images are collated and augmented as by ``ClsDataPreprocessor``, brought to [0, 1], attacked there, and only then
    normalised, so a threat model is always in the scale of the images.

    Args:
        attack (dict, optional): Config of the attack of a training step, built from ``ATTACKS``. Defaults to None:
            no attack, for evaluation only.
        router_attack (dict, optional): Config of the attack in the router's turn of a training in turns. Defaults to
            None: ``attack``.
        mode (str): ``'pair'`` adds ``adv_inputs`` beside ``inputs`` (TRADES, AdvMoE), ``'replace'`` gives adversarial
            ``inputs`` alone, to any classifier. Defaults to ``'pair'``.
        mean (Sequence[float], optional): Of R, G, B in 0..255, as everywhere in MMPretrain. Defaults to None: the
            network sees images in [0, 1].
        std (Sequence[float], optional): In 0..255. Defaults to None.
        augment (dict, optional): Augmentation of whole training batches (B, C, H, W) in 0..255, on the device and
            before everything else, such as ``dict(type='BatchedCropFlip', padding=4)``. Defaults to None.
        **kwargs: As for ``ClsDataPreprocessor``: to_rgb, num_classes, batch_augments, ...

    Raises:
        ValueError: ``mode`` is unknown, or ``mean`` and ``std`` are not in the scale 0..255.
    """

    def __init__(
        self,
        attack: dict | None = None,
        router_attack: dict | None = None,
        mode: str = 'pair',
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        augment: dict | None = None,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        _check_scale(mean, std)
        self.mode = choose(mode, MODES, 'data_preprocessor.mode')
        self.attack_cfg = attack
        self.router_attack_cfg = router_attack
        self.augment = None if augment is None else TRANSFORMS.build(augment)
        for name, given, default in (('mean', mean, 0.0), ('std', std, _MAX_PIXEL)):
            value = torch.tensor([default] if given is None else given, dtype=torch.float32)
            self.register_buffer(name, value.view(-1, 1, 1), persistent=False)
        # By turn; None stands for joint training. Bound attacks are no modules: they refer back to the model.
        self._attacks: dict[str | None, BoundAttack] = {}

    def bind_victim(self, victim: Victim) -> None:
        """Name the model that training attacks, as a function of images in [0, 1]; its classes are counted here."""
        if self.num_classes is None:
            self.num_classes = victim.num_classes
        self._attacks = {}
        if self.attack_cfg is not None:
            self._attacks = dict.fromkeys((None, *GROUPS), build_attack(self.attack_cfg, victim))
        if self.router_attack_cfg is not None:
            self._attacks['router'] = build_attack(self.router_attack_cfg, victim)
        for attack in {*self._attacks.values()}:
            attack.warn_if_short('model.data_preprocessor')
        if any(attack.aims_at_labels for attack in self._attacks.values()):
            raise ValueError(
                "data_preprocessor.attack: targeted='label' takes labels for targets, and those of training are the "
                "true ones; use targeted='least-likely', 'random' or a function of images and labels"
            )

    @property
    def has_victim(self) -> bool:
        """Whether there is a model to attack."""
        return bool(self._attacks)

    def attack_of(self, turn: str | None) -> BoundAttack | None:
        """The attack of a turn (None: of joint training), if there is one."""
        return self._attacks.get(turn)

    def normalize(self, images: Tensor) -> Tensor:
        """Bring images in [0, 1], (B, C, H, W), to what the network expects; ValueError where ``mean`` is not of C."""
        count = max(self.mean.numel(), self.std.numel())
        if count not in (1, images.shape[1]):
            raise ValueError(
                f'model.data_preprocessor: mean and std have {count} numbers and images have {images.shape[1]} '
                'channel(s): give one number for each, or load images as the network takes them (color_type)'
            )
        return (images * _MAX_PIXEL - self.mean) / self.std

    def to_unit(self, inputs: Tensor) -> Tensor:
        """Bring network inputs, (B, C, H, W), back to images in [0, 1], exact for 8-bit images."""
        pixels = inputs * self.std + self.mean
        nearest = pixels.round()
        exact = torch.where((pixels - nearest).abs() < 1e-2, nearest, pixels)
        return (exact / _MAX_PIXEL).clamp(0, 1)

    def forward(self, data: dict, training: bool = False) -> dict:
        """Collate, and in training craft adversarial images.

        Args:
            data (dict): ``inputs``, images in 0..255 or of 16 bits, and ``data_samples``, as the data loader gives
                them; in training in turns also ``turn``, which decides the attack. What has ``adv_inputs`` already, as
                one turn hands it on to the other, is given back as it is.
            training (bool): Whether this is a training step.

        Returns:
            dict: ``inputs`` (B, C, H, W), ``data_samples`` and, in training with ``mode='pair'``, ``adv_inputs`` and
            ``turn``, if there is one.

        Raises:
            ValueError: Images differ in size, are not in 0..255, or a training batch holds a single one.
            RuntimeError: There is an attack but no victim.
            NonFiniteError: The attack met logits or gradients that are not finite.
        """
        if 'adv_inputs' in data:
            return data
        check_images(data['inputs'], 'train_dataloader' if training else 'val_dataloader or test_dataloader')
        inputs = as_pixels(data['inputs'])
        if training and self.augment is not None:
            inputs = self.cast_data(inputs)
            inputs = self.augment(inputs if isinstance(inputs, Tensor) else torch.stack(inputs))
        batch = super().forward(dict(data, inputs=inputs), training)
        images = batch['inputs'] / _MAX_PIXEL
        if not training or self.attack_cfg is None:
            batch['inputs'] = self.normalize(images)
            return batch
        turn = data.get('turn')
        if len(images) < 2 and self._attacks and has_batch_norm(self._attacks[turn].victim.classifier):
            raise ValueError(
                'a training batch holds a single image, on which batch statistics do not exist: set '
                'train_dataloader.batch_size to at least 2 and train_dataloader.drop_last=True'
            )
        adversarial = self.normalize(self._attack(images, batch['data_samples'], turn))
        if self.mode == 'replace':
            return dict(batch, inputs=adversarial)
        batch.update(inputs=self.normalize(images), adv_inputs=adversarial)
        return batch if turn is None else dict(batch, turn=turn)

    def _attack(self, images: Tensor, data_samples: Sequence, turn: str | None) -> Tensor:
        if not self._attacks:
            raise RuntimeError(NO_VICTIM)
        attack = self._attacks[turn]
        try:
            return attack(images, targets_of(data_samples).to(images.device))
        except (NonFiniteImagesError, NonFiniteRouterError) as error:
            raise NonFiniteError(*_diagnose(images, attack, turn)) from error


@torch.no_grad()
def _diagnose(images: Tensor, attack: BoundAttack, turn: str | None) -> tuple[str, str | None, str | None]:
    """Name what is not finite for clean images after an attack went wrong, as :class:`NonFiniteError` takes it."""
    try:
        with attack.victim.frozen() as victim:
            finite = victim(images).isfinite().all()
    except NonFiniteRouterError as error:
        return f'{ROUTER_LOGITS} ({error.router})', turn, 'router'
    return f'gradient of attack {attack.name}' if finite else 'class logits', turn, None


def targets_of(data_samples: Sequence) -> Tensor:
    """Labels (B,) int64 of a batch, or (B, K) class probabilities after batch augmentations."""
    if 'gt_score' in data_samples[0]:
        return torch.stack([sample.gt_score for sample in data_samples])
    return torch.cat([sample.gt_label for sample in data_samples])


def _check_scale(mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
    if (mean is None) != (std is None):
        raise ValueError(f'data_preprocessor.mean={mean} and data_preprocessor.std={std} must be given together')
    if std is None:
        return
    if len(mean) != len(std):
        raise ValueError(f'data_preprocessor.mean={mean} and data_preprocessor.std={std} differ in length')
    if min(std) <= 0 or max(std) > _MAX_PIXEL or min(mean) < 0 or max(mean) > _MAX_PIXEL:
        raise ValueError(f'data_preprocessor.mean={mean}, std={std}: allowed are mean in [0, 255], std in (0, 255]')
    # A mean of 0 and, beside a mean in 0..255, a std of 1 leave pixels as they are and tell nothing of the scale.
    if 0 < max(mean) <= 1 or min(std) < 1 or (max(std) <= 1 and max(mean) <= 1):
        raise ValueError(
            f'data_preprocessor.mean={mean}, std={std} are in the scale 0..1, but images come in 0..255: multiply both '
            'by 255'
        )


def as_pixels(inputs: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
    """Bring images of 16 bits to 0..255; others are left as they are."""
    if isinstance(inputs, Tensor):
        return as_unit(inputs) * _MAX_PIXEL if inputs.dtype == torch.uint16 else inputs
    return [as_pixels(image) for image in inputs]


def check_images(inputs: Sequence[Tensor], loader: str) -> None:
    """Check that images, each (C, H, W), can make up a batch of pixels in 0..255; ``loader`` is for messages.

    Raises:
        ValueError: Images differ in size, or are not in 0..255 and of no type that tells their range.
    """
    images = list(inputs)
    pipeline = f'the pipeline of the data set ({loader}.dataset.pipeline)'
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) > 1:
        raise ValueError(f'images of one batch differ in size: {sorted(shapes)}; add a Resize or a Crop to {pipeline}')
    if images[0].dtype in WHITE:
        return
    low, high = min(float(i.min()) for i in images), max(float(i.max()) for i in images)
    # Written so that NaN fails too.
    scaled = images[0].is_floating_point() and 0 < high <= 1
    if not (low >= 0 and high <= _MAX_PIXEL) or scaled:
        raise ValueError(
            f'images lie in [{low:.3g}, {high:.3g}], but data_preprocessor expects 0..255: remove the scaling or '
            f'normalisation from {pipeline}'
        )
