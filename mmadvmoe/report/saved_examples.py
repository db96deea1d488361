"""Attacked images in a file, with what the routers of tokens made of them.

Letters: B images, T tokens of an image in a layer.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmadvmoe.attacks import Victim
from mmadvmoe.evaluation import Examples
from mmadvmoe.moe import placement_of
from mmadvmoe.runtime.atomic import write_atomically

_PLAIN = tuple(field.name for field in fields(Examples))


@dataclass(frozen=True, eq=False)
class SavedExamples:
    """Attacked images.

    Attributes:
        examples: The images, predictions and routes.
        attack: Name of the attack.
        patches_before, patches_after: For routers of tokens, the first choice of each token, (B, T) for each layer,
            without and with the attack; else empty.
    """

    examples: Examples
    attack: str
    patches_before: tuple[np.ndarray, ...] = ()
    patches_after: tuple[np.ndarray, ...] = ()


def save_examples(path: Path, saved: SavedExamples) -> None:
    """Write the file at once or not at all."""
    content = {name: getattr(saved.examples, name).numpy() for name in _PLAIN}
    content['attack'] = np.array(saved.attack)
    for view in ('before', 'after'):
        for layer, choice in enumerate(getattr(saved, f'patches_{view}')):
            content[f'patches_{view}_{layer}'] = choice
    file = io.BytesIO()
    np.savez_compressed(file, **content)
    write_atomically(path, file.getvalue())


def load_examples(path: Path) -> SavedExamples:
    """Read the file; nothing in it is executed.

    Raises:
        ValueError: An array is missing, or the file is something else.
    """
    with np.load(path, allow_pickle=False) as content:
        missing = [name for name in (*_PLAIN, 'attack') if name not in content]
        if missing:
            raise ValueError(f'{path} lacks {", ".join(missing)}; remove it to have it made anew')
        layers = range(sum(name.startswith('patches_before_') for name in content))
        return SavedExamples(
            Examples(**{name: torch.from_numpy(content[name]) for name in _PLAIN}),
            str(content['attack']),
            tuple(content[f'patches_before_{layer}'] for layer in layers),
            tuple(content[f'patches_after_{layer}'] for layer in layers),
        )


@torch.no_grad()
def patch_choices(victim: Victim, images: Tensor) -> tuple[np.ndarray, ...]:
    """The first choice of each token, (B, T) for each layer; empty where no router reads tokens."""
    if not placement_of(victim.classifier).reads_tokens:
        return ()
    with victim.frozen():
        _, routings = victim.forward_routed(images)
    return tuple(routing.expert[..., 0].cpu().numpy() for routing in routings)
