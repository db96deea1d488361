"""Files that are complete or absent."""

from __future__ import annotations

import errno
import os
import os.path as osp
from pathlib import Path
from typing import Union

from mmengine.fileio import LocalBackend, register_backend

from mmadvmoe.utils import PARTIAL, write_atomically

from .seal import seal


def check_writable(path: Union[str, Path], argument: str) -> None:
    """Find out, before long work, whether the file that an argument names can be written; what is there stays as it is.

    Missing folders are made.

    Raises:
        OSError: It cannot, because the disk is full say; the message names the argument.
    """
    path = os.fspath(path)
    try:
        if osp.isdir(path):
            raise IsADirectoryError(errno.EISDIR, 'it is a folder')
        probe = osp.join(osp.dirname(path), f'.{osp.basename(path)}.{os.getpid()}.probe{PARTIAL}')
        # A block of the disk: an empty file may find room where nothing else does.
        write_atomically(probe, bytes(4096))
        os.remove(probe)
    except OSError as error:
        raise OSError(error.errno, f'{argument}: {path!r} cannot be written ({error.strerror})') from error


class AtomicLocalBackend(LocalBackend):
    """MMEngine's local files, written by :func:`write_atomically`."""

    def put(self, obj: bytes, filepath: Union[str, Path]) -> None:
        """Write a checkpoint, with its SHA-256; the OSError of one that cannot be written says what to do."""
        self._write(seal(obj), os.fspath(filepath))

    def put_text(self, obj: str, filepath: Union[str, Path], encoding: str = 'utf-8') -> None:
        """Write a text file, as it is."""
        self._write(obj.encode(encoding), os.fspath(filepath))

    @staticmethod
    def _write(obj: bytes, filepath: str) -> None:
        try:
            write_atomically(filepath, obj)
        except OSError as error:
            raise OSError(
                error.errno,
                f'{filepath!r} could not be written ({error.strerror}; {len(obj) / 2**20:.1f} MiB). What was saved '
                'before is intact. Make room there, or set `default_hooks.checkpoint.out_dir` or a smaller '
                '`max_keep_ckpts`; then resume',
            ) from error


def use_atomic_files() -> dict[str, str]:
    """Make :class:`AtomicLocalBackend` known to MMEngine; give the ``backend_args`` that name it."""
    register_backend('atomic_local', AtomicLocalBackend, force=True)
    return dict(backend='atomic_local')
