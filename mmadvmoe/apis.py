"""Use a trained model outside of a Runner."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Union

import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import load_checkpoint
from mmpretrain.registry import MODELS
from torch import Tensor

import mmadvmoe  # noqa: F401  # registers the components
from mmadvmoe.attacks import Victim
from mmadvmoe.engine.safe_load import check_state_dict


def load_robust_model(
    config: Union[str, Path, Config], checkpoint: Union[str, Path], device: Union[str, torch.device] = 'cpu'
) -> Victim:
    """Load a trained classifier as a plain module: images in [0, 1] to class logits.

    The checkpoint is read without running anything in it, and has to fit the config tensor for tensor.

    Args:
        config (str, Path or Config): A config file, or the config itself.
        checkpoint (str or Path): File or address of the checkpoint.
        device (str or torch.device): Where the model goes. Defaults to ``'cpu'``.

    Returns:
        Victim: In eval mode. ``model(images)`` maps (B, 3, H, W) in [0, 1] to logits (B, K), normalisation inside;
        ``model.forward_routed(images)`` also gives the routes, and :func:`mmadvmoe.attacks.build_attack` attacks it.

    Raises:
        FileNotFoundError: There is no such config or checkpoint.
        CheckpointError: The checkpoint is damaged, holds what no checkpoint needs, or does not fit the config.
        TypeError: ``config`` is none.

    Examples:
        >>> model = load_robust_model('configs/advmoe_resnet18_digits.py', 'work_dirs/demo/epoch_80.pth')
        >>> model(torch.rand(4, 3, 8, 8)).shape
        torch.Size([4, 10])
    """
    if isinstance(config, (str, Path)):
        config = Config.fromfile(config)
    if not isinstance(config, Mapping) and not isinstance(config, Config):
        raise TypeError(f'config must be the path of a config file or a Config, got a {type(config).__name__}')
    model_cfg = dict(config['model'])
    if config.get('data_preprocessor') is not None:
        model_cfg.setdefault('data_preprocessor', config['data_preprocessor'])
    with DefaultScope.overwrite_default_scope(config.get('default_scope') or 'mmpretrain'):
        classifier = MODELS.build(model_cfg)
    content = load_checkpoint(classifier, str(checkpoint), map_location='cpu', logger='silent')
    # MMEngine leaves a tensor that does not fit as it was.
    check_state_dict(classifier, content, str(checkpoint))
    return Victim.from_classifier(classifier.to(device)).eval()


@torch.no_grad()
def inference(model: Victim, images: Tensor, batch_size: int = 256) -> tuple[Tensor, Tensor]:
    """Class probabilities of images, and the experts that computed them.

    Args:
        model (Victim): From :func:`load_robust_model`.
        images (Tensor): (B, 3, H, W) in [0, 1].
        batch_size (int): Images at a time. Defaults to 256.

    Returns:
        tuple: Probabilities (B, K), and the expert that each of the L routers chose, (B, L) int64 (L is 0 for a dense
        model; of routers for tokens, the experts of all tokens, layer by layer); both on the CPU.
    """
    device = next(model.parameters()).device
    probabilities, experts = [], []
    with model.frozen():
        for part in images.split(batch_size):
            logits, routings = model.forward_routed(part.to(device))
            probabilities.append(logits.softmax(dim=1).cpu())
            chosen = [routing.decisions.cpu() for routing in routings]
            experts.append(torch.cat(chosen, dim=1) if chosen else torch.empty(len(part), 0, dtype=torch.int64))
    return torch.cat(probabilities), torch.cat(experts)
