"""Random states: taking them, giving them back, and seeding the workers of a data loader."""

import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_rank, is_distributed
from mmengine.registry import FUNCTIONS


def get_rng_state() -> dict[str, Any]:
    """Take the state of every random generator that training draws from.

    Of CUDA's that is the one of the current device, the only one that a process of MMEngine computes on. Nothing but
    tensors and plain Python values is in it, so that a checkpoint with it loads with ``weights_only=True``.
    """
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        'python': [version, list(words), gauss],
        'numpy': [name, keys.tolist(), int(position), int(has_gauss), float(cached)],
        'torch': torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state['cuda'] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put back what :func:`get_rng_state` took; a ``cuda`` state is left out where there is no CUDA.

    Its tensors may lie on any device, because a checkpoint is loaded onto the device of training.
    """
    version, words, gauss = state['python']
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state['numpy']
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state['torch'].cpu())
    if 'cuda' in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'].cpu())


@contextmanager
def preserve_rng_state() -> Iterator[None]:
    """Leave the random state as it was found, whatever the block draws or seeds, or raises."""
    state = get_rng_state()
    try:
        yield
    finally:
        set_rng_state(state)


@FUNCTIONS.register_module()
def seed_worker(worker_id: int) -> None:
    """Seed a worker of a data loader anew for every epoch, and differently on every rank.

    MMEngine seeds workers with the run's seed, so that each epoch repeats the augmentations of the first. Here the seed
    is the one that PyTorch draws from the main process when an epoch's workers start, so it follows from the random
    state that a checkpoint holds. Use it with ``persistent_workers=False``: a worker that outlives an epoch has a state
    that no checkpoint can hold. PyTorch has already added ``worker_id`` to ``torch.initial_seed()``.

    Example:
        >>> train_dataloader = dict(
        ...     num_workers=2, persistent_workers=False, worker_init_fn=dict(type='seed_worker'))
    """
    # A spawned worker has no process group, but it inherits the environment of its launcher.
    rank = get_rank() if is_distributed() else int(os.environ.get('RANK', 0))
    words = np.random.SeedSequence([torch.initial_seed(), rank]).generate_state(4)
    seed = int.from_bytes(words[:2].tobytes(), 'little')
    random.seed(seed)
    np.random.seed(words)
    torch.manual_seed(seed)
