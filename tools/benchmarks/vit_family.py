"""The transformers of ``benchmark_moe.py``: time and memory of token experts against the dense network and the gates.

The limit of time is the dense network plus the linear maps of all gates, each alone on the same batch; that of memory
is the peak of an attack step of the dense network plus the weights that the mixture has more. Nothing is dropped.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from mmpretrain.registry import MODELS
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from mmadvmoe.moe import ExpertFFN, router_modules

Step = Callable[[nn.Module, Tensor], None]
# Different batches have different loads per expert.
NUM_BATCHES = 2


class Gates(nn.Module):
    """The gates of a network alone: images (B, 3, H, W), as many of whose pixels as needed stand for tokens."""

    def __init__(self, routers: list[nn.Module], num_tokens: int) -> None:
        super().__init__()
        self.routers = nn.ModuleList(routers)
        self.num_tokens = num_tokens

    def forward(self, images: Tensor) -> Tensor:
        """The logits of all gates, (L, B, T, N)."""
        width = self.routers[0].weight.shape[1]
        tokens = images.flatten(1)[:, : self.num_tokens * width].unflatten(1, (self.num_tokens, width))
        return torch.stack([router(tokens) for router in self.routers])


def build_pair(config: dict, num_experts: int) -> tuple[nn.Module, nn.Module]:
    """The dense network and the mixture, in eval mode and without parameter gradients."""
    pair = []
    for cfg in (config['backbone'], {**config, 'num_experts': num_experts}):
        network = MODELS.build(copy.deepcopy(cfg)).requires_grad_(False)
        network.eval()  # MMPretrain's backbones do not return themselves here
        pair.append(network)
    return tuple(pair)


@torch.no_grad()
def spread_tokens(moe: nn.Module, images: Tensor) -> None:
    """Fit the gates, in the order of the network, to random scores, so that every expert gets its share of tokens."""

    def fit(layer: ExpertFFN, args: tuple[Tensor]) -> None:
        tokens = args[0].flatten(0, -2)
        # On the CPU, which has a solver for tokens that do not span the space.
        scores = torch.randn(len(tokens), layer.num_experts)
        layer.router.weight.copy_(torch.linalg.lstsq(tokens.cpu(), scores, driver='gelsd').solution.T)

    hooks = [layer.register_forward_pre_hook(fit) for layer in moe.expert_layers()]
    moe(images)
    for hook in hooks:
        hook.remove()


def bytes_of(*networks: nn.Module) -> int:
    """What parameters and buffers take."""
    tensors = [tensor for network in networks for tensor in (*network.parameters(), *network.buffers())]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def peak_bytes(network: nn.Module, images: Tensor, step: Step) -> int:
    """The weights, and the most that ``step`` has allocated at a time, as the allocator reports it."""
    if images.device.type == 'cuda':
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(network, images)
        return bytes_of(network) + torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step(network, images)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / 'trace.json'
        recorded.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())['traceEvents']
    changes = [(event['ts'], event['args']['Bytes']) for event in events if event.get('name') == '[memory]']
    live = peak = 0
    for _, change in sorted(changes, key=lambda item: item[0]):
        live += change
        peak = max(peak, live)
    return bytes_of(network) + peak


def run(args: argparse.Namespace, config: dict, time_rounds: Callable[..., dict], steps: dict[str, Step]) -> list[dict]:
    """One row per number of tokens and experts.

    Args:
        args (argparse.Namespace): Of ``benchmark_moe.py``.
        config (dict): The backbone of the mixture; its images are squares of ``args.tokens`` patches.
        time_rounds (Callable): That of ``benchmark_moe.py``.
        steps (dict[str, Callable]): What is timed, ``forward`` and ``attack``.
    """
    rows = []
    for tokens in args.tokens:
        side = math.isqrt(tokens) * config['backbone']['patch_size']
        config['backbone']['img_size'] = side
        batches = torch.rand(NUM_BATCHES, args.batch_size, 3, side, side, device=args.device)
        for num_experts in args.num_experts:
            rows.append(_benchmark(config, tokens, num_experts, batches, args.rounds, time_rounds, steps))
    return rows


def _benchmark(
    config: dict,
    tokens: int,
    num_experts: int,
    batches: Tensor,
    rounds: int,
    time_rounds: Callable[..., dict],
    steps: dict[str, Step],
) -> dict:
    dense, moe = (network.to(batches.device) for network in build_pair(config, num_experts))
    spread_tokens(moe, batches[0])
    routings = moe.forward_routed(batches[-1])[1]
    loads = [load for routing in routings for load in routing.counts]
    gates = Gates(router_modules(moe), routings[0].expert.shape[1])
    print(f'{tokens} patches, N = {num_experts}, {min(loads)} to {max(loads)} tokens per expert, layer and batch')
    row: dict = dict(tokens=tokens, num_experts=num_experts)
    for kind, step in steps.items():
        seconds = time_rounds(dict(dense=dense, gates=gates, moe=moe), batches, rounds, step)
        times = {name: torch.tensor(values) for name, values in seconds.items()}
        ratios = times['moe'] / (times['dense'] + times['gates'])
        low, row[f'{kind}_over_limit'], high = ratios.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
        cell = f'over_limit {row[f"{kind}_over_limit"]:6.3f} [{low:.3f}, {high:.3f}]'
        medians = ', '.join(f'{name} {statistics.median(values) * 1e3:.1f}' for name, values in seconds.items())
        print(f'  {kind:7s}  {cell}   ms: {medians}', flush=True)
    weights = bytes_of(moe) - bytes_of(dense)
    peaks = {name: peak_bytes(model, batches[0], steps['attack']) for name, model in (('dense', dense), ('moe', moe))}
    row['peak_memory_over_limit'] = peaks['moe'] / (peaks['dense'] + weights)
    megabytes = ', '.join(f'{name} {value / 2**20:.1f}' for name, value in (*peaks.items(), ('experts', weights)))
    print(f'  memory   over_limit {row["peak_memory_over_limit"]:6.3f}   MiB: {megabytes}', flush=True)
    return row
