"""Files that are complete or absent."""

from __future__ import annotations

import os
import os.path as osp
from pathlib import Path
from typing import Union

#: Ending of files that are being written. One that is left over was cut off by a kill, and is surely ours to delete.
PARTIAL = '.mmadvmoe-partial'


def write_atomically(path: Union[str, Path], content: bytes) -> None:
    """Write a file that is either the old one or the new one at any moment, never a part.

    It is written under another name, forced to disk, and then renamed over the old one.

    Args:
        path: Its path; missing folders are made.
        content: Its content.

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
