"""Time a mixture of experts against its limit and against computing all experts and masking.

The limit is the least that hard routing can cost: the dense network of one pathway plus the router, each alone on the
same batch, prepared like the mixture: in the same mode, and on a CPU in the memory layout that the mixture chooses.
Everything is timed in turn in one process, round by round, and ratios are taken inside a round, so a machine that slows
down for a while changes both sides. Table and JSON give the median ratio over the rounds.

``--family vit`` times token experts instead; see ``vit_family.py`` beside this file.

Weights are drawn at random; the router is set so that it spreads the images over all experts. What is timed:

- ``forward``: without gradients, in eval mode, as in an evaluation;
- ``attack``: a forward and the gradient of the images, through the router's gate too, in eval mode with frozen weights;
- ``training``: a forward and the gradient of all weights, in train mode, so that norms use the statistics of the batch.
"""

import argparse
import copy
import importlib.util
import json
import math
import statistics
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import timing
import torch
import vit_family
from mmpretrain.registry import MODELS
from torch import Tensor, nn

from mmadvmoe.runtime.launch import load_config

ROOT = Path(__file__).resolve().parents[2]
# Different batches have different loads per expert, and each load is a shape of its own to the library underneath.
NUM_BATCHES = 4
#: What the families take unless told otherwise.
FAMILIES = dict(
    cnn=dict(config=ROOT / 'configs/advmoe_resnet18_cifar10.py', num_experts=[2, 4, 8, 16], batch_size=64),
    vit=dict(config=ROOT / 'configs/advmoe_vit-small-moe_imagenet.py', num_experts=[4, 8, 16], batch_size=32),
)
#: The ratios of a row, each of every kind of step.
RATIOS = ('over_limit', 'speedup_over_masked')
MASKED_EVERY = 5  # The masked form takes up to 2 N times as long: it is timed in every fifth round only.


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--family', choices=FAMILIES, default='cnn')
    parser.add_argument('--config', help=_defaults('config'))
    parser.add_argument('--num-experts', type=int, nargs='+', metavar='N', help=_defaults('num_experts'))
    parser.add_argument('--batch-size', type=int, help=_defaults('batch_size'))
    parser.add_argument('--image-size', type=int, default=32, help='pixels, of the family cnn [%(default)s]')
    parser.add_argument(
        '--tokens', type=int, nargs='+', default=[64, 196], help='patches, square numbers, of the family vit [64 196]'
    )
    parser.add_argument('--rounds', type=int, default=30)
    parser.add_argument('--threads', type=int, help='threads of one operation [what PyTorch takes]')
    timing.add_device(parser)
    parser.add_argument('--json', help='file to write the rows to')
    parser.set_defaults(**FAMILIES[parser.parse_known_args()[0].family])
    args = parser.parse_args()
    timing.check_device(parser, args)
    for name in ('batch_size', 'image_size', 'rounds', 'threads'):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f'--{name.replace("_", "-")} {value} must be at least 1')
    if min(args.num_experts) < 2:
        parser.error(f'--num-experts {min(args.num_experts)}: a mixture has at least 2 experts')
    for tokens in args.tokens:
        if tokens < 1 or math.isqrt(tokens) ** 2 != tokens:
            parser.error(f'--tokens {tokens} must be a square number, the patches of a square image')
    return args


def _defaults(name: str) -> str:
    return f'[{", ".join(f"{family}: {values[name]}" for family, values in FAMILIES.items())}]'.replace(f'{ROOT}/', '')


def load_masked_form() -> type[nn.Module]:
    """The compute-all-and-mask form lives in the tests, as what the fast one is checked against."""
    path = ROOT / 'tests/helpers/masked_mixture.py'
    if not path.is_file():
        raise SystemExit('the form that masks is part of the tests: run this in a checkout')
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.MaskedMoE


def build_backbone(cfg: dict) -> nn.Module:
    backbone = MODELS.build(cfg)
    set_mode([backbone], training=False)
    return backbone


def set_mode(models: Iterable[nn.Module], training: bool) -> None:
    """Train mode with weights that learn, or eval mode with frozen ones."""
    for model in models:
        model.train(training)
        model.requires_grad_(training)


@torch.no_grad()
def spread_images(router: nn.Module, images: Tensor) -> None:
    """Fit the router's last layer to random scores: every expert gets its share, and the loads differ by batch.

    A router fresh from initialisation sends all images one way.
    """
    inputs: list[Tensor] = []
    hook = router.fc.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    router(images)
    hook.remove()
    mean = inputs[0].mean(dim=0)
    scores = torch.randn(len(images), router.num_experts, device=images.device)
    router.fc.weight.copy_((torch.linalg.pinv(inputs[0] - mean, rtol=1e-3) @ scores).T)
    router.fc.bias.copy_(-router.fc.weight @ mean)


def project(outputs: Tensor) -> Tensor:
    """A scalar whose gradient is dense and differs from element to element, as that of a loss."""
    return (outputs * outputs.detach().roll(1, -1)).sum()


@torch.no_grad()
def run_forward(model: nn.Module, images: Tensor) -> None:
    model(images)


def run_attack_step(model: nn.Module, images: Tensor) -> None:
    images = images.detach().requires_grad_()
    outputs = model(images)
    torch.autograd.grad(project(outputs[-1] if isinstance(outputs, tuple) else outputs), images)


def run_training_step(model: nn.Module, images: Tensor) -> None:
    model.zero_grad(set_to_none=True)
    outputs = model(images)
    project(outputs[-1] if isinstance(outputs, tuple) else outputs).backward()


#: What is timed.
STEPS = dict(forward=run_forward, attack=run_attack_step, training=run_training_step)


def time_rounds(models: dict[str, nn.Module], batches: Tensor, rounds: int, step) -> dict[str, list[float]]:
    """Seconds of ``step`` for each model in each round, models in turn; the masked form in every fifth round."""
    device = batches.device.type
    for name, model in models.items():
        for images in batches[: 1 if name == 'masked' else None]:
            timing.warm_up(partial(step, model, images), device)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for i in range(rounds):
        for name, model in models.items():
            if name == 'masked' and i % MASKED_EVERY:
                continue
            seconds[name].append(timing.seconds_of(partial(step, model, batches[i % len(batches)]), device))
    return seconds


def compare(seconds: dict[str, list[float]]) -> dict[str, Tensor]:
    """Ratios round by round: over the limit, and how many times faster than the masked form."""
    times = {name: torch.tensor(values) for name, values in seconds.items()}
    ratios = (times['moe'] / (times['dense'] + times['router']), times['masked'] / times['moe'][::MASKED_EVERY])
    return dict(zip(RATIOS, ratios))


class LikeMixture(nn.Module):
    """A network on images (B, C, H, W) in the layout that an image-routed mixture computes in."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor):
        if images.device.type == 'cpu' and not self.training:
            images = images.contiguous(memory_format=torch.channels_last)
        return self.network(images)


def benchmark(config: dict, num_experts: int, batches: Tensor, rounds: int) -> tuple[dict, dict]:
    """One row of medians for the JSON file, and what the printed table adds to it."""
    device = batches.device
    moe = build_backbone({**config, 'num_experts': num_experts}).to(device)
    spread_images(moe.router, batches.flatten(0, 1))
    models = dict(
        dense=LikeMixture(build_backbone(config['backbone']).to(device)),
        router=LikeMixture(copy.deepcopy(moe.router)),
        moe=moe,
        masked=load_masked_form()(copy.deepcopy(moe)),
    )
    loads = [load for images in batches for load in moe.forward_routed(images)[1][0].counts]
    row: dict = dict(num_experts=num_experts)
    extra: dict = dict(loads=f'{min(loads)} to {max(loads)}')
    for kind, step in STEPS.items():
        set_mode(models.values(), training=kind == 'training')
        seconds = time_rounds(models, batches, rounds, step)
        extra[f'{kind}_ms'] = {name: statistics.median(values) * 1e3 for name, values in seconds.items()}
        for name, ratios in compare(seconds).items():
            row[f'{kind}_{name}'] = ratios.quantile(0.5).item()
            extra[f'{kind}_{name}_quartiles'] = ratios.quantile(torch.tensor([0.25, 0.75])).tolist()
    return row, extra


def print_row(row: dict, extra: dict) -> None:
    """Ratios as median [quartiles], times as medians."""
    print(f'N = {row["num_experts"]}, {extra["loads"]} images per expert and batch')
    for kind in STEPS:
        cells = []
        for name in RATIOS:
            low, high = extra[f'{kind}_{name}_quartiles']
            cells.append(f'{name} {row[f"{kind}_{name}"]:6.3f} [{low:.3f}, {high:.3f}]')
        times = ', '.join(f'{name} {value:.1f}' for name, value in extra[f'{kind}_ms'].items())
        print(f'  {kind:8s}  {"   ".join(cells)}   ms: {times}', flush=True)


def main() -> None:
    args = parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    config = load_config(args.config).model.backbone.to_dict()
    routing = dict(cnn='image', vit='token')[args.family]
    if config['type'] != 'MoEBackbone' or config.get('routing', 'image') != routing:
        raise SystemExit(
            f'{args.config}: backbone must be a MoEBackbone with routing="{routing}" for --family {args.family}'
        )
    torch.manual_seed(0)
    print(f'{args.config}: batch {args.batch_size}, {args.rounds} rounds, {timing.name_of(args.device)}')
    if args.family == 'vit':
        rows = vit_family.run(args, config, time_rounds, dict(forward=run_forward, attack=run_attack_step))
    else:
        rows = run_cnns(args, config)
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=2) + '\n')


def run_cnns(args: argparse.Namespace, config: dict) -> list[dict]:
    """One row per number of experts."""
    batches = torch.rand(NUM_BATCHES, args.batch_size, 3, args.image_size, args.image_size, device=args.device)
    rows = []
    for num_experts in args.num_experts:
        row, extra = benchmark(config, num_experts, batches, args.rounds)
        print_row(row, extra)
        rows.append(row)
    return rows


if __name__ == '__main__':
    main()
