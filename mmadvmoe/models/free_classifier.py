"""Free adversarial training: one backward pass for weights and images."""

from __future__ import annotations

from typing import Any, Optional

import torch
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmpretrain.models.classifiers import ImageClassifier
from mmpretrain.registry import MODELS
from torch import Tensor

from .data_preprocessor import AdvDataPreprocessor
from .losses import check_finite


@MODELS.register_module()
class FreeClassifier(ImageClassifier):
    """Step on each batch several times, and perturb the images by the gradient that each step has computed anyhow.

    The loss is the head's, on the perturbed images alone. The perturbation goes on from batch to batch; checkpoints
    hold it as ``offset``, after the first step. An epoch costs ``replays`` epochs of ordinary training; papers divide
    the number of epochs by it. Shafahi et al., "Adversarial Training for Free!", arXiv:1904.12843, algorithm 1.

    Mixtures of experts are trained jointly. It works in one process: in distributed training MMEngine's wrapper would
    step by itself.

    Args:
        eps (float): Radius of the L-inf ball, on [0, 1] images. Defaults to 8/255.
        replays (int): Steps on each batch. Defaults to 4.
        **kwargs: As for ``ImageClassifier``; ``data_preprocessor`` defaults to ``dict(type='AdvDataPreprocessor',
            mode='replace')``, without an attack.

    Raises:
        TypeError: The data preprocessor is another one, or attacks itself.
        ValueError: ``eps`` or ``replays`` is out of range.

    Examples:
        >>> model = dict(type='FreeClassifier', eps=8 / 255, replays=4, backbone=..., neck=..., head=...)
    """

    def __init__(self, *args, eps: float = 8 / 255, replays: int = 4, data_preprocessor=None, **kwargs) -> None:
        if not isinstance(replays, int) or replays < 1:
            raise ValueError(f'model.replays={replays!r} must be an integer of at least 1')
        if not 0 < eps <= 1:
            raise ValueError(f'model.eps={eps!r} must be in (0, 1]; if it is in units of 0..255, write eps={eps} / 255')
        if data_preprocessor is None or isinstance(data_preprocessor, dict):
            data_preprocessor = {'type': 'AdvDataPreprocessor', 'mode': 'replace', **(data_preprocessor or {})}
        super().__init__(*args, data_preprocessor=data_preprocessor, **kwargs)
        if not isinstance(self.data_preprocessor, AdvDataPreprocessor) or self.data_preprocessor.attack_cfg is not None:
            raise TypeError(
                'FreeClassifier perturbs images itself: set data_preprocessor=dict(type="AdvDataPreprocessor") without '
                'an attack'
            )
        self.eps = eps
        self.replays = replays
        self._offset: Optional[Tensor] = None
        # No buffer: its shape, that of the batches, is not known before, and weight averages pair buffers by order.
        self.register_state_dict_post_hook(_save_offset)
        self.register_load_state_dict_pre_hook(_load_offset)
        self._in_step = False

    def train_step(self, data: dict, optim_wrapper: OptimWrapper) -> dict[str, Tensor]:
        """Preprocess a batch and step on it ``replays`` times; the losses are those of the last one.

        Raises:
            TypeError: The optimizers take turns.
            ValueError: Gradients are to be accumulated.
            NonFiniteError: A loss is not finite.
        """
        if isinstance(optim_wrapper, OptimWrapperDict):
            raise TypeError(
                'FreeClassifier trains all parameters together: leave out AlternatingOptimHook and its groups'
            )
        if optim_wrapper._accumulative_counts != 1:
            raise ValueError(
                f'optim_wrapper.accumulative_counts={optim_wrapper._accumulative_counts} must be 1 for a '
                'FreeClassifier, whose replays each update the weights: for more images in a step raise '
                'train_dataloader.batch_size'
            )
        with optim_wrapper.optim_context(self):
            batch = self.data_preprocessor(data, True)
        images = self.data_preprocessor.to_unit(batch['inputs'])
        # A last batch of fewer images uses the first rows of the perturbation, and leaves the others as they are.
        offset, rest = torch.zeros_like(images), images[:0]
        if self._offset is not None and self._offset.shape[1:] == images.shape[1:]:
            before = self._offset.to(images.device)
            rest = before[len(images) :]
            offset[: len(before)] = before[: len(images)]
        self._in_step = True
        try:
            for _ in range(self.replays):
                points = (images + offset).clamp(0, 1).requires_grad_()
                with optim_wrapper.optim_context(self):
                    losses = self(self.data_preprocessor.normalize(points), batch['data_samples'], mode='loss')
                check_finite(losses)
                loss, log_vars = self.parse_losses(losses)
                optim_wrapper.update_params(loss)
                offset = (offset + self.eps * points.grad.sign()).clamp(-self.eps, self.eps)
        finally:
            self._in_step = False
        self._offset = torch.cat([offset.detach(), rest])
        return log_vars

    def loss(self, inputs: Tensor, data_samples: list) -> dict[str, Tensor]:
        """The head's loss.

        Raises:
            RuntimeError: It is asked for from outside of :meth:`train_step`, as distributed training does.
        """
        if not self._in_step:
            raise RuntimeError('FreeClassifier trains in one process, by its own train_step: use --launcher none')
        return super().loss(inputs, data_samples)


def _save_offset(model: FreeClassifier, state_dict: dict, prefix: str, metadata: dict) -> None:
    if model._offset is not None:
        state_dict[f'{prefix}offset'] = model._offset


def _load_offset(model: FreeClassifier, state_dict: dict, prefix: str, *args: Any) -> None:
    model._offset = state_dict.pop(f'{prefix}offset', None)
