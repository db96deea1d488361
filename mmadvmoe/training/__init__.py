"""How experts and router are trained in turns, and what watches over it."""

from .alternation import AlternatingOptimHook, TurnSchedule
from .awp import AWPOptimWrapper
from .distributed import TurnsDistributedDataParallel
from .health_hook import RouterHealthHook
from .hooks import AdversarialImagesHook, BindVictimHook, CatastrophicOverfittingHook, SpeedHook
from .optim_wrapper import AlternatingOptimWrapper, AlternatingOptimWrapperConstructor, CPUAmpOptimWrapper

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
