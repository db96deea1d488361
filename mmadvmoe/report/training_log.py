"""What a training run wrote down of itself, read from its work directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Union

#: Where MMEngine's ``LocalVisBackend`` writes, below the folder that each start of a run makes for itself.
SCALARS = '*/vis_data/scalars.json'
_COUNTERS = ('epoch', 'iter', 'step')


def read_training_log(work_dir: Union[str, Path]) -> dict[str, list[tuple[int, float]]]:
    """Read the scalars of a run, over all of its starts.

    A run that was interrupted and resumed has a file for each start. What a later start logged replaces what an
    earlier one had logged for the same iterations. MMEngine counts validations in epochs; here they get the iteration
    that was logged last before them.

    Args:
        work_dir (str or Path): Work directory of the run.

    Returns:
        dict: Under the name of each scalar, its points ``(iteration, value)`` in order. Empty where the directory holds
        no log.

    Raises:
        ValueError: A line of a log, other than a last one that was cut off, is not JSON.
    """
    scalars: dict[str, list[tuple[int, float]]] = {}
    # The folders are named by the time of the start.
    for file in sorted(Path(work_dir).glob(SCALARS)):
        _append(scalars, _records(file))
    return scalars


def _records(file: Path) -> list[dict]:
    lines = file.read_text(encoding='utf-8').splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                # A killed run may leave half a line.
                break
            raise ValueError(f'{file}, line {number} is not JSON: {error}') from None
    return records


def _append(scalars: dict[str, list[tuple[int, float]]], records: list[dict]) -> None:
    first = next((record['iter'] for record in records if 'iter' in record), None)
    if first is not None:
        for name, points in scalars.items():
            # A start goes on after a checkpoint, and its first line covers the iterations since then.
            scalars[name] = [point for point in points if point[0] < first]
    iteration = max((points[-1][0] for points in scalars.values() if points), default=0)
    for record in records:
        if not _is_validation(record):
            iteration = record['step']
        for name, value in record.items():
            if name not in _COUNTERS:
                scalars.setdefault(name, []).append((iteration, value))


def _is_validation(record: dict) -> bool:
    """Whether a line holds metrics of a validation, whose step is an epoch; the other lines count iterations."""
    return 'iter' not in record and not all(name.startswith('router/') for name in record if name != 'step')
