"""Checkpoints that survive a kill at any moment, and are refused when they do not fit."""

import os
import os.path as osp
from glob import escape, glob
from typing import Any

from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.fileio import LocalBackend, get_file_backend
from mmengine.hooks import CheckpointHook, EMAHook
from mmengine.optim import OptimWrapper
from mmengine.runner import BaseLoop, Runner, find_latest_checkpoint
from mmpretrain.registry import HOOKS

from mmadvmoe.utils import PARTIAL, bare_model

from .checkpoint_folder import POINTER, CheckpointFolder
from .config_checks import schedules
from .files import AtomicLocalBackend, FolderLock, in_first_process, use_atomic_files
from .safe_load import CheckpointError, check_can_be_loaded, check_state_dict


class _RemoveLater:
    """A file backend that only notes what to remove, until told that it is no longer needed."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self.outdated: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def remove(self, path: str) -> None:
        self.outdated.append(path)

    rmtree = remove

    def remove_outdated(self, keep: set) -> None:
        for path in self.outdated:
            if path in keep:
                continue
            if self._backend.isfile(path):
                self._backend.remove(path)
            elif self._backend.isdir(path):
                self._backend.rmtree(path)
        self.outdated.clear()


@HOOKS.register_module()
class SafeCheckpointHook(CheckpointHook):
    """MMEngine's checkpoint hook, safe against being killed and against files that do not fit.

    Takes the arguments of :class:`mmengine.hooks.CheckpointHook` and writes the same files. Beyond it:

    * At any moment the folder holds a complete checkpoint and a ``last_checkpoint`` that names one: files are replaced
      atomically, and older ones are deleted after the new one and ``last_checkpoint`` are on disk. So there must be
      room for one checkpoint more than ``max_keep_ckpts``. This holds on local disks; other storage is used as it is.
    * The checkpoint of an epoch is saved once more after its validation, so that it holds the result.
    * ``resume=True`` without a file takes the newest checkpoint that loads, with a warning, when the one that
      ``last_checkpoint`` names, or that file itself, is lost or damaged. Every byte of a checkpoint is compared with
      the SHA-256 at its end. ``resume='auto'`` (``--resume``) does so beside a ``load_from``, too, from which training
      begins where there is no checkpoint yet.
    * One process at a time trains in a folder, and touches no file of another folder: ``last_checkpoint`` and the
      checkpoints name files without the path to them. Checkpoints of another training, which a new one would mix with
      its own, are moved into a folder ``earlier_<n>`` below it, with a warning, before training starts.
    * Resuming, validating and testing demand that the checkpoint fits the model tensor for tensor. ``load_from`` in
      training stays MMEngine's: it takes what fits and logs the rest.
    * Before it saves, it calls ``collect_checkpoint_state(runner)`` of every hook that has one, in every process
      (``before_save_checkpoint`` is called in the first process alone).

    Example:
        >>> default_hooks = dict(checkpoint=dict(
        ...     type='SafeCheckpointHook', interval=1, max_keep_ckpts=2,
        ...     save_best='worst/accuracy/top1', rule='greater'))
    """

    def __init__(self, *args, file_client_args: dict | None = None, **kwargs) -> None:
        if file_client_args is not None:
            raise ValueError(
                f'default_hooks.checkpoint.file_client_args={file_client_args!r}: MMEngine has replaced it by '
                '`backend_args`, and SafeCheckpointHook takes that alone.'
            )
        super().__init__(*args, **kwargs)
        self._saved_after_val = False
        self._training = False
        self._own: CheckpointFolder | None = None
        self._locks: list[FolderLock] = []

    def before_run(self, runner: Runner) -> None:
        """Lock the folders of a training, and choose the checkpoint to resume from when none was named.

        Raises:
            FolderInUseError: Another process trains in the same folder.
            CheckpointError: There are checkpoints, or there is a pointer to one, and none loads.
        """
        self._training = False  # one Runner may train first and validate then
        folder = runner.work_dir
        if self.out_dir not in (None, folder):
            folder = osp.join(self.out_dir, osp.basename(folder.rstrip(osp.sep)))
        local = isinstance(get_file_backend(folder, backend_args=self.backend_args), LocalBackend)
        self._own = CheckpointFolder(folder, self.filename_tmpl) if local else None
        if _trains(runner):
            in_first_process(lambda: self._lock({runner.work_dir, folder} if local else {runner.work_dir}))
        if runner._resume == 'auto' or (runner._resume and runner._load_from is None):
            choose = self._own.choose if local else lambda folder, _: find_latest_checkpoint(folder)
            found = in_first_process(lambda: choose(runner.work_dir, runner.logger.warning))
            runner._resume = found is not None or runner._resume is True
            runner._load_from = found if runner._resume else runner._load_from

    def _lock(self, folders: set) -> None:
        for folder in sorted(folders):
            cure = 'Wait until it ends, stop it, or choose another folder (--work-dir, or `work_dir` of the config).'
            self._locks.append(FolderLock(folder, cure))
            self._locks[-1].acquire()

    def after_run(self, runner: Runner) -> None:
        """Give the folders back."""
        for lock in self._locks:
            lock.release()
        self._locks.clear()

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Refuse a checkpoint that does not fit, except where training starts from it.

        Raises:
            CheckpointError: If it does not fit the model, or lacks what resuming needs.
        """
        training = _trains(runner)
        if training and not runner._resume:
            return
        filename = runner._load_from or find_latest_checkpoint(runner.work_dir)
        if training:
            needed = ('meta', 'message_hub', 'optimizer')
            missing = [key for key in needed if key not in checkpoint]
            if missing:
                raise CheckpointError(
                    f'Checkpoint {filename!r} cannot be resumed from: it has no {missing}. It was saved for its '
                    'weights alone, as the best checkpoint is. Resume from `epoch_*.pth`, or start from these weights '
                    'with `load_from` and `resume=False`.'
                )
        check_state_dict(runner.model, checkpoint, filename)

    def before_train(self, runner: Runner) -> None:
        """Move what another training has left in the folder, and tidy up what a killed run has.

        Raises:
            ValueError: The state of a scheduler is such that no checkpoint of the run could be loaded.
        """
        for key, parts in schedules(runner.param_schedulers).items():
            for part in parts:
                advice = 'choose other schedules, such as LinearLR up and CosineAnnealingLR down in place of OneCycleLR'
                check_can_be_loaded(part.state_dict(), f'{key}: {type(part).__name__}', advice)
        self._training = True
        info = runner.message_hub.runtime_info
        if self._own is not None:
            self.backend_args = use_atomic_files()
            foreign = runner._resume and runner._load_from is not None and not self._own.holds(runner._load_from)
            step = 0 if foreign else runner.epoch if self.by_epoch else runner.iter
            in_first_process(lambda: self._own.set_aside(step, runner.work_dir, runner.logger.warning))
            for key in [key for key in info if key.startswith('best_ckpt')]:
                self._take_own_best(runner, key)
        super().before_train(runner)
        self.file_backend = _RemoveLater(self.file_backend)
        if 'last_ckpt' in info and self.last_ckpt is None:
            last_ckpt = self._path_of(osp.basename(info['last_ckpt']))
            # All processes must agree, because they act together when they save.
            exists = [self.file_backend.isfile(last_ckpt)]
            broadcast_object_list(exists)
            self.last_ckpt = last_ckpt if exists[0] else None
        if is_main_process():
            for folder in {runner.work_dir, self.out_dir}:
                for path in glob(osp.join(escape(folder), f'.*{PARTIAL}')):
                    os.remove(path)
            self.file_backend.outdated += map(self._path_of, info.get('outdated_ckpts', []))
            self._remove_outdated()

    def _take_own_best(self, runner: Runner, key: str) -> None:
        """Where a checkpoint says which file is the best so far, look for it in this run's own folder alone."""
        best = runner.message_hub.get_info(key)
        own = self._own.find(best)
        if own is None and best is not None:
            runner.logger.warning(
                f'The best checkpoint so far, {osp.basename(best)}, is not in {self._own.path!r}: one will be there '
                'when a later one is better.'
            )
        runner.message_hub.update_info(key, own)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Name files in the checkpoint relative to the folder that it lies in, so that the folder can be moved."""
        info = checkpoint['message_hub']['runtime_info']
        for key in [key for key in info if key == 'last_ckpt' or key.startswith('best_ckpt')]:
            if self._own is not None and info[key] is not None:
                info[key] = osp.basename(info[key])
        # Averaged weights are validated with statistics of all processes; the copy of EMAHook has those of this one.
        if any(isinstance(hook, EMAHook) and not hook.ema_model.update_buffers for hook in runner.hooks):
            for key, value in bare_model(runner.model).named_buffers():
                if key in checkpoint['state_dict']:
                    checkpoint['state_dict'][key] = value.cpu()

    def after_val_epoch(self, runner: Runner, metrics: dict) -> None:
        """Save the best checkpoint, and the result of the validation with the latest one."""
        if not self._training:
            return
        self._saved_after_val = False
        super().after_val_epoch(runner, metrics)
        step = runner.epoch if self.by_epoch else runner.iter
        if self.last_ckpt is None or self._saved_after_val:
            return
        if self.last_ckpt == self._path_of(self.filename_tmpl.format(step)):
            meta = dict(epoch=runner.epoch, iter=runner.iter)
            self._save_checkpoint_with_step(runner, step, meta)

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        wanted = self.key_indicators if self.save_best else ()
        missing = [key for key in wanted if key != 'auto' and key not in metrics]
        if missing:
            raise ValueError(
                f'default_hooks.checkpoint.save_best={missing[0]!r} is no metric of the validation; allowed: '
                f'{", ".join(metrics)}'
            )
        super()._save_best_checkpoint(runner, metrics)
        self._remove_outdated()

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        runner.call_hook('collect_checkpoint_state')
        if self.max_keep_ckpts > 0 and step not in self.keep_ckpt_ids:
            if len(self.keep_ckpt_ids) == self.max_keep_ckpts:
                oldest = self._path_of(self.filename_tmpl.format(self.keep_ckpt_ids[0]))
                self.file_backend.remove(oldest)
            self.keep_ckpt_ids.append(step)  # a deque of that length: the oldest drops out
            runner.message_hub.update_info('keep_ckpt_ids', list(self.keep_ckpt_ids))
        filename = self.filename_tmpl.format(step)
        self.last_ckpt = self._path_of(filename)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        # If the run is killed before they are deleted, the resumed one deletes them.
        outdated = [osp.basename(path) for path in self.file_backend.outdated]
        runner.message_hub.update_info('outdated_ckpts', outdated)
        runner.save_checkpoint(
            self.out_dir,
            filename,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        if is_main_process():
            if self._own is not None:
                self._own.point_to(self.last_ckpt, runner.work_dir)
            else:  # other storage, where MMEngine goes by whole addresses
                AtomicLocalBackend().put_text(self.last_ckpt, osp.join(runner.work_dir, POINTER))
            self._remove_outdated()
        self._saved_after_val = True

    def _remove_outdated(self) -> None:
        keep = {self.last_ckpt, getattr(self, 'best_ckpt_path', None)}
        keep.update(getattr(self, 'best_ckpt_path_dict', {}).values())
        if is_main_process():
            self.file_backend.remove_outdated(keep)
        self.file_backend.outdated.clear()

    def _path_of(self, filename: str) -> str:
        return self.file_backend.join_path(self.out_dir, filename)


def _trains(runner: Runner) -> bool:
    """Whether :meth:`Runner.train` was called.

    It builds both before it runs. The loop alone is built by whoever looks at ``runner.train_loop``, too.
    """
    return isinstance(runner._train_loop, BaseLoop) and isinstance(runner.optim_wrapper, OptimWrapper)
