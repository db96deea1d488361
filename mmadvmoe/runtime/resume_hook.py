"""Resuming such that nobody can tell it from a run that was never interrupted."""

from collections.abc import Iterator

import torch
from mmengine.dataset import worker_init_fn as mmengine_worker_init_fn
from mmengine.dist import all_gather_object, get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from mmpretrain.registry import HOOKS
from torch.utils.data import DataLoader, Sampler

from mmadvmoe.utils import bare_model

from .checkpoint_hook import SafeCheckpointHook
from .seeding import get_rng_state, set_rng_state

_KEY = 'exact_resume'


@HOOKS.register_module()
class ExactResumeHook(Hook):
    """Save and restore all that an exact resume needs and MMEngine's checkpoints do not hold.

    MMEngine keeps weights, optimisers, schedulers and the log. This hook adds, for every process, the random states of
    Python, NumPy and PyTorch, gradients that are still being accumulated, buffers such as norm statistics, and the seed
    of the sampler. On CPU the weights of a resumed run are then equal, bit for bit, to those of an uninterrupted one.
    The number of processes must stay the same.

    A validation that was due at the checkpoint, and that the kill did not let finish, is made up for first. Otherwise
    that epoch could never become the best.

    It acts after every other hook of ``before_train``, and needs :class:`SafeCheckpointHook` when there are several
    processes.

    Example:
        >>> custom_hooks = [dict(type='ExactResumeHook')]
    """

    priority = 'LOWEST'

    def __init__(self) -> None:
        self._collected: list[dict] | None = None
        self._loaded: dict | None = None
        self._training = False

    def before_run(self, runner: Runner) -> None:
        """Forget what this Runner did before: it may train first and validate then."""
        self._training = False

    def collect_checkpoint_state(self, runner: Runner) -> None:
        """Gather the state of all processes; :class:`SafeCheckpointHook` calls it in each."""
        self._collected = all_gather_object(_own_state(runner))

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Add the states to a checkpoint, unless it holds weights alone and is not for resuming."""
        if 'optimizer' not in checkpoint:
            return
        checkpoint[_KEY] = dict(
            ranks=self._collected or [_own_state(runner)],
            sampler_seed=getattr(_sampler(runner.train_dataloader), 'seed', None),
        )
        self._collected = None

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Keep the states until training is about to go on."""
        self._loaded = checkpoint.get(_KEY, {})

    def before_val_epoch(self, runner: Runner) -> None:
        """Note which validation the next checkpoint includes.

        It is noted before because no checkpoint is saved until the validation is complete, and the checkpoint hook
        saves as soon as it is.
        """
        if self._training:
            runner.message_hub.update_info('last_validated', _progress(runner))

    def before_train(self, runner: Runner) -> None:
        """Put everything back, if the run was resumed.

        Raises:
            ValueError: If the config has something in it that no resume could be exact with.
        """
        self._training = True
        _check_config(runner)
        loop, loader = runner.train_loop, runner.train_dataloader
        by_iter = isinstance(loop, IterBasedTrainLoop)
        if by_iter and loader.generator is None:
            # Each pass over the data draws a seed for its workers. The passes that a resume skips must draw what they
            # drew the first time, when training drew numbers between them.
            loader.generator = torch.Generator().manual_seed(runner.seed)
        if runner.iter == 0:
            return
        self._restore(runner, by_iter)
        self._make_up_validation(runner)
        if by_iter:
            loop.dataloader_iterator = _skipping(loop, loop.dataloader_iterator, get_rng_state())

    def _restore(self, runner: Runner, by_iter: bool) -> None:
        state, self._loaded = self._loaded, None
        if state is None:  # a second training by the same Runner
            return
        if not state:
            runner.logger.warning(
                'The checkpoint was saved without ExactResumeHook and holds no random state: training goes on, but not '
                'as it would have without the interruption.'
            )
            return
        sampler = _sampler(runner.train_dataloader)
        seed = state['sampler_seed']
        if seed is not None and sampler.seed != seed:
            if by_iter:
                raise ValueError(
                    f'The run was started with the random seed {seed}, and its data loader has been built with '
                    f'{sampler.seed}: set randomness=dict(seed={seed}).'
                )
            sampler.seed = seed
        if len(state['ranks']) != get_world_size():
            runner.logger.warning(
                f'The checkpoint was saved by {len(state["ranks"])} processes and there are {get_world_size()}: '
                'training goes on, but with other random numbers.'
            )
            return
        own = state['ranks'][get_rank()]
        model = bare_model(runner.model)
        for name, gradient in own['gradients'].items():
            parameter = model.get_parameter(name)
            parameter.grad = gradient.to(parameter.device)
        for name, buffer in own['buffers'].items():
            model.get_buffer(name).copy_(buffer)
        set_rng_state(own['rng'])

    @staticmethod
    def _make_up_validation(runner: Runner) -> None:
        loop, done = runner.train_loop, _progress(runner)
        if runner.val_loop is None or not isinstance(loop, (EpochBasedTrainLoop, IterBasedTrainLoop)):
            return
        loop._decide_current_val_interval()
        if done in validation_steps(loop) and runner.message_hub.runtime_info.get('last_validated') != done:
            runner.logger.info('The run was stopped before it had validated: validating now.')
            runner.val_loop.run()


def _skipping(loop: IterBasedTrainLoop, batches: Iterator, rng_state: dict) -> Iterator:
    """The batches of an iteration-based loop that was resumed.

    MMEngine draws the batches that were trained on once more, to skip them. That draws random numbers too, so the state
    is restored after it, just before the first new batch is drawn.
    """
    for _ in range(loop.iter):
        yield next(batches)
    set_rng_state(rng_state)
    loop.dataloader_iterator = batches
    yield next(batches)


def validation_steps(loop: EpochBasedTrainLoop | IterBasedTrainLoop) -> list[int]:
    """The epochs or iterations after which a training loop validates."""
    end = loop.max_iters if isinstance(loop, IterBasedTrainLoop) else loop.max_epochs
    return [step for step in range(loop.val_begin, end + 1) if step % loop.val_interval == 0 or step == end]


def _own_state(runner: Runner) -> dict:
    """The state that this process alone knows."""
    model = bare_model(runner.model)
    buffers = model.named_buffers() if get_rank() > 0 else ()
    return dict(
        rng=get_rng_state(),
        # Nothing, unless gradients are being accumulated: every step ends by clearing them.
        gradients={
            name: parameter.grad.cpu() for name, parameter in model.named_parameters() if parameter.grad is not None
        },
        # The checkpoint has those of the first process. Norm statistics differ between processes.
        buffers={name: buffer.cpu() for name, buffer in buffers},
    )


def _progress(runner: Runner) -> int:
    by_iter = isinstance(runner.train_loop, IterBasedTrainLoop)
    return runner.iter if by_iter else runner.epoch


def _sampler(loader: DataLoader) -> Sampler:
    """The sampler of single images, also where batches have a sampler of their own."""
    return getattr(loader.batch_sampler, 'sampler', loader.sampler)


def _check_config(runner: Runner) -> None:
    """Refuse, before training starts, what would make resuming inexact."""
    loader = runner.train_dataloader
    by_epoch = isinstance(runner.train_loop, EpochBasedTrainLoop)
    savers = [hook for hook in runner.hooks if isinstance(hook, SafeCheckpointHook)]
    if by_epoch and loader.persistent_workers:
        raise ValueError(
            'train_dataloader.persistent_workers=True: ExactResumeHook needs False, because workers that outlive an '
            'epoch have random states that no checkpoint can hold.'
        )
    if by_epoch and any(not hook.by_epoch for hook in savers):
        raise ValueError(
            'default_hooks.checkpoint.by_epoch=False: MMEngine resumes a loop over epochs at the start of an epoch. '
            'ExactResumeHook needs by_epoch=True, or train_cfg=dict(by_epoch=False, max_iters=...).'
        )
    if get_world_size() > 1 and not savers:
        raise ValueError(
            'With several processes ExactResumeHook needs default_hooks.checkpoint='
            "dict(type='SafeCheckpointHook'), which lets every process add its random state."
        )
    init = getattr(loader.worker_init_fn, 'func', loader.worker_init_fn)
    if by_epoch and loader.num_workers > 0 and init is mmengine_worker_init_fn:
        runner.logger.warning(
            'The workers of train_dataloader start every epoch with the same random numbers, so '
            'that each image is augmented alike in every epoch. Set '
            "train_dataloader.worker_init_fn=dict(type='seed_worker')."
        )
