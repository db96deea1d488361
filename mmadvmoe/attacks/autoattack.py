"""AutoAttack as published, for any number of classes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torchattacks
from torch import Tensor
from torchattacks.attack import Attack

from mmadvmoe.attacks import steps as ball
from mmadvmoe.registry import ATTACKS

from .apgd import APGD, APGDT
from .views import Victim

VERSIONS = ('standard', 'plus', 'rand')

#: The attacks of the ensembles, by the names of the original.
PARTS = ('apgd-ce', 'apgd-dlr', 'apgd-t', 'fab', 'fab-t', 'square')

#: Those that there are in L1.
PARTS_IN_L1 = ('apgd-ce', 'apgd-dlr', 'apgd-t')

# The targeted attacks of AutoAttack try the 9 most likely wrong classes.
_MOST_CLASSES = 10
# In L1 they are fewer, and APGD on the cross entropy starts more often.
_MOST_CLASSES_L1, _RESTARTS_L1 = 6, 5


@ATTACKS.register_module()
class AutoAttack(Attack):
    """The ensemble of parameter-free attacks of Croce & Hein, arXiv:2003.01690.

    torchattacks has a class of this name with 10 iterations and as many targets as there are
    classes. This one has the published 100 iterations, at most 9 targets and Square's unscaled
    schedule, and each attack of the ensemble sees only the images that are still standing:

    * ``'standard'``: APGD on the cross entropy, targeted APGD, targeted FAB, Square;
    * ``'plus'``: APGD on the cross entropy and on DLR and FAB, with 5 restarts each, Square,
      targeted APGD, targeted FAB;
    * ``'rand'``, for models with random parts: APGD on the cross entropy and on DLR, each gradient
      averaged over 20 passes.

    The DLR loss divides by a difference to the third largest logit and its targeted form by one to
    the fourth, so they do not exist for few classes. With 3 classes APGD on DLR takes the place of
    targeted APGD; with 2 classes the attacks on DLR are left out.

    In L1 (Croce & Hein, arXiv:2103.01208) there are the two kinds of APGD only, with 5 restarts of the one and 5
    targets of the other: torchattacks has neither FAB nor Square there, so no attack of this ensemble does without
    gradients. Hold its number against others with that in mind.

    Args:
        model (Victim): The attacked model.
        norm (str): ``'Linf'``, ``'L2'`` or ``'L1'``. Defaults to ``'Linf'``.
        eps (float): Radius of the ball, on [0, 1] images. Defaults to 8/255.
        version (str): See above. Defaults to ``'standard'``.
        attacks_to_run (Sequence[str], optional): The attacks to run in place of a version: some of ``PARTS``, in this
            order. Defaults to None.
        n_classes (int): K; ``build_attack`` knows it. Defaults to 10.
        steps (int): Iterations of APGD and FAB. Defaults to 100.
        n_queries (int): Queries of Square. Defaults to 5000.
        seed (int): Where random starts come from. A seed given in the call overrules it.
        verbose (bool): Print the progress of each attack. Defaults to False.

    Raises:
        ValueError: ``norm``, ``version`` or one of ``attacks_to_run`` is unknown or not there in this norm, or there
            are fewer than 2 classes.
    """

    def __init__(
        self,
        model: Victim,
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
        if version not in VERSIONS:
            raise ValueError(f'version={version!r} is unknown; allowed: {VERSIONS}')
        unknown = [name for name in attacks_to_run or () if name not in PARTS]
        if unknown or isinstance(attacks_to_run, str):
            raise ValueError(f'attacks_to_run={attacks_to_run!r} must be a list of some of {PARTS}')
        if norm == 'L1' and (absent := [name for name in attacks_to_run or () if name not in PARTS_IN_L1]):
            raise ValueError(f"attacks_to_run={absent!r} have no norm='L1'; allowed there: {PARTS_IN_L1}")
        if n_classes < 2:
            raise ValueError(f'n_classes={n_classes} must be at least 2')
        self.norm = ball.check_norm(norm)
        self.eps = eps
        self.version = version
        self.attacks = _ensemble(
            model,
            version,
            attacks_to_run,
            n_classes,
            dict(norm=norm, eps=eps, seed=seed, verbose=verbose),
            steps,
            n_queries,
        )

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """An adversarial image for each image that some attack fools; the others as they are.

        Args:
            images (Tensor): (B, C, H, W) in [0, 1].
            labels (Tensor): (B,) int64.
        """
        images, labels = images.detach().to(self.device), labels.to(self.device)
        adversarial = images.clone()
        standing = self._correct(images, labels).nonzero().squeeze(1)
        for attack in self.attacks:
            if not len(standing):
                break
            candidates = attack(images[standing], labels[standing])
            correct = self._correct(candidates, labels[standing])
            adversarial[standing[~correct]] = candidates[~correct]
            standing = standing[correct]
        return adversarial

    @torch.no_grad()
    def _correct(self, images: Tensor, labels: Tensor) -> Tensor:
        return self.get_logits(images).argmax(1) == labels


def _ensemble(
    model: Victim,
    version: str,
    attacks_to_run: Sequence[str] | None,
    n_classes: int,
    common: dict,
    steps: int,
    n_queries: int,
) -> list[Attack]:
    """The attacks of one version, in the published order."""
    in_l1 = common['norm'] == 'L1'
    targets = dict(n_classes=min(n_classes, _MOST_CLASSES_L1 if in_l1 else _MOST_CLASSES))

    def apgd(loss: str, **kwargs) -> Attack:
        return APGD(model, loss=loss, steps=steps, **common, **kwargs)

    def apgd_targeted() -> list[Attack]:
        if n_classes >= 4:
            return [APGDT(model, steps=steps, **common, **targets)]
        return dlr() if version == 'standard' else []

    def dlr(**kwargs) -> list[Attack]:
        return [apgd('dlr', **kwargs)] if n_classes >= 3 else []

    def fab(**kwargs) -> list[Attack]:
        return [] if in_l1 else [torchattacks.FAB(model, steps=steps, **common, **targets, **kwargs)]

    def square() -> list[Attack]:
        return [] if in_l1 else [torchattacks.Square(model, n_queries=n_queries, resc_schedule=False, **common)]

    if attacks_to_run is not None:
        parts = {
            'apgd-ce': lambda: [apgd('ce')],
            'apgd-dlr': dlr,
            'apgd-t': apgd_targeted,
            'fab': fab,
            'fab-t': lambda: fab(multi_targeted=True),
            'square': square,
        }
        return [attack for name in attacks_to_run for attack in parts[name]()]
    if version == 'standard':
        return [
            apgd('ce', n_restarts=_RESTARTS_L1 if in_l1 else 1),
            *apgd_targeted(),
            *fab(multi_targeted=True),
            *square(),
        ]
    if version == 'rand':
        return [apgd('ce', eot_iter=20), *dlr(eot_iter=20)]
    return [
        apgd('ce', n_restarts=5),
        *dlr(n_restarts=5),
        *fab(n_restarts=5),
        *square(),
        *apgd_targeted(),
        *fab(multi_targeted=True),
    ]
