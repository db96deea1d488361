"""How a model is attacked."""

from .autoattack import APGD, APGDT, AutoAttack
from .builder import BoundAttack, NonFiniteImagesError, attack_class, build_attack
from .model import NormalizedClassifier
from .pgd import PGD
from .route_pgd import ForcedRoutePGD, RoutePGD
from .router_attack import ClassGroupAttack, RouterAttack
from .settings import JSMA, register_torchattacks
from .standard import STANDARD_ATTACKS, MultiAttack, attack_norm, is_standard_attack, parts_of, standard_attack
from .trades import TRADESAttack, kl_divergence
from .views import HeldVictim, Pathway, Rescaled, Victim

# After this package's own, which take precedence over classes of the same name.
register_torchattacks()

__all__ = [
    'STANDARD_ATTACKS',
    'APGD',
    'APGDT',
    'JSMA',
    'AutoAttack',
    'BoundAttack',
    'ClassGroupAttack',
    'ForcedRoutePGD',
    'HeldVictim',
    'MultiAttack',
    'NonFiniteImagesError',
    'NormalizedClassifier',
    'PGD',
    'Pathway',
    'Rescaled',
    'RoutePGD',
    'RouterAttack',
    'TRADESAttack',
    'Victim',
    'attack_class',
    'attack_norm',
    'build_attack',
    'is_standard_attack',
    'kl_divergence',
    'parts_of',
    'standard_attack',
]
