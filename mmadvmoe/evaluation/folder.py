"""The outcomes of an evaluation on disk, written as they become known."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union

import mmengine
import torch

from mmadvmoe.runtime.atomic import PARTIAL, write_atomically

from .data import Chunk
from .outcomes import CLEAN, NORMS, Outcome, RobustOutcomes

#: Version of the layout of the folder.
FORMAT = 1
RUN, PARTS, OUTCOMES, METRICS = 'run.json', 'parts', 'outcomes.jsonl', 'metrics.json'

_MUST_AGREE = ('format', 'settings', 'versions')


class OutcomeFolder:
    """A folder that gets the outcome of each chunk of images under each attack as soon as it is known.

    At any moment everything in it is complete, so that an evaluation which was killed, or ran out of disk, goes on from
    there. Several processes may write to it, each the chunks of its own.

    Args:
        path: The folder.
        names: The names of the attacks, in the order in which they run.
    """

    def __init__(self, path: Union[str, Path], names: Sequence[str]) -> None:
        self.path = Path(path)
        self._numbers = {name: number for number, name in enumerate((CLEAN, *names))}

    def prepare(self, run: Mapping[str, Any], overwrite: bool = False) -> None:
        """Begin an evaluation in the folder, or go on with one.

        Args:
            run: ``format``, ``settings`` and ``versions``, on which the outcomes depend, and whatever is good to know.
            overwrite: Delete the outcomes that are there and begin anew.

        Raises:
            ValueError: The folder holds the outcomes of an evaluation with other settings; says which differ.
            OSError: The disk is full, say.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f'{str(self.path)!r} is a file; outcomes of all images need a folder.')
        for partial in self.path.glob(f'**/.*{PARTIAL}'):
            partial.unlink()
        results = [path for path in (self.path / METRICS, self.path / OUTCOMES) if path.exists()]
        results += sorted(self.path.glob(f'{PARTS}/*.pt'))
        # As JSON gives it back.
        run = json.loads(json.dumps(run, default=_jsonable))
        before = _read_json(self.path / RUN)
        if not overwrite:
            if before is None and results:
                raise ValueError(
                    f'{str(self.path)!r} holds {results[0].name}, but no {RUN} that tells which evaluation it belongs '
                    'to. Choose another folder, or overwrite it (--overwrite, or overwrite=True).'
                )
            if before is not None:
                self._check_same(before, run)
                return
        # What depends on the settings goes before the settings do.
        for path in results:
            path.unlink()
        self._write(RUN, json.dumps(run, indent=2) + '\n')

    def _check_same(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        differences = _differences(*({key: run.get(key) for key in _MUST_AGREE} for run in (before, now)))
        if differences:
            more = f'; and {len(differences) - 5} more' if len(differences) > 5 else ''
            raise ValueError(
                f'{str(self.path)!r} holds the outcomes of another evaluation: {"; ".join(differences[:5])}{more}'
                '. To go on with that one, start it with its own settings (they are in run.json); to delete its '
                'outcomes and begin anew, overwrite it (--overwrite, or overwrite=True); to keep both, choose another '
                'folder.'
            )

    def part(self, chunk_number: int, name: str) -> Path:
        """The file with the outcome of one chunk under one attack."""
        return self.path / PARTS / f'{chunk_number:06d}.{self._numbers[name]:02d}-{name}.pt'

    def read(self, chunk: Chunk, name: str) -> Optional[Outcome]:
        """Read the outcome of a chunk under an attack; None if it is not known yet.

        Raises:
            ValueError: The outcome is that of other images, or the file is damaged.
        """
        path = self.part(chunk.number, name)
        if not path.is_file():
            return None
        part = _read_part(path)
        if part['digest'] != chunk.digest:
            raise ValueError(
                f'{str(path)!r} holds outcomes of other images or labels than those of chunk {chunk.number} of the '
                'data set. Evaluate that data set, choose another folder, or begin anew (--overwrite, overwrite=True).'
            )
        return Outcome(**part['outcome'])

    def write(self, chunk: Chunk, name: str, outcome: Outcome) -> None:
        """Keep the outcome of a chunk under an attack."""
        part = dict(index=chunk.number, name=name, place=torch.as_tensor(chunk.indices), label=chunk.labels.cpu())
        buffer = io.BytesIO()
        torch.save(dict(part, digest=chunk.digest, outcome=vars(outcome)), buffer)
        self._write(self.part(chunk.number, name).relative_to(self.path), buffer.getvalue())

    def finish(self, outcomes: RobustOutcomes, metrics: Mapping[str, Any]) -> None:
        """Write the outcomes of all images, and the metrics."""
        self._write(OUTCOMES, ''.join(json.dumps(record) + '\n' for record in as_records(outcomes)))
        # A sign as well: who sees this file sees a complete folder.
        self._write(METRICS, mmengine.dump(dict(metrics), file_format='json', indent=2) + '\n')

    def _write(self, name: Union[str, Path], content: Union[str, bytes]) -> None:
        try:
            write_atomically(self.path / name, content.encode() if isinstance(content, str) else content)
        except OSError as error:
            message = (
                f'{str(self.path / name)!r} could not be written ({error.strerror}). The outcomes in '
                f'{str(self.path)!r} are intact: make room there and start the same evaluation again, and it goes on '
                'where it stopped'
            )
            raise OSError(error.errno, message) from error


@dataclass(frozen=True)
class SavedEvaluation:
    """An output folder, as :func:`read_evaluation` reads it.

    Attributes:
        settings, versions: See ``run.json`` in docs/evaluation.md.
        metrics: All metrics; None while the evaluation is unfinished.
        outcomes: The outcomes of all images, or of those that are done under all attacks.
    """

    settings: dict
    versions: dict
    metrics: Optional[dict]
    outcomes: RobustOutcomes


def read_evaluation(path: Union[str, Path]) -> SavedEvaluation:
    """Read an output folder of robust evaluation.

    Raises:
        FileNotFoundError: The folder holds no evaluation.
        ValueError: No image is done under all attacks, or a file is damaged.
    """
    path = Path(path)
    run = _read_json(path / RUN)
    if run is None:
        raise FileNotFoundError(f'{str(path)!r} holds no evaluation: there is no {RUN}')
    folder, names = OutcomeFolder(path, list(run['settings']['attacks'])), (CLEAN, *run['settings']['attacks'])
    parts = []
    for file in sorted(path.glob(f'{PARTS}/*.00-{CLEAN}.pt')):
        clean = _read_part(file)
        files = {name: folder.part(clean['index'], name) for name in names}
        if all(each.is_file() for each in files.values()):
            by_name = {name: Outcome(**_read_part(each)['outcome']) for name, each in files.items()}
            parts.append(RobustOutcomes(clean['place'], clean['label'], by_name))
    if not parts:
        raise ValueError(f'{str(path)!r} holds no chunk that is done under all of {", ".join(names)} yet')
    return SavedEvaluation(run['settings'], run['versions'], _read_json(path / METRICS), RobustOutcomes.merge(parts))


def as_records(outcomes: RobustOutcomes) -> list[dict]:
    """The lines of ``outcomes.jsonl``: index, label, clean prediction and route, and the same per attack."""
    columns = {name: _column(outcome) for name, outcome in outcomes.by_name.items()}
    records = []
    rows = zip(outcomes.index.tolist(), outcomes.label.tolist(), outcomes.robust.tolist())
    for row, (index, label, robust) in enumerate(rows):
        entries = {name: column[row] for name, column in columns.items()}
        clean = {key: entries[CLEAN][key] for key in ('prediction', 'route')}
        attacks = {name: entry for name, entry in entries.items() if name != CLEAN}
        records.append(dict(index=index, label=label, robust=robust, clean=clean, attacks=attacks))
    return records


def _column(outcome: Outcome) -> list[dict]:
    """Entries of all images under one attack; distances in no more digits than it takes to tell two float32 apart."""
    parts = (outcome.attacked, outcome.prediction, outcome.expert, outcome.distance)
    return [
        dict(attacked=attacked, prediction=prediction, route=route)
        | {norm: float(f'{value:.9g}') for norm, value in zip(NORMS, distance)}
        for attacked, prediction, route, distance in zip(*(part.tolist() for part in parts))
    ]


def _differences(before: Any, now: Any, key: str = '') -> list[str]:
    """Where two trees of settings differ, as ``'settings.seed is 0 there and 1 here'``."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        found = []
        for name in (*before, *(name for name in now if name not in before)):
            found += _differences(before.get(name), now.get(name), f'{key}.{name}' if key else name)
        # A mapping of attacks also says in which order they run.
        if not found and list(before) != list(now):
            found.append(f'the order of {key} is {list(before)} there and {list(now)} here')
        return found
    there, here = ('not set' if value is None else json.dumps(value) for value in (before, now))
    return [] if before == now else [f'{key} is {there} there and {here} here']


def _jsonable(value: Any) -> Any:
    """A stand-in for what JSON cannot hold of a config."""
    if isinstance(value, Mapping):
        return dict(value)
    return value.__name__ if isinstance(value, type) else repr(value)


def _read_json(path: Path) -> Optional[dict]:
    return json.loads(path.read_text()) if path.is_file() else None


def _read_part(path: Path) -> dict:
    try:
        return torch.load(path, weights_only=True)
    except (RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(
            f'{str(path)!r} is damaged ({type(error).__name__}: {str(error).splitlines()[0]}). Delete it, and the '
            'evaluation computes it anew.'
        ) from error
