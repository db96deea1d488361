"""List the images of ImageNet-1k with their labels, for the archives as they unpack.

``train/`` holds a folder per class, ``val/`` holds its 50,000 images side by side, and their labels are in the
development kit (ILSVRC2012_devkit_t12). Writes ``meta/train.txt`` and ``meta/val.txt``: a path and a label a line.
"""

import argparse
import sys
from pathlib import Path

from scipy.io import loadmat

IMAGE_SUFFIXES = {'.jpeg', '.jpg', '.png'}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data_root', type=Path, help='the folder that holds train/ and val/')
    parser.add_argument('devkit', type=Path, help='the folder that ILSVRC2012_devkit_t12.tar.gz unpacks to')
    return parser.parse_args()


def images_in(folder: Path) -> list[Path]:
    """The images of one folder, sorted."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)


def class_order(devkit: Path) -> dict[int, str]:
    """The WordNet id of each ILSVRC id of a class that has images, 1 to 1000."""
    synsets = loadmat(devkit / 'data' / 'meta.mat', squeeze_me=True)['synsets']
    return {
        int(number): str(wnid)
        for number, wnid, children in zip(synsets['ILSVRC2012_ID'], synsets['WNID'], synsets['num_children'])
        if int(children) == 0
    }


def main() -> None:
    args = parse_args()
    truth_file = args.devkit / 'data' / 'ILSVRC2012_validation_ground_truth.txt'
    for needed in (args.data_root / 'train', args.data_root / 'val', truth_file, args.devkit / 'data' / 'meta.mat'):
        if not needed.exists():
            sys.exit(f'{needed} is missing')
    wnids = class_order(args.devkit)
    labels = {wnid: label for label, wnid in enumerate(sorted(wnids.values()))}
    folders = {path.name: path for path in (args.data_root / 'train').iterdir() if path.is_dir()}
    missing = sorted(set(labels) - set(folders))
    if missing:
        sys.exit(f'{args.data_root / "train"} has no folder {missing[0]}, one of {len(missing)} classes without one')
    train = [f'{wnid}/{path.name} {label}' for wnid, label in labels.items() for path in images_in(folders[wnid])]
    truth = [int(line) for line in truth_file.read_text().split()]
    images = images_in(args.data_root / 'val')
    if len(images) != len(truth):
        sys.exit(f'{args.data_root / "val"} has {len(images)} images, but {truth_file} labels {len(truth)}')
    val = [f'{path.name} {labels[wnids[number]]}' for path, number in zip(images, truth)]
    meta = args.data_root / 'meta'
    meta.mkdir(exist_ok=True)
    for name, lines in (('train', train), ('val', val)):
        (meta / f'{name}.txt').write_text('\n'.join(lines) + '\n', encoding='utf-8')
        print(f'{meta / name}.txt: {len(lines)} images of {len(labels)} classes')


if __name__ == '__main__':
    main()
