"""Files that tell whether they are whole."""

import io
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from mmadvmoe.runtime.files import damage_of, is_sealed, seal


def _saved(**options) -> bytes:
    buffer = io.BytesIO()
    torch.save(dict(weight=torch.arange(9.0)), buffer, **options)
    return buffer.getvalue()


def _legacy() -> bytes:
    return _saved(_use_new_zipfile_serialization=False)


@pytest.mark.parametrize('content', [_saved, _legacy], ids=['zip', 'legacy'])
def test_a_sealed_file_is_read_as_one_without(content, tmp_path: Path) -> None:
    path = tmp_path / 'a.pth'
    path.write_bytes(content())
    assert not is_sealed(path) and damage_of(path) is None
    path.write_bytes(seal(content()))
    assert is_sealed(path) and damage_of(path) is None
    assert torch.equal(torch.load(path, weights_only=True)['weight'], torch.arange(9.0))


def test_a_sealed_zip_file_is_one_with_a_comment(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.arange(3))
    (tmp_path / 'a.npz').write_bytes(seal(buffer.getvalue()))
    with zipfile.ZipFile(tmp_path / 'a.npz') as archive:
        assert archive.comment.startswith(b'mmadvmoe sha256 ') and archive.testzip() is None
    assert np.load(tmp_path / 'a.npz')['a'].tolist() == [0, 1, 2]


@pytest.mark.parametrize('content', [_saved, _legacy], ids=['zip', 'legacy'])
def test_every_byte_counts(content, tmp_path: Path) -> None:
    path, whole = tmp_path / 'a.pth', seal(content())
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        if damage_of(path) is None:
            # The mark itself: nothing before it changed.
            assert place >= len(content()) - 2 and torch.load(path, weights_only=True)['weight'].sum() == 36


def test_without_a_seal_the_records_of_a_zip_file_are_compared(tmp_path: Path) -> None:
    path, whole = tmp_path / 'a.pth', _saved()
    weights = whole.index(torch.arange(9.0).numpy().tobytes())
    for place in random.Random(0).sample(range(weights, weights + 36), 9):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert 'CRC-32' in damage_of(path)


def test_what_is_cut_off_in_its_seal_is_whole(tmp_path: Path) -> None:
    (tmp_path / 'a.pth').write_bytes(seal(_saved())[:-10])
    assert not is_sealed(tmp_path / 'a.pth') and damage_of(tmp_path / 'a.pth') is None


def test_a_directory_of_another_disk_is_damage(tmp_path: Path) -> None:
    whole = bytearray(_saved())
    # Where the end of the directory says on which disk it begins.
    at = whole.rindex(b'PK\x06\x07') + 4
    whole[at] ^= 1
    (tmp_path / 'a.pth').write_bytes(whole)
    assert 'no whole zip file' in damage_of(tmp_path / 'a.pth')
