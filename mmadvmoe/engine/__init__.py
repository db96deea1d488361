from .alternating_hook import AlternatingOptimHook
from .amp import CPUAmpOptimWrapper
from .awp import AWPOptimWrapper
from .bind_victim_hook import BindVictimHook
from .checkpoint_hook import SafeCheckpointHook
from .health_hook import RouterHealthHook
from .images_hook import AdversarialImagesHook
from .loops import RobustTestLoop, RobustValLoop
from .optim_constructor import AlternatingOptimWrapperConstructor
from .optim_wrapper import AlternatingOptimWrapper
from .preflight import PreflightHook, check_config
from .resume_hook import ExactResumeHook
from .seeding import seed_worker
from .turns import TurnSchedule

__all__ = [
    'AWPOptimWrapper',
    'AdversarialImagesHook',
    'AlternatingOptimHook',
    'AlternatingOptimWrapper',
    'AlternatingOptimWrapperConstructor',
    'BindVictimHook',
    'CPUAmpOptimWrapper',
    'ExactResumeHook',
    'PreflightHook',
    'RobustTestLoop',
    'RobustValLoop',
    'RouterHealthHook',
    'SafeCheckpointHook',
    'TurnSchedule',
    'check_config',
    'seed_worker',
]
