"""Runs that are killed, signalled, out of disk, doubled, or fed with what is not finite: nothing is lost or mixed."""

import contextlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest
import torch
from damaged_files import ATTACKS, build_runner, evaluate, evaluated, scratch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmpretrain.registry import DATASETS, HOOKS, MODELS
from processes import ROOT
from resume_runs import BATCHES, EPOCHS, assert_same_run, kill_at_file_step, small_cfg, train, train_here
from tiny_runs import RandomImages, model_cfg, run_cfg

from mmadvmoe.apis import evaluate_robustness
from mmadvmoe.attacks import Victim
from mmadvmoe.evaluation import OutcomeFolder, read_evaluation
from mmadvmoe.moe import router_modules
from mmadvmoe.runtime.files import FolderInUseError
from mmadvmoe.runtime.launch import prepare_distributed
from mmadvmoe.runtime.safe_load import load_from_local

_FORK = multiprocessing.get_context('fork')


@contextlib.contextmanager
def forked(function, *args):
    """A process that calls a function; killed at the end of the block if it is still alive."""
    process = _FORK.Process(target=function, args=args)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join(600)


def _wait_for(condition, seconds=180):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(0.01)


# ---- kills and signals in training: the run that is resumed ends with the very bits of one that nobody disturbed


@cache
def whole() -> Path:
    """The folder of a training that nobody disturbed."""
    folder = scratch('whole')
    train(small_cfg(), folder)
    return folder


def _resume(folder):
    train(small_cfg(), folder, resume=True)
    assert_same_run(whole(), folder)
    assert not [name for name in os.listdir(folder) if 'partial' in name or 'earlier' in name]


def _train(folder, hook, step):
    if step:
        kill_at_file_step(step)
    # A suite in the background, or under nohup, has its children ignore these.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    train_here(small_cfg(custom_hooks=[dict(type='ExactResumeHook'), *hook]), str(folder), None, {})


def _interrupted(folder, hook=(), step=0, after=None):
    with forked(_train, folder, hook, step) as process:
        if after is not None:
            time.sleep(after)
            process.kill()
        process.join(600)
    _resume(folder)
    return 'finished before' if process.exitcode == 0 else 'resumed'


def killed_in_training(folder, number):
    count = number % (EPOCHS * BATCHES)
    return _interrupted(folder, [dict(type='KillHook', place='iter', count=count)])


def killed_in_validation(folder, number):
    return _interrupted(folder, [dict(type='KillHook', place='val', count=number % EPOCHS + 1)])


def killed_while_saving(folder, number):
    return _interrupted(folder, step=1 + number % 38)


def killed_at_a_random_moment(folder, number):
    return _interrupted(folder, after=random.Random(number).uniform(0, 0.5))


def signalled(folder, number):
    name = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)[number % 3]
    count = number % (EPOCHS * BATCHES)
    became = _interrupted(folder, [dict(type='KillHook', place='iter', count=count, number=int(name))])
    assert became == 'resumed', f'{name.name} did not end the training'
    return became


def killed_in_test(folder, number):
    """An evaluation killed at a step of writing, and gone on with, gives the same bytes."""

    def run():
        kill_at_file_step(1 + number % 35)
        evaluate(folder / 'run')

    with forked(run) as process:
        process.join(600)
    evaluate(folder / 'run')
    for name in ('run.json', 'outcomes.jsonl', 'metrics.json', 'SHA256SUMS'):
        assert (folder / 'run' / name).read_bytes() == (evaluated() / name).read_bytes()
    assert not [path for path in folder.rglob('*') if 'partial' in path.name]
    return 'finished before' if process.exitcode == 0 else 'gone on with'


# ---- a full disk: a small tmpfs where allowed, else a limit on the size of files


@contextlib.contextmanager
def _small_disk(folder, size):
    """``folder`` with room for ``size`` bytes; the block gets a function that makes room."""
    folder.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', f'size={size // 4096 * 4096}', 'tmpfs', str(folder)]
    if os.name == 'posix' and shutil.which('mount') and not subprocess.run(mount, capture_output=True).returncode:
        try:
            yield lambda: subprocess.run(['mount', '-o', 'remount,size=64m', str(folder)], check=True)
        finally:
            subprocess.run(['umount', '-l', str(folder)], check=True)
    else:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 8, before[1]))
        try:
            yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


def full_disk_in_training(folder, number):
    size = sum(path.stat().st_size for path in whole().rglob('*') if path.is_file())
    with _small_disk(folder / 'disk', random.Random(number).randrange(8192, size)) as make_room:
        with forked(_train, folder / 'disk' / 'run', (), 0) as process:
            process.join(600)
        make_room()
        _resume(folder / 'disk' / 'run')
    return 'resumed' if process.exitcode else 'room enough'


def full_disk_in_test(folder, number):
    size = sum(4096 + path.stat().st_size for path in evaluated().rglob('*') if path.is_file())
    result = 'room enough'
    with _small_disk(folder / 'disk', random.Random(number).randrange(8192, size)) as make_room:
        try:
            evaluate(folder / 'disk' / 'run')
        except OSError as error:
            assert 'make room there and start the same evaluation again' in str(error)
            result = 'gone on with'
        make_room()
        evaluate(folder / 'disk' / 'run')
        assert (folder / 'disk/run/outcomes.jsonl').read_bytes() == (evaluated() / 'outcomes.jsonl').read_bytes()
    return result


# ---- two runs in one folder


@HOOKS.register_module()
class Waits(Hook):
    """Says that training has begun, and waits until it is killed."""

    def after_train_iter(self, runner, **_):
        Path(runner.work_dir, 'begun').touch()
        time.sleep(60)


def two_trainings(folder, number):
    """The second is refused, resumed or not, until the first is dead; then it goes on."""
    if number % 2:
        shutil.copytree(whole(), folder / 'run')
    waiting = small_cfg(custom_hooks=[dict(type='Waits')], train_cfg=dict(by_epoch=True, max_epochs=EPOCHS + 1))
    with forked(train_here, waiting, str(folder / 'run'), None, dict(resume=bool(number % 2))) as first:
        _wait_for((folder / 'run' / 'begun').exists)
        before = {path: path.read_bytes() for path in folder.rglob('*.pth')}
        with pytest.raises(FolderInUseError, match=f'is in use: process {first.pid} on .*--work-dir'):
            build_runner(folder / 'run', resume=bool(number % 2)).train()
        assert before == {path: path.read_bytes() for path in folder.rglob('*.pth')}
    _resume(folder / 'run')
    return 'refused'


def two_evaluations(folder, number):
    """The second is refused as long as the first lives, also with ``overwrite``."""

    evaluate(folder / 'run')

    def run():
        begun = OutcomeFolder(folder / 'run', list(ATTACKS))
        begun.prepare(json.loads((folder / 'run' / 'run.json').read_text()))
        (folder / 'begun').touch()
        time.sleep(60)

    before = {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}
    with forked(run) as first:
        _wait_for((folder / 'begun').exists)
        with pytest.raises(FolderInUseError, match=f'is in use: process {first.pid} on '):
            evaluate(folder / 'run', seed=1, overwrite=bool(number % 2))
    assert before.items() <= {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}.items()
    evaluate(folder / 'run', seed=1, overwrite=True)
    assert (folder / 'run/metrics.json').read_bytes() == (evaluated(seed=1) / 'metrics.json').read_bytes()
    return 'refused'


def copied_and_moved(folder, number):
    """A run that goes on in a copy of a folder, or from a file of another one, leaves the other one as it was."""
    shutil.copytree(whole(), folder / 'a')
    cfg = small_cfg(train_cfg=dict(by_epoch=True, max_epochs=EPOCHS + 2))
    if number % 2:
        shutil.copytree(folder / 'a', folder / 'b')
        overrides = dict(resume=True)
    else:
        overrides = dict(resume=True, load_from=str(folder / 'a' / 'epoch_2.pth'))
    if number // 4 % 2:
        # As MMEngine's hook writes them, with the folder that they were made in.
        for path in folder.glob('*/*.pth'):
            content = load_from_local(path)
            info = content['message_hub']['runtime_info']
            info.update({key: str(folder / 'a' / info[key]) for key in ('last_ckpt', 'best_ckpt') if key in info})
            torch.save(content, path)
        for path in folder.glob('*/last_checkpoint'):
            path.write_text(str(folder / 'a' / path.read_text()))
    before = {path: path.read_bytes() for path in (folder / 'a').rglob('*') if path.is_file()}
    # So that every epoch is the best so far.
    hook = dict(type='SafeCheckpointHook', save_best='worst/accuracy/top1', rule=('less', 'greater')[number // 2 % 2])
    train(cfg, folder / 'b', default_hooks=dict(checkpoint=dict(hook, interval=1)), **overrides)
    assert before == {path: path.read_bytes() for path in (folder / 'a').rglob('*') if path.is_file()}
    assert (folder / 'b' / f'epoch_{EPOCHS + 2}.pth').exists()
    return 'untouched'


# ---- processes of one run


_SCRIPT = """
import os, sys, time
import torch
from mmengine.config import Config
from mmadvmoe.runtime.launch import prepare_distributed
prepare_distributed(Config(), 'pytorch')
rank = torch.distributed.get_rank()
open(os.path.join(sys.argv[1], f'{rank}.new'), 'w').write(str(os.getpid()))
os.rename(os.path.join(sys.argv[1], f'{rank}.new'), os.path.join(sys.argv[1], str(rank)))
total = torch.zeros(1)
while True:
    torch.distributed.all_reduce(total)
    time.sleep(0.05)
"""


@contextlib.contextmanager
def _launched(folder):
    """torchrun with two processes that talk all the time: its process, and the numbers of the two."""
    (folder / 'script.py').write_text(_SCRIPT)
    env = {name: value for name, value in os.environ.items() if not name.startswith(('MASTER_', 'RANK', 'WORLD'))}
    env.update(PYTHONPATH=str(ROOT), CUDA_VISIBLE_DEVICES='-1', OMP_NUM_THREADS='1')
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    command += [str(folder / 'script.py'), str(folder)]
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as launcher:
        ranks = [folder / '0', folder / '1']
        try:
            _wait_for(lambda: all(path.exists() for path in ranks) or launcher.poll() is not None, 120)
            yield launcher, [int(path.read_text()) for path in ranks]
        finally:
            launcher.kill()
            launcher.wait()
            for pid in (int(path.read_text()) for path in ranks if path.exists()):
                if _lives(pid):
                    os.kill(pid, signal.SIGKILL)


def _lives(pid):
    try:
        state = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != 'Z'


def launcher_killed(folder, number):
    """Its processes notice, within seconds."""
    with _launched(folder) as (launcher, ranks):
        launcher.kill()
        _wait_for(lambda: not any(map(_lives, ranks)), 10)
    return 'all ended'


def rank_killed(folder, number):
    """The launcher ends, and the other process too."""
    with _launched(folder) as (launcher, ranks):
        os.kill(ranks[number % 2], signal.SIGKILL)
        _wait_for(lambda: launcher.poll() is not None and not any(map(_lives, ranks)), 60)
        assert launcher.returncode != 0
    return 'all ended'


def port_in_use(folder, number):
    """One line says so, from the launch script and from process 0 of other launchers."""
    with socket.socket() as other:
        other.bind(('127.0.0.1', 0))
        other.listen()
        port = str(other.getsockname()[1])
        if number % 2:
            command = ['bash', str(ROOT / 'tools/dist_train.sh'), 'config.py', '2']
            done = subprocess.run(command, env=dict(os.environ, PORT=port), capture_output=True, text=True)
            assert done.returncode and done.stderr == (
                f'port {port} is in use on this machine, by another run perhaps: set PORT to a free one\n'
            )
            return 'refused'
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv('TORCHELASTIC_RUN_ID', raising=False)
            variables = dict(RANK='0', LOCAL_RANK='0', WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
            for name, value in variables.items():
                patch.setenv(name, value)
            with pytest.raises(OSError, match=f'MASTER_PORT={port} is in use on this machine.*free port'):
                prepare_distributed(Config(), 'pytorch')
    return 'refused'


# ---- what is not finite


@DATASETS.register_module()
class BrokenImages(RandomImages):
    """Images of floats, one of which has a pixel that is not finite."""

    def __init__(self, pixel):
        super().__init__()
        self.images = self.images.float()
        self.images[3, 0, 0, 0] = float(pixel)


@HOOKS.register_module()
class BreaksGradients(Hook):
    """Makes the gradient of one parameter infinite, once."""

    def __init__(self, value, group):
        self.value, self.group = float(value), group

    def before_train(self, runner):
        routers = router_modules(runner.model)
        owner = routers[0] if self.group == 'router' else runner.model.head
        next(owner.parameters()).register_hook(lambda gradient: gradient + self.value)


@HOOKS.register_module()
class BreaksRouter(Hook):
    """Makes a weight of the router infinite or NaN before training."""

    def __init__(self, value):
        self.value = float(value)

    def before_train(self, runner):
        with torch.no_grad():
            next(router_modules(runner.model)[0].parameters()).view(-1)[0] = self.value


def not_finite_in_training(folder, number):
    """Training stops with a word; no checkpoint of weights that are not finite is left."""
    value = ('nan', 'inf', '-inf')[number % 3]
    what = ('pixel', 'gradient of the experts', 'gradient of the router', 'router')[number // 3 % 4]
    cfg = run_cfg(folder, hooks=[dict(type='RouterHealthHook')])
    cfg.default_hooks.checkpoint = dict(type='SafeCheckpointHook', interval=1)
    cfg.experiment_name = f'finite_{os.getpid()}_{folder.name}_{number}'
    if what == 'pixel':
        cfg.train_dataloader.dataset = dict(type='BrokenImages', pixel=value)
    elif what == 'router':
        cfg.custom_hooks.append(dict(type='BreaksRouter', value=value))
    else:
        cfg.custom_hooks.append(dict(type='BreaksGradients', value=value, group=what.split()[-1]))
    with pytest.raises((FloatingPointError, ValueError), match='finite|\\[0, 1\\]|0..255'):
        Runner.from_cfg(cfg).train()
    for path in folder.glob('*.pth'):
        weights = torch.load(path, weights_only=True)['state_dict'].values()
        assert all(weight.isfinite().all() for weight in weights), f'{what} {value}: {path.name} is not finite'
    return 'stopped'


def not_finite_in_test(folder, number):
    """Pixels or a router that are not finite stop an evaluation."""
    value = float(('nan', 'inf', '-inf')[number % 3])
    victim = Victim(MODELS.build(model_cfg())).eval()
    images, labels = torch.rand(4, 3, 8, 8), torch.arange(4) % 3
    if number // 3 % 2:
        images[1, 2, 3, 4] = value
    else:
        with torch.no_grad():
            next(router_modules(victim.classifier)[0].parameters()).view(-1)[0] = value
    # A RuntimeError where it is an attack that meets it first.
    with pytest.raises((FloatingPointError, ValueError, RuntimeError), match='finite|\\[0, 1\\]'):
        evaluate_robustness(victim, (images, labels), dict(fgsm=dict(type='FGSM', eps=0.1)), out_dir=folder / 'run')
    with pytest.raises((ValueError, FileNotFoundError)):
        read_evaluation(folder / 'run')
    return 'stopped'
