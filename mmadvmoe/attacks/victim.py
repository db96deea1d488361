"""The model as an attack sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mmengine.model import is_model_wrapper
from torch import Tensor, nn

from mmadvmoe.moe import Routing, forward_routed

from .kl import full_precision


class Victim(nn.Module):
    """A classifier as a function of images in [0, 1], normalisation inside, logits out.

    The classifier is held without being registered as a submodule: a victim kept by the
    classifier's own data preprocessor makes no cycle and adds nothing to its ``state_dict``.
    Parameters, modules, the training flag and ``.to()`` are nevertheless those of the classifier. A
    deep copy of a classifier that holds its victim holds a victim of the copy.

    Args:
        classifier (nn.Module): ``classifier(inputs)`` gives logits (B, K), as MMPretrain's
            ``ImageClassifier`` does. If its ``backbone`` has ``forward_routed``, as
            :class:`mmadvmoe.moe.MoEBackbone` has, routes can be read and given.
        preprocessor (nn.Module, optional): Normalises images: by ``normalize(images)`` on [0, 1]
            if it has that method, else as MMPretrain's ``ClsDataPreprocessor`` does, by ``mean``
            and ``std`` in units of 0..255. Channel order and padding are left as they are. None
            for a classifier of [0, 1] images. Defaults to None.
        num_classes (int, optional): K. Defaults to that of the head or the backbone.

    Raises:
        TypeError: The classifier has no head, or the preprocessor does not tell its scale.
    """

    def __init__(
        self,
        classifier: nn.Module,
        preprocessor: nn.Module | None = None,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        if hasattr(classifier, 'backbone') and getattr(classifier, 'head', None) is None:
            raise TypeError(
                f'{type(classifier).__name__} has no head, so there are no logits to attack; set model.head'
            )
        if preprocessor is not None and not (
            hasattr(preprocessor, 'normalize') or hasattr(preprocessor, '_enable_normalize')
        ):
            raise TypeError(
                f'data_preprocessor of type {type(preprocessor).__name__} does not tell how it '
                'scales images; use ClsDataPreprocessor or AdvDataPreprocessor'
            )
        # A tuple, because a module assigned as an attribute would be registered.
        self._held = (classifier, preprocessor)
        self._num_classes = num_classes

    @classmethod
    def from_classifier(cls, classifier: nn.Module) -> Victim:
        """The victim view of an MMPretrain classifier, normalised by its own data preprocessor.

        Args:
            classifier (nn.Module): The model, bare or in a distributed wrapper, which is taken off:
                an attack must not go through the gradient hooks of the wrapper.
        """
        if is_model_wrapper(classifier):
            classifier = classifier.module
        return cls(classifier, getattr(classifier, 'data_preprocessor', None))

    @property
    def classifier(self) -> nn.Module:
        """The attacked model itself."""
        return self._held[0]

    @property
    def num_classes(self) -> int | None:
        """K, or None where neither the head nor the backbone knows."""
        if self._num_classes is not None:
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
        """What the network is fed for ``images`` in [0, 1]."""
        preprocessor = self._held[1]
        if preprocessor is None:
            return images
        if hasattr(preprocessor, 'normalize'):
            return preprocessor.normalize(images)
        pixels = images * 255
        if preprocessor._enable_normalize:
            pixels = (pixels - preprocessor.mean) / preprocessor.std
        return pixels

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K), in float32 also under autocast, of ``images`` (B, C, H, W) in [0, 1].

        Raises:
            TypeError: The head gives something else than one (B, K) tensor.
        """
        return self._checked(self.classifier(self.normalize(images)))

    def forward_routed(
        self,
        images: Tensor,
        route: Tensor | None = None,
        with_logits: bool = True,
        gated: bool = True,
    ) -> tuple[Tensor, tuple[Routing, ...]]:
        """Logits, and the decisions of the routers that led to them.

        Args:
            images (Tensor): (B, C, H, W) in [0, 1].
            route (Tensor, optional): Experts to take in place of the routers' choice: (B,) int64
                for all routers, or (B, L). Then no gradient flows through the choice.
            with_logits (bool): With a given route, ask the routers for their logits all the same.
            gated (bool): Whether the routers' own choice carries the gradient of the gate.

        Returns:
            tuple: Logits (B, K), and a tuple of L :class:`mmadvmoe.moe.Routing`.

        Raises:
            ValueError: A route is given to a model without routers.
        """
        if not self.num_routers and route is None:
            return self(images), ()
        logits, routings = forward_routed(self.classifier, self.normalize(images), route, with_logits, gated)
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
        return self.classifier.backbone.decide_routes(self.normalize(images), gated=False)

    def _checked(self, logits: Any) -> Tensor:
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            maker = getattr(self.classifier, 'head', self.classifier)
            raise TypeError(
                f'{type(maker).__name__} gives {shape} where an attack needs one tensor of class '
                'logits (B, K); use a head such as LinearClsHead'
            )
        return full_precision(logits)

    @contextmanager
    def frozen(self, example: Tensor | None = None) -> Iterator[Victim]:
        """Eval mode without parameter gradients inside; every flag as it was outside.

        Training flags are set module by module, past the ``train()`` methods of backbones, which
        re-apply frozen stages and would not bring back flags that someone else had set.
        """
        modules = [(module, module.training) for module in self.classifier.modules()]
        parameters = [(p, p.requires_grad) for p in self.classifier.parameters()]
        try:
            for module, _ in modules:
                module.training = False
            for parameter, _ in parameters:
                parameter.requires_grad_(False)
            yield self
        finally:
            for module, training in modules:
                module.training = training
            for parameter, requires_grad in parameters:
                parameter.requires_grad_(requires_grad)

    # nn.Module's bookkeeping, passed on to the classifier that is not registered here.

    @property
    def training(self) -> bool:
        """Whether the classifier is in training mode."""
        return self.classifier.training if '_held' in self.__dict__ else False

    @training.setter
    def training(self, mode: bool) -> None:
        # nn.Module.__init__ assigns the flag before there is a classifier.
        if '_held' in self.__dict__:
            self.classifier.training = mode

    def train(self, mode: bool = True) -> Victim:
        """Put the classifier into training or eval mode."""
        self.classifier.train(mode)
        return self

    def _apply(self, fn: Callable, recurse: bool = True) -> Victim:
        """What ``to()``, ``cuda()`` and ``float()`` are made of."""
        self.classifier._apply(fn, recurse)
        return self

    def named_modules(
        self, memo: set | None = None, prefix: str = '', remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """The modules of the classifier, so that ``parameters()`` and ``buffers()`` are its own."""
        return self.classifier.named_modules(memo, prefix, remove_duplicate)
