"""Time robust evaluation against calling the attacks on the bare model, batch by batch.

Everything is timed in turn in one process, round by round, and ratios are taken inside a round, so a machine that slows
down for a while changes both sides. Table and JSON give the median ratio over the rounds, of wall-clock time and of
processor time, which a machine busy with other work disturbs less:

- AutoAttack through the evaluation, over AutoAttack by its authors called on the bare model with the same batches and
  settings.
- The cascade, PGD-50 first and AutoAttack on what is left standing, over the same. On a mixture of experts RoutePGD
  runs in between.
- On a mixture of experts with image-level routing, the cascade with each attack once more with the route held, as it
  runs in every evaluation of attacks by name, over the same: that is AutoAttack twice.
- PGD-50 through the evaluation, over 50 attack steps as benchmark_moe.py measures them.

The evaluation includes all it does: predictions and routes before and after each attack, checks, and outcomes on disk.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pyautoattack
import timing
import torch
from benchmark_moe import run_attack_step
from mmengine.logging import MMLogger
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted

from mmadvmoe.apis import load_robust_model
from mmadvmoe.attacks import Victim, standard_attack
from mmadvmoe.datasets import ChunkSampler
from mmadvmoe.evaluation.data import Chunk, as_dataset, read_chunks
from mmadvmoe.evaluation.named_attacks import with_route_attack
from mmadvmoe.evaluation.run import RobustEvaluation
from mmadvmoe.runtime.launch import load_config

STEPS = 50
PGD_REPEATS = 3  # It takes so much less time than AutoAttack that a round has room for several.
CLOCKS = {'wall': time.perf_counter, 'cpu': time.process_time}
# What is divided by what.
RATIOS = {
    'autoattack_over_bare': ('autoattack', 'bare_autoattack'),
    'cascade_over_bare': ('cascade', 'bare_autoattack'),
    'cascade_held_over_bare': ('cascade_held', 'bare_autoattack'),
    f'pgd{STEPS}_over_steps': (f'pgd{STEPS}', 'attack_steps'),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config of a trained model')
    parser.add_argument('checkpoint')
    parser.add_argument('--eps', type=float, default=0.2, help='L-inf radius on images in [0, 1] [0.2]')
    parser.add_argument('--images', type=int, default=360, help='first images of the test set [360]')
    parser.add_argument('--batch-size', type=int, default=360)
    parser.add_argument('--iterations', type=int, default=100, help='of APGD and FAB [100, as published]')
    parser.add_argument('--queries', type=int, default=5000, help='of Square [5000, as published]')
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--threads', type=int, help='threads of one operation [what PyTorch takes]')
    timing.add_device(parser)
    parser.add_argument('--json', help='file to write the results to')
    args = parser.parse_args()
    timing.check_device(parser, args)
    for name in ('images', 'batch_size', 'iterations', 'queries', 'rounds', 'threads'):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f'--{name.replace("_", "-")} {value} must be at least 1')
    return args


def bare_autoattack(model: Victim, eps: float, iterations: int, queries: int) -> pyautoattack.AutoAttack:
    """AutoAttack by its authors."""
    attack = pyautoattack.AutoAttack(model, eps=eps, seed=0, device=str(next(model.parameters()).device))
    # APGD plans its steps when it is built.
    budget = dict(n_iter=iterations, eps=eps, seed=0, device=str(next(model.parameters()).device))
    attack.apgd, attack.apgd_targeted = APGDAttack(model, **budget), APGDAttack_targeted(model, **budget)
    attack.fab.n_iter, attack.square.n_queries = iterations, queries
    for part in (attack.apgd_targeted, attack.fab):
        part.n_target_classes = min(part.n_target_classes, model.num_classes - 1)
    return attack


class Contest:
    """What is timed: each contestant goes through all chunks, and gives the number of images that stand."""

    def __init__(self, model: Victim, sampler: ChunkSampler, args: argparse.Namespace) -> None:
        self.model = model
        self.sampler = sampler
        self.device = args.device
        self.chunks: list[Chunk] = list(read_chunks(sampler.dataset, sampler, model))
        self.bare = bare_autoattack(model, args.eps, args.iterations, args.queries)
        pgd = {f'pgd{STEPS}': standard_attack(f'pgd{STEPS}', args.eps)}
        auto = dict(type='AutoAttack', eps=args.eps, steps=args.iterations, n_queries=args.queries)
        both = with_route_attack(dict(pgd, autoattack=auto), model)
        cascade = {name: attack for name, attack in both.items() if not name.endswith('-held')}
        self.contestants: dict[str, Callable[[], int]] = {
            'bare_autoattack': self.run_bare,
            'autoattack': lambda: self.evaluate(dict(autoattack=auto)),
            'cascade': lambda: self.evaluate(cascade, survivors_only=list(cascade)),
            'attack_steps': self.run_steps,
            f'pgd{STEPS}': lambda: self.evaluate(pgd),
        }
        if len(both) > len(cascade):
            self.contestants['cascade_held'] = lambda: self.evaluate(both, survivors_only=list(both))

    def run_bare(self) -> int:
        standing = 0
        for chunk in self.chunks:
            adversarial, _ = self.bare.run_standard_evaluation(chunk.images, chunk.labels, batch_size=len(chunk.images))
            with torch.no_grad():
                standing += int((self.model(adversarial).argmax(1) == chunk.labels).sum())
        return standing

    def run_steps(self) -> int:
        for chunk in self.chunks:
            with self.model.frozen():
                for _ in range(STEPS):
                    run_attack_step(self.model, chunk.images)
        return 0

    def evaluate(self, attacks: dict, **settings) -> int:
        with tempfile.TemporaryDirectory() as folder:
            evaluation = RobustEvaluation(self.model, attacks, chunk_size=self.sampler.chunk_size, **settings)
            evaluation.keep_in(folder)
            evaluation.begin(self.sampler)
            parts = [evaluation.evaluate(chunk) for chunk in self.chunks]
        return sum(int(part.robust.sum()) for part in parts)

    def run(self, rounds: int) -> tuple[dict[str, dict[str, list[float]]], dict[str, int]]:
        """Seconds by each clock of each contestant in each round, and how many images stand."""
        # Memory and code that are needed for the first time take longer.
        self.evaluate({'warm-up': standard_attack('pgd5', 0.1)})
        seconds: dict = {clock: {name: [] for name in self.contestants} for clock in CLOCKS}
        standing = {}
        pgd = ('attack_steps', f'pgd{STEPS}')
        once = [name for name in self.contestants if name not in pgd]
        for _ in range(rounds):
            for name in (*once, *PGD_REPEATS * pgd):
                start = {clock: now() for clock, now in CLOCKS.items()}
                standing[name] = self.contestants[name]()
                timing.wait(self.device)
                for clock, now in CLOCKS.items():
                    seconds[clock][name].append(now() - start[clock])
        return seconds, standing


def medians(values: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    """By clock and name."""
    return {clock: {name: statistics.median(each) for name, each in of.items()} for clock, of in values.items()}


def main() -> None:
    args = parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    # What an evaluation logs is not the point here.
    MMLogger.get_instance('benchmark', log_level='ERROR')
    config = load_config(args.config)
    model = Victim(load_robust_model(config, args.checkpoint, device=args.device))
    dataset = as_dataset(config.test_dataloader.dataset.to_dict() | dict(indices=args.images))
    contest = Contest(model, ChunkSampler(dataset, args.batch_size), args)
    seconds, standing = contest.run(args.rounds)
    ratios = {
        clock: {
            name: [a / b for a, b in zip(times[top], times[under])]
            for name, (top, under) in RATIOS.items()
            if top in times
        }
        for clock, times in seconds.items()
    }
    result = dict(
        config=args.config,
        images=len(dataset),
        batch_size=args.batch_size,
        iterations=args.iterations,
        queries=args.queries,
        threads=torch.get_num_threads(),
        device=timing.name_of(args.device),
        rounds=args.rounds,
        ratios=medians(ratios),
        ratios_of_rounds=ratios,
        seconds=medians(seconds),
        standing={name: count for name, count in standing.items() if name != 'attack_steps'},
    )
    for name in result['ratios']['wall']:
        cells = []
        for clock in CLOCKS:
            rounds = ', '.join(f'{value:.3f}' for value in ratios[clock][name])
            cells.append(f'{clock} {result["ratios"][clock][name]:.3f} [{rounds}]')
        print(f'{name:22s} {"   ".join(cells)}')
    for name in seconds['wall']:
        times = '   '.join(f'{clock} {result["seconds"][clock][name]:8.2f} s' for clock in CLOCKS)
        stand = f'{standing[name]} of {len(dataset)} images stand' if name in result['standing'] else ''
        print(f'  {name:20s} {times}   {stand}')
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + '\n')


if __name__ == '__main__':
    main()
