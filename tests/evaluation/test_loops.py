"""Robust validation and test, through a real Runner on real digits."""

import copy
import itertools
import logging
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.model import BaseModule
from mmengine.runner import Runner
from mmpretrain.registry import MODELS
from tiny_models import dense_backbone
from torch import Tensor
from torchattacks.attack import Attack

import mmadvmoe.evaluation.loops  # noqa: F401
from mmadvmoe.attacks import RoutePGD
from mmadvmoe.datasets import Digits
from mmadvmoe.registry import ATTACKS as REGISTRY

ATTACKS = dict(
    pgd=dict(type='PGD', eps=0.15, alpha=0.05, steps=3),
    fgsm=dict(type='FGSM', eps=0.1),
)
# MMEngine keeps one logger for each name of an experiment.
_RUNS = itertools.count()
NAMES = ('clean', 'pgd', 'fgsm', 'worst')
# What an attack on survivors sees of a chunk depends on the attacks before it.
LOOP = dict(survivors_only=['fgsm'])


@MODELS.register_module(force=True)
class _Flatten(BaseModule):
    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (x.flatten(1),)


class _Record(BaseMetric):
    """Keeps what an evaluator is given, pass by pass, and gives the number of the pass."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = []

    def process(self, data_batch: None, data_samples: list[dict]) -> None:
        self.results += data_samples

    def compute_metrics(self, results: list[dict]) -> dict:
        self.passes.append(torch.stack([sample['pred_score'] for sample in results]))
        return {'images': len(results)}


@cache
def _centroids() -> dict[str, Tensor]:
    """Weights of a nearest-centroid classifier of the digits, on images in 0..255 without a norm."""
    dataset = Digits(split='train')
    images = np.stack([dataset.get_data_info(i)['img'].transpose(2, 0, 1) for i in range(len(dataset))])
    flat = torch.from_numpy(images).flatten(1).double() / 255
    labels = torch.from_numpy(dataset.get_gt_labels())
    means = torch.stack([flat[labels == c].mean(0) for c in range(10)])
    return {'head.fc.weight': (means / 255).float(), 'head.fc.bias': (-means.square().sum(1) / 2).float()}


def _dense_model() -> dict:
    return dict(
        type='ImageClassifier',
        backbone=dict(type='_Flatten'),
        head=dict(type='LinearClsHead', num_classes=10, in_channels=192),
        data_preprocessor=dict(num_classes=10),
    )


def _moe_model(routing: str = 'image') -> dict:
    router = dict(type='ResNetRouter', base_channels=4, num_blocks=1) if routing == 'image' else None
    return dict(
        type='ImageClassifier',
        backbone=dict(
            type='MoEBackbone',
            backbone=dense_backbone(4),
            num_experts=2,
            include=[r'layer1.*conv\d'],
            routing=routing,
            router=router,
        ),
        neck=dict(type='GlobalAveragePooling'),
        head=dict(type='LinearClsHead', num_classes=10, in_channels=8),
        data_preprocessor=dict(type='AdvDataPreprocessor', mean=[120.0] * 3, std=[60.0] * 3),
    )


def _config(work_dir: Path, model: dict, mode: str = 'val', num_images: int = 30, **loop) -> dict:
    loop = {'type': f'Robust{mode.capitalize()}Loop', 'attacks': ATTACKS, 'chunk_size': 8, **loop}
    dataset = dict(type='Digits', split=mode, indices=num_images, pipeline=[dict(type='PackInputs')])
    sampler = dict(type='DefaultSampler', shuffle=False)
    return {
        'work_dir': str(work_dir),
        'default_scope': 'mmpretrain',
        'experiment_name': f'loops_{work_dir.name}_{next(_RUNS)}',
        'log_level': 'WARNING',
        'default_hooks': dict(logger=dict(type='LoggerHook', interval=1)),
        'randomness': dict(seed=0),
        'model': model,
        f'{mode}_dataloader': dict(batch_size=5, num_workers=0, dataset=dataset, sampler=sampler),
        f'{mode}_evaluator': [dict(type='Accuracy')],
        f'{mode}_cfg': loop,
    }


def _runner(cfg: dict) -> Runner:
    runner = Runner.from_cfg(Config(copy.deepcopy(cfg)))
    if isinstance(runner.model.backbone, _Flatten):
        runner.model.load_state_dict(_centroids(), strict=False)
    return runner


def _run(cfg: dict, mode: str = 'val') -> tuple[dict, dict[str, Tensor]]:
    """Metrics, and the scores of all images under each name, in data set order."""
    runner = _runner(cfg)
    record = _Record()
    loop = getattr(runner, f'{mode}_loop')
    loop.evaluator.metrics.append(record)
    metrics = loop.run()
    names = [key.split('/')[0] for key in metrics if key.endswith('/images')]
    return metrics, dict(zip(names, record.passes))


@pytest.fixture(autouse=True)
def _few_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_metrics_by_name_and_worst_case(tmp_path: Path) -> None:
    metrics, scores = _run(_config(tmp_path, _dense_model(), num_images=60))
    assert tuple(scores) == NAMES
    assert all(metrics[f'{name}/images'] == 60 for name in NAMES)
    labels = torch.from_numpy(Digits(split='val', indices=60).get_gt_labels())
    correct = {name: score.argmax(1) == labels for name, score in scores.items()}
    for name in NAMES:
        expected = 100 * correct[name].double().mean().item()
        assert metrics[f'{name}/accuracy/top1'] == pytest.approx(expected)
    assert torch.equal(correct['worst'], correct['clean'] & correct['pgd'] & correct['fgsm'])
    # The attacks matter, and neither is superfluous.
    assert metrics['clean/accuracy/top1'] > metrics['pgd/accuracy/top1'] > 0
    assert not any('expert' in key or 'route' in key for key in metrics)


def test_clean_accuracy_is_that_of_the_plain_loop(tmp_path: Path) -> None:
    cfg = _config(tmp_path, _dense_model(), num_images=100, attacks=dict(pgd=ATTACKS['pgd']))
    robust, _ = _run(cfg)
    cfg['val_cfg'] = dict(type='ValLoop')
    plain, _ = _run(cfg)
    assert 80 < plain['accuracy/top1'] == robust['clean/accuracy/top1']


def test_outcomes_depend_neither_on_batch_size_nor_on_the_sampler(tmp_path: Path) -> None:
    cfg = _config(tmp_path / 'a', _dense_model())
    metrics, scores = _run(cfg)
    other = _config(tmp_path / 'b', _dense_model())
    other['val_dataloader'].update(batch_size=16, sampler=dict(type='DefaultSampler', shuffle=True))
    other_metrics, other_scores = _run(other)
    assert metrics == other_metrics
    assert all(torch.equal(scores[name], other_scores[name]) for name in NAMES)
    reseeded = _config(tmp_path / 'c', _dense_model(), seed=1)
    assert not torch.equal(scores['pgd'], _run(reseeded)[1]['pgd'])


def _one_of_two(rank: int, directory: Path, num_images: int) -> None:
    torch.set_num_threads(1)
    store = f'file://{directory / "store"}'
    torch.distributed.init_process_group('gloo', init_method=store, rank=rank, world_size=2)
    metrics, scores = _run(_config(directory / 'two', _moe_model(), **LOOP, num_images=num_images))
    torch.save((metrics, scores), directory / f'{rank}.pt')
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize('num_images', [27, 5])
def test_two_processes_give_the_outcomes_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_images: int
) -> None:
    """Also when there is a chunk for one of them alone."""
    # MMEngine's metrics leave a folder where the processes run.
    monkeypatch.chdir(tmp_path)
    metrics, scores = _run(_config(tmp_path / 'one', _moe_model(), **LOOP, num_images=num_images))
    mp.start_processes(_one_of_two, (tmp_path, num_images), nprocs=2, start_method='fork')
    first, second = (torch.load(tmp_path / f'{rank}.pt', weights_only=True) for rank in (0, 1))
    assert first[0] == second[0] == metrics
    assert all(torch.equal(first[1][name], scores[name]) for name in NAMES)


def test_the_random_state_is_untouched(tmp_path: Path) -> None:
    loop = _runner(_config(tmp_path, _dense_model())).val_loop
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    loop.run()
    assert random.getstate() == before[0]
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])
    assert torch.equal(torch.get_rng_state(), before[2])


def _trained(work_dir: Path, validate: bool) -> Runner:
    cfg = _config(work_dir, _moe_model(), num_images=16)
    train = dict(type='Digits', split='train', indices=64)
    train['pipeline'] = [dict(type='RandomCrop', crop_size=8, padding=1), dict(type='PackInputs')]
    cfg.update(
        train_dataloader=dict(
            batch_size=16, num_workers=0, dataset=train, sampler=dict(type='DefaultSampler', shuffle=True)
        ),
        train_cfg=dict(by_epoch=True, max_epochs=2, val_interval=1),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01)),
    )
    cfg['default_hooks']['checkpoint'] = dict(
        type='CheckpointHook', interval=-1, save_best='worst/accuracy/top1', rule='greater'
    )
    if not validate:
        for key in ('val_cfg', 'val_dataloader', 'val_evaluator'):
            cfg.pop(key)
        cfg['default_hooks']['checkpoint'] = None
    runner = _runner(cfg)
    runner.train()
    return runner


def test_training_takes_the_same_way_with_and_without_validation(tmp_path: Path) -> None:
    with_validation = _trained(tmp_path / 'with', validate=True)
    without = _trained(tmp_path / 'without', validate=False)
    weights = without.model.state_dict()
    for name, value in with_validation.model.state_dict().items():
        assert torch.equal(value, weights[name]), name
    assert list((tmp_path / 'with').glob('best_worst_accuracy_top1_epoch_*.pth'))
    assert all(p.requires_grad for p in with_validation.model.parameters())


class _Journal(Hook):
    def __init__(self) -> None:
        self.entries = []

    def before_test(self, runner: Runner) -> None:
        self.entries.append('before_test')

    def before_test_epoch(self, runner: Runner) -> None:
        self.entries.append('before_test_epoch')

    def before_test_iter(self, runner: Runner, batch_idx: int, data_batch: dict) -> None:
        assert len(data_batch['inputs']) == (8 if batch_idx < 3 else 6)
        self.entries.append(f'before {batch_idx}')

    def after_test_iter(self, runner: Runner, batch_idx: int, data_batch: dict, outputs: list) -> None:
        assert not runner.model.training
        assert len(outputs) == len(data_batch['inputs'])
        self.entries.append(f'after {batch_idx} {outputs[0].sample_idx} {outputs[-1].img_path}')

    def after_test_epoch(self, runner: Runner, metrics: dict) -> None:
        assert {f'{name}/accuracy/top1' for name in NAMES} <= metrics.keys()
        self.entries.append('after_test_epoch')

    def after_test(self, runner: Runner) -> None:
        self.entries.append('after_test')


def test_hooks_and_progress_count_chunks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cfg = dict(_config(tmp_path, _dense_model(), mode='test'), log_level='INFO')
    runner = _runner(cfg)
    journal = _Journal()
    runner.register_hook(journal)
    runner.test()
    assert journal.entries == [
        'before_test',
        'before_test_epoch',
        *(f'{when}' for i in range(4) for when in (f'before {i}', f'after {i} {8 * i} {min(8 * i + 7, 29)}')),
        'after_test_epoch',
        'after_test',
    ]
    log = next(tmp_path.rglob('*.log')).read_text()
    assert all(f'Epoch(test) [{i}/4]' in log for i in (1, 2, 3, 4))
    assert 'worst/accuracy/top1: ' in log
    assert 'takes 8 images at a time (test_cfg.chunk_size) in place of test_dataloader.batch_size=5' in log


@pytest.mark.parametrize('routing', ['image', 'layer'])
def test_an_moe_reports_its_routes(tmp_path: Path, routing: str) -> None:
    attacks = dict(route=dict(type='RoutePGD', eps=0.2, alpha=0.1, steps=2))
    runner = _runner(_config(tmp_path, _moe_model(routing), num_images=16, attacks=attacks))
    metrics = runner.val_loop.run()
    victim = runner.val_loop.victim
    dataset = Digits(split='val', indices=16)
    images = np.stack([dataset.get_data_info(i)['img'].transpose(2, 0, 1) for i in range(16)])
    with torch.no_grad(), victim.frozen():
        _, routings = victim.forward_routed(torch.from_numpy(images) / 255)
    chosen = torch.stack([routing.expert for routing in routings])
    for n in (0, 1):
        share = (chosen == n).double().mean().item()
        assert metrics[f'clean/expert_share/{n}'] == pytest.approx(share)
    assert metrics['route/expert_share/0'] + metrics['route/expert_share/1'] == pytest.approx(1)
    assert 0 <= metrics['route/route_changed'] <= 1


@REGISTRY.register_module(force=True)
class _StrongerRoutePGD(RoutePGD):
    pass


@pytest.mark.parametrize(
    ('model', 'attack', 'warns'),
    [
        (_moe_model(), dict(type='PGD', eps=0.1), True),
        (_moe_model(), dict(type='RoutePGD', eps=0.1), False),
        (_moe_model(), dict(type='_StrongerRoutePGD', eps=0.1), False),
        (_dense_model(), dict(type='PGD', eps=0.1), False),
    ],
)
def test_an_moe_judged_without_route_attacks_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: dict, attack: dict, warns: bool
) -> None:
    runner = _runner(_config(tmp_path, model, attacks=dict(some=attack)))
    messages = []
    logger = MMLogger.get_current_instance()
    monkeypatch.setattr(logger, 'log', lambda level, message, *_: messages.append((level, message)))
    runner.val_loop  # noqa: B018
    warned = [message for level, message in messages if level == logging.WARNING]
    assert any('val_cfg.attacks (some) has no attack on the routes' in message for message in warned) == warns


@pytest.mark.parametrize(
    ('loop', 'error', 'message'),
    [
        (dict(attacks={}), ValueError, r'val_cfg\.attacks holds no attack.*ValLoop'),
        (dict(attacks=[dict(type='PGD')]), TypeError, r'val_cfg\.attacks must map names'),
        (dict(attacks=dict(clean=ATTACKS['pgd'])), ValueError, "cannot be called 'clean'"),
        (dict(attacks=dict(worst=ATTACKS['pgd'])), ValueError, "cannot be called 'worst'"),
        (dict(attacks={'a/b': ATTACKS['pgd']}), ValueError, "cannot be called 'a/b'"),
        (dict(attacks=dict(pgd=dict(eps=0.1))), TypeError, r'val_cfg\.attacks\.pgd must be the config'),
        (dict(attacks=dict(pgd=dict(type='PDG'))), ValueError, "did you mean 'PGD'"),
        (dict(attacks=dict(pgd=dict(type='PGD', eps=8))), ValueError, 'eps=8 / 255'),
        (dict(fp16=True), ValueError, r'val_cfg\.fp16=True'),
        (dict(chunk_size=0), ValueError, 'chunk_size must be at least 1, but got 0'),
    ],
)
def test_bad_settings_are_refused_before_anything_runs(
    tmp_path: Path, loop: dict, error: type[Exception], message: str
) -> None:
    runner = _runner(_config(tmp_path, _dense_model(), **loop))
    with pytest.raises(error, match=message):
        runner.val_loop  # noqa: B018


@pytest.mark.parametrize(
    ('loader', 'message'),
    [
        (dict(drop_last=True), r'val_dataloader\.drop_last=True leaves images out'),
        (dict(batch_sampler=dict(type='BatchSampler')), r'val_dataloader\.batch_sampler'),
    ],
)
def test_a_loader_that_would_change_the_images_is_refused(tmp_path: Path, loader: dict, message: str) -> None:
    cfg = _config(tmp_path, _dense_model())
    cfg['val_dataloader'].update(loader)
    with pytest.raises(ValueError, match=message):
        _runner(cfg).val_loop  # noqa: B018


@REGISTRY.register_module(force=True)
class _Faulty(Attack):
    """Fails, or makes images that are none, for the second chunk."""

    def __init__(self, model: torch.nn.Module, fault: str) -> None:
        super().__init__('Faulty', model)
        self.fault = fault
        self.calls = 0

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        if self.calls < 2:
            return images
        if self.fault == 'raise':
            raise KeyError('no such thing')
        return images + 1 if self.fault == 'range' else images[:, :, :4]


@pytest.mark.parametrize(
    ('fault', 'error', 'message'),
    [
        ('raise', RuntimeError, "attack 'bad' failed on images 8 to 15 of the data set: KeyError"),
        ('range', ValueError, r"attack 'bad' left \[0, 1\].* in images \[8, 9"),
        ('shape', ValueError, r"attack 'bad' made images of shape \(8, 3, 4, 8\)"),
    ],
)
def test_a_faulty_attack_is_named_with_its_images(
    tmp_path: Path, fault: str, error: type[Exception], message: str
) -> None:
    attacks = dict(bad=dict(type='_Faulty', fault=fault))
    loop = _runner(_config(tmp_path, _dense_model(), attacks=attacks)).val_loop
    with pytest.raises(error, match=message):
        loop.run()


def test_logits_that_are_not_finite_are_named(tmp_path: Path) -> None:
    runner = _runner(_config(tmp_path, _dense_model()))
    runner.model.head.fc.bias.data[3] = torch.nan
    with pytest.raises(FloatingPointError, match=r"logits of 8 of 8 images are not finite in 'clean' \(images \[0, 1"):
        runner.val_loop.run()


def test_labels_must_be_classes_of_the_model(tmp_path: Path) -> None:
    model = _dense_model()
    model['head']['num_classes'] = 4
    runner = Runner.from_cfg(Config(_config(tmp_path, model, attacks=dict(fgsm=ATTACKS['fgsm']))))
    with pytest.raises(ValueError, match=r'num_classes=4 differs from the 10 classes of val_dataloader\.dataset'):
        runner.val_loop  # noqa: B018


def test_images_of_two_sizes_are_named(tmp_path: Path) -> None:
    cfg = _config(tmp_path, _dense_model())
    pipeline = [dict(type='RandomResize', scale=(8, 8), ratio_range=(1, 3)), dict(type='PackInputs')]
    cfg['val_dataloader']['dataset']['pipeline'] = pipeline
    with pytest.raises(ValueError, match=r'differ in size: .* \(val_dataloader\.dataset\.pipeline\)'):
        _runner(cfg).val_loop.run()
