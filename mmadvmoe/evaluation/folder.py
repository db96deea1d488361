"""The outcomes of an evaluation on disk, written as they become known."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from mmadvmoe.runtime.files import FolderLock, damage_of, is_sealed, seal
from mmadvmoe.utils import PARTIAL, as_plain, some, write_atomically

from .data import Chunk
from .outcomes import CLEAN, NORMS, Outcome, RobustOutcomes

#: Version of the layout of the folder.
FORMAT = 2
RUN, PARTS, OUTCOMES, METRICS, SUMS = 'run.json', 'parts', 'outcomes.jsonl', 'metrics.json', 'SHA256SUMS'

_MUST_AGREE = ('format', 'settings', 'versions')


class OutcomeFolder:
    """A folder that gets the outcome of each chunk of images under each attack as soon as it is known.

    At any moment everything in it is complete, so that an evaluation which was killed, or ran out of disk, goes on from
    there. Several processes of one evaluation may write to it, each the chunks of its own; another evaluation may not
    as long as it does. What is read is compared with its checksum, and with the run, attack and chunk that it is
    said to be of. ``names`` are those of the attacks, in the order in which they run.
    """

    def __init__(self, path: str | Path, names: Sequence[str]) -> None:
        self.path = Path(path)
        self._numbers = {name: number for number, name in enumerate((CLEAN, *names))}
        self._lock = FolderLock(path, 'Wait until that evaluation ends, stop it, or choose another folder.')
        self._run: dict | None = None

    def prepare(self, run: Mapping[str, Any], overwrite: bool = False) -> None:
        """Begin an evaluation in the folder, or go on with one; nobody else may write to it until :meth:`close`.

        Args:
            run: ``format``, ``settings`` and ``versions``, on which the outcomes depend, and whatever is good to know.
            overwrite: Delete the outcomes that are there and begin anew.

        Raises:
            FolderInUseError: Another process evaluates into the folder.
            ValueError: The folder holds the outcomes of an evaluation with other settings; says which differ.
            OSError: The disk is full, say.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f'{str(self.path)!r} is a file; outcomes of all images need a folder.')
        self._lock.acquire()
        try:
            self._prepare(as_plain(run), overwrite)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let others write to the folder."""
        self._lock.release()

    def _prepare(self, run: dict, overwrite: bool) -> None:
        for folder in (self.path, self.path / PARTS):  # not below: a training may write there
            for partial in folder.glob(f'.*{PARTIAL}'):
                partial.unlink()
        results = [path for path in (self.path / name for name in (METRICS, SUMS, OUTCOMES)) if path.exists()]
        results += sorted(self.path.glob(f'{PARTS}/*.pt'))
        if not overwrite:
            before = _read_run(self.path)
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
        self._run = None
        self._write(RUN, json.dumps(dict(run, sha256=_digest(run)), indent=2) + '\n')

    def _check_same(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        differences = _differences(*({key: run.get(key) for key in _MUST_AGREE} for run in (before, now)))
        if differences:
            raise ValueError(
                f'{str(self.path)!r} holds the outcomes of another evaluation: {some(differences, separator="; ")}'
                '. To go on with that one, start it with its own settings (they are in run.json); to delete its '
                'outcomes and begin anew, overwrite it (--overwrite, or overwrite=True); to keep both, choose another '
                'folder.'
            )

    def part(self, chunk_number: int, name: str) -> Path:
        """The file with the outcome of one chunk under one attack."""
        return self.path / PARTS / f'{chunk_number:06d}.{self._numbers[name]:02d}-{name}.pt'

    def read(self, chunk: Chunk, name: str) -> Outcome | None:
        """Read the outcome of a chunk under an attack; None if it is not known yet.

        Raises:
            ValueError: The outcome is that of other images, or the file is damaged.
        """
        if not self.part(chunk.number, name).is_file():
            return None
        part = self.read_part(chunk.number, name)
        if part['digest'] != chunk.digest:
            raise ValueError(
                f'{str(self.part(chunk.number, name))!r} holds outcomes of other images or labels than those of chunk '
                f'{chunk.number} of the data set. Evaluate that data set, choose another folder, or begin anew '
                '(--overwrite, overwrite=True).'
            )
        return Outcome(**part['outcome'])

    def read_part(self, chunk_number: int, name: str) -> dict:
        """Read the file of a chunk under an attack.

        Returns:
            dict: ``index`` and ``name`` (of chunk and attack), ``place`` and ``label`` of its images, their ``digest``,
            and ``outcome``.

        Raises:
            ValueError: It is damaged, or of another run, attack or chunk.
        """
        run, path = self._run_of(), self.part(chunk_number, name)
        try:
            damage = damage_of(path)
            if damage is None and not is_sealed(path):
                damage = 'it is cut off: its checksum is missing'
            part = torch.load(path, weights_only=True) if damage is None else {}
        except (OSError, MemoryError):
            raise
        except Exception as error:  # a damaged pickle can fail in any way
            # Before that mark, PyTorch's message recommends to load without safety.
            damage = f'{type(error).__name__}: {str(error).split("WeightsUnpickler error:")[-1].strip()}'
        if damage is None and not _is_part(part):
            damage = 'it holds something else than an outcome'
        cure = f'Delete it and {METRICS}, and the evaluation, started again, computes it anew.'
        if damage is not None:
            raise ValueError(f'{str(path)!r} is damaged ({damage}). {cure}')
        identity = _identity(run)
        if (part['index'], part['name'], part['run']) != (chunk_number, name, identity):
            other = f'chunk {part["index"]} under {part["name"]!r}' + ' of another run' * (part['run'] != identity)
            raise ValueError(f'{str(path)!r} does not hold what its name says, but the outcome of {other}. {cure}')
        return part

    def write(self, chunk: Chunk, name: str, outcome: Outcome) -> None:
        """Keep the outcome of a chunk under an attack."""
        part = dict(index=chunk.number, name=name, place=torch.as_tensor(chunk.indices), label=chunk.labels.cpu())
        part.update(digest=chunk.digest, run=_identity(self._run_of()), outcome=vars(outcome))
        buffer = io.BytesIO()
        torch.save(part, buffer)
        self._write(self.part(chunk.number, name).relative_to(self.path), seal(buffer.getvalue()))

    def _run_of(self) -> dict:
        """The content of ``run.json``, read once."""
        self._run = self._run or _existing_run(self.path)
        return self._run

    def finish(self, outcomes: RobustOutcomes, metrics: Mapping[str, Any]) -> None:
        """Write the outcomes of all images, and the metrics."""
        files = {
            OUTCOMES: ''.join(json.dumps(record) + '\n' for record in as_records(outcomes)).encode(),
            METRICS: (json.dumps(as_plain(metrics), indent=2) + '\n').encode(),
        }
        sums = ''.join(f'{hashlib.sha256(content).hexdigest()}  {name}\n' for name, content in files.items())
        self._write(OUTCOMES, files[OUTCOMES])
        self._write(SUMS, sums)
        # A sign as well: who sees this file sees a complete folder.
        self._write(METRICS, files[METRICS])

    def _write(self, name: str | Path, content: str | bytes) -> None:
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
    metrics: dict | None
    outcomes: RobustOutcomes


def read_evaluation(path: str | Path) -> SavedEvaluation:
    """Read an output folder of robust evaluation.

    Raises:
        FileNotFoundError: The folder holds no evaluation.
        ValueError: No image is done under all attacks, a file is damaged, or the metrics are of more images.
    """
    path = Path(path)
    run = _existing_run(path)
    folder, names = OutcomeFolder(path, list(run['settings']['attacks'])), (CLEAN, *run['settings']['attacks'])
    parts = []
    # A set, for the name of an attack may end so as well.
    for number in sorted({int(file.name.split('.')[0]) for file in path.glob(f'{PARTS}/*.00-{CLEAN}.pt')}):
        if all(folder.part(number, name).is_file() for name in names):
            read = {name: folder.read_part(number, name) for name in names}
            if len({part['digest'] for part in read.values()}) > 1:
                raise ValueError(f'{str(path)!r} holds outcomes of different images for chunk {number}; begin anew.')
            by_name = {name: Outcome(**part['outcome']) for name, part in read.items()}
            parts.append(RobustOutcomes(read[CLEAN]['place'], read[CLEAN]['label'], by_name))
    if not parts:
        raise ValueError(f'{str(path)!r} holds no chunk that is done under all of {", ".join(names)} yet')
    metrics, outcomes = read_metrics(path), RobustOutcomes.merge(parts)
    expected = run['settings'].get('data', {}).get('num_images')
    if metrics is not None and expected is not None and len(outcomes.index) != expected:
        raise ValueError(
            f'{str(path)!r} holds the outcomes of {len(outcomes.index)} images, and {METRICS} is of {expected}: parts '
            f'were deleted. Delete {METRICS} and start the same evaluation again, which computes them anew.'
        )
    return SavedEvaluation(run['settings'], run['versions'], metrics, outcomes)


def read_metrics(path: Path) -> dict | None:
    """Read the metrics of an output folder; None while the evaluation is unfinished.

    Raises:
        ValueError: The file is damaged.
    """
    metrics, sums = path / METRICS, path / SUMS
    if not metrics.is_file():
        return None
    content, cure = metrics.read_bytes(), 'Delete it and start the same evaluation again, which writes it anew.'
    expected = dict(line.split()[::-1] for line in sums.read_text().splitlines()) if sums.is_file() else {}
    if expected.get(METRICS) != hashlib.sha256(content).hexdigest():
        raise ValueError(f'{str(metrics)!r} is damaged: its SHA-256 is not the one in {SUMS}. {cure}')
    return _parse(metrics, content, cure)


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


def _read_run(path: Path) -> dict | None:
    """The content of ``run.json``, without its checksum; None if there is none."""
    file = path / RUN
    if not file.is_file():
        return None
    cure = 'Put back a copy of it, choose another folder, or begin anew (--overwrite, or overwrite=True).'
    run = _parse(file, file.read_bytes(), cure)
    settings = run.get('settings')
    lacking = [key for key in _MUST_AGREE if key not in run]
    if lacking or not isinstance(settings, dict) or not isinstance(settings.get('attacks'), dict):
        raise ValueError(f'{str(file)!r} is damaged: it lacks {", ".join(lacking) or "settings.attacks"}. {cure}')
    digest = run.pop('sha256', None)
    if run['format'] != FORMAT:
        raise ValueError(f'{str(file)!r} has format {run["format"]!r}, and format {FORMAT} is known here. {cure}')
    if digest != _digest(run):
        raise ValueError(f'{str(file)!r} is damaged: its content is not that of its checksum. {cure}')
    return run


def _existing_run(path: Path) -> dict:
    run = _read_run(path)
    if run is None:
        raise FileNotFoundError(f'{str(path)!r} holds no evaluation: there is no {RUN}')
    return run


def _parse(file: Path, content: bytes, cure: str) -> dict:
    try:
        parsed = json.loads(content)
    except ValueError as error:
        raise ValueError(f'{str(file)!r} is damaged ({error}). {cure}') from None
    if not isinstance(parsed, dict):
        raise ValueError(f'{str(file)!r} is damaged: it holds a {type(parsed).__name__}, not an object. {cure}')
    return parsed


def _digest(content: Mapping) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _identity(run: Mapping) -> str:
    """What tells a run from others: all that its outcomes depend on."""
    return _digest({key: run[key] for key in _MUST_AGREE})


def _is_part(part: Any) -> bool:
    keys = {'index', 'name', 'place', 'label', 'digest', 'run', 'outcome'}
    outcome = part['outcome'] if isinstance(part, dict) and keys <= part.keys() else None
    return isinstance(outcome, dict) and outcome.keys() == {field.name for field in fields(Outcome)}
