"""Use a trained model outside of a Runner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.registry import DefaultScope
from mmengine.runner import load_checkpoint
from mmpretrain.evaluation import Accuracy
from mmpretrain.registry import MODELS
from torch import Tensor, nn

import mmadvmoe  # noqa: F401  # registers the components
from mmadvmoe.attacks import NormalizedClassifier, Victim
from mmadvmoe.attacks.model import as_unit, check_unit
from mmadvmoe.attacks.views import decisions
from mmadvmoe.datasets import ChunkSampler
from mmadvmoe.evaluation import CLEAN, WORST, RobustOutcomes
from mmadvmoe.evaluation.data import Data, as_dataset, read_chunks, spread_images
from mmadvmoe.evaluation.named_attacks import choose_attacks, with_route_attack
from mmadvmoe.evaluation.run import RobustEvaluation
from mmadvmoe.runtime.console import quiet
from mmadvmoe.runtime.launch import load_config
from mmadvmoe.runtime.preflight import check_data
from mmadvmoe.runtime.safe_load import check_state_dict
from mmadvmoe.runtime.seeding import preserve_rng_state
from mmadvmoe.runtime.zoo import read_zoo
from mmadvmoe.utils import choose


def list_models(pattern: str = '*', pretrained: bool = False) -> list[str]:
    """Names for :func:`get_model`, sorted.

    Args:
        pattern (str): What names must match, as file names match ``'*digits*'``. Defaults to all.
        pretrained (bool): Only models whose weights are published. Defaults to False.

    Examples:
        >>> list_models('advmoe_*_cifar10', pretrained=False)
    """
    models = read_zoo().values()
    return sorted(m.name for m in models if fnmatchcase(m.name, pattern) and (m.weights is not None or not pretrained))


def get_model(
    name: str, pretrained: bool | str | Path = False, device: str | torch.device = 'cpu'
) -> NormalizedClassifier:
    """A model of this package by its name, as a plain module: images in [0, 1] to class logits.

    Weights that come with the installation are compared with their published SHA-256.

    Args:
        name (str): One of :func:`list_models`.
        pretrained (bool, str or Path): True for the published weights, a file or address for others, False for random
            ones. Defaults to False.
        device (str or torch.device): Where the model goes. Defaults to ``'cpu'``.

    Returns:
        NormalizedClassifier: In eval mode, as :func:`load_robust_model` gives it.

    Raises:
        ValueError: There is no model of this name, or no weights of it are published.
        CheckpointError: The weights are not those that were published, or do not fit.

    Examples:
        >>> model = get_model('advmoe_resnet18_digits', pretrained=True)
        >>> model(torch.rand(4, 3, 8, 8)).shape
        torch.Size([4, 10])
    """
    models = read_zoo()
    model = models[choose(name, sorted(models), 'name')]
    if pretrained is False:
        classifier = _build_classifier(load_config(model.config))
        with quiet():
            classifier.init_weights()
        return NormalizedClassifier(classifier.to(device)).eval()
    checkpoint = model.checked_weights() if pretrained is True else pretrained
    return load_robust_model(model.config, checkpoint, device)


def load_robust_model(
    config: str | Path | Config, checkpoint: str | Path, device: str | torch.device = 'cpu'
) -> NormalizedClassifier:
    """Load a trained classifier as a plain module: images in [0, 1] to class logits.

    The checkpoint is read without running anything in it, and has to fit the config tensor for tensor.

    Args:
        config (str, Path or Config): A config file, or the config itself.
        checkpoint (str or Path): File or address of the checkpoint.
        device (str or torch.device): Where the model goes. Defaults to ``'cpu'``.

    Returns:
        NormalizedClassifier: In eval mode. ``model(images)`` maps (B, 3, H, W) in [0, 1] to logits (B, K);
        ``model.forward_routed(images)`` also gives the routes, and :func:`mmadvmoe.attacks.build_attack` attacks it.

    Raises:
        FileNotFoundError: There is no such config or checkpoint.
        CheckpointError: The checkpoint is damaged, holds what no checkpoint needs, or does not fit the config.
        TypeError: ``config`` is none.

    Examples:
        >>> model = load_robust_model('configs/advmoe_resnet18_digits.py', 'work_dirs/digits/epoch_120.pth')
        >>> model(torch.rand(4, 3, 8, 8)).shape
        torch.Size([4, 10])
    """
    if isinstance(config, (str, Path)):
        config = load_config(config)
    if not isinstance(config, Mapping) and not isinstance(config, Config):
        raise TypeError(f'config must be the path of a config file or a Config, got a {type(config).__name__}')
    classifier = _build_classifier(config)
    content = load_checkpoint(classifier, str(checkpoint), map_location='cpu', logger='silent')
    # MMEngine leaves a tensor that does not fit as it was.
    check_state_dict(classifier, content, str(checkpoint))
    return NormalizedClassifier(classifier.to(device)).eval()


def _build_classifier(config: Mapping) -> nn.Module:
    """The classifier of a config, with weights as its layers draw them."""
    model_cfg = dict(config['model'])
    if config.get('data_preprocessor') is not None:
        model_cfg.setdefault('data_preprocessor', config['data_preprocessor'])
    with DefaultScope.overwrite_default_scope(config.get('default_scope') or 'mmpretrain'):
        return MODELS.build(model_cfg)


@torch.no_grad()
def inference(
    model: NormalizedClassifier | Victim, images: Tensor | np.ndarray, batch_size: int = 256
) -> tuple[Tensor, Tensor]:
    """Class probabilities of images, and the experts that computed them.

    Args:
        model (NormalizedClassifier or Victim): Such as :func:`load_robust_model` gives.
        images (Tensor or ndarray): (B, 3, H, W) in [0, 1], or uint8 or uint16; or one image, (3, H, W): a batch
            of one. An array can have its channels last, as NumPy images have them.
        batch_size (int): Images at a time. Defaults to 256.

    Returns:
        tuple: Probabilities (B, K), and the expert that each of the L routers chose, (B, L) int64 (L is 0 for a dense
        model; of routers for tokens, the experts of all tokens, layer by layer); both on the CPU.

    Raises:
        TypeError: Images are neither, or of an integer type that does not tell their range.
        ValueError: They have another shape, or are not in [0, 1].
        FloatingPointError: A router gives logits that are not finite.
    """
    images = as_unit(_as_batch(images))
    if not len(images):
        # Networks of MMPretrain cannot have no image; of one they tell K and L.
        probabilities, experts = inference(model, images.new_zeros(1, *images.shape[1:]))
        return probabilities[:0], experts[:0]
    device = next(model.parameters()).device
    probabilities, experts = [], []
    with model.frozen():
        for part in images.split(batch_size):
            logits, routings = model.forward_routed(check_unit(part.to(device)))
            probabilities.append(logits.softmax(dim=1).cpu())
            experts.append(decisions(routings, logits).cpu())
    return torch.cat(probabilities), torch.cat(experts)


def _as_batch(images: Tensor | np.ndarray) -> Tensor:
    """Images as (B, C, H, W), their numbers as they are."""
    if isinstance(images, np.ndarray):
        # A copy, in an order that tensors can have.
        images = torch.from_numpy(np.array(images))
        if images.dim() in (3, 4) and images.shape[-1] in (1, 3) and images.shape[-3] not in (1, 3):
            images = images.movedim(-1, -3)
    if not isinstance(images, Tensor):
        raise TypeError(
            f'images must be a tensor or an array, got a {type(images).__name__}; of a PIL image numpy.asarray makes '
            'one, and numpy.stack of several'
        )
    if images.dim() == 3:
        images = images[None]
    if images.dim() != 4:
        raise ValueError(f'images must be (B, C, H, W) or one (C, H, W), got {tuple(images.shape)}')
    return images


@dataclass(frozen=True)
class RobustnessResult:
    """What :func:`evaluate_robustness` found.

    Attributes:
        metrics: As :class:`~mmadvmoe.evaluation.RobustTestLoop` reports them: ``'pgd50/accuracy/top1'`` in percent, and
            what the routes of a mixture of experts did.
        outcomes: Logits, experts and distances of every image under every attack.
    """

    metrics: dict[str, float]
    outcomes: RobustOutcomes

    @property
    def clean_accuracy(self) -> float:
        """Share of images that are classified rightly without an attack."""
        return self.metrics[f'{CLEAN}/accuracy/top1'] / 100

    @property
    def robust_accuracy(self) -> float:
        """Share of images that are classified rightly without an attack and under every one."""
        return self.metrics[f'{WORST}/accuracy/top1'] / 100


def evaluate_robustness(
    model: nn.Module,
    data: Data,
    attacks: Mapping[str, Mapping] | Sequence[str],
    *,
    eps: float | None = None,
    norm: str | None = None,
    cascade: bool = False,
    chunk_size: int = 128,
    seed: int = 0,
    out_dir: str | Path | None = None,
    overwrite: bool = False,
    device: str | torch.device | None = None,
    num_classes: int | None = None,
) -> RobustnessResult:
    """Measure the accuracy of a classifier under attacks, and the worst case of each image over all of them.

    A mixture of experts is always attacked by :class:`~mmadvmoe.attacks.RoutePGD` as well, and with image-level routing
    by each attack with the route held, because the worst case over attacks that know nothing of routes can be far too
    high. RoutePGD takes as many steps as the longest attack asked for, at most 50. In several processes (with a process
    group) each takes its share of the images, and all get the result.

    Args:
        model (nn.Module): What :func:`load_robust_model` gives, a view of it (:class:`~mmadvmoe.attacks.Victim`), an
            MMPretrain classifier, which gets the normalisation of its ``data_preprocessor``, or any module that maps
            images in [0, 1] to logits.
        data (Mapping, Dataset or tuple): Config of a data set; a data set, with samples as MMPretrain packs them or
            pairs of an image in [0, 1] and a label; or the tensors images (B, C, H, W) and labels (B,).
        attacks (Mapping or Sequence): Configs of attacks under names of your own; or names of standard attacks, such as
            ``['pgd50', 'autoattack']`` (:data:`mmadvmoe.attacks.STANDARD_ATTACKS`).
        eps (float, optional): Radius of the standard attacks, on [0, 1] images.
        norm (str, optional): Norm of the standard attacks. Defaults to ``'Linf'``.
        cascade (bool): Whether each attack gets only the images that are right so far. Accuracies are then those after
            an attack and all before it; the worst case is the same, up to what the attacks draw. Defaults to False.
        chunk_size (int): Images attacked at a time. What an attack draws depends on it. Defaults to 128.
        seed (int): Seed of the attacks. Defaults to 0.
        out_dir (str or Path, optional): Folder that gets the outcome of each image as it becomes known, and in which a
            killed evaluation goes on where it stopped.
        overwrite (bool): Delete the outcomes in ``out_dir`` and begin anew, instead of going on or refusing to.
        device (str or torch.device, optional): Where the model is moved to first. Defaults to where it is.
        num_classes (int, optional): K of a module that is none of this package. Defaults to the width of its logits
            for the first image.

    Returns:
        RobustnessResult: Metrics and outcomes.

    Raises:
        TypeError: Data or attacks are of another kind.
        ValueError: A setting is not allowed, labels and classes do not fit, images are not in [0, 1], or ``out_dir``
            holds the outcomes of another evaluation.
        RuntimeError: An attack failed; names it and the images. What was done before is in ``out_dir``.
        FloatingPointError: Logits are not finite.

    Examples:
        >>> model = load_robust_model('configs/advmoe_resnet18_digits.py', 'work_dirs/digits/epoch_120.pth')
        >>> data = dict(type='Digits', split='test', pipeline=[dict(type='PackInputs')])
        >>> result = evaluate_robustness(model, data, ['pgd50', 'autoattack'], eps=0.2, cascade=True)
        >>> result.clean_accuracy, result.robust_accuracy
    """
    victim = Victim(model, num_classes=num_classes)
    if device is not None:
        victim.model.to(device)
    dataset = as_dataset(data)
    if victim.num_classes is None and len(dataset):
        # One pass tells how many classes the module of someone else has.
        image, _ = spread_images(dataset, getattr(victim.classifier, 'data_preprocessor', None), 1)
        with victim.frozen(), torch.no_grad():
            victim(image.to(next(iter(victim.parameters()), image).device))
    if not isinstance(attacks, Mapping):
        attacks = choose_attacks(attacks, eps=eps, norm=norm or 'Linf')
    elif eps is not None or norm is not None:
        raise ValueError(f'eps={eps}, norm={norm!r} are for standard attacks by name: write them into the configs')
    attacks = with_route_attack(attacks, victim)
    check_data(dataset, 'data', victim.num_classes)
    evaluation = RobustEvaluation(
        victim, attacks, chunk_size=chunk_size, seed=seed, survivors_only=list(attacks) if cascade else ()
    )
    if out_dir is not None:
        evaluation.keep_in(out_dir, overwrite)
    sampler = ChunkSampler(dataset, chunk_size)
    with preserve_rng_state():
        evaluation.begin(sampler)
        for chunk in read_chunks(dataset, sampler, victim):
            evaluation.evaluate(chunk)
        metrics = evaluation.finish(Evaluator(Accuracy()))
    return RobustnessResult(metrics, evaluation.outcomes)
