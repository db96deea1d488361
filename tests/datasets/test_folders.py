"""Image folders: the same split as the official data sets, read once, and a cache that is never stale."""

import numpy as np
import pytest
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from PIL import Image
from test_dataset_configs import BASE

from mmadvmoe.datasets import ImageFolders, stratified_split

CLASSES = ('ant', 'bee', 'cow')


@pytest.fixture
def root(tmp_path):
    """12 training and 6 test images of 5 x 7 pixels, each of one colour, and files that are no images."""
    for part, count in (('train', 12), ('test', 6)):
        for number in range(count):
            save(tmp_path / part / CLASSES[number % 3] / f'{number:02d}.png', number)
        (tmp_path / part / 'ant' / 'notes.txt').write_text('no image')
    return tmp_path


def save(path, value, size=(7, 5), mode='RGB'):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == 'L' else (value, 0, 0)).save(path)


def build(root, split='train', num_val=3, **kwargs):
    return ImageFolders(str(root), split, num_val, **kwargs)


def values(dataset):
    return [int(dataset.get_data_info(i)['img'][0, 0, 0]) for i in range(len(dataset))]


def test_parts_are_stratified_disjoint_and_complete(root):
    parts = {split: build(root, split) for split in ('train', 'val', 'trainval', 'test')}
    assert {split: len(part) for split, part in parts.items()} == dict(train=9, val=3, trainval=12, test=6)
    assert parts['train'].metainfo['classes'] == CLASSES
    found = {split: values(part) for split, part in parts.items()}
    assert sorted(found['train'] + found['val']) == sorted(found['trainval']) == list(range(12))
    # In the order of classes and names, as all data sets here are split.
    labels = [value % 3 for value in found['trainval']]
    assert found['trainval'] == sorted(range(12), key=lambda value: (value % 3, value))
    assert found['val'] == [found['trainval'][i] for i in stratified_split(labels, 3)[1]]
    for part in parts.values():
        infos = [part.get_data_info(i) for i in range(len(part))]
        assert all(info['img'].shape == (5, 7, 3) and info['gt_label'] == info['img'][0, 0, 0] % 3 for info in infos)


def test_a_second_start_decodes_nothing(root, monkeypatch):
    first = values(build(root))
    monkeypatch.setattr(Image, 'open', lambda *_: pytest.fail('decoded again'))
    assert values(build(root)) == first
    assert values(build(root, 'val'))


@pytest.mark.parametrize(
    'change', ['new image', 'other size of file', 'same size of file', 'damaged cache', 'cut cache', 'other size']
)
def test_a_cache_that_does_not_fit_is_made_anew(root, change):
    before = values(build(root, 'trainval'))
    cache = root / 'train.as_is.npz'
    kwargs = {}
    if change == 'new image':
        save(root / 'train' / 'ant' / '99.png', 99)
    elif change == 'other size of file':
        Image.fromarray(np.random.randint(0, 256, (5, 7, 3), np.uint8)).save(root / 'train' / 'ant' / '00.png')
    elif change == 'same size of file':
        path = root / 'train' / 'ant' / '99.bmp'
        save(path, 1)
        before = values(build(root, 'trainval'))
        save(path, 2)
    elif change == 'damaged cache':
        content = bytearray(cache.read_bytes())
        content[len(content) // 3] ^= 255
        cache.write_bytes(content)
    elif change == 'cut cache':
        cache.write_bytes(cache.read_bytes()[:100])
    else:
        kwargs = dict(size=(4, 4))
    again = build(root, 'trainval', **kwargs)
    fresh = build(root, 'trainval', cache=False, **kwargs)
    assert values(again) == values(fresh)
    assert (values(again) == before) == (change in ('damaged cache', 'cut cache', 'other size'))


def test_no_cache_where_none_is_wanted_or_possible(root, tmp_path_factory):
    build(root, cache=False)
    assert not list(root.glob('*.npz'))
    elsewhere = tmp_path_factory.mktemp('cache')
    build(root, cache=str(elsewhere))
    assert [path.name for path in elsewhere.iterdir()] == ['train.as_is.npz']
    blocked = elsewhere / 'file'
    blocked.write_text('')
    assert values(build(root, cache=str(blocked / 'below'))) == values(build(root))


def test_grayscale_and_other_sizes(root):
    save(root / 'train' / 'ant' / '00.png', 7, size=(20, 10), mode='L')
    with pytest.raises(ValueError, match=r'00.png has 10 x 20|has 5 x 7 pixels and ant/00.png has 10 x 20'):
        build(root)
    dataset = build(root, 'trainval', size=(4, 6))
    first = dataset.get_data_info(0)['img']
    assert first.shape == (4, 6, 3) and (first == 7).all()


@pytest.mark.parametrize(('kind', 'dtype'), [('png', '<u2'), ('tiff', '<u2'), ('tiff', '>u2')])
def test_images_of_16_bits_are_as_bright_as_those_of_8(root, kind, dtype):
    gray = np.arange(35, dtype=np.uint8).reshape(5, 7) * 7
    (root / 'train' / 'ant' / '00.png').unlink()
    Image.fromarray((gray.astype(np.uint16) * 257).astype(dtype)).save(root / 'train' / 'ant' / f'00.{kind}')
    first = build(root, 'trainval').get_data_info(0)['img']
    assert np.array_equal(first, np.repeat(gray[..., None], 3, axis=2))


def test_numbers_of_no_known_range_are_refused(root):
    Image.fromarray(np.ones((5, 7), np.float32)).save(root / 'train' / 'ant' / '99.tiff')
    with pytest.raises(OSError, match="99.tiff .*mode 'F'.* no known range; save it with 8 or 16 bits"):
        build(root)


def test_classes_are_numbered_as_they_are_given(root):
    dataset = build(root, 'trainval', metainfo=dict(classes=['cow', 'ant', 'bee']))
    infos = [dataset.get_data_info(i) for i in range(len(dataset))]
    assert [CLASSES[info['img'][0, 0, 0] % 3] for info in infos] == [dataset.CLASSES[i['gt_label']] for i in infos]
    # The images held out are the same.
    assert values(build(root, 'val', metainfo=dict(classes=['cow', 'ant', 'bee']))) == values(build(root, 'val'))
    with pytest.raises(ValueError, match=r"metainfo.classes=\('ant', 'bee'\) are not the folders of .*'cow'"):
        build(root, metainfo=dict(classes=['ant', 'bee']))


def test_mistakes_are_named(root):
    with pytest.raises(FileNotFoundError, match='train/<class>/ .there is none.*data_root'):
        build(root / 'nowhere')
    (root / 'train' / 'dog').mkdir()
    with pytest.raises(FileNotFoundError, match='no image in dog'):
        build(root)
    save(root / 'train' / 'dog' / '1.png', 1)
    with pytest.raises(ValueError, match="'cow'.* are not those of train/ .*'dog'"):
        build(root, 'test')
    with pytest.raises(ValueError, match="split='valid'"):
        build(root, 'valid')
    (root / 'train' / 'dog' / '1.png').write_text('text')
    with pytest.raises(OSError, match='dog/1.png is no image'):
        build(root)


@pytest.mark.parametrize('name', ['cifar10_images', 'cifar10_images_batched'])
def test_configs(root, name):
    init_default_scope('mmpretrain')
    cfg = Config.fromfile(BASE / 'datasets' / f'{name}.py')
    assert cfg.data_root == 'data/cifar10_images'
    for part in ('train', 'val', 'test'):
        loader = cfg[f'{part}_dataloader']
        loader.num_workers, loader.batch_size = 0, 2
        dataset = loader.dataset.get('dataset', loader.dataset)
        assert (dataset.type, dataset.split) == ('ImageFolders', part)
        dataset.update(data_root=str(root), num_val=3, size=32)
        batch = next(iter(Runner.build_dataloader(loader, seed=0)))
        assert len(batch['inputs']) == len(batch['data_samples']) == 2
        assert batch['inputs'][0].shape == (3, 32, 32)
