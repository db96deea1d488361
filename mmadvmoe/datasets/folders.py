"""Anyone's own images, a folder for each class, in memory."""

from __future__ import annotations

import hashlib
import io
import os
import os.path as osp
import zipfile

import numpy as np
from mmengine.logging import print_log
from mmpretrain.datasets import BaseDataset
from mmpretrain.registry import DATASETS
from PIL import Image

from mmadvmoe.utils import choose, write_atomically

from .imagenet import files_in, folders_in
from .splits import SPLITS, part_of

#: Files that are taken for images.
ENDINGS = ('.bmp', '.jpeg', '.jpg', '.pgm', '.png', '.ppm', '.tif', '.tiff', '.webp')


@DATASETS.register_module()
class ImageFolders(BaseDataset):
    """Images in ``data_root/train/<class>/`` and ``data_root/test/<class>/``, read once and then kept in memory.

    Validation images are held out of the training ones, the same share of each class and always the same. Classes are
    numbered in the order of their names, or in that of ``metainfo=dict(classes=[...])``. Images become RGB of 8 bits,
    grayscale ones with three equal channels.

    The decoded images of each folder are kept beside it, in ``data_root/train.<height>x<width>.npz``, so that a second
    start does not decode them again. That file is taken only while the names and sizes of the image files are those it
    was made from, and its content is what was written; otherwise it is made anew.

    Args:
        data_root: The folder that holds ``train/`` and ``test/``.
        split: ``'train'``, ``'val'``, ``'trainval'`` (all of ``train/``) or ``'test'``.
        num_val: Images of ``train/`` to hold out.
        size: Height and width, or one number for both, that images are resized to where they differ from it. None
            takes them as they are; then all must be of one size.
        cache: Folder of the file with decoded images. Defaults to ``data_root``; False for none.
        **kwargs: Other arguments of :class:`mmpretrain.datasets.BaseDataset`, such as ``pipeline``.

    Raises:
        FileNotFoundError: A folder is missing or has no images; the message says what is expected where.
        ValueError: ``split`` or ``num_val`` is not allowed, images differ in size or have numbers of no known range, or
            the classes of ``test/``, or those given, are not those of ``train/``.
        OSError: A file is no image that can be read; the message names it.
    """

    def __init__(
        self,
        data_root: str = '',
        split: str = 'train',
        num_val: int = 5000,
        size: None | int | tuple[int, int] = None,
        cache: None | bool | str = None,
        **kwargs,
    ) -> None:
        self.part = choose(split, SPLITS, 'dataset.split')
        self.num_val = num_val
        self.size = (size, size) if isinstance(size, int) else None if size is None else tuple(size)
        self.cache = data_root if cache in (None, True) else cache
        super().__init__(ann_file='', data_root=data_root, **kwargs)

    def load_data_list(self) -> list[dict]:
        """Read the images of the split, in the order of their classes and names."""
        folder = 'test' if self.part == 'test' else 'train'
        names = self._list_files(folder)
        classes = tuple(dict.fromkeys(name.split('/')[0] for name in names))
        if folder == 'test':
            of_training = tuple(folders_in(osp.join(self.data_root, 'train')))
            if of_training and classes != of_training:
                raise ValueError(
                    f'the classes of {osp.join(self.data_root, "test")} {classes} are not those of train/ {of_training}'
                )
        given = tuple(self._metainfo.setdefault('classes', classes))
        if sorted(given) != sorted(classes):
            raise ValueError(f'metainfo.classes={given} are not the folders of {self.data_root}: {classes}')
        numbers = {name: number for number, name in enumerate(classes)}
        images = self._read(folder, names)
        # Split by folders, so that a class of another number does not move images from one part to the other.
        data_list = [dict(img=img, gt_label=numbers[name.split('/')[0]]) for img, name in zip(images, names)]
        data_list = part_of(data_list, self.part, self.num_val)
        wanted = [given.index(name) for name in classes]
        for info in data_list:
            info['gt_label'] = wanted[info['gt_label']]
        return data_list

    def _list_files(self, folder: str) -> list[str]:
        root = osp.join(self.data_root, folder)
        names = [
            f'{each}/{file}'
            for each in folders_in(root)
            for file in sorted(files_in(osp.join(root, each)))
            if file.lower().endswith(ENDINGS)
        ]
        empty = sorted(set(folders_in(root)) - {name.split('/')[0] for name in names})
        if not names or empty:
            found = f'no image in {", ".join(empty[:3])}' if empty else 'there is none'
            raise FileNotFoundError(
                f'{type(self).__name__} needs images in {osp.abspath(root)}/<class>/ ({found}; endings: '
                f'{", ".join(ENDINGS)}). If the data set is elsewhere, set data_root to the folder that holds train/ '
                'and test/.'
            )
        return names

    def _read(self, folder: str, names: list[str]) -> np.ndarray:
        """All images, (N, H, W, 3) uint8, from the cache or the files."""
        root = osp.join(self.data_root, folder)
        if not self.cache:
            return self._decode(root, names)
        origin = _digest_of_files(root, names, self.size)
        path = osp.join(self.cache, f'{folder}.{"x".join(map(str, self.size)) if self.size else "as_is"}.npz')
        images = _read_cache(path, origin)
        if images is None:
            images = self._decode(root, names)
            content = io.BytesIO()
            np.savez(content, images=images, origin=np.array([origin, hashlib.sha256(images).hexdigest()]))
            try:
                write_atomically(path, content.getvalue())
            except OSError as error:
                print_log(f'{path} could not be written ({error.strerror}); images are decoded at each start.')
        return images

    def _decode(self, root: str, names: list[str]) -> np.ndarray:
        images: np.ndarray | None = None
        for number, name in enumerate(names):
            path = osp.join(root, name)
            try:
                with Image.open(path) as file:
                    image = _as_rgb(file)
            except OSError as error:
                raise OSError(f'{path} is no image that can be read: {error}') from error
            if self.size is not None and image.size != self.size[::-1]:
                image = image.resize(self.size[::-1], Image.Resampling.BILINEAR)
            pixels = np.asarray(image)
            if images is None:
                images = np.empty((len(names), *pixels.shape), np.uint8)
            elif pixels.shape != images.shape[1:]:
                raise ValueError(
                    f'{path} has {pixels.shape[0]} x {pixels.shape[1]} pixels and {names[0]} has '
                    f'{images.shape[1]} x {images.shape[2]}: set dataset.size=(height, width)'
                )
            images[number] = pixels
        return images

    def extra_repr(self) -> list[str]:
        """Name the split when the data set is printed."""
        return [f'Split: \t{self.part}']


def _as_rgb(image: Image.Image) -> Image.Image:
    """An image in RGB; Pillow cuts what has more than 8 bits to white.

    Raises:
        OSError: Its numbers are of no known range.
    """
    if image.mode.startswith('I;16'):
        image = Image.fromarray(np.rint(np.asarray(image).astype(np.float32) / 257).astype(np.uint8))
    elif image.mode in ('I', 'F'):
        raise OSError(f'its numbers (mode {image.mode!r}) have no known range; save it with 8 or 16 bits')
    return image.convert('RGB')


def _digest_of_files(root: str, names: list[str], size: tuple[int, int] | None) -> str:
    digest = hashlib.sha256(f'RGB, {size}'.encode())
    for name in names:
        found = os.stat(osp.join(root, name))
        digest.update(f'{name}/{found.st_size}/{found.st_mtime_ns}\n'.encode())
    return digest.hexdigest()


def _read_cache(path: str, origin: str) -> np.ndarray | None:
    """The images, or None if the file is not there, not whole or made from other files."""
    if not osp.isfile(path):
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            made_from, content = file['origin'].tolist()
            if made_from != origin:
                return None
            images = file['images']
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None
    return images if hashlib.sha256(images).hexdigest() == content else None
