"""Watch over the routers of a network in training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from mmengine.dist import all_reduce
from mmengine.hooks import Hook
from mmengine.optim import AmpOptimWrapper, ApexOptimWrapper
from mmengine.runner import IterBasedTrainLoop, Runner
from mmpretrain.registry import HOOKS
from torch import Tensor

from mmadvmoe.models import NonFiniteError
from mmadvmoe.moe import Routing, router_modules, split_parameters
from mmadvmoe.utils import bare_model, single_wrappers

SIDES = ('clean', 'adversarial')


@HOOKS.register_module()
class RouterHealthHook(Hook):
    """Log what the routers do, warn of starving experts, and stop on gradients that are not finite.

    Takes ``routing_records`` from the model, which :class:`RobustClassifier` writes in each training step: the routings
    of the clean and of the adversarial images, one per router; with ``reuse_batch`` those of both turns. Each report
    has

    - ``router/share_clean_0``, ``router/share_adversarial_0``...: share of the images that each expert got;
    - ``router/entropy``: mean entropy of the router's softmax for one image, in nats, in [0, ln N];
    - ``router/load_entropy``: entropy of the shares, in nats, in [0, ln N]; 0 when one expert gets all;
    - ``router/max_logit``: the largest absolute value of a router logit;
    - ``router/route_changed``: share of the images that the attack sent to another expert;
    - ``router/dropped``: share of the choices that no expert computed for want of capacity, for routers of tokens
      that drop any.

    For routers of tokens, read "tokens" for "images" (with top K > 1, "choices of tokens"). Entropies are those of the
    clean images, or of the adversarial ones where training sees no others. With several routers there is one such set
    for each, ``router/<index>/...``, and ``router/...`` is their mean (for ``max_logit`` their maximum). Models without
    a router are left alone.

    Args:
        interval (int, optional): Report every so many iterations. Defaults to None: at the end of each epoch; in
            training by iterations, as often as it validates.
        starve_below (float): Warn when an expert gets less than this part of an equal share 1/N of all images since
            the last report, in [0, 1]. Defaults to 0.1.

    Raises:
        ValueError: An argument is out of range.

    Examples:
        >>> custom_hooks = [dict(type='RouterHealthHook')]
    """

    def __init__(self, interval: int | None = None, starve_below: float = 0.1) -> None:
        if interval is not None and interval < 1:
            raise ValueError(f'RouterHealthHook: interval={interval}; allowed: None or 1 and more')
        if not 0 <= starve_below <= 1:
            raise ValueError(f'RouterHealthHook: starve_below={starve_below}; allowed: [0, 1]')
        self.interval = interval
        self.starve_below = starve_below
        self._every = interval  # of this run
        self._watches = False
        self._tally: _Tally | None = None
        self._handles: list[Any] = []

    def before_train(self, runner: Runner) -> None:
        """Start watching the gradients, and the routers if there are any.

        Raises:
            TypeError: The model has routers but does not tell what they decide.
        """
        self.after_train(runner)  # of a training that failed
        self._tally = None
        by_iterations = isinstance(runner.train_loop, IterBasedTrainLoop)
        self._every = self.interval or (runner.train_loop.val_interval if by_iterations else None)
        model = bare_model(runner.model)
        self._watches = bool(router_modules(model))
        if self._watches and not hasattr(model, 'routing_records'):
            raise TypeError(
                f'RouterHealthHook: a {type(model).__name__} does not tell where its routers send images; set '
                "model.type='RobustClassifier' or remove the hook"
            )
        names = {id(p): (name, group) for group, own in split_parameters(model).items() for name, p in own}
        for member in single_wrappers(runner.optim_wrapper):
            # A loss scaler produces such gradients on purpose, and skips the step itself.
            if not isinstance(member, (AmpOptimWrapper, ApexOptimWrapper)):
                self._handles.append(member.optimizer.register_step_pre_hook(partial(_check_gradients, names)))

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        """Add the routes of the iteration to the tally."""
        if self._watches:
            records = bare_model(runner.model).routing_records
            for record in records.values():
                if self._tally is None:
                    self._tally = _Tally(record.clean or record.adversarial)
                self._tally.add(record.clean, record.adversarial)
            records.clear()
        if self._every is not None and self.every_n_train_iters(runner, self._every):
            self._report(runner, runner.iter + 1)

    def after_train_epoch(self, runner: Runner) -> None:
        """Report on the epoch."""
        if self._every is None or isinstance(runner.train_loop, IterBasedTrainLoop):
            self._report(runner, runner.iter)

    def after_train(self, runner: Runner) -> None:
        """Stop watching the gradients."""
        while self._handles:
            self._handles.pop().remove()

    def _report(self, runner: Runner, step: int) -> None:
        tally, self._tally = self._tally, None
        if tally is None:
            return
        tally.reduce()
        per_router = tally.measure()
        mean = {key: sum(scalars[key] for scalars in per_router) / len(per_router) for key in per_router[0]}
        mean['max_logit'] = max(scalars['max_logit'] for scalars in per_router)
        scalars = {f'router/{key}': value for key, value in mean.items()}
        if len(per_router) > 1:
            scalars |= {f'router/{i}/{key}': value for i, own in enumerate(per_router) for key, value in own.items()}
        for key, value in scalars.items():
            runner.message_hub.update_scalar(key, value)
        runner.visualizer.add_scalars(scalars, step=step)
        runner.logger.info(_summary(mean, tally.num_experts, len(per_router)))
        self._warn_of_starving(runner, tally, step)

    def _warn_of_starving(self, runner: Runner, tally: _Tally, step: int) -> None:
        least = self.starve_below / tally.num_experts
        starving = [
            f'expert {expert} of router {router} ({share:.2%})'
            for router, shares in enumerate(tally.shares.tolist())
            for expert, share in enumerate(shares)
            if share < least
        ]
        if starving:
            # With the iteration, as MMEngine's logger drops a warning that it has given before.
            runner.logger.warning(
                f'Starving up to iteration {step}: {", ".join(starving)} got less than {least:.2%} of the images (or '
                f'tokens), where an equal share is {1 / tally.num_experts:.2%}. The network is losing the capacity of '
                'these experts; a router loss that balances them, a smaller learning rate of the router or clipping of '
                'its gradient may help'
            )


def _check_gradients(
    names: dict[int, tuple[str, str]], optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict
) -> None:
    """Refuse a step on gradients that are not finite; ``names`` are those of parameters and their groups, by id."""
    parameters = [p for g in optimizer.param_groups for p in g['params'] if p.grad is not None]
    # The largest magnitude is finite exactly when all are; a sum of squares could overflow.
    largest = [torch.linalg.vector_norm(p.grad, math.inf) for p in parameters]
    finite = torch.stack(largest).isfinite().tolist() if largest else []
    for parameter, is_finite in zip(parameters, finite):
        if not is_finite:
            name, group = names[id(parameter)]
            raise NonFiniteError(f'gradient of {name}', group=group)


class _Tally:
    """Sums over the batches of one report.

    Letters: S sides (clean, adversarial), L routers, N experts.
    """

    def __init__(self, routings: Sequence[Routing]) -> None:
        self.num_experts = routings[0].num_experts
        num_routers, device = len(routings), routings[0].expert.device
        self.counts = torch.zeros(len(SIDES), num_routers, self.num_experts, dtype=torch.float64, device=device)
        # Decisions whose clean and adversarial versions are both known; softmaxes in the entropy; choices dropped.
        self.pairs, self.softmaxes, self.dropped = torch.zeros(3, num_routers, dtype=torch.float64)
        zeros = torch.zeros(num_routers, dtype=torch.float64, device=device)
        self.changed, self.entropy, self.max_logit = zeros, zeros.clone(), zeros.clone()

    def add(self, clean: Sequence[Routing], adversarial: Sequence[Routing]) -> None:
        """Add a batch: the routings of each router, of either side or both."""
        for side, routings in enumerate((clean, adversarial)):
            if routings:
                self.counts[side] += torch.stack([routing.load for routing in routings])
                largest = [routing.logits.abs().amax().double() for routing in routings]
                self.max_logit = torch.maximum(self.max_logit, torch.stack(largest))
                self.dropped += torch.tensor([routing.dropped for routing in routings])
        self.entropy = self.entropy + torch.stack([_entropy(r) for r in clean or adversarial])
        self.softmaxes += torch.tensor([r.logits.numel() // r.num_experts for r in clean or adversarial])
        if clean and adversarial:
            self.pairs += torch.tensor([routing.decisions.numel() for routing in clean])
            self.changed = self.changed + torch.stack([_changed(c, a) for c, a in zip(clean, adversarial)])

    def reduce(self) -> None:
        """Sum over all processes."""
        sums = torch.cat([self.pairs, self.softmaxes, self.dropped]).to(self.entropy.device)
        sums = torch.cat([self.counts.flatten(), sums, self.changed, self.entropy])
        all_reduce(sums)
        all_reduce(self.max_logit, op='max')
        sizes = [self.counts.numel(), *[len(self.pairs)] * 5]
        counts, self.pairs, self.softmaxes, self.dropped, self.changed, self.entropy = sums.cpu().split(sizes)
        self.counts = counts.view_as(self.counts)

    @property
    def shares(self) -> Tensor:
        """Share of all images that each expert got, clean and adversarial together, (L, N)."""
        counts = self.counts.sum(0)
        return counts / counts.sum(1, keepdim=True)

    def measure(self) -> list[dict[str, float]]:
        """The scalars of each router."""
        seen = [side for side in range(len(SIDES)) if self.counts[side].any()]
        measured = []
        for router, max_logit in enumerate(self.max_logit.tolist()):
            counts = {SIDES[side]: self.counts[side, router] for side in seen}
            shares = {side: count / count.sum() for side, count in counts.items()}
            scalars = {
                f'share_{side}_{n}': each for side, share in shares.items() for n, each in enumerate(share.tolist())
            }
            scalars['entropy'] = float(self.entropy[router] / self.softmaxes[router])
            scalars['load_entropy'] = float(torch.special.entr(shares[SIDES[seen[0]]]).sum())
            scalars['max_logit'] = max_logit
            if self.pairs[router]:
                scalars['route_changed'] = float(self.changed[router] / self.pairs[router])
            if self.dropped.any():
                scalars['dropped'] = float(self.dropped[router] / self.counts[:, router].sum())
            measured.append(scalars)
        return measured


def _changed(clean: Routing, adversarial: Routing) -> Tensor:
    """Decisions of the router that an attack changes, by its logits: without noise, and also where they were held."""
    own, before = (r.token_logits.topk(r.top_k, dim=-1).indices.sort(-1).values for r in (adversarial, clean))
    return (own != before).sum()


def _entropy(routing: Routing) -> Tensor:
    """Entropy of the router's softmax, summed over the images or tokens, in nats."""
    return torch.special.entr(routing.logits.double().softmax(dim=-1)).sum()


def _summary(scalars: dict[str, float], num_experts: int, num_routers: int) -> str:
    """One line for the log."""
    parts = [f'Router(train) mean of {num_routers}:' if num_routers > 1 else 'Router(train)']
    for side in SIDES:
        if f'share_{side}_0' in scalars:
            shares = (scalars[f'share_{side}_{expert}'] for expert in range(num_experts))
            parts.append(f'share {side}: ' + '/'.join(f'{share:.3f}' for share in shares))
    if 'route_changed' in scalars:
        parts.append(f'route changed: {scalars["route_changed"]:.2%}')
    of_the_load = f'(of the load {scalars["load_entropy"]:.3f}, at most {math.log(num_experts):.3f})'
    return '  '.join(
        [*parts, f'entropy: {scalars["entropy"]:.3f} {of_the_load}', f'max |logit|: {scalars["max_logit"]:.3g}']
    )
