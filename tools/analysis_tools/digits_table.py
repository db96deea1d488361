"""Make the results tables of docs/results.md: every method on digits, over several seeds.

Trains each method with each seed, tests the checkpoint that was the most robust one on held-out training images, and
prints a table. Every finished run is one line of results.jsonl in the work directory and is not run again; a run that
fails is a line as well.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from threading import Lock

ROOT = Path(__file__).resolve().parents[2]

#: Rows of the tables: label and config, by the kind of network.
FAMILIES = {
    'resnet18': {
        'AT(Dense)': 'configs/baselines/at_dense_resnet18_digits.py',
        'AT(S-Dense)': 'configs/baselines/at_sdense_resnet18_digits.py',
        'AT(MoE)': 'configs/baselines/at_moe_resnet18_digits.py',
        'AdvMoE': 'configs/advmoe_resnet18_digits.py',
        'AdvMoE (paper)': 'configs/advmoe_resnet18_digits_paper.py',
        'AdvMoE (reference)': 'configs/advmoe_resnet18_digits_reference.py',
    },
    'vit': {
        'AT(Dense ViT)': 'configs/baselines/at_dense_vit-small_digits.py',
        'AT(ViT-MoE)': 'configs/baselines/at_vit-small-moe_digits.py',
        'AdvMoE (ViT-MoE)': 'configs/advmoe_vit-small-moe_digits.py',
    },
}
METHODS = {label: config for rows in FAMILIES.values() for label, config in rows.items()}
#: Columns of the table: label and metric of the test.
ACCURACIES = {
    'SA': 'clean/accuracy/top1',
    'PGD-50': 'pgd50/accuracy/top1',
    'RoutePGD': 'routepgd50/accuracy/top1',
    'RA': 'ra/accuracy/top1',
    'RA-AA': 'worst/accuracy/top1',
}
PACKAGES = ('torch', 'mmengine', 'mmpretrain', 'torchattacks', 'numpy', 'scikit-learn')
BEST = 'best_worst_accuracy_top1_*.pth'

#: For what runs must not do at the same time.
LOCK = Lock()


class RunError(RuntimeError):
    """A command of a run failed; the message is the last line it wrote."""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2, 3, 4], help='[0 1 2 3 4]')
    parser.add_argument('--family', choices=FAMILIES, default='resnet18', help='kind of network [%(default)s]')
    parser.add_argument('--methods', nargs='+', choices=METHODS, metavar='LABEL', help='[all of the family]')
    parser.add_argument('--jobs', type=int, default=2, help='runs at a time [2]')
    parser.add_argument('--threads', type=int, default=1, help='OMP_NUM_THREADS of each run [1]')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/digits_table'), help='[%(default)s]')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        default=[],
        metavar='KEY=VALUE',
        help='settings to override in all configs',
    )
    parser.add_argument('--retry-failed', action='store_true', help='run failed runs again')
    parser.add_argument('--table', action='store_true', help='print the table of what is there and run nothing')
    args = parser.parse_args()
    args.methods = args.methods or list(FAMILIES[args.family])
    return args


def run(label: str, seed: int, args: argparse.Namespace) -> dict:
    """Train and test one method with one seed; what happened, as a line of results.jsonl."""
    config = METHODS[label]
    directory = (args.work_dir / Path(config).stem / f'seed_{seed}').resolve()
    # What an interrupted run left must not pass for a result of this one.
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    record = dict(
        method=label,
        config=config,
        seed=seed,
        cfg_options=args.cfg_options,
        revision=revision(),
        threads=args.threads,
        versions={package: version(package) for package in PACKAGES},
    )
    options = ['--cfg-options', f'randomness.seed={seed}', *args.cfg_options]
    try:
        started = time.monotonic()
        call(['tools/train.py', config, '--work-dir', directory, *options], directory / 'train.out', args.threads)
        record['train_seconds'] = round(time.monotonic() - started, 1)
        checkpoint = max(directory.glob(BEST), key=os.path.getmtime)
        record['checkpoint'] = checkpoint.name
        started = time.monotonic()
        metrics = directory / 'metrics.json'
        command = ['tools/test.py', config, checkpoint, '--work-dir', directory / 'test']
        command += ['--out', metrics, '--out-item', 'metrics', *options]
        call(command, directory / 'test.out', args.threads)
        record['test_seconds'] = round(time.monotonic() - started, 1)
        record['metrics'] = json.loads(metrics.read_text())
    except RunError as error:
        return dict(record, status='failed', error=str(error))
    return dict(record, status='done', cost=cost_of(directory / Path(config).name))


def cost_of(config: Path) -> dict:
    """What one image costs, from the config as a run has written it down; one run at a time."""
    # Slow to import, and not needed to print the table.
    from mmengine.config import Config

    from mmadvmoe.cost import count_cost

    with LOCK:
        return asdict(count_cost(Config.fromfile(config)))


def call(command: Sequence, output: Path, threads: int) -> None:
    """Run one of the tools, with what it writes in a file.

    Raises:
        RunError: It failed.
    """
    env = dict(os.environ, OMP_NUM_THREADS=str(threads))
    with output.open('w') as file:
        done = subprocess.run(
            [sys.executable, *map(str, command)], cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT, check=False
        )
    if done.returncode:
        lines = [line for line in output.read_text(errors='replace').splitlines() if line.strip()]
        raise RunError(lines[-1] if lines else f'exit status {done.returncode}')


def revision() -> str:
    """The revision of the checkout, with a mark where files differ from it; 'unknown' without git."""
    command = ['git', 'describe', '--always', '--dirty', '--abbrev=12', '--exclude=*']
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return 'unknown'
    return done.stdout.strip() or 'unknown'


def read(path: Path) -> list[dict]:
    """The runs so far; of a run that was repeated, the last line counts, and one cut off by a kill does not."""
    records = []
    for number, line in enumerate(path.read_text().splitlines() if path.is_file() else [], start=1):
        try:
            records.append(json.loads(line))
        except ValueError:
            print(f'line {number} of {path} is damaged and left out: {line[:60]}', file=sys.stderr)
    return list({(record['method'], record['seed']): record for record in records}.values())


def table(records: Sequence[Mapping]) -> str:
    """The runs as a table in Markdown, and below it the runs that failed."""
    header = [
        'method',
        *ACCURACIES,
        'busiest expert',
        'pathway GFLOPs',
        'router GFLOPs',
        'parameters',
        'active',
        'runs',
    ]
    lines = ['| ' + ' | '.join(header) + ' |', '| --- |' + ' ---: |' * (len(header) - 1)]
    for label in METHODS:
        runs = [record for record in records if record['method'] == label]
        done = [record for record in runs if record['status'] == 'done']
        cells = [spread([record['metrics'][metric] for record in done]) for metric in ACCURACIES.values()]
        cells.append(spread([busiest for record in done if (busiest := busiest_share(record['metrics'])) is not None]))
        cells += costs(done[0]['cost']) if done else [''] * 4
        cells.append(f'{len(done)}' if len(done) == len(runs) else f'{len(done)} of {len(runs)}')
        if runs:
            lines.append('| ' + ' | '.join([label, *cells]) + ' |')
    failed = [record for record in records if record['status'] == 'failed']
    if failed:
        lines += ['', 'Failed:', '']
        lines += [f'* {record["method"]}, seed {record["seed"]}: {record["error"]}' for record in failed]
    return '\n'.join(lines)


def spread(values: Sequence[float]) -> str:
    """Mean, sample standard deviation and range."""
    if not values:
        return ''
    if len(values) == 1:
        return f'{values[0]:.1f}'
    mean, deviation = statistics.mean(values), statistics.stdev(values)
    return f'{mean:.1f} ± {deviation:.1f} ({min(values):.1f} to {max(values):.1f})'


def busiest_share(metrics: Mapping[str, float]) -> float | None:
    """The largest share of the clean test images that one expert got, in percent."""
    shares = [value for name, value in metrics.items() if name.startswith('clean/expert_share/')]
    return 100 * max(shares) if shares else None


def costs(cost: Mapping[str, float]) -> list[str]:
    """The columns of cost."""
    router = f'{cost["router_gflops"]:.2g}' if cost['router_gflops'] else ''
    return [f'{cost["pathway_gflops"]:.2g}', router, f'{cost["params_total"]:,}', f'{cost["params_active"]:,}']


def run_all(
    args: argparse.Namespace, results: Path, work: Callable[[str, int, argparse.Namespace], dict] = run
) -> None:
    """Do the runs that are missing, several at a time, and write each down as it ends."""
    records = read(results)
    if any(record['cfg_options'] != args.cfg_options for record in records):
        raise ValueError(f'{results} holds runs with other --cfg-options: choose another --work-dir')
    kept = {
        (record['method'], record['seed']) for record in records if record['status'] == 'done' or not args.retry_failed
    }
    missing = [(label, seed) for seed in args.seeds for label in args.methods if (label, seed) not in kept]
    print(f'==> {len(missing)} runs to do, {len(kept)} are in {results}; what a run writes is beside it', flush=True)

    def one(job: tuple[str, int]) -> None:
        record = work(*job, args)
        with LOCK, results.open('a+') as file:
            file.seek(0)
            cut_off = file.read()[-1:] not in ('', '\n')
            file.write('\n' * cut_off + json.dumps(record) + '\n')
        print(f'{record["method"]}, seed {record["seed"]}: {record.get("error") or brief(record)}', flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        # list() waits, and raises what a worker raised.
        list(pool.map(one, missing))


def brief(record: Mapping) -> str:
    """One finished run in one line."""
    values = (f'{label} {record["metrics"][metric]:.1f}' for label, metric in ACCURACIES.items())
    return f'{", ".join(values)} ({record["train_seconds"]} s to train, {record["test_seconds"]} s to test)'


def main() -> None:
    args = parse_args()
    results = args.work_dir / 'results.jsonl'
    if not args.table:
        args.work_dir.mkdir(parents=True, exist_ok=True)
        run_all(args, results)
    print(table(read(results)))


if __name__ == '__main__':
    main()
