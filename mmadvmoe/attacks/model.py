"""A classifier with its normalisation inside: images in [0, 1], or integers that tell their range, to class logits."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmpretrain.models.classifiers import BaseClassifier
from torch import Tensor, nn

from mmadvmoe.moe import BaseRouter, Route, Routing, forward_routed, router_modules
from mmadvmoe.utils import bare_model, checkpointing

# How far noise and the steps of attacks may lead out of [0, 1]; what is normalised or in 0..255 lies further out.
_SLACK = 0.5


class NormalizedClassifier(nn.Module):
    """A classifier as a function of images in [0, 1], normalisation inside, logits out.

    The gradient at the images is contiguous, in whatever layout the network computes. Threads may share one.

    Args:
        classifier (nn.Module): ``classifier(inputs)`` gives logits (B, K), as MMPretrain's ``ImageClassifier`` does. If
            its ``backbone`` has ``forward_routed``, as :class:`mmadvmoe.moe.MoEBackbone` has, routes can be read and
            given. Distributed wrappers, weight averages and an ``nn.Sequential`` of one are taken off: they compute
            nothing, and hide routes.
        preprocessor (nn.Module, optional): Normalises images: by ``normalize(images)`` on [0, 1] if it has that method,
            else as MMPretrain's ``ClsDataPreprocessor`` does, by ``mean`` and ``std`` in units of 0..255. Channel order
            and padding are left as they are. Defaults to the classifier's own ``data_preprocessor``, which stays a part
            of it; a classifier without one is of [0, 1] images.
        num_classes (int, optional): K. Defaults to what an MMPretrain classifier tells, or the first forward pass.

    Raises:
        TypeError: An MMPretrain classifier, or one with routers, has no head, or the preprocessor does not tell its
            scale.
        ValueError: A mixture of experts is further inside, where its routes would not be seen.
    """

    def __init__(
        self, classifier: nn.Module, preprocessor: nn.Module | None = None, num_classes: int | None = None
    ) -> None:
        super().__init__()
        classifier = bare_model(classifier)
        own = getattr(classifier, 'data_preprocessor', None)
        preprocessor = own if preprocessor is None else preprocessor
        needs_head = isinstance(classifier, BaseClassifier) or hasattr(
            getattr(classifier, 'backbone', None), 'forward_routed'
        )
        if needs_head and getattr(classifier, 'head', None) is None:
            raise TypeError(
                f'{type(classifier).__name__} has no head, so there are no logits to attack; set model.head'
            )
        if preprocessor is not None and not (
            hasattr(preprocessor, 'normalize') or hasattr(preprocessor, '_enable_normalize')
        ):
            raise TypeError(
                f'data_preprocessor of type {type(preprocessor).__name__} does not tell how it scales images; use '
                'ClsDataPreprocessor or AdvDataPreprocessor'
            )
        self.classifier = classifier
        self.check_routes_are_seen()
        self._normalized_by_itself = preprocessor is not None and preprocessor is own
        self.preprocessor = None if self._normalized_by_itself else preprocessor
        self._given_classes = self._num_classes = num_classes
        self._freeze = _Freeze()

    def check_routes_are_seen(self) -> None:
        """Raise ValueError if the classifier has routers and looks dense all the same."""
        if not self.num_routers and not isinstance(self.classifier, BaseRouter) and router_modules(self.classifier):
            raise ValueError(
                f'a mixture of experts lies inside of {type(self.classifier).__name__}, where attacks would not see '
                'its routes and take it for a dense network: give the classifier whose backbone is the MoEBackbone, '
                'wrap other networks by it (backbone=dict(type="MoEBackbone", backbone=...)), not around it, and '
                'instead of a deployable() copy attack the model it was made from'
            )

    @property
    def training(self) -> bool:
        """Whether the classifier is in training mode, of which this is no second opinion."""
        return self.classifier.training

    @training.setter
    def training(self, mode: bool) -> None:
        # ``nn.Module.__init__`` sets it when there is no classifier yet.
        if 'classifier' in self.__dict__.get('_modules', ()):
            self.classifier.training = mode

    @property
    def num_classes(self) -> int | None:
        """K: what was given, else the width of the logits of the last pass, else what the classifier tells, or None.

        A module of someone else may mean anything by ``num_classes``, so it is not asked.
        """
        if self._num_classes is not None or not isinstance(self.classifier, BaseClassifier):
            return self._num_classes
        for part in (getattr(self.classifier, name, None) for name in ('head', 'backbone')):
            count = getattr(part, 'num_classes', None)
            if isinstance(count, int) and count > 0:
                return count
        return None

    @property
    def num_experts(self) -> int:
        """N; 1 for a dense model."""
        return getattr(getattr(self.classifier, 'backbone', None), 'num_experts', 1)

    @property
    def num_routers(self) -> int:
        """L; 0 for a dense model."""
        return getattr(getattr(self.classifier, 'backbone', None), 'num_routers', 0)

    def normalize(self, images: Tensor) -> Tensor:
        """Bring images in [0, 1] to what the network is fed, in the type of its weights."""
        # Flattened and back, because a gradient comes out of a flattening contiguous, as attacks expect it.
        images = images.flatten().view(images.shape)
        seen = self._freeze.of_thread.seen
        if seen is not None and images.requires_grad:
            images.register_hook(lambda grad: seen.append(grad.isnan().any()))
        preprocessor = self.classifier.data_preprocessor if self._normalized_by_itself else self.preprocessor
        if hasattr(preprocessor, 'normalize'):
            images = preprocessor.normalize(images)
        elif preprocessor is not None:
            images = images * 255
            if preprocessor._enable_normalize:
                images = (images - preprocessor.mean) / preprocessor.std
        weight = next(self.classifier.parameters(), images)
        return images.to(weight.dtype) if weight.is_floating_point() else images

    def _inputs(self, images: Tensor) -> Tensor:
        """What the network is fed for ``images``: in [0, 1], or of an integer type that tells its range."""
        images = as_unit(images)
        # A thread that holds the model frozen has looked at the images, and comes back many times.
        if not (self._freeze.of_thread.depth or torch.jit.is_tracing() or torch.compiler.is_compiling()):
            check_unit(images, slack=_SLACK)
        return self.normalize(images)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K), in float32 also under autocast, of ``images`` (B, C, H, W) in [0, 1], or of 8 or 16 bits.

        Raises:
            TypeError: The head gives something else than one (B, K) tensor, or images are other integers.
            ValueError: Images are far outside [0, 1]; noise and steps of attacks may lead a little out of it. Inside of
                :meth:`frozen` that is left to the caller.
        """
        return self._checked(self.classifier(self._inputs(images)))

    def forward_routed(
        self, images: Tensor, route: Route | None = None, with_logits: bool = True, gated: bool = True
    ) -> tuple[Tensor, tuple[Routing, ...]]:
        """Logits, and the decisions of the routers that led to them.

        Args:
            images (Tensor): (B, C, H, W) in [0, 1].
            route, with_logits, gated: See :meth:`mmadvmoe.moe.MoEBackbone.forward_routed`; logits are asked for.

        Returns:
            tuple: Logits (B, K), and a tuple of L :class:`mmadvmoe.moe.Routing`.

        Raises:
            ValueError: A route is given to a model without routers.
        """
        if not self.num_routers:
            if route is not None:
                raise ValueError('a route was given, but the model has no router')
            return self(images), ()
        logits, routings = forward_routed(self.classifier, self._inputs(images), route, with_logits, gated)
        return self._checked(logits), routings

    def decide_routes(self, images: Tensor) -> tuple[Routing, ...]:
        """The decisions of the routers alone, without a gate; a router of the whole network is all that is run.

        Args:
            images (Tensor): (B, C, H, W) in [0, 1].

        Raises:
            ValueError: The model has no router.
        """
        if not self.num_routers:
            raise ValueError('the model has no router, so there is no route to look at')
        return self.classifier.backbone.decide_routes(self._inputs(images), gated=False)

    @contextmanager
    def frozen(self) -> Iterator[NormalizedClassifier]:
        """Eval mode without parameter gradients inside; every flag as it was outside.

        Where several threads, or calls inside each other, freeze the model, the first one notes the flags and the last
        one restores them. Activation checkpointing is off inside, for its backward pass cannot give the gradient of
        images alone. Flags are set module by module, past the ``train()`` methods of backbones, which re-apply
        frozen stages and would not bring back flags that someone else had set.
        """
        self._freeze.enter(self)
        try:
            yield self
        finally:
            self._freeze.leave()

    @contextmanager
    def watched_gradients(self) -> Iterator[list[Tensor]]:
        """A list that gets, for each gradient at images which this thread computes inside, whether NaN is in it."""
        thread = self._freeze.of_thread
        outer, thread.seen = thread.seen, []
        try:
            yield thread.seen
        finally:
            thread.seen = outer

    def _checked(self, logits: Any) -> Tensor:
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            maker = getattr(self.classifier, 'head', self.classifier)
            raise TypeError(
                f'{type(maker).__name__} gives {shape} where an attack needs one tensor of class logits (B, K); use a '
                'head such as LinearClsHead'
            )
        if self._given_classes not in (None, logits.shape[1]):
            raise ValueError(
                f'num_classes={self._given_classes}, but {type(self.classifier).__name__} gives {logits.shape[1]} '
                'logits'
            )
        self._num_classes = logits.shape[1]
        return full_precision(logits)


class _OfThread(threading.local):
    """How often this thread holds a model frozen, and the gradients it watches, if it does; others must not decide."""

    depth = 0
    seen: list[Tensor] | None = None


class _Freeze:
    """How many hold a model frozen, and the flags to restore after the last one. A copy, or one unpickled, is new."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders = 0
        self.of_thread = _OfThread()
        self._flags: list[tuple[object, str, bool]] = []

    def __reduce__(self) -> tuple:
        return type(self), ()

    def enter(self, model: nn.Module) -> None:
        self.of_thread.depth += 1
        with self._lock:
            if not self._holders:
                self._flags = [(module, 'training', module.training) for module in model.modules()]
                self._flags += [(each, 'requires_grad', each.requires_grad) for each in model.parameters()]
                self._flags += [(module, key, True) for module, key in checkpointing(model)]
            self._holders += 1
            for owner, key, _ in self._flags:
                setattr(owner, key, False)

    def leave(self) -> None:
        self.of_thread.depth -= 1
        with self._lock:
            self._holders -= 1
            if self._holders:
                return
            for owner, key, value in self._flags:
                setattr(owner, key, value)
            self._flags = []


def full_precision(logits: Tensor) -> Tensor:
    """Half-precision logits as float32; wider ones as they are."""
    return logits.float() if logits.element_size() < 4 else logits


#: The integer types of images that files hold, with the value of white.
WHITE = {torch.uint8: 2**8 - 1, torch.uint16: 2**16 - 1}
#: What rounding may add to images in [0, 1] that were normalised and brought back.
ROUNDING = 1e-4


def as_unit(images: Tensor) -> Tensor:
    """Bring images of integers, of any shape, to [0, 1] by their type; floating point images are left as they are.

    Raises:
        TypeError: They are integers of another type than :data:`WHITE` has, whose white nobody knows.
    """
    if images.is_floating_point():
        return images
    if images.dtype not in WHITE:
        raise TypeError(
            f'images are {images.dtype}, which does not tell what is white; give floating point images in [0, 1], or '
            f'{" or ".join(map(str, WHITE))}'
        )
    return images.float() / WHITE[images.dtype]


def check_unit(images: Tensor, what: str = 'images', slack: float = ROUNDING) -> Tensor:
    """Give floating point images back if they lie in [0, 1], or ``slack`` outside, at the cost of one transfer.

    Raises:
        ValueError: They do not, or a pixel is NaN; ``what`` names them.
    """
    if not images.numel():
        return images
    check_range(*torch.stack([*images.detach().aminmax()]).tolist(), what, slack)
    return images


def check_range(low: float, high: float, what: str = 'images', slack: float = ROUNDING) -> None:
    """Raise ValueError unless the least and the largest value of images lie in [0, 1]; see :func:`check_unit`."""
    # Written so that NaN fails too.
    if not (low >= -slack and high <= 1 + slack):
        raise ValueError(
            f'{what} must be in [0, 1], got values from {low:.4g} to {high:.4g}; divide pixels in 0..255 by 255; '
            'normalisation belongs inside the model (mean and std of the data_preprocessor)'
        )
