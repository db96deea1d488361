"""Turn a checkpoint of the AdvMoE reference code (OPTML-Group/Robust-MoE-CNN) into one of mmadvmoe."""

import argparse
import io
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from mmengine.registry import init_default_scope
from mmpretrain.registry import MODELS
from torch import Tensor, nn

from mmadvmoe.runtime.files import check_writable, seal
from mmadvmoe.runtime.launch import check_checkpoint, load_config
from mmadvmoe.runtime.safe_load import load_from_local
from mmadvmoe.utils import write_atomically
from mmadvmoe.version import __version__

#: For each network: a tensor that tells it, and how its names are replaced by ours. Names of the backbone get its
#: prefix later; those of the head start with a slash.
NETWORKS = {
    'DenseNet': (
        'features.conv0.weight',
        [
            (r'^features\.conv0', 'stem.0'),
            (r'^features\.norm0', 'stem.1'),
            (r'^features\.denseblock(\d+)\.denselayer(\d+)', lambda m: f'stages.{int(m[1]) - 1}.block.{int(m[2]) - 1}'),
            (r'^features\.transition(\d+)', lambda m: f'transitions.{int(m[1]) - 1}'),
            (r'^classifier', '/head.fc'),
        ],
    ),
    'WideResNet': (
        'block1.layer.0.conv1.weight',
        [
            (r'^bn0', 'stem_tail.0'),
            (r'^bn1', 'norm'),
            (r'^block(\d)\.layer\.(\d+)\.bn(\d)', r'layer\1.\2.norm\3'),
            (r'^block(\d)\.layer\.(\d+)\.convShortcut', r'layer\1.\2.shortcut'),
            (r'^block(\d)\.layer\.(\d+)', r'layer\1.\2'),
            (r'^fc', '/head.fc'),
        ],
    ),
    'VGG': ('features.0.weight', [(r'^classifier\.(\d+)', lambda m: f'/head.layers.{int(m[1]) // 2}.fc')]),
    'ResNet': (
        'layer1.0.conv1.weight',
        [(r'^(layer\d\.\d+)\.shortcut', r'\1.downsample'), (r'^(linear|fc)', '/head.fc')],
    ),
}
# Norms that the reference's WideResNet-MoE holds but does not use: where the shape changes, it convolves the raw input.
_TRANSITION_NORM = re.compile(r'^(block\d\.layer\.0)\.bn1\.')


class MisfitError(ValueError):
    """A tensor of the reference checkpoint and the network of the config do not fit."""


def convert(checkpoint: Mapping, model: nn.Module) -> dict[str, Tensor]:
    """Name the tensors of a reference checkpoint as in ``model``.

    Args:
        checkpoint (Mapping): ``state_dict`` and, of a mixture, ``router``.
        model (nn.Module): The classifier to fill.

    Returns:
        dict[str, Tensor]: A state dict that fits ``model`` tensor for tensor.

    Raises:
        MisfitError: Naming the first tensor that does not fit.
    """
    if 'state_dict' not in checkpoint:
        raise MisfitError(f'there is no `state_dict`, only {sorted(map(str, checkpoint))}')
    network, router = _split(checkpoint)
    kind = _kind(network)
    wanted = model.state_dict()
    is_moe = any(name.startswith('backbone.network.') for name in wanted)
    prefix = 'backbone.network.' if is_moe else 'backbone.'
    _check_what_has_no_tensor(network, model)
    converted: dict[str, Tensor] = {}
    for source, target, value in (*_named(kind, network, prefix), *_named_router(router)):
        transition = kind == 'WideResNet' and _TRANSITION_NORM.match(source)
        transition = transition and f'{transition[1]}.convShortcut.weight' in network
        if router and transition:
            if target in wanted:
                raise MisfitError(
                    f'{source} is not used by the mixtures of the reference code, which convolve the raw input there: '
                    'set activate_transitions=False in the WideResNet of the config'
                )
            continue
        if target not in wanted:
            hint = '; set activate_transitions=True in the WideResNet of the config' if transition else ''
            raise MisfitError(f'{source} has no place in the network of the config, which has no {target}{hint}')
        if value.shape != wanted[target].shape:
            raise MisfitError(
                f'{source} has shape {tuple(value.shape)}, but {target} in the network of the config has '
                f'{tuple(wanted[target].shape)}'
            )
        converted[target] = value.to(wanted[target].dtype)
    for name in wanted:
        if name not in converted:
            raise MisfitError(f'{name} of the network of the config has no counterpart in the checkpoint')
    return converted


def _split(checkpoint: Mapping) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors of the network and of the router.

    The reference code hangs its one router below the network and below each expert layer, so the network's part of a
    checkpoint repeats it.
    """
    network: dict[str, Tensor] = {}
    router = {_bare(name): value for name, value in (checkpoint.get('router') or {}).items()}
    copies: list[tuple[str, str, Tensor]] = []
    for name, value in checkpoint['state_dict'].items():
        name = _bare(name)
        path, found, rest = f'.{name}'.rpartition('.router.')
        if not found:
            network[name] = value
        elif 'router' in checkpoint:
            copies.append((name, rest, value))
        else:
            router.setdefault(rest, value)
            copies.append((name, rest, value))
    for name, rest, value in copies:
        if rest not in router or not torch.equal(router[rest], value):
            raise MisfitError(f'{name} is not a copy of {rest} of the one router')
    return network, router


def _bare(name: str) -> str:
    return re.sub(r'^module\.', '', name)


def _kind(network: Mapping[str, Tensor]) -> str:
    for kind, (sign, _) in NETWORKS.items():
        if sign in network:
            return kind
    first = next(iter(network), 'nothing')
    raise MisfitError(f'{first}: this is none of the networks of the reference code, {", ".join(NETWORKS)}')


def _named(kind: str, network: Mapping[str, Tensor], prefix: str) -> Iterator[tuple[str, str, Tensor]]:
    """(name in the reference, name in mmadvmoe, tensor)."""
    rules = list(NETWORKS[kind][1])
    if kind == 'DenseNet':
        blocks = {name.split('.')[1] for name in network if name.startswith('features.denseblock')}
        rules.append((r'^features\.norm_final', f'transitions.{len(blocks) - 1}.0'))
    if kind == 'VGG':
        names = _vgg_names(network)
        rules.append((r'^features\.(\d+)', lambda m: names.get(int(m[1]), m[0])))
    for source, value in network.items():
        if source.startswith('normalize.'):
            continue
        name = source
        for pattern, replacement in rules:
            name, count = re.subn(pattern, replacement, name)
            if count:
                break
        yield source, name[1:] if name.startswith('/') else prefix + name, value


def _vgg_names(network: Mapping[str, Tensor]) -> dict[int, str]:
    """Where each layer of the flat list of the reference is in ours, which has one module per convolution."""
    layers = sorted({int(name.split('.')[1]) for name in network if re.match(r'^features\.\d+\.weight$', name)})
    names: dict[int, str] = {}
    ours = -1
    last = 0
    for layer in layers:
        if network[f'features.{layer}.weight'].dim() == 4:
            # Between a layer with parameters and the next convolution: a ReLU, and perhaps a pooling.
            ours += 1 if ours < 0 else layer - last - 1
            names[layer] = f'features.{ours}.conv'
        else:
            names[layer] = f'features.{ours}.bn'
        last = layer
    return names


def _named_router(router: Mapping[str, Tensor]) -> Iterator[tuple[str, str, Tensor]]:
    blocks = sorted({tuple(map(int, m.groups())) for m in map(re.compile(r'layer(\d+)\.(\d+)\.').match, router) if m})
    for source, value in router.items():
        name = re.sub(r'^layer(\d+)\.(\d+)\.', lambda m: f'blocks.{blocks.index((int(m[1]), int(m[2])))}.', source)
        yield f'router.{source}', f'backbone.router.{name}', value


def _check_what_has_no_tensor(network: Mapping[str, Tensor], model: nn.Module) -> None:
    """Check what would change the function but shows in no shape."""
    preprocessor = model.data_preprocessor
    for name, neutral in (('mean', 0.0), ('std', 1.0)):
        given = network.get(f'normalize.{name}', torch.tensor([neutral])).flatten().float()
        ours = getattr(preprocessor, name).flatten() / 255
        if not torch.allclose(*torch.broadcast_tensors(given, ours), atol=1e-6):
            raise MisfitError(
                f'normalize.{name} of the checkpoint is {given.tolist()} for images in [0, 1]: set '
                f'data_preprocessor.{name}={[round(float(255 * v), 4) for v in given]}'
                if f'normalize.{name}' in network
                else f'normalize.{name} is not in the checkpoint, whose images are not normalised: remove '
                'data_preprocessor.mean and std'
            )
    stem = getattr(getattr(model.backbone, 'router', None), 'conv1', None)
    if stem is not None and stem.stride != (1, 1):
        raise MisfitError(
            'router.conv1.weight is applied with stride 1 in the reference code, but the config sets '
            f'backbone.router.stem_stride={stem.stride[0]}: set 1'
        )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('src', help='checkpoint of the reference code')
    parser.add_argument('dst', help='file to write')
    parser.add_argument('--config', required=True, help='config of the same network')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    check_checkpoint(args.src, 'SRC')
    check_writable(args.dst, 'DST')
    cfg = load_config(args.config)
    init_default_scope('mmpretrain')
    model = MODELS.build(cfg.model)
    checkpoint = load_from_local(args.src)
    try:
        state_dict = convert(checkpoint, model)
    except MisfitError as error:
        raise SystemExit(f'{args.src} does not fit {args.config}: {error}') from None
    model.load_state_dict(state_dict)
    meta = dict(mmadvmoe_version=__version__, converted_from=Path(args.src).name, config=Path(args.config).name)
    buffer = io.BytesIO()
    torch.save(dict(meta=meta, state_dict=state_dict), buffer)
    write_atomically(args.dst, seal(buffer.getvalue()))
    print(f'{args.dst}: {len(state_dict)} tensors')
    context = getattr(model.backbone, 'context', None)
    if context is not None and context.gate != 'logit':
        print(
            f'note: the config has gate={context.gate!r}; logits and routes are those of the reference code, the '
            "gradients through its router need backbone.gate='logit'"
        )


if __name__ == '__main__':
    main()
