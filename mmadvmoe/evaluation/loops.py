"""Validation and test under attack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mmengine.evaluator import Evaluator
from mmengine.logging import print_log
from mmengine.runner import Runner, TestLoop, ValLoop
from mmpretrain.registry import LOOPS

from mmadvmoe.attacks import Victim
from mmadvmoe.datasets import ChunkSampler
from mmadvmoe.runtime.preflight import check_data, check_topk
from mmadvmoe.runtime.seeding import preserve_rng_state
from mmadvmoe.utils import bare_model

from .data import Chunk, unit_batch
from .named_attacks import check_groups, held_name, with_route_attack
from .outcomes import CLEAN, as_data_samples
from .run import RobustEvaluation


class _RobustLoop:
    """Common part of :class:`RobustValLoop` and :class:`RobustTestLoop`, on top of MMEngine's loops."""

    #: 'val' or 'test', as in the names of config keys and of hook methods.
    mode: str

    def __init__(
        self,
        runner: Runner,
        dataloader: Mapping,
        evaluator: Evaluator | Mapping | Sequence,
        attacks: Mapping[str, dict],
        chunk_size: int = 128,
        seed: int = 0,
        survivors_only: Sequence[str] = (),
        worst_of: Mapping[str, Sequence[str]] | None = None,
        fp16: bool = False,
    ) -> None:
        if fp16:
            raise ValueError(
                f'{self.mode}_cfg.fp16=True (or --amp) is not for robust evaluation: in half precision an attack loses '
                'its gradient and the model looks more robust than it is. Set it to False.'
            )
        model = bare_model(runner.model)
        self.data_preprocessor = model.data_preprocessor
        self.victim = Victim(model)
        self.evaluation = RobustEvaluation(
            self.victim,
            attacks,
            key=f'{self.mode}_cfg.attacks',
            chunk_size=chunk_size,
            seed=seed,
            survivors_only=survivors_only,
            worst_of=worst_of,
        )
        check_groups(attacks, survivors_only, worst_of or {}, self.mode)
        super().__init__(runner, self._in_chunks(dataloader, chunk_size), evaluator)
        check_data(self.dataloader.dataset, f'{self.mode}_dataloader', self.victim.num_classes)
        check_topk(self.evaluator.metrics, f'{self.mode}_evaluator', self.victim.num_classes)

    def _in_chunks(self, dataloader: Mapping, chunk_size: int) -> dict:
        """Rewrite the config of a loader so that each of its batches is one chunk."""
        key = f'{self.mode}_dataloader'
        if not isinstance(dataloader, Mapping):
            kind = type(dataloader).__name__
            raise TypeError(
                f'{key} must be a config for robust evaluation, which brings its own sampler, not a {kind}.'
            )
        if dataloader.get('drop_last'):
            raise ValueError(f'{key}.drop_last=True leaves images out of the result; remove it.')
        if dataloader.get('batch_sampler') is not None:
            raise ValueError(
                f'{key}.batch_sampler={dataloader["batch_sampler"]!r} cannot be kept: robust evaluation goes through '
                'the data set in order. Remove it.'
            )
        batch_size = dataloader.get('batch_size')
        if batch_size not in (None, chunk_size):
            print_log(
                f'Robust evaluation takes {chunk_size} images at a time ({self.mode}_cfg.chunk_size) in place of '
                f'{key}.batch_size={batch_size}: what an attack draws belongs to its chunk.',
                logger='current',
            )
        sampler = dict(type=ChunkSampler, chunk_size=chunk_size)
        return dict(dataloader, batch_size=chunk_size, sampler=sampler)

    def run(self) -> dict:
        """Attack the whole data set, and compute all metrics as :func:`compute_metrics` names them."""
        call_hook = self.runner.call_hook
        call_hook(f'before_{self.mode}')
        call_hook(f'before_{self.mode}_epoch')
        self.runner.model.eval()
        # Hooks stay outside: the ones after an epoch save the random state of training.
        with preserve_rng_state():
            metrics = self._evaluate()
        call_hook(f'after_{self.mode}_epoch', metrics=metrics)
        call_hook(f'after_{self.mode}')
        return metrics

    def _evaluate(self) -> dict:
        sampler = self.dataloader.sampler
        self.evaluation.begin(sampler, self.runner.cfg.get('model'))
        for idx, (number, batch) in enumerate(zip(sampler.chunks(), self.dataloader)):
            self.runner.call_hook(f'before_{self.mode}_iter', batch_idx=idx, data_batch=batch)
            indices = sampler.chunk(number)
            images, labels = unit_batch(self.data_preprocessor, batch, indices, f'{self.mode}_dataloader')
            part = self.evaluation.evaluate(Chunk(number, indices, images, labels))
            samples = as_data_samples(part.by_name[CLEAN], part.index, part.label)
            for index, sample, given in zip(indices, samples, batch['data_samples']):
                # What hooks call the image; MMPretrain's would count chunks, as if they were of one size.
                sample.set_metainfo(dict(img_path=given.get('img_path', str(index))))
            self.runner.call_hook(f'after_{self.mode}_iter', batch_idx=idx, data_batch=batch, outputs=samples)
        return self.evaluation.finish(self.evaluator)


@LOOPS.register_module()
class RobustValLoop(_RobustLoop, ValLoop):
    """Validation under named attacks, through ordinary MMEngine evaluators.

    Every metric of ``val_evaluator`` is reported without an attack (``'clean/accuracy/top1'``), under each attack
    (``'pgd10/accuracy/top1'``) and in the worst case of each image over all of them (``'worst/accuracy/top1'``). For a
    mixture of experts, the worst case means something only when :class:`~mmadvmoe.attacks.RoutePGD` is among the
    attacks; the loop warns when it is not. It also reports the share of images per expert and of routes that an attack
    changed, in [0, 1].

    The images are attacked in chunks of ``chunk_size``, in data set order, with a seed made from ``seed``, the name of
    the attack and the number of the chunk. So the result does not depend on the batch size or the sampler of
    ``val_dataloader`` (both are replaced), nor on the number of processes, which take whole chunks in turn. The random
    state of training is left as it was.

    Args:
        runner, dataloader, evaluator: As in MMEngine's loops; the loader as a config.
        attacks: Config of each attack under its name; names may not be ``'clean'`` or ``'worst'``.
        chunk_size: Images attacked at a time by one process.
        seed: Seed of the attacks.
        survivors_only: Names of costly attacks that get only the images which are right without an attack and under all
            attacks before them. An image counts as robust under such an attack when it survives that one and all
            before; its accuracy is thus never above theirs.
        worst_of: Further worst cases, each over the attacks it names and reported under its own name:
            ``dict(ra=['pgd50', 'routepgd50'])`` gives ``'ra/accuracy/top1'``.
        fp16: Must be False; there because MMEngine's loops and ``--amp`` know it.

    Raises:
        TypeError: The data loader or an attack is not given as a config.
        ValueError: There is no attack, a name or an attack's setting is not allowed, or the data loader would leave
            images out.

    Examples:
        >>> val_cfg = dict(
        ...     type='RobustValLoop',
        ...     attacks=dict(
        ...         pgd10=dict(type='PGD', eps=8 / 255, alpha=2 / 255, steps=10),
        ...         routepgd10=dict(type='RoutePGD', eps=8 / 255, alpha=2 / 255, steps=10)))
    """

    mode = 'val'


@LOOPS.register_module()
class RobustTestLoop(_RobustLoop, TestLoop):
    """Test under named attacks; see :class:`RobustValLoop`, whose arguments and metrics it has.

    Args:
        cascade: Whether every attack gets only the images that are right without an attack and under all attacks before
            it, as with all names in ``survivors_only``.
        add_route_attack: Whether attacks that know of routes are put beside the attacks on a mixture of experts; see
            :func:`~mmadvmoe.evaluation.named_attacks.with_route_attack`. Those that are added to an attack in
            ``survivors_only`` get the survivors as well.
        out_dir: Folder that gets the outcome of each image as it becomes known, and in which a killed test goes on
            where it stopped; see docs/evaluation.md. None to write nothing.
        overwrite: Delete the outcomes in ``out_dir`` and begin anew, instead of going on or refusing to.

    Raises:
        ValueError: ``out_dir`` holds the outcomes of an evaluation with other settings.

    Examples:
        >>> test_cfg = dict(
        ...     type='RobustTestLoop',
        ...     attacks=dict(
        ...         pgd50=dict(type='PGD', eps=8 / 255, alpha=2 / 255, steps=50),
        ...         routepgd50=dict(type='RoutePGD', eps=8 / 255, alpha=2 / 255, steps=50),
        ...         autoattack=dict(type='AutoAttack', eps=8 / 255)),
        ...     survivors_only=['autoattack'],
        ...     worst_of=dict(ra=['pgd50', 'routepgd50']))
    """

    mode = 'test'

    def __init__(
        self,
        runner: Runner,
        dataloader: Mapping,
        evaluator: Evaluator | Mapping | Sequence,
        attacks: Mapping[str, dict],
        cascade: bool = False,
        add_route_attack: bool = False,
        out_dir: str | None = None,
        overwrite: bool = False,
        **kwargs,
    ) -> None:
        if add_route_attack:
            attacks = with_route_attack(attacks, Victim(runner.model), f'{self.mode}_cfg.attacks')
        if cascade:
            kwargs['survivors_only'] = list(attacks)
        elif add_route_attack:
            few = kwargs.get('survivors_only', ())
            kwargs['survivors_only'] = [name for each in few for name in (each, held_name(each)) if name in attacks]
        super().__init__(runner, dataloader, evaluator, attacks, **kwargs)
        if out_dir is not None:
            self.evaluation.keep_in(out_dir, overwrite)
