"""Several attacks as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Optional, Union

import torchattacks
from torch import nn

from mmadvmoe.registry import ATTACKS

from .builder import attack_class, build_attack
from .views import Victim


@ATTACKS.register_module()
class MultiAttack(torchattacks.MultiAttack):
    """torchattacks' MultiAttack by configs: each attack gets the images that those before it did not fool.

    Args:
        model (Victim): The attacked model.
        attacks (Sequence[Mapping]): Configs of at least two attacks, in the same norm where they have a radius.
        verbose (bool): Print the rates of success of each batch. Defaults to False.

    Raises:
        ValueError: There are fewer than two attacks, or their radii are in several norms.
    """

    def __init__(self, model: Union[Victim, nn.Module], attacks: Sequence[Mapping], verbose: bool = False) -> None:
        if not isinstance(attacks, Sequence) or isinstance(attacks, str) or len(attacks) < 2:
            raise ValueError(f"attack type='MultiAttack': attacks={attacks!r} must be a list of at least two configs")
        victim = model if isinstance(model, Victim) else Victim(model)
        built = [build_attack(cfg, victim) for cfg in attacks]
        for cfg in attacks:
            if cfg.get('route') == 'held':
                raise ValueError(
                    "attack type='MultiAttack': give route='held' to it, for all of its attacks, rather than to "
                    f'one of them ({dict(cfg)})'
                )
        super().__init__([each.attack for each in built], verbose)
        norms = {each.norm for each in built if each.eps is not None}
        if len(norms) > 1:
            raise ValueError(
                f"attack type='MultiAttack': attacks have radii in {', '.join(sorted(norms))}; give each norm an "
                'attack of its own, the worst case over all is reported'
            )
        #: The largest radius of its attacks, and its norm.
        self.eps: Optional[float] = max((each.eps for each in built if each.eps is not None), default=None)
        self.norm: str = norms.pop() if norms else 'Linf'


def parts_of(cfg: Mapping) -> list[Mapping]:
    """The configs of the attacks that an attack is made of; itself, if it is a single one."""
    if 'attacks' not in cfg or not issubclass(attack_class(cfg['type']), MultiAttack):
        return [cfg]
    return [part for each in cfg['attacks'] for part in parts_of(each)]
