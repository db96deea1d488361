import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from mmadvmoe.datasets import ImageNetSplit
from mmadvmoe.datasets.splits import SPLITS

TOOL = Path(__file__).parents[2] / 'tools' / 'dataset_converters' / 'imagenet_annotations.py'

# Packing the data list collects garbage, which takes seconds in a process that holds all of MMPretrain.
PLAIN = dict(serialize_data=False)


@pytest.fixture
def root(small_data: Path, tmp_path: Path) -> Path:
    shutil.copytree(small_data / 'imagenet', tmp_path / 'copy')
    return tmp_path / 'copy'


def test_listed_images_are_split(root: Path) -> None:
    parts = {part: ImageNetSplit(data_root=str(root), split=part, num_val=10, **PLAIN) for part in SPLITS}
    assert {part: len(data) for part, data in parts.items()} == dict(train=30, val=10, trainval=40, test=10)
    train, val, trainval, test = ({info['img_path'] for info in data} for data in parts.values())
    assert not train & val and train | val == trainval and not trainval & test
    assert sorted(parts['val'].get_gt_labels()) == list(range(0, 1000, 100))
    assert len(parts['train'].metainfo['classes']) == 1000


def _error(root: Path, split: str = 'train') -> str:
    with pytest.raises(FileNotFoundError) as caught:
        ImageNetSplit(data_root=str(root), split=split, num_val=10, **PLAIN)
    return str(caught.value)


def test_missing_images_are_named_by_folder(root: Path) -> None:
    (root / 'train' / 'n00000003' / 'n00000003_13.JPEG').unlink()
    message = _error(root)
    assert 'n00000003: 1 of 4 images missing' in message
    assert 'https://image-net.org/challenges/LSVRC/2012/2012-downloads.php' in message
    assert 'ILSVRC2012_img_train.tar' in message and str(root / 'train') in message
    (root / 'val' / 'ILSVRC2012_val_00000002.JPEG').unlink()
    assert '1 of 10 images missing' in _error(root, 'test')


def test_no_folder_at_all(tmp_path: Path) -> None:
    assert 'there is no such folder' in _error(tmp_path / 'nothing')


def test_class_folders_must_be_complete(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(root / 'meta')
    message = _error(root)
    assert '40 of 1,281,167 images' in message and '10 of 1000 class folders' in message
    assert 'val/ has no folder per class' in _error(root, 'test')
    assert 'imagenet_annotations.py' in _error(root, 'test')
    monkeypatch.setattr(ImageNetSplit, 'METAINFO', {'classes': tuple('abcdefghij')})
    monkeypatch.setattr(ImageNetSplit, 'official_sizes', dict(train=40, val=10))
    assert len(ImageNetSplit(data_root=str(root), split='trainval', **PLAIN)) == 40


def test_annotations_are_made_from_the_development_kit(root: Path, tmp_path: Path) -> None:
    shutil.rmtree(root / 'meta')
    kit = tmp_path / 'kit' / 'data'
    kit.mkdir(parents=True)
    # The kit numbers classes in an order of its own, and lists their ancestors, too, which have no images.
    wnids = [f'n{number:08d}' for number in range(10)][::-1] + ['n99999999']
    synsets = np.array(
        [(number + 1, wnid, int(wnid == 'n99999999')) for number, wnid in enumerate(wnids)],
        dtype=[('ILSVRC2012_ID', object), ('WNID', object), ('num_children', object)],
    )
    savemat(kit / 'meta.mat', dict(synsets=synsets))
    (kit / 'ILSVRC2012_validation_ground_truth.txt').write_text('\n'.join(str(i) for i in range(1, 11)) + '\n')
    command = [sys.executable, str(TOOL), str(root), str(kit.parent)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f'{root}/meta/train.txt: 40 images of 10 classes' in done.stdout
    data = ImageNetSplit(data_root=str(root), split='trainval', **PLAIN)
    assert len(data) == 40
    for info in data:
        assert int(Path(info['img_path']).parent.name[1:]) == info['gt_label']
    # The first validation image is of the kit's class 1, which is the last in the order of WordNet ids.
    assert ImageNetSplit(data_root=str(root), split='test', **PLAIN).get_gt_labels().tolist() == list(range(9, -1, -1))

    (root / 'val' / 'ILSVRC2012_val_00000002.JPEG').unlink()
    failed = subprocess.run(command, capture_output=True, text=True)
    assert failed.returncode != 0 and 'has 9 images, but' in failed.stderr
