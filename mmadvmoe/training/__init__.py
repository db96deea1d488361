"""How experts and router are trained in turns, and what watches over it."""

from .alternation import AlternatingOptimHook, TurnSchedule
from .amp import CPUAmpOptimWrapper
from .awp import AWPOptimWrapper
from .bind_victim_hook import BindVictimHook
from .distributed import TurnsDistributedDataParallel
from .health_hook import RouterHealthHook
from .images_hook import AdversarialImagesHook
from .optim_wrapper import AlternatingOptimWrapper, AlternatingOptimWrapperConstructor
from .overfitting_hook import CatastrophicOverfittingHook
from .speed_hook import SpeedHook

__all__ = [
    'AWPOptimWrapper',
    'AdversarialImagesHook',
    'AlternatingOptimHook',
    'AlternatingOptimWrapper',
    'AlternatingOptimWrapperConstructor',
    'BindVictimHook',
    'CPUAmpOptimWrapper',
    'CatastrophicOverfittingHook',
    'RouterHealthHook',
    'SpeedHook',
    'TurnSchedule',
    'TurnsDistributedDataParallel',
]
