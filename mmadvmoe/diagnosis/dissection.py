"""Why a mixture of experts fails under attack: attack the whole of it, its routers alone, its experts alone.

:func:`dissect` attacks; :func:`summarize` counts: accuracies in percent, shares in [0, 1], and numbers of images.
:func:`certified_routes` bounds: routes that no perturbation of a threat model can change.

Dimension letters: B images, K classes, N experts, L routers, D decisions of the routers for one image. In bounds D is
the numbers of an image, H the outputs of an affine map, and M linear functions of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmadvmoe.attacks import Pathway, Victim, build_attack
from mmadvmoe.evaluation.outcomes import CLEAN, Outcome
from mmadvmoe.moe import BaseRouting, placement_of

from .subject import Images, ThreatModel, percent

END_TO_END = 'end_to_end'
#: Of bins of decisions: how many at most, and how many decisions each has at least.
_BINS, _IN_A_BIN = 10, 10


@dataclass(frozen=True, eq=False)
class Dissection:
    """The outcomes of B images under attacks on the parts of a model.

    Attributes:
        label: True classes, (B,) int64.
        outcomes: By name; a dense model has ``'clean'`` and ``'end_to_end'`` only:

            * ``'clean'``: no attack;
            * ``'gate'``: PGD through the gate, the plain attack on the whole model;
            * ``'route_pgd'``: RoutePGD, the route held and forced;
            * ``'end_to_end'``: of each image the worse of these two;
            * ``'router'``: the route is attacked, the class is not;
            * ``'experts'``: PGD with the route held at the clean one, and held in the prediction too;
            * ``'experts_free'``: the same images, but the routers decide for them.
        pathways: For each expert, the outcomes of all images when it alone computes all of them: without an attack,
            and under PGD on it. Empty for a dense model.
        num_experts: N; 1 for a dense model.
        num_classes: K.
        widths: Decisions of each router for one image; they sum to D.
        certified: Whether the route of each image provably cannot change, (B,) bool; None where there are no bounds.
        margins: By how much each clean decision was made, (B, D), see :func:`decision_margins`; None for a dense model.
    """

    label: Tensor
    outcomes: Mapping[str, Outcome]
    pathways: Sequence[tuple[Outcome, Outcome]]
    num_experts: int
    num_classes: int
    widths: Sequence[int]
    certified: Tensor | None = None
    margins: Tensor | None = None


def dissect(victim: Victim, data: Images, threat: ThreatModel) -> Dissection:
    """Attack a model as a whole and in parts.

    With N experts that is N + 4 attacks, one of which (RoutePGD) has N + 1 runs.

    Args:
        victim: The model, a mixture with any level of routing, or a dense one.
        data, threat: The images, and ball and steps of all attacks.

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
    certified = certified_routes(victim, data, threat)
    margins, widths = decision_margins(victim, data)
    num_classes = clean.logits.shape[1]
    return Dissection(label, outcomes, pathways, victim.num_experts, num_classes, widths, certified, margins)


@torch.no_grad()
def decision_margins(victim: Victim, data: Images) -> tuple[Tensor, list[int]]:
    """Measure by how much the routers of a mixture decide: the least liked of the chosen experts against the others.

    Returns:
        The difference of logits of each decision, (B, D), on the CPU in double precision; 0 where all experts are
        chosen. All decisions on one token share it. And the number of decisions of each router for one image.
    """
    parts = []
    with victim.frozen():
        for chunk in data.chunks():
            routings = victim.decide_routes(chunk.images)
            parts.append(torch.cat([_margins(routing) for routing in routings], dim=1).cpu())
    return torch.cat(parts), [routing.decisions.shape[1] for routing in routings]


def _margins(routing: BaseRouting) -> Tensor:
    """Of one router, (B, T * K)."""
    best = routing.token_logits.double().topk(min(routing.top_k + 1, routing.num_experts)).values
    return (best[..., routing.top_k - 1] - best[..., -1]).repeat_interleave(routing.top_k, dim=1)


def worse_of(clean: Outcome, first: Outcome, second: Outcome, label: Tensor) -> Outcome:
    """Choose for each image the outcome that is worse for the model.

    That is the one in which it is wrong. If it is wrong in both, the one in which the route is the clean one, for then
    it was not the route that failed; if it is right in both, the one in which the route changed.
    """
    damage = []
    for outcome in (first, second):
        wrong = outcome.prediction != label
        changed = (outcome.expert != clean.expert).any(dim=1)
        damage.append(2 * wrong.int() + (wrong ^ changed).int())
    return second.where(damage[1] > damage[0], first)


def summarize(dissection: Dissection) -> dict:
    """Put everything that a dissection shows into numbers that JSON can hold.

    Returns:
        ``sa``; ``attacks`` with the :func:`attack_summary` of each; ``failures``, see :func:`failures`; for each of
        the ``experts`` its ``sa`` and ``ra`` when it computes all images, and those of the ``best_expert`` of each
        image; ``load`` with the :func:`expert_load` without an attack and under each;
        ``routes_certified``, the share of images whose route provably cannot change, None where there are no bounds;
        ``flips_by_margin``, see :func:`flips_by_margin`, None for a dense model.
    """
    outcomes, label = dissection.outcomes, dissection.label
    clean = outcomes[CLEAN]
    is_moe = bool(dissection.widths)
    right = [[outcome.prediction == label for outcome in pair] for pair in dissection.pathways]
    # An expert that is wrong without an attack is no answer to one.
    right = [(before, before & after) for before, after in right]
    best = [percent(torch.stack(masks).any(dim=0)) for masks in zip(*right)]
    return dict(
        sa=percent(clean.prediction == label),
        attacks={name: attack_summary(clean, o, label) for name, o in outcomes.items() if name != CLEAN},
        failures=failures(dissection) if is_moe else None,
        experts=[dict(expert=n, sa=percent(before), ra=percent(both)) for n, (before, both) in enumerate(right)],
        best_expert=dict(zip(('sa', 'ra'), best)) if is_moe else None,
        # With the route held the load is that without an attack.
        load={name: expert_load(dissection, o) for name, o in outcomes.items() if name != 'experts'} if is_moe else {},
        routes_certified=None if dissection.certified is None else float(dissection.certified.double().mean()),
        flips_by_margin=None if dissection.margins is None else flips_by_margin(dissection),
    )


def attack_summary(clean: Outcome, attacked: Outcome, label: Tensor) -> dict:
    """Count what one attack did.

    Returns:
        ``ra``: right without the attack and under it, in percent of all images. ``route_changed``: share of all images
        with any decision changed. ``decisions_changed``: share of all decisions. ``table``: over the images that are
        right without the attack, ``table[route][prediction]`` images whose route was ``'kept'`` or ``'changed'`` and
        whose prediction was ``'kept'`` or ``'flipped'``.
    """
    right = clean.prediction == label
    robust = right & (attacked.prediction == label)
    decisions = attacked.expert != clean.expert
    changed = decisions.any(dim=1)

    def row(among: Tensor) -> dict[str, int]:
        return dict(kept=int((among & robust).sum()), flipped=int((among & right & ~robust).sum()))

    return dict(
        ra=percent(robust),
        route_changed=float(changed.double().mean()),
        decisions_changed=float(decisions.double().mean()) if decisions.numel() else 0.0,
        table=dict(kept=row(~changed), changed=row(changed)),
    )


def failures(dissection: Dissection) -> dict[str, int]:
    """Count who fails: of the images that are right without an attack, how many ...

    Returns:
        ``standing``: are right end to end. ``experts``: are not, and fell to an attack that left the route as it was,
        on the whole model or with the route held. ``router``: fell only to attacks that changed the route.
    """
    label, outcomes = dissection.label, dissection.outcomes
    right, whole, held = (outcomes[name].prediction == label for name in (CLEAN, END_TO_END, 'experts'))
    kept = (outcomes[END_TO_END].expert == outcomes[CLEAN].expert).all(dim=1)
    fooled, by_experts = right & ~whole, ~held | kept
    return dict(
        standing=int((right & whole).sum()),
        experts=int((fooled & by_experts).sum()),
        router=int((fooled & ~by_experts).sum()),
    )


def flips_by_margin(dissection: Dissection) -> list[dict]:
    """Count how many decisions the attack on the router changed, by the margin by which they were made without it.

    A margin is one of logits, as a multiple of the mean margin of its router. Multiplying its logits by a constant
    changes no decision of a router, so neither logits nor probabilities of two routers compare; and of a router that is
    trained well, nearly all probabilities are so close to 1 that they tell its decisions hardly apart.

    Returns:
        Bins of the decisions in ascending order, ten or as many as leave ten decisions in each, as equal in number as
        margins that are the same, and share a bin, allow. Of each its smallest, mean and largest margin
        (``margin_from``, ``margin_mean``, ``margin_to``), the number of ``decisions``, and ``changed``, the share of
        them that the attack changed.
    """
    of_routers = dissection.margins.double().split(list(dissection.widths), dim=1)
    # A router that is always undecided has margins of 0, which they stay.
    tiny = torch.finfo(torch.float64).tiny
    # In single precision, in which margins of a constant router are the same.
    margins = torch.cat([of_one / of_one.mean().clamp(min=tiny) for of_one in of_routers], dim=1).flatten().float()
    changed = (dissection.outcomes['router'].expert != dissection.outcomes[CLEAN].expert).flatten()
    count = max(min(len(margins) // _IN_A_BIN, _BINS), 1)
    starts = margins.sort().values[torch.arange(count) * len(margins) // count].unique()
    bins = torch.bucketize(margins, starts, right=True) - 1
    found = []
    for index in range(len(starts)):
        inside, flipped = margins[bins == index].double(), changed[bins == index].double()
        ends = dict(margin_from=inside.min(), margin_mean=inside.mean(), margin_to=inside.max(), changed=flipped.mean())
        found.append(dict(decisions=len(inside), **{key: float(value) for key, value in ends.items()}))
    return found


def expert_load(dissection: Dissection, outcome: Outcome) -> dict[str, list]:
    """Measure how experts share the decisions.

    Returns:
        ``per_class``: for each of the K classes, N shares of the decisions for its images that sum to 1; None for a
        class without images. ``per_layer``: for each of the L routers, N shares of its decisions.
    """

    def shares(decisions: Tensor) -> list[float]:
        return [float((decisions == n).double().mean()) for n in range(dissection.num_experts)]

    of_classes = [outcome.expert[dissection.label == c] for c in range(dissection.num_classes)]
    return dict(
        per_class=[shares(decisions) if len(decisions) else None for decisions in of_classes],
        per_layer=[shares(decisions) for decisions in outcome.expert.split(list(dissection.widths), dim=1)],
    )


#: Images bounded at a time.
_BATCH = 64
#: What rounding may add to a margin of float32 logits, in units of the largest logit.
_ROUNDING = 1e-5


@torch.no_grad()
def certified_routes(victim: Victim, data: Images, threat: ThreatModel) -> Tensor | None:
    """Find the images whose route provably is the same everywhere in their ball.

    The others may have a route that an attack can change, or one that the bounds are too loose for. Bounds are those of
    CROWN (Zhang et al., arXiv:1811.00866): each ReLU between two lines, carried back to the image; exact for a linear
    router.

    Args:
        victim, data, threat: The mixture, the images, and the balls around them. In L-inf, [0, 1] is made use of.

    Returns:
        (B,) bool; None where the router does not decide once for the whole image, or is not made of
        :meth:`~mmadvmoe.moe.BaseRouter.affine_maps`.
    """
    if not placement_of(victim.classifier).one_route_per_image:
        return None
    maps = victim.classifier.backbone.router.affine_maps()
    if maps is None:
        return None
    with victim.frozen():
        layers = _as_matrices([lambda x: maps[0](victim.model.normalize(x)), *maps[1:]], data.images[:1])
        parts = [_certified(layers, images.flatten(1).double(), threat) for images in data.images.split(_BATCH)]
    return torch.cat(parts).cpu()


def _as_matrices(maps: Sequence[Callable[[Tensor], Tensor]], image: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Weights (H, H of the map before) and biases (H,) of affine maps, in double precision."""
    layers, x = [], torch.zeros_like(image)
    for affine in maps:
        bias = affine(x)
        with torch.enable_grad():
            weight = torch.autograd.functional.jacobian(affine, x, vectorize=True)
        layers.append((weight.reshape(bias.numel(), -1).double(), bias.flatten().double()))
        x = torch.zeros_like(bias)
    return layers


def _certified(layers: Sequence[tuple[Tensor, Tensor]], images: Tensor, threat: ThreatModel) -> Tensor:
    """Whether the largest logit stays the largest, (B,), for images (B, D)."""
    # Of the ReLUs so far: the slopes of the lines below and above, and how high the latter is at 0, (B, 1, H) each.
    relus: list[tuple[Tensor, Tensor, Tensor]] = []

    def least(rows: Tensor, shift: Tensor) -> Tensor:
        """Lower bounds (B, M) of ``rows`` (B, M, H) times the inputs of the next layer, plus ``shift``."""
        for (below, above, height), (weight, bias) in zip(reversed(relus), reversed(layers[: len(relus)])):
            up, down = rows.clamp(min=0), rows.clamp(max=0)
            shift = shift + (down * height).sum(2)
            rows = up * below + down * above
            shift, rows = shift + rows @ bias, rows @ weight
        if threat.norm == 'Linf':
            low, high = (images - threat.eps).clamp(min=0), (images + threat.eps).clamp(max=1)
            middle, spread = (low + high) / 2, rows.abs() @ ((high - low) / 2)[:, :, None]
        else:
            dual = {'L2': 2.0, 'L1': math.inf}[threat.norm]
            middle, spread = images, threat.eps * rows.norm(p=dual, dim=2, keepdim=True)
        return (rows @ middle[:, :, None] - spread).squeeze(2) + shift

    for weight, bias in layers[:-1]:
        low, high = least(weight[None], bias), -least(-weight[None], -bias)
        chord = (high / (high - low).clamp(min=1e-300)).where(low < 0, torch.ones_like(low)).clamp(min=0)
        # Below an undecided ReLU the line of slope 0 or 1, whichever leaves less between.
        below = ((low >= 0) | (low < 0) & (high > -low)).to(images)
        relus.append(tuple(part[:, None] for part in (below, chord, (-low * chord).where(low < 0, low * 0))))
    weight, bias = layers[-1]
    point = images
    for number, (one_weight, one_bias) in enumerate(layers):
        point = (point.relu() if number else point) @ one_weight.T + one_bias
    chosen = point.argmax(1)
    margin = least(weight[chosen][:, None] - weight, bias[chosen][:, None] - bias)
    others = margin.scatter(1, chosen[:, None], torch.inf).amin(1)
    return others > _ROUNDING * point.abs().amax(1)
