"""How many channels of each group fit into a budget of multiply-adds."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from mmadvmoe.cost import flop_analyzer

from .channels import ChannelGroup


class _CostModel:
    """Multiply-adds of a network as a function of the channels that its groups keep."""

    def __init__(self, classifier: nn.Module, groups: Sequence[ChannelGroup], input_shape: Sequence[int]) -> None:
        analyzer = flop_analyzer(classifier, input_shape)
        self.groups = groups
        # Of each layer: its multiply-adds, and the groups that scale them.
        scaled: dict[str, list[int]] = {}
        for index, group in enumerate(groups):
            for name in (*group.producers, *group.norms, *group.consumers):
                scaled.setdefault(name, []).append(index)
        self.layers = [(analyzer.total(f'classifier.{name}'), indices) for name, indices in scaled.items()]
        self.rest = analyzer.total() - sum(flops for flops, _ in self.layers)

    def __call__(self, counts: Sequence[int]) -> float:
        shares = [count / group.channels for count, group in zip(counts, self.groups)]
        total = float(self.rest)
        for flops, indices in self.layers:
            for index in indices:
                flops = flops * shares[index]
            total += flops
        return total


def fit_channels(
    classifier: nn.Module, groups: Sequence[ChannelGroup], input_shape: Sequence[int], target_gflops: float
) -> list[int]:
    """Choose how many channels each group keeps, so that the network costs as much as a target and no more.

    Every group keeps the same share, as near as whole channels allow; what the rounding leaves of the budget goes
    to the groups with the smallest shares.

    Args:
        classifier (nn.Module): The dense network, in eval mode.
        groups (Sequence[ChannelGroup]): As :func:`find_channel_groups` gives them.
        input_shape (Sequence[int]): (C, H, W).
        target_gflops (float): 1e9 multiply-adds per image.

    Returns:
        list[int]: For each group, at least 1.

    Raises:
        ValueError: The target is below what one channel in each group costs, or above the dense network.
    """
    cost = _CostModel(classifier, groups, input_shape)
    target = target_gflops * 1e9
    least, most = cost([1] * len(groups)), cost([group.channels for group in groups])
    if not least <= target <= most * (1 + 1e-9):
        raise ValueError(
            f'target: its network costs {target:.4g} multiply-adds, but by removing channels from this one only '
            f'{least:.4g} to {most:.4g} can be reached'
        )
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(_at(middle, groups)) <= target else (low, middle)
    counts = _at(low, groups)
    while True:
        affordable = []
        for index, group in enumerate(groups):
            more = counts[:index] + [counts[index] + 1] + counts[index + 1 :]
            if counts[index] < group.channels and cost(more) <= target:
                affordable.append((counts[index] / group.channels, index))
        if not affordable:
            return counts
        counts[min(affordable)[1]] += 1


def _at(share: float, groups: Sequence[ChannelGroup]) -> list[int]:
    return [max(1, round(share * group.channels)) for group in groups]
