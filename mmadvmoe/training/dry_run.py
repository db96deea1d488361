"""Try out a training before it is started: each of its parts once, on real data, and what the whole will cost."""

from __future__ import annotations

import sys
import time
from collections import Counter
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmadvmoe.runtime.launch import build_runner
from mmadvmoe.runtime.preflight import check_batches
from mmadvmoe.runtime.resume_hook import validation_steps
from mmadvmoe.runtime.safe_load import check_state_dict, load_from_local
from mmadvmoe.utils import bare_model, single_wrappers

from .alternation import AlternatingOptimHook, TurnSchedule
from .awp import AWPOptimWrapper

#: Images that are attacked as in a validation.
VAL_IMAGES = 32
# Iterations of each group: on a GPU the first ones also load kernels.
_CYCLES = dict(cpu=1, cuda=4)
_NAME = 'dry_run.pth'


@dataclass
class DryRun:
    """What was measured.

    Attributes:
        seconds (dict[str, float]): Of one iteration by turn, ``'joint'`` where training takes none; data loading, which
            runs beside it, is not in it.
        iterations (dict[str, int]): How many of them the whole training has.
        val_seconds (float): Of one validation; 0 without one.
        validations (int): How many of them the whole training has.
        memory (int, optional): Bytes at the peak, of the GPU or, without one, of the process; None where the system
            does not tell, as Windows.
        checkpoint (int): Bytes of a checkpoint.
        device (str): Where it ran.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    iterations: dict[str, int] = field(default_factory=dict)
    val_seconds: float = 0.0
    validations: int = 0
    memory: int | None = None
    checkpoint: int = 0
    device: str = 'cpu'

    @property
    def total_seconds(self) -> float:
        """Of the whole training, validations included and the final test not."""
        training = sum(count * self.seconds[turn] for turn, count in self.iterations.items())
        return training + self.validations * self.val_seconds

    def __str__(self) -> str:
        rows = [
            f'{count:8,d} iterations ({turn}) of {self.seconds[turn]:.3f} s' for turn, count in self.iterations.items()
        ]
        rows.append(f'{self.validations:8,d} validations of {self.val_seconds:.1f} s')
        memory = 'unknown' if self.memory is None else f'{self.memory / 2**20:,.0f} MiB'
        total = timedelta(seconds=round(self.total_seconds))
        return '\n'.join(
            [
                f'dry run on {self.device}: each turn, an attacked validation batch, a save and a load went well',
                *(f'  {row}' for row in rows),
                f'  about {total} in all, without the final test',
                f'  peak memory {memory}, a checkpoint {self.checkpoint / 2**20:,.1f} MiB',
            ]
        )


def dry_run(cfg: Config) -> DryRun:
    """Build everything, train one turn of each group, attack a validation batch, save and load.

    Nothing is kept: the run, in one process, has a folder of its own, which is deleted, and a copy of the config. The
    process is not what it was (seeds, logger). Raises whatever the training would raise.
    """
    cfg = Config(deepcopy(cfg.to_dict()))
    found = DryRun(device='cuda' if torch.cuda.is_available() else 'cpu')
    if cfg.get('visualizer') is not None:
        cfg.visualizer.vis_backends = []
    if cfg.get('val_cfg') and 'attacks' in cfg.val_cfg:
        cfg.val_cfg.chunk_size = VAL_IMAGES
    with TemporaryDirectory() as folder:
        cfg.work_dir, cfg.experiment_name = folder, f'dry_run_{uuid4().hex}'
        runner = build_runner(cfg)
        watch = _Watch(found, _CYCLES[found.device])
        runner.register_hook(watch, priority='LOWEST')
        check_batches(runner)
        with suppress(_Enough):
            runner.train()
        if runner.val_loop is not None:
            start = time.perf_counter()
            with suppress(_Enough):
                runner.val_loop.run()
            share = len(runner.val_dataloader.dataset) / min(watch.val_images, len(runner.val_dataloader.dataset))
            found.val_seconds = (time.perf_counter() - start) * share
            found.validations = len(validation_steps(runner.train_loop))
        runner.save_checkpoint(folder, _NAME)
        path = Path(folder, _NAME)
        check_state_dict(bare_model(runner.model), load_from_local(str(path)), str(path))
        found.checkpoint = path.stat().st_size
        turns = (watch.schedule.turn_at(i) if watch.schedule else 'joint' for i in range(runner.max_iters))
        found.iterations = {turn: count for turn, count in Counter(turns).items() if turn in found.seconds}
    found.memory = _peak_memory()
    return found


class _Enough(Exception):  # noqa: N818  no error
    """Thrown to leave a loop of MMEngine's that has shown what it should."""


class _Watch(Hook):
    """Times some iterations of each kind, and leaves after them and after one batch of validation."""

    def __init__(self, found: DryRun, cycles: int) -> None:
        self.found, self.cycles, self.iterations = found, cycles, cycles
        self.schedule: TurnSchedule | None = None
        self.val_images = 1

    def before_train(self, runner: Runner) -> None:
        """Shorten the schedule, which the hook has checked, and let each iteration end in an update."""
        for hook in runner.hooks:
            if isinstance(hook, AlternatingOptimHook):
                self.schedule, cycles = hook.schedule, self.cycles
                shared = dict(reuse_batch=self.schedule.reuse_batch, reuse_attack=self.schedule.reuse_attack)
                # Where batches are shared, an iteration of the router by itself is one of a third kind.
                first = cycles if self.schedule.router_first_iters and self.schedule.reuse_batch else 0
                hook.schedule = TurnSchedule(cycles, cycles, router_first_iters=first, **shared)
                self.iterations = cycles + first if self.schedule.reuse_batch else 2 * cycles
                for member in runner.optim_wrapper.values():
                    member._accumulative_counts = 1
        for member in single_wrappers(runner.optim_wrapper):
            if isinstance(member, AWPOptimWrapper):
                member.warmup_iters = 0

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        self._start = _now()

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None, outputs: dict | None = None
    ) -> None:
        # The latest of a turn counts: the first ones are slow.
        self.found.seconds[(data_batch or {}).get('turn', 'joint')] = _now() - self._start
        if batch_idx + 1 == min(self.iterations, len(runner.train_dataloader)):
            raise _Enough

    def after_val_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None, outputs: list | None = None
    ) -> None:
        self.val_images = len(outputs)
        raise _Enough


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _peak_memory() -> int | None:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # on Windows
        return None
    # In KiB but on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)
