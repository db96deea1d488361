"""Time a whole iteration of alternating training, a turn of the experts and one of the router on a batch each.

An iteration runs as in any training: loader, hooks, checks, attacks, losses, optimizers and log. What is compared:

- ``parts``: an iteration over the sum of its parts measured alone (clean pass and steps of each attack, loss and
  gradient of each turn, update of each group);
- ``masked``: the form that computes all experts and masks, with the two attacks, the losses and the router objective of
  the reference code, over an iteration;
- ``experts``: iterations with the largest over those with the smallest number of experts, and the same of the peak
  memory of a loss and its gradient beyond the weights and their gradients;
- ``processes``: an iteration of two CPU processes on a core each over that of one on one core, at the same batch per
  process;
- ``throughput`` (with ``--device cuda``): images per second in float32, TF32 and bfloat16, and the share of the time in
  which kernels run, by the profiler.

Sides take turns in one process, round by round; ratios are taken inside a round and given as medians. Images are drawn
at random, the router is set so that it spreads them over all experts.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import timing
import torch
import torch.nn.functional as F
from benchmark_moe import load_masked_form, spread_images
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmpretrain.registry import DATASETS
from mmpretrain.structures import DataSample
from torch import Tensor, nn
from torch.utils.data import Dataset
from vit_family import peak_bytes

from mmadvmoe.attacks import Victim, kl_divergence
from mmadvmoe.runtime.launch import build_runner, enable_amp, finish_distributed, load_config, prepare_distributed
from mmadvmoe.training.alternation import train_only
from mmadvmoe.utils import bare_model

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / 'configs/advmoe_resnet18_cifar10.py'
WHAT = ('parts', 'masked', 'experts', 'processes', 'throughput')
PRECISIONS = ('fp32', 'tf32', 'bf16')
MASKED_ROUNDS = 5
# Passes after which the norms of a router know its images.
SETTLE = 50


@DATASETS.register_module()
class RandomBatches(Dataset):
    """Batches of 8-bit images, enough for a few iterations, given whole: smooth ones, which a router can tell apart."""

    def __init__(self, size: int, image_size: int, num_classes: int) -> None:
        generator = torch.Generator().manual_seed(0)
        coarse = 255 * torch.rand(size, 3, 3, 3, generator=generator)
        self.images = F.interpolate(coarse, (image_size, image_size), mode='bicubic').clamp(0, 255).byte()
        self.num_classes = num_classes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        label = torch.tensor([index % self.num_classes])
        return dict(inputs=self.images[index], data_samples=DataSample(gt_label=label))

    def __getitems__(self, indices: list[int]) -> dict:
        samples = [self[index]['data_samples'] for index in indices]
        return dict(inputs=self.images[torch.as_tensor(indices)], data_samples=samples)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', nargs='*', metavar='WHAT', help=f'[all of {", ".join(WHAT)} that fit the device]')
    parser.add_argument('--config', default=str(CONFIG), help='alternating training with image-level routing')
    parser.add_argument('--num-experts', type=int, nargs='+', default=[2, 4, 8, 16], metavar='N', help='[2 4 8 16]')
    parser.add_argument('--batch-size', type=int, default=64, help='[%(default)s]')
    parser.add_argument('--image-size', type=int, default=32, help='[%(default)s]')
    parser.add_argument('--rounds', type=int, default=5, help='[%(default)s]')
    parser.add_argument('--threads', type=int, help='threads of one operation [what PyTorch takes]')
    timing.add_device(parser)
    parser.add_argument('--json', help='file to write the results to')
    parser.add_argument('--worker', metavar='FILE', help=argparse.SUPPRESS)
    args = parser.parse_args()
    timing.check_device(parser, args)
    for each in args.what:
        if each not in WHAT:
            parser.error(f'{each!r} is unknown; allowed: {", ".join(WHAT)}')
    if args.device == 'cpu' and 'throughput' in args.what:
        parser.error('throughput needs --device cuda')
    if args.device == 'cpu' and torch.cuda.is_available():
        parser.error(
            'MMEngine trains on the GPU that it sees: use --device cuda, or hide it by CUDA_VISIBLE_DEVICES=-1'
        )
    if args.rounds < 1 or min(args.num_experts) < 2:
        parser.error('--rounds must be at least 1 and --num-experts at least 2')
    return args


class Training:
    """A run of the config on random images, whose iterations are timed in pairs: the experts' and the router's.

    Args:
        args (Namespace): The command line.
        num_experts (int): N.
        launcher (str): As for ``tools/train.py``.
        precision (str): One of :data:`PRECISIONS`.
    """

    def __init__(
        self, args: argparse.Namespace, num_experts: int, launcher: str = 'none', precision: str = 'fp32'
    ) -> None:
        self.device = args.device
        cfg = load_config(args.config)
        cfg.model.backbone.num_experts = num_experts
        size = args.batch_size * int(os.environ.get('WORLD_SIZE', 1)) * 2
        cfg.train_dataloader = dict(
            batch_size=args.batch_size,
            num_workers=0,
            collate_fn=dict(type='keep_batch'),
            sampler=dict(type='DefaultSampler', shuffle=True),
            pin_memory=args.device == 'cuda',
            dataset=dict(
                type='RandomBatches',
                size=size,
                image_size=args.image_size,
                num_classes=cfg.model.head.num_classes,
            ),
        )
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
        cfg.test_cfg = cfg.test_dataloader = cfg.test_evaluator = None
        cfg.train_cfg = dict(by_epoch=True, max_epochs=10**6)
        cfg.param_scheduler = None
        cfg.optim_wrapper.router.optimizer.update(lr=0.0)  # steps that leave the routes where they are
        cfg.default_hooks.checkpoint = None
        cfg.visualizer = dict(type='Visualizer', vis_backends=[])
        cfg.custom_hooks = [hook for hook in cfg.custom_hooks if hook.type not in ('PreflightHook', 'ExactResumeHook')]
        cfg.log_level = 'ERROR'
        if precision == 'bf16':
            enable_amp(cfg)
        prepare_distributed(cfg, launcher)
        self.folder = tempfile.TemporaryDirectory()
        cfg.work_dir, cfg.experiment_name = self.folder.name, f'benchmark_{time.time_ns()}'
        self.runner = build_runner(cfg)
        self.model = bare_model(self.runner.model)
        images = self.runner.train_dataloader.dataset.images.float().to(self.device) / 255
        self.images = images[: args.batch_size]
        self.labels = torch.arange(args.batch_size, device=self.device) % cfg.model.head.num_classes
        self.model.init_weights()  # as the training would, after which nothing is drawn anew
        router = self.model.backbone.router
        with torch.no_grad():
            for _ in range(SETTLE):
                router.train()(images)  # so that attacks, in eval mode, and losses have the same routes
        for module in router.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.0  # counts on, and moves nothing
        self.model.eval()
        spread_images(router, images)

    def run(self, rounds: int, between: Callable[[float], None]) -> None:
        """Train ``rounds`` pairs of iterations after a warm-up; ``between(seconds)`` is called after each pair."""
        hook = _Pairs(rounds, timing.WARM_UP[self.device], between, self.device)
        self.runner.register_hook(hook, priority='LOWEST')
        self._check_routes()
        try:
            self.runner.train()
        except _Done:
            self._check_routes()

    def _check_routes(self) -> None:
        """Raise RuntimeError where an expert gets nearly all images, with whose routes nothing is to be measured."""
        with Victim(self.model).frozen() as victim, torch.no_grad():
            counts = victim.decide_routes(self.images)[0].counts
        if sum(counts) >= 8 * len(counts) and max(counts) > 0.8 * sum(counts):  # of fewer, chance may do that
            raise RuntimeError(f'the router sends {list(counts)} of {sum(counts)} images to the experts')

    def seconds(self, rounds: int) -> list[float]:
        found: list[float] = []
        self.run(rounds, found.append)
        return found

    # The parts of an iteration, each alone.

    def parts(self) -> dict[str, tuple[int, Callable[[], object]]]:
        """Each part, and how often an iteration has it."""
        steps = self.model.data_preprocessor._attacks['experts'].attack.steps
        found: dict[str, tuple[int, Callable[[], object]]] = {'clean pass': (2, self._clean)}
        for turn in ('experts', 'router'):
            found[f'attack step ({turn})'] = (steps, partial(self._step, turn))
            found[f'loss and gradient ({turn})'] = (1, partial(self.loss, turn))
            found[f'update ({turn})'] = (1, partial(self._update, turn))
        return found

    @torch.no_grad()
    def _clean(self) -> tuple:
        with Victim(self.model).frozen() as victim:
            return victim.forward_routed(self.images)

    def _step(self, turn: str) -> Tensor:
        attack = self.model.data_preprocessor._attacks[turn]
        with attack.victim.frozen() as victim:
            points = self.images.clone().requires_grad_()
            logits, routings = victim.forward_routed(points, gated=False)
            total = kl_divergence(logits.detach().roll(1, 1), logits).sum()
            if turn == 'router':
                total = total + sum(kl_divergence(r.logits.detach().roll(1, 1), r.logits).sum() for r in routings)
            return torch.autograd.grad(total, points)[0]

    def loss(self, turn: str, *_) -> None:
        samples = [DataSample(gt_label=label) for label in self.labels[:, None]]
        self.model.train()
        with train_only(self.model, turn):
            losses = self.model.loss(self.images, samples, self.images.flip(3), turn)
            self.model.parse_losses(losses)[0].backward()

    def _update(self, turn: str) -> None:
        optimizer = self.runner.optim_wrapper[turn].optimizer
        optimizer.step()


class _Done(Exception):  # noqa: N818  no error
    pass


class _Pairs(Hook):
    def __init__(self, rounds: int, warm_up: int, between: Callable[[float], None], device: str) -> None:
        self.left, self.warm_up, self.between, self.device = rounds, warm_up, between, device
        # On one CPU thread, what other processes take does not count; with several processes waiting does.
        alone = device == 'cpu' and torch.get_num_threads() == 1 and not torch.distributed.is_initialized()
        self.clock = time.process_time if alone else time.perf_counter
        self.start = None

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        if data_batch['turn'] != 'router':
            return
        timing.wait(self.device)
        if self.start is not None and self.warm_up <= 0:
            self.between(self.clock() - self.start)
            self.left -= 1
        self.warm_up -= 1
        if not self.left:
            raise _Done
        timing.wait(self.device)
        self.start = self.clock()


class Masked:
    """The iteration of the reference code, on the form that computes all experts and masks."""

    def __init__(self, training: Training) -> None:
        model = training.model
        self.images, self.labels = training.images, training.labels
        self.steps = model.data_preprocessor._attacks['experts'].attack.steps
        self.backbone = load_masked_form()(model.backbone)
        self.head = copy.deepcopy(nn.Sequential(model.neck, nn.Identity())), copy.deepcopy(model.head)
        self.network = nn.ModuleList([self.backbone, *self.head])
        self.num_experts = model.backbone.num_experts
        self.router_logits: Tensor = torch.empty(0)
        self.backbone.router.register_forward_hook(self._note)
        router = {id(p) for p in self.backbone.router.parameters()}
        experts = [p for p in self.network.parameters() if id(p) not in router]
        settings = dict(lr=1e-3, momentum=0.9, weight_decay=5e-4)
        self.optimizers = dict(
            experts=torch.optim.SGD(experts, **settings),
            router=torch.optim.SGD(self.backbone.router.parameters(), **settings),
        )

    def _note(self, module: nn.Module, args: tuple, logits: Tensor) -> None:
        self.router_logits = logits

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Class and router logits."""
        features = self.backbone(images)
        return self.head[1](self.head[0][0](features)), self.router_logits

    def attack(self) -> Tensor:
        self.network.eval().requires_grad_(False)
        with torch.no_grad():
            clean = self.forward(self.images)
        points = self.images + 1e-3 * torch.randn_like(self.images)
        for _ in range(self.steps):
            points.requires_grad_()
            total = sum(kl_divergence(c, a).sum() for c, a in zip(clean, self.forward(points)))
            (grad,) = torch.autograd.grad(total, points)
            points = points.detach() + 5 / 255 * grad.sign()
            points = (self.images + (points - self.images).clamp(-8 / 255, 8 / 255)).clamp(0, 1)
        self.network.train().requires_grad_(True)
        return points

    def iterate(self) -> None:
        """A turn of the experts and one of the router."""
        for turn in ('experts', 'router'):
            adversarial = self.attack()
            if turn == 'experts':
                self.backbone.router.requires_grad_(False)
                clean, attacked = (self.forward(each)[0] for each in (self.images, adversarial))
                loss = F.cross_entropy(clean, self.labels) + 6 * kl_divergence(clean, attacked).mean()
            else:
                clean, attacked = (self.backbone.router(each) for each in (self.images, adversarial))
                loss = 6 * F.cross_entropy(clean, self.labels % self.num_experts)
                loss = loss + 6 * kl_divergence(clean, attacked).mean()
            self.network.zero_grad()
            loss.backward()
            self.optimizers[turn].step()


def compare_parts(args: argparse.Namespace) -> dict:
    training = Training(args, args.num_experts[0])
    parts = training.parts()
    ratios, times = [], {name: [] for name in parts}

    def between(seconds: float) -> None:
        alone = {name: timing.seconds_of(part, args.device) for name, (_, part) in parts.items()}
        for name, value in alone.items():
            times[name].append(value)
        ratios.append(seconds / sum(count * alone[name] for name, (count, _) in parts.items()))
        training.runner.optim_wrapper.zero_grad()

    training.run(args.rounds + 1, between)
    # The first round is where the parts are warm for the first time.
    row = dict(num_experts=args.num_experts[0], over_parts=statistics.median(ratios[1:]), rounds=ratios[1:])
    row['ms'] = {name: statistics.median(values[1:]) * 1e3 for name, values in times.items()}
    print(f'  an iteration over the sum of its parts: {row["over_parts"]:.3f} {_range(ratios[1:])}', flush=True)
    return row


def compare_masked(args: argparse.Namespace) -> list[dict]:
    rows = []
    for num_experts in args.num_experts:
        training = Training(args, num_experts)
        masked = Masked(training)
        timing.warm_up(masked.iterate, args.device)
        ours, theirs = [], []

        def between(seconds: float, masked: Masked = masked, ours: list = ours, theirs: list = theirs) -> None:
            ours.append(seconds)
            theirs.append(timing.seconds_of(masked.iterate, args.device))

        training.run(min(args.rounds, MASKED_ROUNDS), between)
        ratios = [b / a for a, b in zip(ours, theirs)]
        row = dict(num_experts=num_experts, seconds=statistics.median(ours), masked_over=statistics.median(ratios))
        print(
            f'  N = {num_experts}: masked form over an iteration {row["masked_over"]:.2f} {_range(ratios)}, '
            f'an iteration takes {row["seconds"]:.3f} s',
            flush=True,
        )
        rows.append(row)
    return rows


def compare_experts(args: argparse.Namespace) -> dict:
    few, many = min(args.num_experts), max(args.num_experts)
    runs = {n: Training(args, n) for n in (few, many)}
    seconds: dict[int, list[float]] = {n: [] for n in runs}
    for _ in range(args.rounds):
        for n, run in runs.items():
            seconds[n] += run.seconds(1)
            run.runner._hooks.pop()
    ratios = [b / a for a, b in zip(seconds[few], seconds[many])]
    peaks = {}
    for n, run in runs.items():
        for parameter in run.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        peaks[n] = peak_bytes(nn.Identity(), run.images, lambda *_, run=run: run.loss('experts'))
    row = dict(few=few, many=many, time=statistics.median(ratios), memory=peaks[many] / peaks[few])
    print(
        f'  N = {many} over N = {few}: time {row["time"]:.3f} {_range(ratios)}, peak memory {row["memory"]:.3f} '
        f'({peaks[few] / 2**20:.0f} and {peaks[many] / 2**20:.0f} MiB)',
        flush=True,
    )
    return row


def compare_processes(args: argparse.Namespace) -> dict:
    """Each side in processes of its own, pinned to a core each."""
    ratios, pair = [], []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(max(2, args.rounds // 2)):
            pair = [_run_processes(args, count, Path(folder) / 'seconds.json') for count in (1, 2)]
            ratios.append(pair[1] / pair[0])
    row = dict(two_over_one=statistics.median(ratios), seconds=pair)
    print(f'  two processes over one: {row["two_over_one"]:.3f} {_range(ratios)}', flush=True)
    return row


def _run_processes(args: argparse.Namespace, count: int, file: Path) -> float:
    own = ['--config', args.config, '--batch-size', args.batch_size, '--image-size', args.image_size]
    own += ['--rounds', args.rounds, '--num-experts', args.num_experts[0], '--threads', 1, '--worker', file]
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={count}']
    environment = dict(os.environ, OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='-1')
    done = subprocess.run(
        [*torchrun, __file__, *map(str, own)], env=environment, capture_output=True, text=True, timeout=3600
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return statistics.median(json.loads(file.read_text()))


def work(args: argparse.Namespace) -> None:
    """One of the processes of :func:`compare_processes`."""
    rank = int(os.environ['LOCAL_RANK'])
    if hasattr(os, 'sched_setaffinity'):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, [cores[rank % len(cores)]])
    seconds = Training(args, args.num_experts[0], launcher='pytorch').seconds(args.rounds)
    if rank == 0:
        Path(args.worker).write_text(json.dumps(seconds))
    finish_distributed()


def measure_throughput(args: argparse.Namespace) -> list[dict]:
    rows = []
    for precision in PRECISIONS:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != 'fp32'
        training = Training(args, args.num_experts[0], precision=precision)
        seconds = statistics.median(training.seconds(4 * args.rounds))
        training.runner._hooks.pop()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as recorded:
            profiled = sum(training.seconds(4))
        # The operations that launched the kernels have their time as well.
        kernels = (each for each in recorded.events() if each.device_type == torch.autograd.DeviceType.CUDA)
        busy = sum(each.self_device_time_total for each in kernels if not each.is_user_annotation) / 1e6
        # The profile has the pairs of the warm-up as well.
        share = busy / (profiled * (4 + timing.WARM_UP['cuda']) / 4)
        row = dict(precision=precision, images_per_second=2 * args.batch_size / seconds, kernels=share)
        print(
            f'  {precision}: {row["images_per_second"]:,.0f} images/s, kernels run {share:.0%} of the time', flush=True
        )
        rows.append(row)
    return rows


def _range(values: list[float]) -> str:
    return f'[{min(values):.3f}, {max(values):.3f}]'


def main() -> None:
    args = parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    MMLogger.get_instance('benchmark', log_level='ERROR')
    if args.worker:
        work(args)
        return
    torch.manual_seed(0)
    device = timing.name_of(args.device)
    print(f'{args.config}: batch {args.batch_size}, {args.rounds} rounds, {device}')
    fits = [each for each in WHAT if each != ('throughput' if args.device == 'cpu' else 'processes')]
    measure = dict(zip(WHAT, (compare_parts, compare_masked, compare_experts, compare_processes, measure_throughput)))
    found = {}
    for what in args.what or fits:
        print(what)
        found[what] = measure[what](args)
    if args.json:
        settings = dict(config=Path(args.config).name, batch_size=args.batch_size, device=device)
        Path(args.json).write_text(json.dumps(dict(settings, **found), indent=2) + '\n')


if __name__ == '__main__':
    main()
