"""The numbers of a dissection: accuracies in percent, shares in [0, 1], and counts of images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch
from torch import Tensor

from mmadvmoe.evaluation.outcomes import CLEAN, Outcome

from .dissection import END_TO_END, Dissection
from .trials import percent


def summarize(dissection: Dissection) -> dict:
    """Everything that a dissection shows, in numbers that JSON can hold.

    Returns:
        ``sa``; ``attacks`` with the :func:`attack_summary` of each; ``failures``, see :func:`failures`; for each of
        the ``experts`` its ``sa`` and ``ra`` when it computes all images, and those of the ``best_expert`` of each
        image; ``load`` with the :func:`expert_load` without an attack and under each.
    """
    outcomes, label = dissection.outcomes, dissection.label
    clean = outcomes[CLEAN]
    is_moe = bool(dissection.widths)
    right = [[outcome.prediction == label for outcome in pair] for pair in dissection.pathways]
    best = None
    if is_moe:
        # An expert that is wrong without an attack is no answer to one.
        both = torch.stack([before & after for before, after in right]).any(dim=0)
        best = dict(sa=percent(torch.stack([before for before, _ in right]).any(dim=0)), ra=percent(both))
    return dict(
        sa=percent(clean.prediction == label),
        attacks={name: attack_summary(clean, o, label) for name, o in outcomes.items() if name != CLEAN},
        failures=failures(dissection) if is_moe else None,
        experts=[
            dict(expert=n, sa=percent(before), ra=percent(before & after)) for n, (before, after) in enumerate(right)
        ],
        best_expert=best,
        # With the route frozen the load is that without an attack.
        load={name: expert_load(dissection, o) for name, o in outcomes.items() if name != 'experts'} if is_moe else {},
    )


def attack_summary(clean: Outcome, attacked: Outcome, label: Tensor) -> dict:
    """What one attack did.

    Returns:
        ``ra``: right without the attack and under it, in percent of all images. ``route_changed``: share of all images
        with any decision changed. ``decisions_changed``: share of all decisions. ``table``: over the images that are
        right without the attack, ``table[route][prediction]`` images whose route was ``'kept'`` or ``'changed'`` and
        whose prediction was ``'kept'`` or ``'flipped'``.
    """
    right = clean.prediction == label
    stays = right & (attacked.prediction == label)
    decisions = attacked.expert != clean.expert
    changed = decisions.any(dim=1)

    def row(among: Tensor) -> dict[str, int]:
        return dict(kept=int((among & stays).sum()), flipped=int((among & right & ~stays).sum()))

    return dict(
        ra=percent(stays),
        route_changed=float(changed.double().mean()),
        decisions_changed=float(decisions.double().mean()) if decisions.numel() else 0.0,
        table=dict(kept=row(~changed), changed=row(changed)),
    )


def failures(dissection: Dissection) -> dict[str, int]:
    """Who fails: of the images that are right without an attack, how many ...

    Returns:
        ``standing``: are right end to end. ``experts``: are not, and fell to an attack that left the route as it was,
        on the whole model or with the route frozen. ``router``: fell only to attacks that changed the route.
    """
    label, outcomes = dissection.label, dissection.outcomes
    right, whole, frozen = (outcomes[name].prediction == label for name in (CLEAN, END_TO_END, 'experts'))
    kept = (outcomes[END_TO_END].expert == outcomes[CLEAN].expert).all(dim=1)
    fallen, by_experts = right & ~whole, ~frozen | kept
    return dict(
        standing=int((right & whole).sum()),
        experts=int((fallen & by_experts).sum()),
        router=int((fallen & ~by_experts).sum()),
    )


def expert_load(dissection: Dissection, outcome: Outcome) -> dict[str, list]:
    """How experts share the decisions.

    Returns:
        ``per_class``: for each of the K classes, N shares of the decisions for its images that sum to 1; None for a
        class without images. ``per_layer``: for each of the L routers, N shares of its decisions.
    """
    experts = range(dissection.num_experts)
    per_class: list[Optional[list[float]]] = []
    for c in range(dissection.num_classes):
        mine = outcome.expert[dissection.label == c]
        per_class.append(_shares(mine, experts) if len(mine) else None)
    per_layer = [_shares(part, experts) for part in outcome.expert.split(list(dissection.widths), dim=1)]
    return dict(per_class=per_class, per_layer=per_layer)


def _shares(decisions: Tensor, experts: Sequence[int]) -> list[float]:
    return [float((decisions == n).double().mean()) for n in experts]
