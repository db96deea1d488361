"""Weights of expert convolutions in the layout that oneDNN computes in, for as long as they cannot change.

PyTorch brings the weight of a convolution into oneDNN's own layout at each call. For one network at a batch of 64 that
costs next to nothing; of N experts that get 64 / N images each it is N times the weights for the same work. An attack
makes hundreds of passes through weights that stand still, so there the layout is made once.
"""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .folded_norms import FoldedNorm

_OPS = (
    '_reorder_convolution_weight',
    '_convolution_pointwise',
    '_reorder_convolution_transpose_weight',
    '_convolution_transpose_pointwise',
)
_PLAIN = ('none', [], '')  # no activation fused

#: The layers whose weights are held, each with what was made of its weights so far.
HELD: WeakKeyDictionary[nn.Module, HeldWeights] = WeakKeyDictionary()


class HeldWeights:
    """The experts' weights of one convolution, brought into oneDNN's layout at their first use.

    A weight that is changed in place or replaced is brought there again, as far as PyTorch tells of the change: writes
    through ``.data`` it does not tell of, so they have no place while weights are held.

    Args:
        layer (nn.Module): A :class:`MoEConv2d`.
    """

    def __init__(self, layer: nn.Module) -> None:
        self._made: dict[tuple, Tensor] = {}
        self._source: tuple[int, int] | None = None
        self._serves = (
            layer.groups == 1
            and layer.padding_mode == 'zeros'
            and not isinstance(layer.padding, str)
            and torch.backends.mkldnn.is_available()
            and all(hasattr(torch.ops.mkldnn, name) for name in _OPS)
        )

    def serves(self, layer: nn.Module, x: Tensor) -> bool:
        """Whether these weights can stand in for those of the layer on ``x`` (B, C, H, W)."""
        return (
            self._serves
            and x.device.type == 'cpu'
            and x.dtype == layer.weight.dtype == torch.float32
            and not torch.is_autocast_enabled('cpu')
            and torch.backends.mkldnn.enabled
            and not (torch.is_grad_enabled() and layer.weight.requires_grad)
        )

    def run(
        self,
        layer: nn.Module,
        x: Tensor,
        counts: Sequence[int],
        gate: Tensor | None,
        folded: FoldedNorm | None = None,
    ) -> Tensor:
        """The output of the layer for a batch sorted by expert.

        Args:
            layer (nn.Module): The layer.
            x (Tensor): (B, C_in, H, W).
            counts (Sequence[int]): Images of each expert.
            gate (Tensor, optional): (B,), the straight-through factor in the order of ``x``.
            folded (FoldedNorm, optional): The layer with the norm after it in its weights, to be computed in its place.
        """
        source = layer if folded is None else folded
        self._weight, self._bias = source.weight, source.bias
        state = self._weight.data_ptr(), self._weight._version
        if state != self._source:
            self._made, self._source = {}, state
        self._added = self._chunks(layer, self._bias)
        if folded is not None:
            if 'added' not in self._made:
                self._made['added'] = [folded.shift if b is None else b + folded.shift for b in self._added]
            self._added = self._made['added']
        return _Convolve.apply(x, gate, self, layer, tuple(counts))

    @staticmethod
    def _chunks(layer: nn.Module, stacked: Tensor | None) -> Sequence[Tensor | None]:
        return [None] * layer.num_experts if stacked is None else stacked.detach().chunk(layer.num_experts)

    def convolve(self, layer: nn.Module, x: Tensor, expert: int) -> Tensor:
        """One expert on its own images: (b, C_in, H, W) -> (b, C_out, H', W')."""
        padding, stride, dilation = layer.padding, layer.stride, layer.dilation
        key = ('forward', expert, *x.shape[2:])
        if key not in self._made:
            self._made[key] = torch.ops.mkldnn._reorder_convolution_weight(
                self._chunks(layer, self._weight)[expert], padding, stride, dilation, 1, list(x.shape)
            )
        return torch.ops.mkldnn._convolution_pointwise(
            x, self._made[key], self._added[expert], padding, stride, dilation, 1, *_PLAIN
        )

    def gate_of_bias(
        self, layer: nn.Module, grad: Tensor, counts: Sequence[int], used: Sequence[int]
    ) -> Tensor | float:
        """What the bias has in the gradient of the gate: (B,), or 0 without a bias.

        What a folded norm adds comes after the gate and is no part of it.
        """
        if self._bias is None:
            return 0.0
        biases = self._chunks(layer, self._bias)
        sums = grad.sum(dim=(2, 3)).split(list(counts))
        return torch.cat([part @ biases[n] for part, n in zip(sums, used)])

    def backward(self, layer: nn.Module, grad: Tensor, size: Sequence[int], expert: int) -> Tensor:
        """The gradient of the images of one expert, (b, C_in, H, W), from that of its output."""
        padding, stride, dilation = layer.padding, layer.stride, layer.dilation
        kernel = layer.weight.shape[2:]
        # What the convolution cut off where the stride does not fit the size.
        rest = [
            h - ((o - 1) * s - 2 * p + d * (k - 1) + 1)
            for h, o, s, p, d, k in zip(size, grad.shape[2:], stride, padding, dilation, kernel)
        ]
        key = ('backward', expert, *size)
        if key not in self._made:
            self._made[key] = torch.ops.mkldnn._reorder_convolution_transpose_weight(
                self._chunks(layer, self._weight)[expert], padding, rest, stride, dilation, 1, list(grad.shape)
            )
        return torch.ops.mkldnn._convolution_transpose_pointwise(
            grad, self._made[key], None, padding, rest, stride, dilation, 1, *_PLAIN
        )


class _Convolve(torch.autograd.Function):
    """A convolution by held weights, with the gradients of images and gate.

    A convolution W is linear, so the gradient of an image's gate, its output's product with the gradient g of the
    output, is that of the input with the gradient of the input: <g, W x> = <W^T g, x>. One product for the whole batch
    does for all experts, and nothing is kept but the input, so that an in-place activation may follow.
    """

    @staticmethod
    def forward(ctx, x: Tensor, gate: Tensor | None, held: HeldWeights, layer: nn.Module, counts: tuple[int, ...]):
        ctx.held, ctx.layer, ctx.size = held, layer, x.shape[2:]
        ctx.used = [n for n, count in enumerate(counts) if count]
        ctx.counts = [counts[n] for n in ctx.used]
        if gate is not None and ctx.needs_input_grad[1]:
            ctx.save_for_backward(x)
            ctx.gate_dtype = gate.dtype
        return _join([held.convolve(layer, part, n) for n, part in zip(ctx.used, x.split(ctx.counts))])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        grads = grad.split(ctx.counts)
        grad_x = _join([ctx.held.backward(ctx.layer, g, ctx.size, n) for g, n in zip(grads, ctx.used)])
        grad_gate = None
        if ctx.needs_input_grad[1]:
            grad_gate = image_dots(grad_x, *ctx.saved_tensors)
            grad_gate += ctx.held.gate_of_bias(ctx.layer, grad, ctx.counts, ctx.used)
            grad_gate = grad_gate.to(ctx.gate_dtype)
        return grad_x, grad_gate, None, None, None


def _join(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def image_dots(a: Tensor, b: Tensor) -> Tensor:
    """The dot product of each image of ``a`` with that of ``b``: twice (B, ...) -> (B,)."""
    if a.dim() == 4 and not a.is_contiguous():
        # Of images in channels-last layout this is a view.
        a, b = a.permute(0, 2, 3, 1), b.permute(0, 2, 3, 1)
    return torch.linalg.vecdot(a.flatten(1), b.flatten(1))
