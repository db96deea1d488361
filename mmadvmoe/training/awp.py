"""Adversarial weight perturbation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from mmengine.dist import all_reduce
from mmengine.optim import OptimWrapper
from mmpretrain.registry import OPTIM_WRAPPERS
from torch import Tensor, nn

from mmadvmoe.utils import bare_model


@OPTIM_WRAPPERS.register_module()
class AWPOptimWrapper(OptimWrapper):
    r"""Take the gradient where the weights are at their worst nearby, and step from where they are.

    .. math:: v = \gamma \, \lVert w \rVert \, g / \lVert g \rVert, \quad g = \nabla_w L(w), \quad
              w \leftarrow w - \eta \nabla_w L(w + v)

    for each weight tensor w of this optimizer that has more than one dimension, not for norm layers and biases; the
    experts of a layer are one tensor, so the norms are those of all N together. Wu et
    al., "Adversarial Weight Perturbation Helps Robust Generalization", arXiv:2004.05884, equations 7 to 11, with one
    step of ascent.

    An iteration costs one more forward and backward pass, on the adversarial images that were crafted at w. Losses and
    routes in the log are those at w, and so are the statistics that norm layers keep. Works alone or as either group of
    an ``AlternatingOptimWrapper``, then perturbing the weights of that group.

    Args:
        gamma (float): Size of the perturbation relative to that of the weights, above 0. Defaults to 5e-3.
        warmup_iters (int): Iterations of this optimizer before the first perturbation. Defaults to 0.
        **kwargs: As for :class:`mmengine.optim.OptimWrapper`: optimizer, clip_grad, accumulative_counts.

    Raises:
        ValueError: ``gamma`` or ``warmup_iters`` is out of range.

    Examples:
        >>> optim_wrapper = dict(
        ...     constructor='AlternatingOptimWrapperConstructor',
        ...     experts=dict(type='AWPOptimWrapper', gamma=5e-3, optimizer=dict(type='SGD', lr=0.1)),
        ...     router=dict(optimizer=dict(type='SGD', lr=0.01)))
    """

    def __init__(self, gamma: float = 5e-3, warmup_iters: int = 0, **kwargs: Any) -> None:
        if not (isinstance(gamma, (int, float)) and gamma > 0):
            raise ValueError(f'AWPOptimWrapper.gamma={gamma!r} must be a number above 0')
        if not (isinstance(warmup_iters, int) and warmup_iters >= 0):
            raise ValueError(f'AWPOptimWrapper.warmup_iters={warmup_iters!r} must be an integer of at least 0')
        super().__init__(**kwargs)
        self.gamma = gamma
        self.warmup_iters = warmup_iters
        self._call: tuple[nn.Module, tuple, dict] | None = None

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Note how the model is called inside with ``mode='loss'``, to be able to compute the loss again."""
        if self._inner_count < self.warmup_iters:
            with super().optim_context(model):
                yield
            return
        # The gradient of this forward pass only tells the direction of v, so a distributed wrapper must not wait for
        # its backward pass.
        quiet = model.no_sync() if hasattr(model, 'no_sync') else nullcontext()
        handle = model.register_forward_pre_hook(self._note_call, with_kwargs=True)
        try:
            with quiet:
                yield
        finally:
            handle.remove()

    def _note_call(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        if kwargs.get('mode') == 'loss':
            self._call = (model, args, kwargs)

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Back-propagate the loss at the perturbed weights, and restore them bit for bit.

        Raises:
            RuntimeError: The loss was not computed inside :meth:`optim_context`.
        """
        if self._inner_count < self.warmup_iters:
            super().backward(loss, **kwargs)
            return
        if self._call is None:
            raise RuntimeError(
                'AWPOptimWrapper computes the loss again at perturbed weights: it must be computed inside '
                "optim_context(model), by calling the model with mode='loss'"
            )
        (model, args, kept), self._call = self._call, None
        parameters = (parameter for group in self.optimizer.param_groups for parameter in group['params'])
        weights = [parameter for parameter in parameters if parameter.requires_grad and parameter.dim() > 1]
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        # At w, where a RobustClassifier has noted them.
        records = getattr(bare_model(model), 'routing_records', {})
        records_at_w = dict(records)
        with _kept(weights + list(model.buffers())):
            with torch.no_grad():
                for weight, gradient in zip(weights, gradients):
                    weight.add_(self._perturbation(weight, gradient))
            with super().optim_context(model):
                losses = model(*args, **kept)
            parse_losses = bare_model(model).parse_losses
            super().backward(self.scale_loss(parse_losses(losses)[0]), **kwargs)
        records.update(records_at_w)

    def _perturbation(self, weight: Tensor, gradient: Tensor | None) -> Tensor:
        gradient = torch.zeros_like(weight) if gradient is None else gradient
        # Every process perturbs by the gradient of the global batch, so that their weights stay equal. Gradients are
        # exchanged as they lie in memory, in an order that depends on which experts got images.
        gradient = gradient.contiguous()
        all_reduce(gradient, op='mean')
        norm = gradient.norm()
        return gradient * torch.where(norm > 0, self.gamma * weight.norm() / norm, torch.zeros_like(norm))


@contextmanager
def _kept(tensors: list[Tensor]) -> Iterator[None]:
    """Give tensors back the values they have now, whatever happens inside."""
    values = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, values):
                tensor.copy_(value)
