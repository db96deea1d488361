"""Folders that one run at a time writes to."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional, Union

from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.logging import print_log

try:
    import fcntl
except ImportError:  # not a POSIX system: nothing is locked there
    fcntl = None

LOCK = '.mmadvmoe-lock'


class FolderInUseError(RuntimeError):
    """Another process that is alive writes to a folder."""


class FolderLock:
    """A lock on a folder, held by the process that acquired it until it releases it or ends, in whatever way.

    It is a POSIX record lock (``fcntl.lockf``): the system gives it back when the process dies, and processes that were
    forked from it, such as the workers of a data loader, do not hold it. The file that carries it lies in the folder
    while the lock is held; one that a killed process left behind locks nothing. Inside one process it excludes nothing,
    so that a run which failed in a notebook can be started again there. A missing folder is made. ``cure`` is what the
    user may do when it is in use, for the message.
    """

    def __init__(self, folder: Union[str, Path], cure: str) -> None:
        self.path = Path(folder) / LOCK
        self._cure = cure
        self._descriptor: Optional[int] = None

    def acquire(self) -> None:
        """Take the lock, at once or not at all.

        Raises:
            FolderInUseError: Another process holds it.
            OSError: The folder cannot be written to.
        """
        if self._descriptor is not None or fcntl is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = os.read(descriptor, 200).decode(errors='replace').strip()
                os.close(descriptor)
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    print_log(f'{str(self.path.parent)!r} cannot be locked ({error.strerror})', 'current', 30)
                    return
                raise FolderInUseError(
                    f'{str(self.path.parent)!r} is in use: {holder or "another process"} writes to it. {self._cure}'
                ) from None
            # Whoever held it may have removed the file in between.
            if _is_at(descriptor, self.path):
                break
            os.close(descriptor)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f'process {os.getpid()} on {socket.gethostname()}\n'.encode())
        self._descriptor = descriptor

    def release(self) -> None:
        """Give the lock back, if it is held."""
        if self._descriptor is not None:
            if _is_at(self._descriptor, self.path):
                self.path.unlink()
            os.close(self._descriptor)
            self._descriptor = None


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def in_first_process(function: Callable[[], Any]) -> Any:
    """Call a function in the first process; all processes get what it gives, or raise what it raises.

    To be called by all processes. Files that they share are judged, locked and moved once.
    """
    found: list = [None, None]
    if is_main_process():
        try:
            found[0] = function()
        except Exception as error:
            found[1] = error
    broadcast_object_list(found)
    if found[1] is not None:
        raise found[1]
    return found[0]
