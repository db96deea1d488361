"""Find the dense network inside of a checkpoint that experts are to begin with."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Union

from mmengine.logging import print_log
from mmengine.model import PretrainedInit
from mmengine.runner import CheckpointLoader
from torch import Tensor, nn

from .expert_layers import ExpertLayer

# Where the weights of a backbone stand: in a checkpoint of it alone, and in that of a classifier; of DDP, too.
_PREFIXES = (None, 'backbone.', 'module.', 'module.backbone.')
_CURE = (
    'set backbone.backbone.init_cfg=dict(type="Pretrained", checkpoint=..., prefix=...) to a checkpoint of the same '
    'dense network with the same widths, and prefix to what stands in front of its names'
)


def with_found_prefix(
    init_cfg: Union[None, Mapping[str, Any], Sequence[Mapping[str, Any]]], wanted: Mapping[str, Tensor]
) -> Any:
    """Give the ``init_cfg`` of a dense network with the prefix under which its checkpoint has the wanted layers.

    ``wanted`` are the parameters of one expert of each layer, by their names in the dense network. Whatever is not of
    type ``Pretrained`` stays as it is.

    Raises:
        ValueError: A checkpoint has none of them, under any prefix.
    """
    if isinstance(init_cfg, (list, tuple)):
        return [with_found_prefix(each, wanted) for each in init_cfg]
    if not init_cfg or init_cfg['type'] not in ('Pretrained', PretrainedInit):
        return init_cfg
    file = init_cfg['checkpoint']
    content = CheckpointLoader.load_checkpoint(file, map_location='cpu', logger='silent')
    found = content.get('state_dict', content)
    given = init_cfg.get('prefix')
    for prefix in dict.fromkeys((given, *_PREFIXES)):
        before = '' if prefix is None else prefix if prefix.endswith('.') else f'{prefix}.'
        if any(getattr(found.get(before + name), 'shape', None) == value.shape for name, value in wanted.items()):
            if prefix != given:
                print_log(
                    f'{file} has the layers of the experts under prefix={prefix!r}, not {given!r}',
                    'current',
                    logging.INFO,
                )
            return {**init_cfg, 'prefix': prefix}
    name, value = next(iter(wanted.items()))
    others = [f'{key} {tuple(each.shape)}' for key, each in found.items() if key.endswith(name)]
    raise ValueError(
        f'no layer that gets experts is in the checkpoint {file!r} (prefix={given!r}): {name} {tuple(value.shape)} is '
        f'wanted, there is {others[0] if others else ", ".join(list(found)[:3]) + ", ..."}. To upcycle, {_CURE}'
    )


def check_has_experts(content: Mapping[str, Any], model: nn.Module, file: str) -> None:
    """Check that what is loaded into a mixture, the content of a checkpoint file, is not that of a dense network.

    Raises:
        ValueError: No parameter of an expert layer is there.
    """
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, ExpertLayer))
    wanted = [f'{name}.{key}' for name, module in layers for key, _ in module.named_parameters(recurse=False)]
    state = content.get('state_dict', content)
    if wanted and not any(name in state or f'module.{name}' in state for name in wanted):
        raise ValueError(
            f'load_from={file!r} has no expert layer of this mixture ({wanted[0]}, ...), so that it would begin from '
            f'scratch but for what is shared. To make experts of a dense network, leave load_from out and {_CURE}'
        )
