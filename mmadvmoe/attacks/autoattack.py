"""AutoAttack by its authors (``pyautoattack``), for any number of classes, and how far it is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torchattacks
from mmengine.logging import print_log
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.fab_pt import FABAttack_PT
from pyautoattack.square import SquareAttack
from torch import Tensor
from torchattacks.attack import Attack
from tqdm import tqdm

from mmadvmoe.registry import ATTACKS
from mmadvmoe.utils import choose

from .steps import check_norm

#: The attacks of the ensembles, by their authors' names.
PARTS = ('apgd-ce', 'apgd-dlr', 'apgd-t', 'fab', 'fab-t', 'square')
VERSIONS = {
    'standard': ('apgd-ce', 'apgd-t', 'fab-t', 'square'),
    'plus': ('apgd-ce', 'apgd-dlr', 'fab', 'square', 'apgd-t', 'fab-t'),
    'rand': ('apgd-ce', 'apgd-dlr'),
}
#: Classes that the difference of logits ratio and its targeted form need.
_NEEDED_CLASSES = {'apgd-dlr': 3, 'apgd-t': 4}
# Wrong classes that targeted attacks try, at most; in L1 APGD tries fewer.
_TARGETS, _TARGETS_L1 = 9, 5


def build_part(
    model: Any, name: str, num_classes: int, version: str, *, steps: int, n_queries: int = 5000, **settings: Any
) -> Any:
    """Build one attack of the ensemble, with the published settings of a version.

    Args:
        model (Callable): Images in [0, 1] to logits (B, K).
        name (str): One of :data:`PARTS`.
        num_classes (int): K.
        version (str): One of :data:`VERSIONS`.
        steps (int): Of all but Square, which takes ``n_queries`` instead.
        **settings: ``norm``, ``eps``, ``seed`` and ``device``; for APGD also some that take the place of the published
            ones.

    Returns:
        Has ``perturb(images, labels)``, which gives the images back where the model is not fooled.
    """
    # The authors give L1 settings of its own in this version only.
    in_l1 = settings['norm'] == 'L1' and version == 'standard'
    if name == 'square':
        return SquareAttack(model, p_init=0.8, n_queries=n_queries, resc_schedule=False, **settings)
    settings['n_iter'] = steps
    if name.startswith('fab'):
        restarts = 5 if version == 'plus' and name == 'fab' else 1
        targets = min(_TARGETS, num_classes - 1)
        return FABAttack_PT(model, n_restarts=restarts, targeted=name == 'fab-t', n_target_classes=targets, **settings)
    settings = dict(use_largereps=in_l1) | settings
    if name == 'apgd-t':
        targets = min(_TARGETS_L1 if in_l1 else _TARGETS, num_classes - 1)
        return APGDAttack_targeted(model, **(dict(n_target_classes=targets) | settings))
    published = dict(n_restarts=5 if version == 'plus' or in_l1 else 1, eot_iter=20 if version == 'rand' else 1)
    return APGDAttack(model, loss=name.removeprefix('apgd-'), **(published | settings))


def _check_square(norm: str, images: Tensor) -> None:
    """Refuse images whose first stripes Square cannot lay out; in Linf it can for any size.

    Raises:
        ValueError: Height or width is such.
    """
    height, width = images.shape[-2:]
    side = height // 5
    first = (height - 5 * side) // 2
    whole = side == 1 or (side > 1 and all(first + size // side * side <= size for size in (height, width)))
    if norm != 'Linf' and not whole:
        raise ValueError(
            f'Square, as its authors have it, cannot begin in norm={norm!r} on images of {height}x{width} pixels; run '
            "AutoAttack without it: attacks_to_run=['apgd-ce', 'apgd-t', 'fab-t']"
        )


@ATTACKS.register_module()
class AutoAttack(Attack):
    """The ensemble of parameter-free attacks of Croce & Hein, arXiv:2003.01690, as its authors' package has it.

    Each attack of the ensemble sees only the images that are still robust:

    * ``'standard'``: APGD on the cross entropy, targeted APGD, targeted FAB, Square;
    * ``'plus'``: APGD on the cross entropy and on DLR and FAB, with 5 restarts each, Square, targeted APGD, targeted
      FAB;
    * ``'rand'``, for models with random parts: APGD on the cross entropy and on DLR, each gradient averaged over 20
      passes.

    In L1 (arXiv:2103.01208) APGD on the cross entropy has 5 restarts in ``'standard'``, and targeted APGD 5 target
    classes; both spend their iterations on three radii, 3 eps, 2 eps and eps.

    The DLR loss divides by a difference to the third largest logit and its targeted form by one to the fourth, so they
    do not exist for few classes. With 3 classes APGD on DLR takes the place of targeted APGD in ``'standard'``; with 2
    classes the attacks on DLR are left out.

    Args:
        model (Callable): The attacked model.
        norm (str): ``'Linf'``, ``'L2'`` or ``'L1'``. Defaults to ``'Linf'``.
        eps (float): Radius of the ball, on [0, 1] images. Defaults to 8/255.
        version (str): See above. Defaults to ``'standard'``.
        attacks_to_run (Sequence[str], optional): The attacks to run in place of a version: some of ``PARTS``, in this
            order, with the settings of ``'standard'``. Defaults to None.
        n_classes (int): K; ``build_attack`` knows it. Defaults to 10.
        steps (int): Iterations of APGD and FAB. Defaults to 100.
        n_queries (int): Queries of Square. Defaults to 5000.
        seed (int): Where random starts come from. A seed given in the call overrules it.
        verbose (bool): Log after each attack how many images are still robust. Defaults to False.

    Raises:
        ValueError: A setting is unknown, a part in ``attacks_to_run`` needs more classes, or there are fewer than 2.
    """

    def __init__(
        self,
        model: Any,
        norm: str = 'Linf',
        eps: float = 8 / 255,
        version: str = 'standard',
        attacks_to_run: Sequence[str] | None = None,
        n_classes: int = 10,
        steps: int = 100,
        n_queries: int = 5000,
        seed: int = 0,
        verbose: bool = False,
    ) -> None:
        super().__init__('AutoAttack', model)
        if isinstance(attacks_to_run, str):
            raise ValueError(f'attacks_to_run={attacks_to_run!r} must be a list of some of {PARTS}')
        if n_classes < 2:
            raise ValueError(f'n_classes={n_classes} must be at least 2')
        self.norm = check_norm(norm)
        self.eps = eps
        self.version = choose(version, VERSIONS, 'version')
        self.n_classes = n_classes
        self.steps = steps
        self.n_queries = n_queries
        self.seed = seed
        self.verbose = verbose
        self._settings_of = version if attacks_to_run is None else 'standard'
        names = VERSIONS[version] if attacks_to_run is None else attacks_to_run
        parts = [_existing(choose(name, PARTS, 'attacks_to_run'), n_classes, self._settings_of) for name in names]
        #: Names of the attacks that run, in order.
        self.parts = [part for part in parts if part is not None]
        if not self.parts or (attacks_to_run is not None and None in parts):
            raise ValueError(f'attacks_to_run={names}: one does not exist for n_classes={n_classes}; leave it out')

    @torch.no_grad()
    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Give an adversarial image for each of ``images`` in [0, 1] that some attack fools, the others as they are.

        Raises:
            ValueError: Square is to run in L2 or L1 on images of a size on which it cannot begin.
        """
        images, labels = images.detach().to(self.device), labels.to(self.device)
        if 'square' in self.parts:
            _check_square(self.norm, images)
        adversarial = images.clone()
        robust = self._correct(images, labels).nonzero().squeeze(1)
        passes = {name: self._passes(name) for name in self.parts}
        progress = PassProgress(self.get_logits, passes, len(images), 'AutoAttack')
        for name in self.parts:
            if not len(robust):
                break
            progress.begin(name, len(robust))
            found = self.authors_part(name, progress).perturb(images[robust], labels[robust])
            correct = self._correct(found, labels[robust])
            adversarial[robust[~correct]] = found[~correct].to(images.dtype)
            robust = robust[correct]
            if self.verbose:
                print_log(f'AutoAttack: {len(robust)} of {len(images)} images are robust after {name}', 'current')
        progress.close()
        return adversarial

    def _passes(self, name: str) -> int:
        """Forward passes of one attack of the ensemble, about, on images that withstand it."""
        if name == 'square':
            return self.n_queries
        targets = min(_TARGETS, self.n_classes - 1) if name in ('apgd-t', 'fab-t') else 1
        return self.steps * targets

    def authors_part(self, name: str, model: Callable | None = None) -> Any:
        """One attack of the ensemble, with the settings of this one, on ``model`` in place of its own."""
        settings = dict(norm=self.norm, eps=self.eps, seed=self.seed, device=self.device)
        settings |= dict(steps=self.steps, n_queries=self.n_queries)
        return build_part(model or self.get_logits, name, self.n_classes, self._settings_of, **settings)

    def _correct(self, images: Tensor, labels: Tensor) -> Tensor:
        return self.get_logits(images).argmax(1) == labels


def _existing(name: str, num_classes: int, version: str) -> str | None:
    """The attack itself, one that stands in for it, or None where there is none for so few classes."""
    if num_classes >= _NEEDED_CLASSES.get(name, 2):
        return name
    return 'apgd-dlr' if name == 'apgd-t' and num_classes == 3 and version == 'standard' else None


class _SparseInL1(Attack):
    """Mixin of torchattacks' APGD and APGDT: in L1 the sparse form of arXiv:2103.01208, as its authors have it."""

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Give an adversarial image for each image that is fooled, the others as they are; as :class:`AutoAttack`."""
        if self.norm != 'L1':
            return super().forward(images, labels)
        settings = dict(norm='L1', eps=self.eps, seed=self.seed, device=self.device, steps=self.steps)
        settings |= dict(n_restarts=self.n_restarts, eot_iter=self.eot_iter)
        if isinstance(self, torchattacks.APGDT):
            name, count = 'apgd-t', self.n_target_classes + 1
            settings |= dict(n_target_classes=self.n_target_classes)
        else:
            name, count = f'apgd-{self.loss}', 2
        part = build_part(self.get_logits, name, count, 'standard', **settings)
        with torch.no_grad():
            return part.perturb(images.detach().to(self.device), labels.to(self.device))


@ATTACKS.register_module()
class APGD(_SparseInL1, torchattacks.APGD):
    """Auto-PGD of torchattacks (Croce & Hein, arXiv:2003.01690), and in L1 of AutoAttack's authors."""


@ATTACKS.register_module()
class APGDT(_SparseInL1, torchattacks.APGDT):
    """Targeted Auto-PGD of torchattacks (Croce & Hein, arXiv:2003.01690), and in L1 of AutoAttack's authors."""

    # The targeted DLR loss looks at the fourth largest logit.
    min_classes = 4


class _Log:
    """A file for tqdm: what it would draw is a line of the log."""

    def write(self, text: str) -> None:
        if text.strip():
            print_log(text.strip(), 'current')


class PassProgress:
    """Shows which part of an attack runs, how many images still stand and how long it can take at most.

    In a terminal as a bar of tqdm, elsewhere as a line of the log every minute.

    Args:
        model (Callable): Images to logits; :meth:`__call__` is it, and counts.
        parts (Mapping): Forward passes of each part of the attack on images that all stand.
        num_images (int): In the batch.
        name (str): Of the attack.
        terminal (bool, optional): Whether to draw a bar. Defaults to whether stderr is a terminal.
        interval (float): Seconds between two lines of the log.
    """

    def __init__(
        self,
        model: Callable,
        parts: Mapping[str, int],
        num_images: int,
        name: str,
        terminal: bool | None = None,
        interval: float = 60.0,
    ) -> None:
        self._model, self._left, self._num_images, self._name = model, dict(parts), num_images, name
        terminal = sys.stderr.isatty() if terminal is None else terminal
        form = dict(delay=2.0) if terminal else dict(file=_Log(), ncols=0, delay=interval, mininterval=interval)
        self._bar = tqdm(total=sum(parts.values()), unit='pass', leave=False, miniters=1, **form)

    def __call__(self, images: Any) -> Any:
        """Run the model, and count it."""
        self._bar.update()
        return self._model(images)

    def begin(self, part: str, robust: int) -> None:
        """A part begins, on ``robust`` images; what the one before left out because images fell is not to come."""
        self._bar.total = self._bar.n + sum(self._left.values())
        self._left.pop(part, None)
        state = f'{self._name}: {part}, {robust} of {self._num_images} images still robust'
        self._bar.set_description(state, refresh=False)

    def close(self) -> None:
        """The attack is through."""
        self._bar.close()
