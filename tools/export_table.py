"""Print the table of docs/export.md: how far the files of tools/export.py are from the models, network by network.

The weights are random, but changed so that the images of the comparison take different experts, and class logits are
as large as those of a trained model.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from export import SUFFIXES, compare, comparison_images, export
from torch import Tensor, nn

from mmadvmoe.apis import get_model
from mmadvmoe.attacks import NormalizedClassifier
from mmadvmoe.moe import placement_of, router_modules
from mmadvmoe.runtime.launch import load_config
from mmadvmoe.runtime.zoo import read_zoo

MODELS = (
    'advmoe_resnet18_digits',
    'advmoe_resnet18_digits_layer',
    'advmoe_resnet18_cifar10',
    'advmoe_vgg16-bn_cifar10',
    'advmoe_densenet-bc-40-12_cifar10',
    'advmoe_vit-small-moe_digits',
)
#: The largest class logit.
_LOGIT = 10.0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('models', nargs='*', default=MODELS, help='names for get_model [%(default)s]')
    parser.add_argument('--formats', nargs='+', choices=SUFFIXES, default=list(SUFFIXES), help='[all]')
    return parser.parse_args()


@torch.no_grad()
def liven(model: NormalizedClassifier, images: Tensor) -> None:
    """Give the images different routes, by equal logits of all experts for the mean image, and large class logits."""

    def center(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        mean, logits = (tensor.flatten(0, -2).mean(dim=0) for tensor in (inputs[0], output))
        layer.weight -= torch.outer(logits, mean) / mean.square().sum()
        return layer.forward(*inputs)

    linear = [[part for part in router.modules() if isinstance(part, nn.Linear)] for router in router_modules(model)]
    # A router of tokens is such a layer itself.
    hooks = [
        (layers[-1] if layers else router).register_forward_hook(center)
        for router, layers in zip(router_modules(model), linear)
    ]
    largest = model(images).abs().max()
    for hook in hooks:
        hook.remove()
    # Logits as large as those of a trained model.
    last = [part for part in model.classifier.head.modules() if isinstance(part, nn.Linear)][-1]
    last.weight *= _LOGIT / largest
    last.bias *= _LOGIT / largest


def main() -> None:
    args = parse_args()
    print(f'| model | routing | images or tokens on each expert | {" | ".join(args.formats)} |')
    print('| --- | --- | --- |' + ' ---: |' * len(args.formats))
    for name in args.models:
        torch.manual_seed(0)
        model, images = get_model(name), comparison_images(load_config(read_zoo()[name].config))
        liven(model, images)
        loads = [routing.counts for routing in model.decide_routes(images)]
        cells = [
            f'`{name}`',
            str(placement_of(model.classifier).name),
            ', '.join('/'.join(map(str, n)) for n in loads[:3]),
        ]
        cells[-1] += f', ... ({len(loads)} routers)' if len(loads) > 3 else ''
        with TemporaryDirectory() as folder:
            for kind in args.formats:
                exported = export(model, images[:2], kind, Path(folder) / f'model{SUFFIXES[kind]}')
                cells.append(f'{compare(model, exported, images):.0e}')
        print(f'| {" | ".join(cells)} |', flush=True)


if __name__ == '__main__':
    main()
