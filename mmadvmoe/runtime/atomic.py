"""Files that are complete or absent."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Union

from mmengine.fileio import LocalBackend, register_backend

from mmadvmoe.utils import PARTIAL, write_atomically

__all__ = ['PARTIAL', 'AtomicLocalBackend', 'use_atomic_files', 'write_atomically']


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
