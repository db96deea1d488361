"""How a model is attacked."""

from .autoattack import AutoAttack
from .bound import BoundAttack, NonFiniteImagesError
from .builder import build_attack
from .kl import kl_divergence
from .library import JSMA, register_torchattacks
from .pgd import PGD
from .route_pgd import RoutePGD
from .router_attack import RouterAttack
from .trades import TRADESAttack
from .victim import Victim

# After this package's own, which take precedence over classes of the same name.
register_torchattacks()

__all__ = [
    'JSMA',
    'AutoAttack',
    'BoundAttack',
    'NonFiniteImagesError',
    'PGD',
    'RoutePGD',
    'RouterAttack',
    'TRADESAttack',
    'Victim',
    'build_attack',
    'kl_divergence',
]
