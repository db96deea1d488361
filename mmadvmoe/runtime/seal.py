"""Files that tell whether they are whole: by a SHA-256 at their end, and by the checksums that zip files have."""

from __future__ import annotations

import errno
import hashlib
import os
import zipfile
from pathlib import Path
from typing import Optional, Union

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


def is_sealed(path: Union[str, Path]) -> bool:
    """Whether a file ends in a seal, broken or not."""
    with open(path, 'rb') as file:
        return _seal_of(file) is not None


def damage_of(path: Union[str, Path]) -> Optional[str]:
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


def _seal_of(file) -> Optional[bytes]:
    """The digest at the end of an open file."""
    file.seek(0, os.SEEK_END)
    file.seek(max(0, file.tell() - _LENGTH))
    end = file.read(_LENGTH)
    return end[len(_MARK) :] if end.startswith(_MARK) and len(end) == _LENGTH else None
