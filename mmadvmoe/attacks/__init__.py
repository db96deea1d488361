"""How a model is attacked."""

from .autoattack import APGD, APGDT, AutoAttack
from .bound import BoundAttack, NonFiniteImagesError
from .builder import build_attack
from .kl import kl_divergence
from .library import JSMA, register_torchattacks
from .pathway import Pathway
from .pgd import PGD
from .route_pgd import RoutePGD
from .router_attack import RouterAttack
from .standard import STANDARD_ATTACKS, attack_norm, is_standard_attack, standard_attack
from .trades import TRADESAttack
from .victim import Victim

# After this package's own, which take precedence over classes of the same name.
register_torchattacks()

__all__ = [
    'STANDARD_ATTACKS',
    'APGD',
    'APGDT',
    'JSMA',
    'AutoAttack',
    'BoundAttack',
    'NonFiniteImagesError',
    'PGD',
    'Pathway',
    'RoutePGD',
    'RouterAttack',
    'TRADESAttack',
    'Victim',
    'attack_norm',
    'build_attack',
    'is_standard_attack',
    'kl_divergence',
    'standard_attack',
]
