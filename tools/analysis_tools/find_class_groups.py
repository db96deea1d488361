"""Which classes to give to which expert, so that routes hold: groups of classes that an attack seldom confuses.

Reads a robust network, best a dense one, from a config and a checkpoint, attacks validation images, and looks for the
partitions of the classes that attacked predictions leave most seldom. A small router is trained by itself on each of
them and attacked: where its routes flip, a mixture will not pay. Prints a table and the fragment of a config.
docs/dissection.md says more.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from mmadvmoe.diagnosis.class_groups import (
    MOST_FLIPS,
    Partition,
    RouterTrial,
    as_numbers,
    attacked_confusion,
    check_num_groups,
    config_fragment,
    default_router,
    find_class_groups,
    modulo_partition,
    try_router,
)
from mmadvmoe.diagnosis.dissection_tables import text_table, threat_text
from mmadvmoe.diagnosis.subject import load_subject, parse_arguments, write_json
from mmadvmoe.runtime.files import check_writable
from mmadvmoe.visualization import draw_confusion, save_png

LOADER = 'val_dataloader'


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--num-groups', type=int, nargs='+', default=[2, 4], metavar='N', help='experts [2 4]')
    parser.add_argument('--max-load', type=float, metavar='S', help='largest share in one group [2 / N; 0.8 for 2]')
    parser.add_argument('--count', type=int, default=3, help='partitions of each number of groups [%(default)s]')
    parser.add_argument('--hidden', type=int, help='hidden units of the router on trial, 0 for a linear one [16]')
    parser.add_argument('--pool', type=int, help='average pooling in front of that router [1 for each 28 pixels]')
    parser.add_argument(
        '--iterations', type=int, default=3000, help='updates of each router [%(default)s]; 0: no trial'
    )
    parser.add_argument('--num-train', type=int, default=20000, help='training images of the routers [%(default)s]')
    parser.add_argument('--figure', metavar='FILE.png', help='file for the heat map of the best partition')
    args = parse_arguments(parser, num_images=5000, loader=LOADER)
    if args.count < 1 or args.iterations < 0 or args.num_train < 2 or (args.hidden or 0) < 0:
        parser.error('--count, --num-train must be at least 1 and 2, --iterations and --hidden at least 0')
    return args


def main() -> None:
    args = parse_args()
    started = time.monotonic()
    subject = load_subject(args, 'class_groups', LOADER)
    names = subject.header['class_names']
    # What cannot be done is to be told before the attack.
    for number in args.num_groups:
        check_num_groups(number, len(names), args.max_load)
    if args.figure is not None:
        check_writable(args.figure, '--figure')
    train = subject.more_images('train_dataloader', args.num_train) if args.iterations else None
    confusion = attacked_confusion(subject.victim, subject.data, subject.threat)
    found = []
    for number in args.num_groups:
        best = find_class_groups(confusion, number, args.max_load, args.count)
        # What the reference code does, to compare with.
        found += [(str(place), partition) for place, partition in enumerate(best, start=1)]
        found.append(('y mod N', modulo_partition(confusion, number)))
    router = default_router(subject.data)
    router.update({key: getattr(args, key) for key in ('hidden', 'pool') if getattr(args, key) is not None})
    trials = [None] * len(found)
    if args.iterations:
        trials = [
            try_router(each, train, subject.data, subject.threat, subject.victim, router, args.iterations)
            for _, each in found
        ]
    print(f'\n{args.config}: {threat_text(subject.header, "validation images")}')
    print(text_table(['groups', 'place', 'kept %', 'largest %', 'router SA', 'RA', 'flips %'], _rows(found, trials)))
    for place, partition in found:
        print(f'\n{len(partition.groups)} groups, {place}: {_words(partition, names)}')
    # The fewest flips of those that say something, or without a trial what is kept most.
    best = min(
        (index for index, (place, _) in enumerate(found) if place.isdigit()),
        key=lambda index: (*_failure(trials[index]), -found[index][1].kept),
    )
    partition, trial = found[best][1], trials[best]
    pays = trial is None or trial.pays
    print(f'\n{_verdict(trial)}\n\n{config_fragment(partition, names, subject.threat, router, pays)}')
    if args.out is not None:
        partitions = [dict(as_numbers(each, names, one), place=p) for (p, each), one in zip(found, trials)]
        seconds = round(time.monotonic() - started, 1)
        content = dict(subject.header, seconds=seconds, confusion=confusion.tolist(), partitions=partitions, best=best)
        write_json(args.out, content)
        print(f'\nall numbers: {args.out}')
    if args.figure is not None:
        title = f'{partition.kept:.1%} stay in their group under attack'
        save_png(draw_confusion(confusion, partition.groups, names, title), Path(args.figure))
        print(f'\nheat map: {args.figure}')


def _failure(trial: RouterTrial | None) -> tuple[bool, float]:
    return (False, 0.0) if trial is None else (not trial.pays, trial.flips)


def _rows(found: Sequence[tuple[str, Partition]], trials: Sequence[RouterTrial | None]) -> list[list[str]]:
    rows = []
    for (place, partition), trial in zip(found, trials):
        tried = ['', '', ''] if trial is None else [f'{each:.1f}' for each in (trial.sa, trial.ra, trial.flips)]
        largest = f'{100 * max(partition.load):.0f}'
        rows.append([str(len(partition.groups)), place, f'{100 * partition.kept:.1f}', largest, *tried])
    return rows


def _words(partition: Partition, names: Sequence[str]) -> str:
    return '; '.join(
        f'{", ".join(names[index] for index in group)} ({load:.0%})'
        for group, load in zip(partition.groups, partition.load)
    )


def _verdict(trial: RouterTrial | None) -> str:
    if trial is None:
        return 'No router was tried: whether its routes hold is not known.'
    routes = f'{trial.flips:.1f} % of its routes flip, {trial.ra:.1f} % of the images go where they should under attack'
    if trial.pays:
        return f'Best for a router: {routes}. A mixture can pay.'
    if trial.flips > MOST_FLIPS:
        return (
            f'A mixture will hardly pay: even for the best groups {routes} (more than {MOST_FLIPS:g} % flips lose it).'
        )
    return f'A mixture will hardly pay: {routes}, where always the same expert has {trial.majority:.1f} %.'


if __name__ == '__main__':
    main()
