"""Compare the runs of tools/sweep.py: a table over seeds, paired differences to a baseline, accuracy against cost.

The table is Markdown: mean, sample standard deviation and range over the seeds. With --baseline a second table gives
the mean difference to that row over the seeds that both have, with its 95% interval (Student's t). With --plot a
picture shows the mean of the metric against the multiply-adds of one image, routers included. With --training-time
both are about the time that training took, on the CPU (of use where all is computed there) or by the clock. Arguments
can be in a file, one a line: @FILE.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from scipy.stats import t as student
from sweep import read

from mmadvmoe.utils import choose
from mmadvmoe.visualization.style import MARKERS

SUFFIX = '/accuracy/top1'
TIMES = dict(cpu='train_processor_seconds', wall='train_seconds')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, fromfile_prefix_chars='@'
    )
    parser.add_argument('results', type=Path, nargs='+', help='results.jsonl of sweeps, or their folders')
    parser.add_argument('--rows', nargs='+', metavar='LABEL', help='the rows, in order [all, as they were run]')
    parser.add_argument(
        '--columns',
        nargs='+',
        metavar='NAME[=TITLE]',
        help='accuracies, by the name of the attack, clean or worst [all; clean is called SA]',
    )
    parser.add_argument('--baseline', metavar='LABEL', help='row that the others are compared with')
    parser.add_argument('--metric', default='worst', help='accuracy that is compared and drawn [%(default)s]')
    parser.add_argument('--plot', type=Path, help='file to draw accuracy against cost in, as in ra_over_cost.png')
    parser.add_argument('--training-time', choices=list(TIMES), help='add a column of it, and draw against it')
    return parser.parse_args()


def rows_of(records: Sequence[Mapping], wanted: Sequence[str] | None = None) -> dict[str, list[Mapping]]:
    """The runs of each row, by its label, in the order wanted or else that of the runs.

    Raises:
        ValueError: A label names no run, or runs of several configs or options, or one seed has two results.
    """
    rows: dict[str, list[Mapping]] = {}
    for record in records:
        runs = rows.setdefault(record['method'], [])
        if record in runs:
            continue
        if runs and what(runs[0]) != what(record):
            raise ValueError(
                f'{record["method"]!r} names runs of {what(runs[0])} and of {what(record)}: compare them apart'
            )
        digests = {run['config_sha256'] for run in (*runs, record) if run.get('config_sha256')}
        if len(digests) > 1:
            raise ValueError(
                f'{record["method"]!r} names runs of {record["config"]} as it was and as it is: compare them apart'
            )
        if record['seed'] in [other['seed'] for other in runs]:
            raise ValueError(f'{record["method"]!r} has two runs with seed {record["seed"]} that differ')
        runs.append(record)
    return {choose(label, rows, '--rows'): rows[label] for label in (rows if wanted is None else wanted)}


def what(record: Mapping) -> tuple:
    """What runs of one row have in common."""
    return record['config'], record.get('settings', []), record['cfg_options']


def columns_of(rows: Mapping[str, Sequence[Mapping]], wanted: Sequence[str] | None = None) -> dict[str, str]:
    """Title of each accuracy by its name: those wanted (``NAME[=TITLE]``), or else all, the worst case last."""
    metrics = [metric for runs in rows.values() for record in done(runs) for metric in record['metrics']]
    names = dict.fromkeys(metric.removesuffix(SUFFIX) for metric in metrics if metric.endswith(SUFFIX))
    if wanted is not None:
        titles = {name: title or name for name, _, title in (column.partition('=') for column in wanted)}
        return {choose(name, names, '--columns'): title for name, title in titles.items()}
    return {name: 'SA' if name == 'clean' else name for name in sorted(names, key=lambda name: name == 'worst')}


def done(runs: Sequence[Mapping], metric: str | None = None) -> list[Mapping]:
    """The runs that did not fail and, if one is named, have a metric: dense networks have no held routes."""
    return [r for r in runs if r['status'] == 'done' and (metric is None or metric in r['metrics'])]


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    ruler = '| --- |' + ' ---: |' * (len(header) - 1)
    return '\n'.join(['| ' + ' | '.join(header) + ' |', ruler, *('| ' + ' | '.join(line) + ' |' for line in lines)])


def table(rows: Mapping[str, Sequence[Mapping]], columns: Mapping[str, str], training_time: str | None = None) -> str:
    """The rows as a table, and below it the runs that failed."""
    header = ['method', *columns.values(), *([title_of(training_time)] if training_time else []), 'busiest expert']
    header += ['multiply-adds with router', 'router', 'parameters', 'active', 'runs']
    lines = []
    for label, runs in rows.items():
        good = done(runs)
        metrics = [[r['metrics'][name + SUFFIX] for r in good if name + SUFFIX in r['metrics']] for name in columns]
        cells = [spread(values, len(good)) for values in metrics]
        cells += [spread([record[TIMES[training_time]] for record in timed(good)], len(good))] if training_time else []
        cells.append(spread([share for record in good if (share := busiest_share(record['metrics'])) is not None]))
        cells += costs(good[0]['cost']) if good else [''] * 4
        cells.append(f'{len(good)}' if len(good) == len(runs) else f'{len(good)} of {len(runs)}')
        lines.append([label, *cells])
    text = markdown(header, lines)
    failed = [(label, record) for label, runs in rows.items() for record in runs if record['status'] == 'failed']
    if failed:
        text += '\n\nFailed:\n'
        text += ''.join(f'\n* {label}, seed {record["seed"]}: {record["error"]}' for label, record in failed)
    return text


def spread(values: Sequence[float], runs: int = 0) -> str:
    """Mean, sample standard deviation and range, with their number where it is less than that of the runs."""
    if not values:
        return ''
    of = f', {len(values)} of {runs} runs' if len(values) < runs else ''
    if len(values) == 1:
        return f'{values[0]:.1f}{of}'
    mean, deviation = statistics.mean(values), statistics.stdev(values)
    return f'{mean:.1f} ± {deviation:.1f} ({min(values):.1f} to {max(values):.1f}){of}'


def busiest_share(metrics: Mapping[str, float]) -> float | None:
    """The largest share of the clean test images that one expert got, in percent."""
    shares = [value for name, value in metrics.items() if name.startswith('clean/expert_share/')]
    return 100 * max(shares) if shares else None


def costs(cost: Mapping[str, float]) -> list[str]:
    """The columns of cost: of one image, and parameters."""
    router = f'{1e9 * cost["router_gflops"]:,.0f}' if cost['router_gflops'] else ''
    return [f'{multiply_adds(cost):,.0f}', router, f'{cost["params_total"]:,}', f'{cost["params_active"]:,}']


def multiply_adds(cost: Mapping[str, float]) -> float:
    """Multiply-adds of one image, routers included."""
    return 1e9 * (cost['pathway_gflops'] + cost['router_gflops'])


def timed(runs: Sequence[Mapping]) -> list[Mapping]:
    """The runs of which is known how long the whole training took: not resumed, and new enough to say so."""
    return [record for record in runs if TIMES['cpu'] in record and not record.get('resumed')]


def title_of(kind: str) -> str:
    """What a table and a picture call a time of :data:`TIMES`."""
    return f'training, s ({kind})'


def paired(first: Sequence[Mapping], second: Sequence[Mapping], metric: str) -> list[float]:
    """Differences of a metric, first minus second, seed by seed."""
    by_seed = {record['seed']: record['metrics'][metric] for record in done(second, metric)}
    return [r['metrics'][metric] - by_seed[r['seed']] for r in done(first, metric) if r['seed'] in by_seed]


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean, and its 95% interval by Student's t; an infinite one of a single value."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return mean, -float('inf'), float('inf')
    half = student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return mean, mean - half, mean + half


def differences(rows: Mapping[str, Sequence[Mapping]], baseline: str, metric: str) -> str:
    """Paired differences of every row to the baseline.

    Raises:
        ValueError: There is no such row, or it does not have the metric.
    """
    if not done(rows[choose(baseline, rows, '--baseline')], metric):
        raise ValueError(f'--baseline: {baseline!r} has no {metric.removesuffix(SUFFIX)!r}; choose another --metric')
    lines = []
    for label, runs in rows.items():
        values = paired(runs, rows[baseline], metric) if label != baseline else []
        if values:
            mean, low, high = interval(values)
            lines.append([label, f'{mean:+.1f}', f'{low:+.1f} to {high:+.1f}', f'{len(values)}'])
    return markdown([f'against {baseline}', 'mean difference', '95% interval', 'pairs'], lines)


def plot(rows: Mapping[str, Sequence[Mapping]], metric: str, path: Path, training_time: str | None = None) -> None:
    """Draw the mean of a metric against the cost of one image or of training, with the range over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout='constrained')
    axes = figure.subplots()
    for (label, runs), mark in zip(rows.items(), itertools.cycle(MARKERS)):
        shown = timed(done(runs, metric)) if training_time else done(runs, metric)
        values = [record['metrics'][metric] for record in shown]
        if not values:
            continue
        spent = [record[TIMES[training_time]] if training_time else multiply_adds(record['cost']) for record in shown]
        mean = statistics.mean(values)
        reach = [[mean - min(values)], [max(values) - mean]]
        axes.errorbar(statistics.mean(spent), mean, reach, fmt=mark, capsize=3, label=label)
    axes.set_xlabel(title_of(training_time) if training_time else 'multiply-adds of one image, routers included')
    axes.set_ylabel(f'{metric.removesuffix(SUFFIX)} accuracy, %')
    axes.set_xscale('log')
    axes.legend(fontsize='small')
    figure.savefig(path, dpi=150)


def main() -> None:
    args = parse_args()
    files = [path / 'results.jsonl' if path.is_dir() else path for path in args.results]
    for file in files:
        if not file.is_file():
            sys.exit(f'{file} is not there')
    records = [record for file in files for record in read(file)]
    rows = rows_of(records, args.rows)
    metric = choose(args.metric, columns_of(rows), '--metric') + SUFFIX
    print(table(rows, columns_of(rows, args.columns), args.training_time))
    if args.baseline is not None:
        print('\n' + differences(rows, args.baseline, metric))
    if args.plot is not None:
        plot(rows, metric, args.plot, args.training_time)


if __name__ == '__main__':
    main()
