"""torchattacks' classes in the registry, and what must be known about them."""

from __future__ import annotations

import inspect

import torchattacks
from torch import Tensor
from torchattacks.attack import Attack

from mmadvmoe.registry import ATTACKS

#: Attacks that hand the labels to a cross entropy and to nothing else, so that class
#: probabilities (B, K) do as well as class indices (B,).
SOFT_LABEL_ATTACKS = frozenset(
    'FGSM BIM RFGSM PGD EOTPGD FFGSM MIFGSM DIFGSM TIFGSM NIFGSM SINIFGSM VMIFGSM VNIFGSM PGDL2 PIFGSM PIFGSMPP'.split()
)

#: Attacks with an eps in another norm than L-inf and no argument that says so.
L2_ATTACKS = frozenset(['PGDL2', 'PGDRSL2'])

#: Attacks of torchattacks with a choice of norms that have none for L1; there they are parts of AutoAttack.
NO_L1 = frozenset(['FAB', 'Square'])

#: Classes of torchattacks that a config cannot build, and why.
NOT_FROM_CONFIGS = {
    'LGV': (
        torchattacks.LGV,
        'trains a copy of the model on a data loader of [0, 1] images before it attacks, to make images for other '
        'models than this; call torchattacks.LGV with what mmadvmoe.apis.load_robust_model gives',
    ),
    'MultiAttack of torchattacks': (
        torchattacks.MultiAttack,
        "takes attacks that have been built; give configs: dict(type='MultiAttack', attacks=[dict(type='PGD', ...), "
        "dict(type='Square', ...)])",
    ),
}


def attacks_a_model(cls: type) -> bool:
    """Whether a config can build the attack: it takes a model, and has a default for all else.

    Of torchattacks' classes that leaves out those of :data:`NOT_FROM_CONFIGS`.
    """
    _, first, *others = inspect.signature(cls.__init__).parameters.values()
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return first.name == 'model' and all(other.default is not other.empty or other.kind in optional for other in others)


@ATTACKS.register_module()
class JSMA(torchattacks.JSMA):
    """torchattacks' JSMA for any number of classes: it aims at the next of K classes, not of 10.

    Args:
        model (Victim): The attacked model.
        theta (float): Change of a pixel per step. Defaults to 1.
        gamma (float): Largest share of changed pixels. Defaults to 0.1.
        n_classes (int): K; ``build_attack`` knows it. Defaults to 10.
    """

    def __init__(self, model, theta: float = 1.0, gamma: float = 0.1, n_classes: int = 10) -> None:
        super().__init__(model, theta, gamma)
        self.n_classes = n_classes
        self.set_mode_targeted_by_function(self._next_class, quiet=True)

    def _next_class(self, images: Tensor, labels: Tensor) -> Tensor:
        return (labels + 1) % self.n_classes


def register_torchattacks() -> None:
    """Register every class of torchattacks under its own name, unless this package has its own."""
    for name in torchattacks.__all__:
        cls = getattr(torchattacks, name)
        if issubclass(cls, Attack) and attacks_a_model(cls) and name not in ATTACKS.module_dict:
            ATTACKS.register_module(name=name, module=cls)
