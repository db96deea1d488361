"""All faults that the suite tries, and how often."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import broken_runs as runs
import damaged_files as files


@dataclass(frozen=True)
class Fault:
    """One kind of fault.

    Attributes:
        run: ``run(an empty folder, number of the case)`` gives in a word what became of it, or raises.
        cases: How many cases the long form has.
        tested: Numbers of the cases that the tests run.
    """

    run: Callable[[Path, int], str]
    cases: int
    tested: range = range(1)


def _drawn(case: Callable, *args) -> Callable[[Path, int], str]:
    """A case that draws what it does, by its number."""
    return lambda folder, number: case(folder, random.Random(number), *args)


FAULTS: dict[str, Fault] = {
    'killed in training': Fault(runs.killed_in_training, 24, range(6, 7)),
    'killed in validation': Fault(runs.killed_in_validation, 6, range(1, 2)),
    'killed while saving': Fault(runs.killed_while_saving, 38, range(17, 19)),
    'killed at a random moment': Fault(runs.killed_at_a_random_moment, 20, range(0)),
    'killed in a test': Fault(runs.killed_in_test, 35, range(20, 22)),
    'SIGTERM, SIGINT, SIGHUP': Fault(runs.signalled, 12, range(1, 2)),
    'full disk in training': Fault(runs.full_disk_in_training, 12),
    'full disk in a test': Fault(runs.full_disk_in_test, 12, range(2)),
    'two trainings in one folder': Fault(runs.two_trainings, 4, range(2)),
    'two evaluations in one folder': Fault(runs.two_evaluations, 4, range(2)),
    'resumed in a copy, or from another folder': Fault(runs.copied_and_moved, 8, range(8)),
    'launcher killed': Fault(runs.launcher_killed, 5),
    'rank killed': Fault(runs.rank_killed, 4, range(0)),
    'port in use': Fault(runs.port_in_use, 2, range(2)),
    'not finite in training': Fault(runs.not_finite_in_training, 12, range(0, 12, 4)),
    'not finite in a test': Fault(runs.not_finite_in_test, 6, range(3, 5)),
    'damaged checkpoint, for each reader': Fault(files.damaged_for_each_reader, len(files.READERS), range(9)),
    'malicious file, for each reader': Fault(
        files.malicious_file, files.NUM_MALICIOUS, range(0, files.NUM_MALICIOUS, len(files.PAYLOADS) + 1)
    ),
    'swapped parts': Fault(_drawn(files.swapped_parts), 50, range(4)),
    **{f'flipped {name}': Fault(_drawn(case, files.flip), 300, range(5)) for name, case in files.DAMAGED.items()},
    **{f'truncated {name}': Fault(_drawn(case, files.cut), 20, range(3)) for name, case in files.DAMAGED.items()},
}
