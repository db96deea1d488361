"""Files that are complete or absent and tell whether they are whole, and folders that one run at a time writes to."""

from __future__ import annotations

import errno
import hashlib
import os
import os.path as osp
import socket
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.logging import print_log

from mmadvmoe.utils import PARTIAL, write_atomically

try:
    import fcntl
except ImportError:  # not a POSIX system: nothing is locked there
    fcntl = None

_MARK = b'mmadvmoe sha256 '
_LENGTH = len(_MARK) + 64
#: A zip file without a comment ends in a record of this length, that starts so.
_END, _END_SIGN = 22, b'PK\x05\x06'


def seal(content: bytes) -> bytes:
    """Append the SHA-256 of what is to be written.

    PyTorch and NumPy read a sealed file as they read one without: in a zip file, which is what both write, the seal is
    the comment of the archive, and after a pickle (PyTorch's legacy format) nothing is read.
    """
    if content[-_END:].startswith(_END_SIGN) and content.endswith(b'\0\0'):
        content = content[:-2] + _LENGTH.to_bytes(2, 'little')
    return content + _MARK + hashlib.sha256(content).hexdigest().encode()


def is_sealed(path: str | Path) -> bool:
    """Whether a file ends in a seal, broken or not."""
    with open(path, 'rb') as file:
        return _seal_of(file) is not None


def damage_of(path: str | Path) -> str | None:
    """Say what is damaged of a file; None if nothing is known to be.

    A sealed file is compared with its seal, every byte of it. Any other zip file is compared with the CRC-32 of its
    records, which PyTorch does not look at. A file without either gives None.

    Raises:
        OSError: It cannot be read.
    """
    with open(path, 'rb') as file:
        expected = _seal_of(file)
        if expected is not None:
            size, digest = os.fstat(file.fileno()).st_size - _LENGTH, hashlib.sha256()
            file.seek(0)
            while size > 0 and (block := file.read(min(size, 1 << 20))):
                digest.update(block)
                size -= len(block)
            return None if digest.hexdigest().encode() == expected else 'its bytes are not those of its SHA-256'
        try:
            if not zipfile.is_zipfile(file):
                return None
            with zipfile.ZipFile(file) as archive:
                record = archive.testzip()
        except Exception as error:  # a damaged directory can fail in any way, by seeking to nowhere too
            if isinstance(error, OSError) and error.errno != errno.EINVAL:
                raise
            return f'it is no whole zip file ({type(error).__name__}: {error})'
        return None if record is None else f'the bytes of its record {record!r} are not those of their CRC-32'


def _seal_of(file) -> bytes | None:
    """The digest at the end of an open file."""
    file.seek(0, os.SEEK_END)
    file.seek(max(0, file.tell() - _LENGTH))
    end = file.read(_LENGTH)
    return end[len(_MARK) :] if end.startswith(_MARK) and len(end) == _LENGTH else None


def check_writable(path: str | Path, argument: str) -> None:
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

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write a checkpoint, with its SHA-256; the OSError of one that cannot be written says what to do."""
        self._write(seal(obj), os.fspath(filepath))

    def put_text(self, obj: str, filepath: str | Path, encoding: str = 'utf-8') -> None:
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

    def __init__(self, folder: str | Path, cure: str) -> None:
        self.path = Path(folder) / LOCK
        self._cure = cure
        self._descriptor: int | None = None

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
