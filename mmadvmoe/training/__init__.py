"""How experts and router are trained in turns, and what watches over it."""

from .alternation import AlternatingOptimHook, TurnSchedule
from .awp import AWPOptimWrapper
from .distributed import TurnsDistributedDataParallel
from .health_hook import RouterHealthHook
from .images_hook import AdversarialImagesHook
from .optim_wrapper import AlternatingOptimWrapper, AlternatingOptimWrapperConstructor, CPUAmpOptimWrapper
from .overfitting_hook import CatastrophicOverfittingHook
from .setup_hooks import BindVictimHook, SpeedHook

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
