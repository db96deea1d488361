"""Why a mixture of experts fails under attack: attack the whole of it, its routers alone, its experts alone.

Dimension letters: B images, K classes, N experts, L routers, D decisions of the routers for one image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmadvmoe.attacks import Pathway, Victim, build_attack
from mmadvmoe.evaluation.outcomes import CLEAN, Outcome

from .threat_model import ThreatModel
from .trials import Images

END_TO_END = 'end_to_end'


@dataclass(frozen=True, eq=False)
class Dissection:
    """What became of B images under attacks on the parts of a model.

    Attributes:
        label: True classes, (B,) int64.
        outcomes: By name; a dense model has ``'clean'`` and ``'end_to_end'`` only:

            * ``'clean'``: no attack;
            * ``'gate'``: PGD through the gate, the plain attack on the whole model;
            * ``'route_pgd'``: RoutePGD, the route held and forced;
            * ``'end_to_end'``: of each image the worse of these two;
            * ``'router'``: the route is attacked, the class is not;
            * ``'experts'``: PGD with the route frozen at the clean one, and frozen in the prediction too;
            * ``'experts_free'``: the same images, but the routers decide for them.
        pathways: For each expert, the outcomes of all images when it alone computes all of them: without an attack,
            and under PGD on it. Empty for a dense model.
        num_experts: N; 1 for a dense model.
        num_classes: K.
        widths: Decisions of each router for one image; they sum to D.
    """

    label: Tensor
    outcomes: Mapping[str, Outcome]
    pathways: Sequence[tuple[Outcome, Outcome]]
    num_experts: int
    num_classes: int
    widths: Sequence[int]


def dissect(victim: Victim, data: Images, threat: ThreatModel) -> Dissection:
    """Attack a model as a whole and in parts.

    With N experts that is N + 4 attacks, one of which (RoutePGD) has N + 1 runs.

    Args:
        victim: The model, a mixture with any level of routing, or a dense one.
        data: The images.
        threat: Ball and steps of all attacks.

    Raises:
        RuntimeError: An attack fails.
        FloatingPointError: A logit is not finite.
    """
    clean = data.classified(victim, data.images)

    def attacked(name: str, kind: str, model: Victim = victim, **others: str) -> Tensor:
        return data.attacked(name, build_attack(threat.attack(kind, **others), model))

    outcomes = {CLEAN: clean}
    label = data.labels.cpu()
    if not victim.num_routers:
        outcomes[END_TO_END] = data.classified(victim, attacked('PGD', 'PGD'), 'PGD')
        return Dissection(label, outcomes, (), 1, clean.logits.shape[1], ())
    for key, kind in (('gate', 'PGD'), ('route_pgd', 'RoutePGD'), ('router', 'RouterAttack')):
        outcomes[key] = data.classified(victim, attacked(key, kind), key)
        if key == 'route_pgd':
            outcomes[END_TO_END] = worse_of(clean, outcomes['gate'], outcomes['route_pgd'], label)
    held = attacked('experts', 'PGD', route='held')
    outcomes['experts'] = data.classified(victim, held, 'experts', clean.expert)
    outcomes['experts_free'] = data.classified(victim, held, 'experts_free')
    pathways = []
    for expert in range(victim.num_experts):
        pathway, name = Pathway(victim, expert), f'expert {expert}'
        adversarial = attacked(name, 'PGD', pathway)
        pathways.append((data.classified(pathway, data.images), data.classified(pathway, adversarial, name)))
    with torch.no_grad(), victim.frozen():
        widths = [routing.decisions.shape[1] for routing in victim.forward_routed(data.images[:1])[1]]
    return Dissection(label, outcomes, pathways, victim.num_experts, clean.logits.shape[1], widths)


def worse_of(clean: Outcome, first: Outcome, second: Outcome, label: Tensor) -> Outcome:
    """Of each image the outcome that is worse for the model.

    That is the one in which it is wrong. If it is wrong in both, the one in which the route is the clean one, for then
    it was not the route that failed; if it is right in both, the one in which the route changed.
    """
    damage = []
    for outcome in (first, second):
        wrong = outcome.prediction != label
        changed = (outcome.expert != clean.expert).any(dim=1)
        damage.append(2 * wrong.int() + (wrong ^ changed).int())
    return second.where(damage[1] > damage[0], first)
