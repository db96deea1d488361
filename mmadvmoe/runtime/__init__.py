"""Additions to MMEngine: safe loading, whole checkpoints, exact resuming, launching, and checks before long work."""

from .checkpoint_hook import SafeCheckpointHook
from .config_checks import check_config
from .console import ConsoleRunner
from .preflight import PreflightHook
from .resume_hook import ExactResumeHook
from .safe_load import CheckpointError, enable_safe_loading
from .seeding import seed_worker

__all__ = [
    'CheckpointError',
    'ConsoleRunner',
    'ExactResumeHook',
    'PreflightHook',
    'SafeCheckpointHook',
    'check_config',
    'enable_safe_loading',
    'seed_worker',
]
