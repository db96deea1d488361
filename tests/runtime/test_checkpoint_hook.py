"""Whenever a run is killed, its folder holds a checkpoint that loads and a pointer to it."""

import argparse
import errno
import multiprocessing
import os
import runpy
import signal
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.fileio import LocalBackend
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import BaseLoop, Runner
from mmpretrain.registry import DATASETS, HOOKS, METRICS, MODELS
from resume_runs import kill_at_file_step
from torch import nn
from torch.utils.data import Dataset

import mmadvmoe  # noqa: F401
from mmadvmoe.runtime.checkpoint_hook import SafeCheckpointHook
from mmadvmoe.runtime.files import AtomicLocalBackend
from mmadvmoe.runtime.safe_load import CheckpointError, load_from_local

SCORES = {1: 0.5, 2: 0.2, 3: 0.9, 4: 0.4}


@DATASETS.register_module()
class TwoPoints(Dataset):
    metainfo = dict(classes=('a',))

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return dict(inputs=torch.ones(3) * index)


@MODELS.register_module()
class OneLinear(BaseModel):
    def __init__(self, outputs=2):
        super().__init__()
        self.linear = nn.Linear(3, outputs)

    def forward(self, inputs, mode='tensor'):
        out = self.linear(torch.stack(inputs))
        return dict(loss=out.square().mean()) if mode == 'loss' else out


@METRICS.register_module()
class ScoreOfEpoch(BaseMetric):
    """A score that is known for every epoch (the third is the best)."""

    epoch = 0

    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        type(self).epoch += 1
        return {'worst/accuracy/top1': SCORES[type(self).epoch], 'loss': 1.0}


def cfg_of(work_dir, epochs=4, model=None, **checkpoint):
    loader = dict(dataset=dict(type='TwoPoints'), batch_size=2, num_workers=0, sampler=dict(type='DefaultSampler'))
    cfg_of.count += 1
    ScoreOfEpoch.epoch = 0
    return Config(
        dict(
            default_scope='mmpretrain',
            work_dir=str(work_dir),
            experiment_name=f'checkpoint_{os.getpid()}_{cfg_of.count}',
            model=model or dict(type='OneLinear'),
            train_dataloader=loader,
            train_cfg=dict(by_epoch=True, max_epochs=epochs),
            val_dataloader=loader,
            val_cfg=dict(),
            val_evaluator=dict(type='ScoreOfEpoch'),
            test_dataloader=loader,
            test_cfg=dict(),
            test_evaluator=dict(type='ScoreOfEpoch'),
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1, momentum=0.9)),
            default_hooks=dict(checkpoint=dict(type='SafeCheckpointHook', interval=1) | checkpoint),
            randomness=dict(seed=0),
            log_level='ERROR',
        )
    )


cfg_of.count = 0


def files(folder):
    return sorted(path.name for path in Path(folder).glob('*.pth'))


def assert_resumable(folder, work_dir=None):
    """What the pointer names is there and loads, and nothing beside it is broken."""
    last = str(Path(folder, Path(work_dir or folder, 'last_checkpoint').read_text()))
    for path in {last, *map(str, Path(folder).glob('*.pth'))}:
        load_from_local(path)
    return load_from_local(last)


def test_same_files_as_mmengine(tmp_path):
    """Names, kept checkpoints, the best and the published one are those of MMEngine's hook."""
    options = dict(
        max_keep_ckpts=2,
        save_best=['worst/accuracy/top1', 'loss'],
        rule=['greater', 'less'],
        published_keys=['meta', 'state_dict'],
    )
    Runner.from_cfg(cfg_of(tmp_path / 'ours', **options)).train()
    Runner.from_cfg(cfg_of(tmp_path / 'theirs', type='CheckpointHook', **options)).train()

    def named(folder):
        """File names without the hash of what a published file holds."""
        return [name if name.count('-') == 0 else name.split('-')[0] for name in files(folder)]

    assert named(tmp_path / 'ours') == named(tmp_path / 'theirs')
    assert {'epoch_3.pth', 'epoch_4.pth', 'best_worst_accuracy_top1_epoch_3.pth'} <= set(files(tmp_path / 'ours'))
    ours = assert_resumable(tmp_path / 'ours')
    theirs = load_from_local(tmp_path / 'theirs' / 'epoch_4.pth')
    assert ours['meta']['epoch'] == theirs['meta']['epoch'] == 4
    assert torch.equal(ours['state_dict']['linear.weight'], theirs['state_dict']['linear.weight'])
    info = ours['message_hub']['runtime_info']
    assert info['best_score_worst/accuracy/top1'] == 0.9
    assert info['keep_ckpt_ids'] == [3, 4]


def test_by_iteration_and_other_folder(tmp_path):
    cfg = cfg_of(tmp_path / 'run', by_epoch=False, interval=2, max_keep_ckpts=1, out_dir=str(tmp_path / 'out'))
    cfg.train_cfg = dict(by_epoch=False, max_iters=5, val_interval=100)
    cfg.train_dataloader.sampler = dict(type='InfiniteSampler')
    Runner.from_cfg(cfg).train()
    assert files(tmp_path / 'out' / 'run') == ['iter_5.pth']
    assert assert_resumable(tmp_path / 'out' / 'run', tmp_path / 'run')['meta']['iter'] == 5


def _train(cfg, kill_at):
    torch.set_num_threads(1)  # other threads did not come along through the fork
    kill_at_file_step(kill_at)
    Runner.from_cfg(cfg).train()


def train_in_fork(cfg, kill_at=-1):
    process = multiprocessing.get_context('fork').Process(target=_train, args=(cfg, kill_at))
    process.start()
    process.join(60)
    return process.exitcode


def test_kill_at_any_step_of_saving(tmp_path):
    """Kill at each write, rename and removal in turn: never is the last checkpoint lost."""
    options = dict(epochs=3, max_keep_ckpts=1, save_best='worst/accuracy/top1')
    epochs = []
    for kill_at in range(1, 100, 4):
        folder = tmp_path / str(kill_at)
        if train_in_fork(cfg_of(folder, **options), kill_at) == 0:
            break
        if (folder / 'last_checkpoint').exists():
            epochs.append(assert_resumable(folder)['meta']['epoch'])
    assert epochs == sorted(epochs) and {1, 2, 3} == set(epochs)


@pytest.mark.parametrize('kill_at', [22, 24, 31, 38, 45])
def test_resumed_run_tidies_up(kill_at, tmp_path):
    """No half-written or outdated file outlives the run that is resumed."""
    options = dict(epochs=3, max_keep_ckpts=1, save_best='worst/accuracy/top1')
    cfg = cfg_of(tmp_path, **options)
    cfg.custom_hooks = [dict(type='ExactResumeHook')]
    assert train_in_fork(cfg, kill_at) == -signal.SIGKILL
    cfg.resume = True
    info = assert_resumable(tmp_path)['message_hub']['runtime_info']
    ScoreOfEpoch.epoch = info['last_validated']
    cfg.experiment_name += '_resumed'
    Runner.from_cfg(cfg).train()
    assert files(tmp_path) == ['best_worst_accuracy_top1_epoch_3.pth', 'epoch_3.pth']
    assert not [name for name in os.listdir(tmp_path) if 'partial' in name]


def test_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    Runner.from_cfg(cfg_of(tmp_path, epochs=1)).train()
    before = (tmp_path / 'epoch_1.pth').read_bytes()

    def no_space(descriptor):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', no_space)
    with pytest.raises(OSError, match='epoch_2.pth.*No space left.*is intact') as caught:
        resumed(tmp_path, epochs=2)
    assert caught.value.errno == errno.ENOSPC
    assert (tmp_path / 'epoch_1.pth').read_bytes() == before
    assert_resumable(tmp_path)
    assert not [name for name in os.listdir(tmp_path) if 'partial' in name]


def test_put_replaces_atomically(tmp_path):
    backend, path = AtomicLocalBackend(), tmp_path / 'new' / 'file'
    backend.put_text('old', path)
    reader = path.open('rb')
    backend.put_text('new', str(path))
    assert reader.read() == b'old' and path.read_bytes() == b'new'
    assert os.listdir(path.parent) == ['file']
    assert isinstance(backend, LocalBackend)


@pytest.fixture
def finished(tmp_path):
    Runner.from_cfg(cfg_of(tmp_path, epochs=2, save_best='worst/accuracy/top1')).train()
    return tmp_path


def test_a_metric_that_the_validation_lacks_is_named(tmp_path):
    ScoreOfEpoch.epoch = 0
    with pytest.raises(ValueError, match=r"save_best='single' is no metric of .*allowed: worst/accuracy/top1, loss"):
        Runner.from_cfg(cfg_of(tmp_path, epochs=1, save_best='single', rule='greater')).train()


def resumed(folder, epochs=3, **changes):
    cfg = cfg_of(folder, epochs=epochs)
    ScoreOfEpoch.epoch = 2
    cfg.resume = True
    cfg.update(changes)
    runner = Runner.from_cfg(cfg)
    runner.train()
    return runner


@pytest.mark.parametrize(
    'damage', ['cut', 'gone', 'empty pointer', 'pointer gone', 'pointer of bytes', 'pointer elsewhere']
)
def test_resume_falls_back_to_what_loads(damage, finished):
    last = finished / 'epoch_2.pth'
    if damage == 'cut':
        last.write_bytes(last.read_bytes()[:1000])
    elif damage == 'gone':
        last.unlink()
    elif damage == 'pointer gone':
        (finished / 'last_checkpoint').unlink()
    else:
        contents = {'empty pointer': b'', 'pointer of bytes': b'\xff\xfe/epoch_1.pth', 'pointer elsewhere': b'/a/b.pth'}
        (finished / 'last_checkpoint').write_bytes(contents[damage])
    runner = resumed(finished)
    assert runner._load_from.endswith('epoch_2.pth' if 'pointer' in damage else 'epoch_1.pth')
    assert assert_resumable(finished)['meta']['epoch'] == 3


def test_auto_goes_on_from_the_own_latest_and_begins_from_load_from(finished, tmp_path_factory):
    start = str(finished / 'epoch_1.pth')
    folder = tmp_path_factory.mktemp('second')
    for begun in (False, True):
        runner = resumed(folder, epochs=2 if begun else 1, resume='auto', load_from=start)
        assert runner._load_from == (str(folder / 'epoch_1.pth') if begun else start)
        assert runner._resume is begun and runner.epoch == 1 + begun
    # The tool says so, and names a file that no option changes.
    tool = runpy.run_path(str(Path(__file__).parents[2] / 'tools' / 'train.py'))
    args = dict(no_validate=False, amp=False, auto_scale_lr=False, no_persistent_workers=False, no_pin_memory=False)
    args |= dict(work_dir=None, cfg_options=dict(load_from=start), local_rank=0, config='x.py')
    for resume, expected in (('auto', ('auto', start)), (str(finished / 'epoch_2.pth'), (True, 'epoch_2.pth'))):
        cfg = cfg_of(folder)
        tool['merge_args'](cfg, argparse.Namespace(**args, resume=resume))
        assert cfg.resume == expected[0] and cfg.load_from.endswith(expected[1])
    cfg.default_hooks.checkpoint.type = 'CheckpointHook'
    tool['merge_args'](cfg, argparse.Namespace(**args, resume='auto'))
    assert cfg.resume is True and cfg.load_from is None


def test_resume_with_nothing_that_loads(finished):
    for path in finished.glob('epoch_*.pth'):
        path.write_bytes(b'')
    with pytest.raises(CheckpointError, match='Nothing to resume from.*epoch_2.pth.*is empty'):
        resumed(finished)


def test_a_new_training_moves_what_another_has_left(finished):
    left = {path.name: path.read_bytes() for path in finished.glob('*.pth')}
    assert {'epoch_1.pth', 'epoch_2.pth'} < left.keys()
    cfg = cfg_of(finished, epochs=1, save_best='worst/accuracy/top1')
    cfg.log_level = 'WARNING'
    Runner.from_cfg(cfg).train()
    (log,) = [path.read_text() for path in finished.glob('*/*.log') if 'A new training begins' in path.read_text()]
    assert 'checkpoints of another: ' in log and 'earlier_1' in log and '--resume FILE' in log
    assert left == {path.name: path.read_bytes() for path in (finished / 'earlier_1').iterdir()}
    assert files(finished) == ['best_worst_accuracy_top1_epoch_1.pth', 'epoch_1.pth']
    # From one of those: what has been trained since is another's.
    resumed(finished, load_from=str(finished / 'earlier_1' / 'epoch_2.pth'))
    assert {'best_worst_accuracy_top1_epoch_1.pth', 'epoch_1.pth'} == set(os.listdir(finished / 'earlier_2'))
    assert left == {path.name: path.read_bytes() for path in (finished / 'earlier_1').iterdir()}
    # From an earlier one of its own: what comes later is moved.
    resumed(finished / 'earlier_1', load_from=str(finished / 'earlier_1' / 'epoch_1.pth'))
    assert files(finished / 'earlier_1' / 'earlier_1') == ['epoch_2.pth']


def test_a_checkpoint_names_no_folder(finished):
    info = load_from_local(finished / 'epoch_2.pth')['message_hub']['runtime_info']
    assert (info['last_ckpt'], info['best_ckpt']) == ('epoch_2.pth', 'best_worst_accuracy_top1_epoch_1.pth')
    assert (finished / 'last_checkpoint').read_text() == 'epoch_2.pth'


def test_resume_refuses_a_checkpoint_of_weights_alone(finished):
    with pytest.raises(CheckpointError, match=r"best_.*cannot be resumed.*\['optimizer'\]"):
        resumed(finished, load_from=str(finished / 'best_worst_accuracy_top1_epoch_1.pth'))


def test_resume_and_test_demand_every_tensor_and_training_does_not(finished):
    other = dict(type='OneLinear', outputs=5)
    checkpoint = str(finished / 'epoch_2.pth')
    message = r'epoch_2.pth.*linear.weight \(2, 3\) in the file, \(5, 3\) in the model'
    with pytest.raises(CheckpointError, match=message):
        resumed(finished, model=other)
    for task in ('test', 'val'):
        cfg = cfg_of(finished, model=other)
        cfg.load_from = checkpoint
        with pytest.raises(CheckpointError, match=message):
            getattr(Runner.from_cfg(cfg), task)()
    cfg = cfg_of(finished / 'tuned', epochs=1, model=other)
    cfg.load_from = checkpoint
    Runner.from_cfg(cfg).train()
    assert_resumable(finished / 'tuned')


@MODELS.register_module()
class WithStatistics(OneLinear):
    def __init__(self):
        super().__init__()
        self.register_buffer('seen', torch.zeros(()))


@HOOKS.register_module()
class StatisticsOfAll(Hook):
    """Changes statistics at the end of an epoch, as SyncBuffersHook does where there are several processes."""

    def after_train_epoch(self, runner):
        runner.model.seen.fill_(runner.epoch + 7.0)


def test_averaged_weights_are_saved_with_the_statistics_they_are_validated_with(tmp_path):
    cfg = cfg_of(tmp_path, epochs=2, model=dict(type='WithStatistics'))
    cfg.custom_hooks = [dict(type='EMAHook', momentum=0.5), dict(type='StatisticsOfAll')]
    runner = Runner.from_cfg(cfg)
    runner.train()
    saved = load_from_local(tmp_path / 'epoch_2.pth')
    (ema,) = [hook.ema_model.module for hook in runner.hooks if type(hook).__name__ == 'EMAHook']
    assert torch.equal(saved['state_dict']['linear.weight'], ema.linear.weight)
    assert not torch.equal(ema.linear.weight, runner.model.linear.weight)
    assert saved['state_dict']['seen'] == runner.model.seen == 8.0


def test_validation_on_its_own_saves_nothing(finished):
    before = files(finished)
    cfg = cfg_of(finished, save_best='worst/accuracy/top1')
    cfg.load_from = str(finished / 'epoch_2.pth')
    cfg.custom_hooks = [dict(type='ExactResumeHook')]
    runner = Runner.from_cfg(cfg)
    runner.val()
    assert files(finished) == before
    assert isinstance(runner._train_loop, dict), 'the training set need not exist to validate'


@HOOKS.register_module()
class LooksAtTheTrainLoop(Hook):
    """Reads ``runner.train_loop``, which builds it, as MMPretrain's VisualizationHook does in every validation."""

    def __init__(self, when):
        setattr(self, when, lambda runner, **_: runner.train_loop)


@pytest.mark.parametrize('when', ['before_run', 'after_val_iter'])
def test_the_task_is_what_was_called_whoever_looks_at_the_train_loop(when, finished):
    def runner_of(**changes):
        cfg = cfg_of(finished, save_best='worst/accuracy/top1', **changes)
        cfg.load_from = str(finished / 'epoch_2.pth')
        cfg.custom_hooks = [dict(type='ExactResumeHook'), dict(type='LooksAtTheTrainLoop', when=when)]
        return Runner.from_cfg(cfg)

    before = files(finished)
    runner = runner_of()
    assert runner.val()['worst/accuracy/top1'] == SCORES[1]
    assert isinstance(runner._train_loop, BaseLoop)
    assert 'last_validated' not in runner.message_hub.runtime_info
    with pytest.raises(CheckpointError, match='linear.weight'):
        runner_of(model=dict(type='OneLinear', outputs=5)).val()
    assert files(finished) == before


def test_a_runner_that_has_trained_validates_without_saving(tmp_path):
    runner = Runner.from_cfg(cfg_of(tmp_path, epochs=2, save_best='worst/accuracy/top1'))
    runner.train()
    before = files(tmp_path)
    assert runner.val()['worst/accuracy/top1'] == SCORES[3]
    assert files(tmp_path) == before


def test_deprecated_file_client_is_refused():
    with pytest.raises(ValueError, match='default_hooks.checkpoint.file_client_args'):
        SafeCheckpointHook(file_client_args=dict(backend='disk'))


def test_a_schedule_whose_checkpoints_would_not_load_is_refused_before_training(tmp_path):
    cfg = cfg_of(tmp_path, 1)
    cfg.param_scheduler = dict(type='OneCycleLR', eta_max=0.1, total_steps=1)
    message = r'param_scheduler: OneCycleLR would be saved with \S*OneCycleParamScheduler.*in place of OneCycleLR'
    with pytest.raises(ValueError, match=message):
        Runner.from_cfg(cfg).train()
    assert not files(tmp_path)
    cfg = cfg_of(tmp_path, 1)
    cfg.param_scheduler = [
        dict(type=kind, **kwargs)
        for kind, kwargs in dict(
            LinearLR=dict(start_factor=0.5), CosineAnnealingLR=dict(), ReduceOnPlateauLR=dict(monitor='loss')
        ).items()
    ]
    Runner.from_cfg(cfg).train()
    assert_resumable(tmp_path)
