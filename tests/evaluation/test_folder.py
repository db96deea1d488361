"""An output folder stays complete whatever happens to it."""

import itertools
import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from mmadvmoe.evaluation import Chunk, Outcome, OutcomeFolder, RobustOutcomes, read_evaluation
from mmadvmoe.utils import PARTIAL, write_atomically

RUN = dict(format=2, settings=dict(attacks=dict(a={}, b={}), seed=0), versions=dict(torch='2'), machine=dict(threads=1))


def _outcome(seed: int = 0) -> Outcome:
    generator = torch.Generator().manual_seed(seed)
    return Outcome(
        logits=torch.randn(4, 3, generator=generator),
        expert=torch.randint(2, (4, 1), generator=generator),
        distance=torch.rand(4, 3, generator=generator),
        attacked=torch.tensor([True, False, True, True]),
    )


def _same(a: Outcome, b: Outcome) -> bool:
    return all(torch.equal(value, vars(b)[name]) for name, value in vars(a).items())


def _folder(path: Path) -> OutcomeFolder:
    return OutcomeFolder(path, ['a', 'b'])


def _chunk(number: int = 0) -> Chunk:
    indices = range(4 * number, 4 * number + 4)
    return Chunk(number, indices, torch.full((4, 3, 2, 2), number / 10), torch.tensor([0, 1, 2, 0]))


def _run_of(path: Path) -> dict:
    run = json.loads((path / 'run.json').read_text())
    assert run.pop('sha256')
    return run


@contextmanager
def _full_disk(room: int) -> Iterator[None]:
    """No file can grow beyond ``room`` bytes: writing fails in the middle, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    folder.prepare(RUN)
    assert folder.read(_chunk(), 'a') is None
    folder.write(_chunk(), 'a', _outcome())
    assert _same(_folder(tmp_path).read(_chunk(), 'a'), _outcome())
    assert folder.read(_chunk(), 'b') is None and folder.read(_chunk(), 'clean') is None


def test_chunks_that_are_done_can_be_read_before_the_end(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    with pytest.raises(FileNotFoundError, match=r'holds no evaluation: there is no run\.json'):
        read_evaluation(tmp_path)
    folder.prepare(RUN)
    for number, name in enumerate(('clean', 'a', 'b')):
        with pytest.raises(ValueError, match='no chunk that is done under all of clean, a, b yet'):
            read_evaluation(tmp_path)
        folder.write(_chunk(1), name, _outcome(number))
    folder.write(_chunk(0), 'clean', _outcome())
    saved = read_evaluation(tmp_path)
    assert saved.metrics is None and saved.settings['seed'] == 0
    assert saved.outcomes.index.tolist() == [4, 5, 6, 7]
    assert _same(saved.outcomes.by_name['b'], _outcome(2))


@pytest.mark.parametrize('what', ['settings', 'versions', 'format'])
def test_another_run_is_refused_and_nothing_is_touched(tmp_path: Path, what: str) -> None:
    folder = _folder(tmp_path)
    folder.prepare(RUN)
    folder.write(_chunk(), 'a', _outcome())
    folder.close()
    other = RUN | {what: 1 if what == 'format' else RUN[what] | dict(seed=1, torch='3')}
    before = {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()}
    with pytest.raises(ValueError, match=rf'{what}.* there and .* here.*begin anew.*--overwrite'):
        folder.prepare(other)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()}
    if what == 'format':
        return  # nobody writes the old one any more
    folder.prepare(other, overwrite=True)
    assert _run_of(tmp_path) == other
    assert folder.read(_chunk(), 'a') is None


def test_another_machine_goes_on(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    folder.prepare(RUN)
    folder.write(_chunk(), 'a', _outcome())
    folder.prepare(RUN | dict(machine=dict(threads=8)))
    assert folder.read(_chunk(), 'a') is not None
    # The run that was begun is the one that is described.
    assert _run_of(tmp_path) == RUN


def test_only_what_is_its_own_is_deleted(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    (tmp_path / 'notes.txt').write_text('mine')
    folder.prepare(RUN)
    (tmp_path / 'parts').mkdir()
    (tmp_path / 'parts' / f'.000000.00-clean.pt.1{PARTIAL}').write_text('cut off')
    (tmp_path / 'training').mkdir()
    (tmp_path / 'training' / f'.epoch_1.pth.1{PARTIAL}').write_text('being written')
    folder.prepare(RUN, overwrite=True)
    folder.close()
    names = sorted(path.name for path in tmp_path.rglob('*'))
    assert names == [f'.epoch_1.pth.1{PARTIAL}', 'notes.txt', 'parts', 'run.json', 'training']


def test_results_of_nobody_knows_what_are_refused(tmp_path: Path) -> None:
    (tmp_path / 'metrics.json').write_text('{"mine": 1}')
    with pytest.raises(ValueError, match=r'holds metrics\.json, but no run\.json'):
        _folder(tmp_path).prepare(RUN)
    assert (tmp_path / 'metrics.json').read_text() == '{"mine": 1}'
    folder = _folder(tmp_path)
    folder.prepare(RUN, overwrite=True)
    folder.close()
    assert [path.name for path in tmp_path.iterdir()] == ['run.json']


def test_a_file_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / 'file').write_text('')
    with pytest.raises(ValueError, match='is a file; outcomes of all images need a folder'):
        _folder(tmp_path / 'file').prepare(RUN)


def test_a_full_disk_loses_nothing_and_says_how_to_go_on(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    folder.prepare(RUN)
    folder.write(_chunk(), 'clean', _outcome())
    before = {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()}
    outcomes = RobustOutcomes(torch.arange(4), _chunk().labels, dict(clean=_outcome(), a=_outcome(1), b=_outcome(2)))
    with pytest.raises(OSError) as caught, _full_disk(100):
        folder.write(_chunk(), 'a', _outcome())
    assert '000000.01-a.pt' in str(caught.value) and 'make room there and start the same evaluation' in str(
        caught.value
    )
    with pytest.raises(OSError, match=r'outcomes\.jsonl.* could not be written'), _full_disk(100):
        folder.finish(outcomes, {})
    assert before == {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()}
    folder.finish(outcomes, {'clean/accuracy/top1': 50.0})
    assert len((tmp_path / 'outcomes.jsonl').read_text().splitlines()) == 4
    assert json.loads((tmp_path / 'metrics.json').read_text()) == {'clean/accuracy/top1': 50.0}


def test_metrics_of_more_images_than_there_are_outcomes_are_not_believed(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    run = dict(RUN, settings=dict(RUN['settings'], data=dict(type='Digits', num_images=8)))
    folder.prepare(run)
    for number, name in itertools.product((0, 1), ('clean', 'a', 'b')):
        folder.write(_chunk(number), name, _outcome(number))
    folder.finish(read_evaluation(tmp_path).outcomes, {'clean/accuracy/top1': 50.0})
    assert read_evaluation(tmp_path).metrics is not None
    folder.part(1, 'a').unlink()
    with pytest.raises(ValueError, match=r'outcomes of 4 images, and metrics\.json is of 8: .*Delete metrics\.json'):
        read_evaluation(tmp_path)


@pytest.mark.parametrize('content', [b'', b'PK', None])
def test_a_damaged_part_is_named(tmp_path: Path, content: bytes | None) -> None:
    folder = _folder(tmp_path)
    folder.prepare(RUN)
    folder.write(_chunk(), 'a', _outcome())
    path = folder.part(0, 'a')
    path.write_bytes(path.read_bytes()[:200] if content is None else content)
    with pytest.raises(ValueError, match=r'000000\.01-a\.pt.* is damaged .*Delete it'):
        folder.read(_chunk(), 'a')


@pytest.mark.parametrize('content', ['', '{', '{}', '[]', '{"format": 2, "versions": {}, "settings": {"attacks": {}}}'])
def test_a_damaged_run_file_is_named(tmp_path: Path, content: str) -> None:
    folder = _folder(tmp_path)
    folder.prepare(RUN)
    folder.write(_chunk(), 'a', _outcome())
    folder.close()
    (tmp_path / 'run.json').write_text(content)
    for read in (read_evaluation, lambda path: _folder(path).prepare(RUN)):
        with pytest.raises(ValueError, match=r'run\.json.* is damaged.*begin anew \(--overwrite'):
            read(tmp_path)
    _folder(tmp_path).prepare(RUN, overwrite=True)
    assert _run_of(tmp_path) == RUN


def test_a_folder_of_another_format_is_refused(tmp_path: Path) -> None:
    _folder(tmp_path).prepare(RUN)
    (tmp_path / 'run.json').write_text(json.dumps(RUN | dict(format=1)))
    for read in (read_evaluation, lambda path: _folder(path).prepare(RUN)):
        with pytest.raises(ValueError, match='has format 1, and format 2 is known here.*--overwrite'):
            read(tmp_path)


def test_a_file_is_the_old_one_until_it_is_the_new_one(tmp_path: Path) -> None:
    write_atomically(tmp_path / 'new' / 'file', b'old')
    with pytest.raises(OSError), _full_disk(10):
        write_atomically(tmp_path / 'new' / 'file', bytes(20))
    assert [path.name for path in (tmp_path / 'new').iterdir()] == ['file']
    assert (tmp_path / 'new' / 'file').read_bytes() == b'old'
