"""Files that are complete or absent."""

from __future__ import annotations

import os
import os.path as osp
from pathlib import Path
from typing import Union

from mmengine.fileio import LocalBackend, register_backend

#: Ending of files that are being written. One that is left over was cut off by a kill, and is surely ours to delete.
PARTIAL = '.mmadvmoe-partial'


def write_atomically(path: Union[str, Path], content: bytes) -> None:
    """Write a file under another name, force it to disk, and rename it over the old one; missing folders are made.

    Raises:
        OSError: If it cannot be written, because the disk is full say. What was there before is unharmed, and nothing
            half written is left.
    """
    path = os.fspath(path)
    folder = osp.dirname(path) or '.'
    partial = osp.join(folder, f'.{osp.basename(path)}.{os.getpid()}{PARTIAL}')
    try:
        os.makedirs(folder, exist_ok=True)
        with open(partial, 'wb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(folder)
    except OSError:
        if osp.exists(partial):
            os.remove(partial)
        raise


def _sync_folder(folder: str) -> None:
    """Force the renaming itself to disk, before anything older is deleted."""
    if os.name == 'posix':
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class AtomicLocalBackend(LocalBackend):
    """MMEngine's local files, written by :func:`write_atomically`."""

    def put(self, obj: bytes, filepath: Union[str, Path]) -> None:
        """Write a file; the OSError of one that cannot be written says what to do."""
        filepath = os.fspath(filepath)
        try:
            write_atomically(filepath, obj)
        except OSError as error:
            raise OSError(
                error.errno,
                f'{filepath!r} could not be written ({error.strerror}; {len(obj) / 2**20:.1f} MiB). What was saved '
                'before is intact. Make room there, or set `default_hooks.checkpoint.out_dir` or a smaller '
                '`max_keep_ckpts`; then resume',
            ) from error

    def put_text(self, obj: str, filepath: Union[str, Path], encoding: str = 'utf-8') -> None:
        """Write a text file, as :meth:`put` does."""
        self.put(obj.encode(encoding), filepath)


def use_atomic_files() -> dict[str, str]:
    """Make :class:`AtomicLocalBackend` known to MMEngine; give the ``backend_args`` that name it."""
    register_backend('atomic_local', AtomicLocalBackend, force=True)
    return dict(backend='atomic_local')
