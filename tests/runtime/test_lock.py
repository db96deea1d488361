"""A lock is held by a living process, and by no other."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from mmadvmoe.runtime.files import LOCK, FolderInUseError, FolderLock

_FORK = multiprocessing.get_context('fork')


def _hold(folder: Path) -> None:
    FolderLock(folder, '').acquire()
    # As the worker of a data loader, which outlives its parent for a while.
    worker = os.fork()
    (folder / f'worker{worker}' if worker else folder / 'forked').touch()
    time.sleep(60)


@pytest.fixture
def holder(tmp_path: Path):
    process = _FORK.Process(target=_hold, args=(tmp_path,))
    process.start()
    while not (list(tmp_path.glob('worker*')) and (tmp_path / 'forked').exists()):
        time.sleep(0.01)
    yield process
    process.kill()
    process.join()
    os.kill(int(next(tmp_path.glob('worker*')).name.removeprefix('worker')), signal.SIGKILL)


def test_a_living_holder_keeps_others_out_and_a_dead_one_does_not(tmp_path: Path, holder) -> None:
    lock = FolderLock(tmp_path, 'Wait.')
    with pytest.raises(FolderInUseError, match=f'{tmp_path}.* is in use: process {holder.pid} on .*Wait'):
        lock.acquire()
    holder.kill()
    holder.join()
    lock.acquire()
    assert str(os.getpid()) in (tmp_path / LOCK).read_text()
    lock.release()
    assert not (tmp_path / LOCK).exists()


def test_a_run_that_failed_can_be_started_again_in_the_same_process(tmp_path: Path) -> None:
    FolderLock(tmp_path / 'new', '').acquire()
    again = FolderLock(tmp_path / 'new', '')
    again.acquire()
    again.acquire()
    again.release()
    again.release()
