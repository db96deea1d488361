"""Write a trained model as TorchScript, ONNX or an exported program: images in [0, 1] to class logits, any batch size.

A mixture routes for itself: all its experts are computed and the chosen one is selected, at N times the cost of the
expert layers. The file is read back and compared with the model on batches of 1, 7 and 64 images.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from mmengine.config import Config
from torch import Tensor, nn

from mmadvmoe.apis import load_robust_model
from mmadvmoe.attacks import NormalizedClassifier
from mmadvmoe.cost import input_shape_of
from mmadvmoe.moe import deployable
from mmadvmoe.runtime.files import check_writable
from mmadvmoe.runtime.launch import check_checkpoint, load_config

#: Endings of the files.
SUFFIXES = {'torchscript': '.pt', 'onnx': '.onnx', 'torch_export': '.pt2'}
BATCHES = (1, 7, 64)
TOLERANCE = 1e-5


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file or address')
    parser.add_argument('--format', choices=SUFFIXES, default='onnx', help='[%(default)s]')
    parser.add_argument('--out', type=Path, help='file to write [the checkpoint with another ending]')
    return parser.parse_args()


def export(model: nn.Module, images: Tensor, kind: str, path: Path) -> Callable[[Tensor], Tensor]:
    """Write a model and read it back.

    Args:
        model (nn.Module): Images in [0, 1] to logits; mixtures in it are made :func:`~mmadvmoe.moe.deployable`.
        images (Tensor): (B, C, H, W) with B > 1, of the size that the file is for.
        kind (str): A key of ``SUFFIXES``.
        path (Path): The file.

    Returns:
        Callable: What the file computes.

    Raises:
        ImportError: ``onnx``, ``onnxscript`` or ``onnxruntime`` is missing.
    """
    network = deployable(model).requires_grad_(False)
    batch = {0: torch.export.Dim('batch', min=1, max=2**16)}
    with warnings.catch_warnings():
        # Of the exporters' own parts, and that shapes of the network, which are constants, are taken for such.
        warnings.simplefilter('ignore')
        if kind == 'torchscript':
            torch.jit.trace(network, images, check_trace=False).save(str(path))
            return torch.jit.load(str(path))
        if kind == 'torch_export':
            torch.export.save(torch.export.export(network, (images,), dynamic_shapes=(batch,)), path)
            return torch.export.load(path).module()
        try:
            import onnxruntime
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise ImportError(f"{error}: --format onnx needs more; run: pip install 'mmadvmoe[export]'") from error
        names = dict(input_names=['images'], output_names=['logits'])
        # One file, unless it would be larger than a message of protobuf can be.
        external = sum(tensor.nbytes for tensor in network.state_dict().values()) > 2**30
        options = dict(dynamic_shapes=(batch,), verbose=False, external_data=external, **names)
        torch.onnx.export(network, (images,), path, dynamo=True, **options)
    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    return lambda x: torch.from_numpy(session.run(None, {'images': x.numpy()})[0])


def comparison_images(cfg: Config) -> Tensor:
    """Random images of the size that a config trains with, from dark to bright, so that routes differ."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(max(BATCHES), *input_shape_of(cfg), generator=generator)
    return images * torch.linspace(0, 1, len(images))[torch.randperm(len(images), generator=generator)].view(
        -1, 1, 1, 1
    )


@torch.no_grad()
def compare(model: NormalizedClassifier, exported: Callable[[Tensor], Tensor], images: Tensor) -> float:
    """The largest difference of logits, relative to the largest logit where that is above 1.

    Args:
        model (NormalizedClassifier): The model itself.
        exported (Callable): What :func:`export` gives.
        images (Tensor): (64, C, H, W) in [0, 1].
    """
    worst = 0.0
    for size in BATCHES:
        expected = model(images[:size])
        difference = (exported(images[:size]) - expected).abs().max()
        worst = max(worst, (difference / expected.abs().max().clamp(min=1)).item())
    return worst


def main() -> None:
    args = parse_args()
    check_checkpoint(args.checkpoint, 'CHECKPOINT')
    cfg: Config = load_config(args.config)
    model = load_robust_model(cfg, args.checkpoint)
    # What is at an address is exported into the current folder.
    source = Path(args.checkpoint.rsplit('/', 1)[1] if '://' in args.checkpoint else args.checkpoint)
    path = args.out or source.with_suffix(SUFFIXES[args.format])
    if path.exists() and source.exists() and path.samefile(args.checkpoint):
        sys.exit(f'{path} is the checkpoint itself: give another file with --out')
    check_writable(path, '--out')
    images = comparison_images(cfg)
    exported = export(model, images[:2], args.format, path)
    difference = compare(model, exported, images)
    print(f'{path}: {path.stat().st_size:,} bytes; differs from the model by {difference:.1e} at most')
    if model.num_routers:
        loads = [routing.counts for routing in model.decide_routes(images)]
        print(f'images, or tokens, on each expert in the comparison: {"; ".join(map(str, loads))}')
    if not difference <= TOLERANCE:
        sys.exit(f'{path} differs by more than {TOLERANCE}: do not use it')


if __name__ == '__main__':
    main()
