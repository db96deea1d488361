"""Batch norms in the convolutions before them, for as long as neither can change.

In eval mode a batch norm multiplies each channel by a number and adds another, so a convolution whose output goes there
and nowhere else can have both in its weights. What is saved is a pass over all activations in each direction. Which
convolution goes where is not guessed from names: one pass is watched, operation by operation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Optional
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from mmcv.cnn.bricks.wrappers import Conv2d as MMCVConv2d
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Exact classes: a subclass may compute something else.
_CONVS = (nn.Conv2d, MMCVConv2d)
_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


@dataclass(frozen=True, eq=False)
class FoldedNorm:
    """A convolution with the norm after it in its weights.

    Attributes:
        norm (nn.Module): The norm, which passes on what it gets meanwhile.
        weight (Tensor): Weight of the convolution times the scale of the norm, in the shape it has.
        bias (Tensor, optional): Bias of the convolution times the scale of the norm; None without a bias.
        shift (Tensor): (C_out,), what the norm adds.
    """

    norm: nn.Module
    weight: Tensor
    bias: Optional[Tensor]
    shift: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, conv: nn.Module, norm: nn.Module) -> FoldedNorm:
        """Fold ``norm`` into ``conv``, of whose output channels there may be several blocks, one for each expert."""
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight
        shift = -norm.running_mean * scale
        if norm.bias is not None:
            shift = shift + norm.bias
        dtype = conv.weight.dtype
        scales = scale.repeat(len(conv.weight) // len(scale))
        weight = (conv.weight * scales[:, None, None, None]).to(dtype)
        bias = None if conv.bias is None else (conv.bias * scales).to(dtype)
        return cls(norm, weight, bias, shift.to(dtype))

    @property
    def holds(self) -> bool:
        """Whether it stands for both layers; not when something has set the norm to training meanwhile."""
        return not self.norm.training


#: The convolutions that have a norm in their weights now.
FOLDED: WeakKeyDictionary[nn.Module, FoldedNorm] = WeakKeyDictionary()


@contextmanager
def norms_folded(network: nn.Module, probe: Callable[[], Any], expert_layer: type[nn.Module]) -> Iterator[None]:
    """Promise that no weight of a network in eval mode changes inside, so that norms may go into its convolutions.

    The network must have the same data flow in every pass. A layer with a hook keeps what it computes, so does one
    whose parameters want a gradient, and so does all under autocast, where folding would round differently.

    Args:
        network (nn.Module): A network without folded norms, or with: those stay.
        probe (Callable): Runs the network once on some input and returns what it gives.
        expert_layer (type): The class of the convolutions with experts, which look into :data:`FOLDED` themselves.
    """
    taken: list[nn.Module] = []
    try:
        for conv, norm in _pairs(network, probe, (*_CONVS, expert_layer)):
            folded = FOLDED[conv] = FoldedNorm.of(conv, norm)
            taken.append(conv)
            norm.forward = _pass_on(norm)
            taken.append(norm)
            if not isinstance(conv, expert_layer):
                conv.forward = _convolve(conv, folded)
        yield
    finally:
        for module in taken:
            FOLDED.pop(module, None)
            # Past nn.Module's own bookkeeping: it is a plain attribute that hides the method of the class.
            module.__dict__.pop('forward', None)


def _pass_on(norm: nn.Module) -> Callable[[Tensor], Tensor]:
    plain = norm.forward
    return lambda x: plain(x) if norm.training else x


def _convolve(conv: nn.Module, folded: FoldedNorm) -> Callable[[Tensor], Tensor]:
    plain = conv.forward
    bias = folded.shift if folded.bias is None else folded.bias + folded.shift
    settings = bias, conv.stride, conv.padding, conv.dilation, conv.groups
    return lambda x: F.conv2d(x, folded.weight, *settings) if folded.holds else plain(x)


def _pairs(network: nn.Module, probe: Callable[[], Any], convs: tuple) -> list[tuple[nn.Module, nn.Module]]:
    """The convolutions whose output is used in a norm and nowhere else, each with that norm."""
    candidates = [module for module in network.modules() if _is_untouched(module)]
    norms = [module for module in candidates if type(module) in _NORMS and _is_fixed(module)]
    if not norms or any(torch.is_autocast_enabled(kind) for kind in ('cpu', 'cuda')):
        return []
    watch = _Watch()
    hooks = []
    for module in candidates:
        if type(module) in convs and module.weight.dtype in (torch.float32, torch.float64):
            if getattr(module, 'padding_mode', 'zeros') == 'zeros' and not isinstance(module.padding, str):
                hooks.append(module.register_forward_hook(watch.leave_conv))
    for norm in norms:
        hooks.append(norm.register_forward_pre_hook(watch.enter_norm))
        hooks.append(norm.register_forward_hook(watch.leave_norm))
    try:
        with torch.no_grad(), watch:
            result = probe()
    finally:
        for hook in hooks:
            hook.remove()
    return watch.found(result)


def _is_untouched(module: nn.Module) -> bool:
    """Whether nobody looks at what the module computes, replaces it or learns from it."""
    hooks = ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks')
    if 'forward' in module.__dict__ or module in FOLDED or any(getattr(module, name, None) for name in hooks):
        return False
    return not any(parameter.requires_grad for parameter in module.parameters(recurse=False))


def _is_fixed(norm: nn.Module) -> bool:
    return not norm.training and norm.running_mean is not None


class _Watch(TorchDispatchMode):
    """Sees where the output of each convolution goes: into which norm, and whether anywhere else."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[nn.Module, Tensor]] = {}  # with the tensor, so that its id stays its own
        self._used_elsewhere: set[int] = set()
        self._calls: Counter[nn.Module] = Counter()
        self._norm_of: dict[int, nn.Module] = {}
        self._inside: Optional[int] = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        used = {id(value) for value in tree_leaves((args, kwargs))} & self._made.keys()
        self._used_elsewhere |= used - {self._inside}
        return func(*args, **(kwargs or {}))

    def leave_conv(self, conv: nn.Module, _, output: Tensor) -> None:
        self._calls[conv] += 1
        self._made[id(output)] = conv, output

    def enter_norm(self, norm: nn.Module, args: tuple) -> None:
        self._calls[norm] += 1
        if id(args[0]) in self._made:
            self._norm_of[id(args[0])] = norm
            self._inside = id(args[0])

    def leave_norm(self, *_) -> None:
        self._inside = None

    def found(self, result: Any) -> list[tuple[nn.Module, nn.Module]]:
        used_elsewhere = self._used_elsewhere | {id(value) for value in tree_leaves(result)}
        pairs = [(self._made[key][0], norm) for key, norm in self._norm_of.items() if key not in used_elsewhere]
        return [(conv, norm) for conv, norm in pairs if self._calls[conv] == self._calls[norm] == 1]
