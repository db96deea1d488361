import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType

import pytest
from processes import start_script_in_fork

from mmadvmoe.runtime.files import LOCK, FolderInUseError, FolderLock

ROOT = Path(__file__).resolve().parents[2]
DENSE, MOE = 'AT(Dense):configs/baselines/at_dense_resnet18_digits.py', 'configs/advmoe_resnet18_digits.py'
NAMES = ('clean', 'pgd50', 'ra', 'worst')


@pytest.fixture(autouse=True)
def _tools() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / 'tools'))
        patch.chdir(ROOT)
        yield


@pytest.fixture
def sweep() -> ModuleType:
    return import_module('sweep')


@pytest.fixture
def compare() -> ModuleType:
    return import_module('compare')


def _record(method: str, seed: int, values: tuple, shares: tuple = ()) -> dict:
    metrics = {f'{name}/accuracy/top1': value for name, value in zip(NAMES, values)}
    metrics.update({f'clean/expert_share/{n}': share for n, share in enumerate(shares)})
    cost = dict(pathway_gflops=0.0034, router_gflops=0.001 * bool(shares), params_total=1234, params_active=789)
    ran = dict(status='done', cfg_options=[], train_seconds=1, train_processor_seconds=2, test_seconds=2)
    return dict(method=method, config=f'{method}.py', seed=seed, metrics=metrics, cost=cost, **ran)


def _failed(method: str, seed: int) -> dict:
    error = 'NonFiniteError: loss at iteration 3'
    return dict(method=method, config=f'{method}.py', seed=seed, status='failed', error=error, cfg_options=[])


def _args(directory: Path, *configs: str, **others: object) -> argparse.Namespace:
    values = dict(seeds=[0, 1], set=[], cfg_options=[], jobs=2, threads=1, retry_failed=False)
    return argparse.Namespace(work_dir=directory, configs=list(configs or (DENSE, MOE)), **{**values, **others})


RECORDS = [
    _record('MoE', 0, (90, 60, 38, 30), shares=(0.25, 0.75)),
    _record('MoE', 1, (94, 60, 40, 20), shares=(1.0, 0.0)),
    _failed('MoE', 2),
    _record('Dense', 1, (96, 50, 50, 45.04)),
    _record('Dense', 0, (96, 50, 50, 34)),
]


def test_table_shows_spread_load_and_failures(compare: ModuleType) -> None:
    rows = compare.rows_of(RECORDS, ['Dense', 'MoE'])
    lines = compare.table(rows, compare.columns_of(rows)).splitlines()
    assert lines[0].startswith('| method | SA | pgd50 | ra | worst | busiest expert |')
    dense, moe = ([cell.strip() for cell in line.strip('|').split('|')] for line in lines[2:4])
    assert dense[:4] == ['Dense', '96.0 ± 0.0 (96.0 to 96.0)', '50.0 ± 0.0 (50.0 to 50.0)', '50.0 ± 0.0 (50.0 to 50.0)']
    assert dense[5:] == ['', '3,400,000', '', '1,234', '789', '2']
    assert moe[1] == '92.0 ± 2.8 (90.0 to 94.0)'
    assert moe[4:6] == ['25.0 ± 7.1 (20.0 to 30.0)', '87.5 ± 17.7 (75.0 to 100.0)']
    assert moe[-5:] == ['4,400,000', '1,000,000', '1,234', '789', '2 of 3']
    assert lines[-1] == '* MoE, seed 2: NonFiniteError: loss at iteration 3'
    chosen = compare.table(rows, compare.columns_of(rows, ['worst=RA-AA', 'clean']))
    assert chosen.startswith('| method | RA-AA | clean | busiest expert |')
    timed = compare.table(rows, compare.columns_of(rows, ['worst']), training_time='wall').splitlines()
    assert timed[0].startswith('| method | worst | training, s (wall) | busiest expert |')
    assert timed[2].split(' | ')[2] == '1.0 ± 0.0 (1.0 to 1.0)'
    # Of a run that was resumed, only the time since then is known.
    resumed = dict(_record('MoE', 1, (94, 60, 40, 20)), resumed=True)
    timed = compare.table(dict(MoE=[RECORDS[0], resumed]), compare.columns_of(rows, ['worst']), training_time='wall')
    assert timed.splitlines()[2].split(' | ')[2] == '1.0, 1 of 2 runs'
    timed = compare.table(rows, compare.columns_of(rows, ['worst']), training_time='cpu').splitlines()
    assert timed[2].split(' | ')[2] == '2.0 ± 0.0 (2.0 to 2.0)'
    # Older runs do not say whether they were resumed.
    older = [{key: value for key, value in record.items() if 'processor' not in key} for record in rows['Dense']]
    timed = compare.table(dict(Dense=older), compare.columns_of(rows, ['worst']), training_time='wall').splitlines()
    assert timed[2].split(' | ')[2] == ''


def test_differences_are_paired_by_seed(compare: ModuleType) -> None:
    rows = compare.rows_of(RECORDS)
    metric = 'worst/accuracy/top1'
    assert compare.paired(rows['MoE'], rows['Dense'], metric) == pytest.approx([30 - 34, 20 - 45.04])
    line = compare.differences(rows, 'Dense', metric).splitlines()[-1]
    # Student's t with one degree of freedom: 12.706 standard errors.
    mean, half = -14.52, 12.7062 * 10.52
    assert line == f'| MoE | {mean:+.1f} | {mean - half:+.1f} to {mean + half:+.1f} | 2 |'
    assert compare.interval([1.0])[1:] == (-float('inf'), float('inf'))
    with pytest.raises(ValueError, match="--baseline='Dnse'.*did you mean 'Dense'"):
        compare.differences(rows, 'Dnse', metric)


def test_the_picture_is_drawn(compare: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr('matplotlib.figure.Figure.savefig', lambda figure, *_, **__: drawn.append(figure))
    compare.plot(compare.rows_of(RECORDS), 'worst/accuracy/top1', tmp_path / 'ra.png')
    (axes,) = drawn[0].axes
    points = {line.get_label(): line[0].get_xydata().tolist() for line in axes.containers}
    assert points == {'MoE': [[pytest.approx(4.4e6), 25.0]], 'Dense': [[pytest.approx(3.4e6), pytest.approx(39.52)]]}
    # Less than a decade apart, and the axis tells them apart nevertheless.
    drawn[0].draw_without_rendering()
    compare.plot(compare.rows_of(RECORDS), 'worst/accuracy/top1', tmp_path / 'ra.png', training_time='wall')
    assert {line[0].get_xdata().tolist()[0] for line in drawn[1].axes[0].containers} == {1.0}
    left, right = axes.get_xlim()
    ticks = zip(axes.get_xticks(minor=True), axes.get_xticklabels(minor=True))
    assert len({text.get_text() for at, text in ticks if left <= at <= right and text.get_text()}) > 1
    assert axes.get_ylabel() == 'worst accuracy, %'


def test_settings_are_combined(sweep: ModuleType) -> None:
    assert sweep.grid([]) == [[]]
    assert sweep.grid(['a=1,2', 'b=[0,1];[1,0]']) == [
        ['a=1', 'b=[0,1]'],
        ['a=1', 'b=[1,0]'],
        ['a=2', 'b=[0,1]'],
        ['a=2', 'b=[1,0]'],
    ]


def test_finished_runs_are_not_run_again(sweep: ModuleType, tmp_path: Path) -> None:
    called = []

    def work(labelled: str, settings: list, seed: int, args: argparse.Namespace) -> dict:
        label, config = sweep.split(labelled)
        called.append((label, seed))
        made = _failed(label, seed) if called[-1] == ('advmoe_resnet18_digits', 1) else _record(label, seed, (1,) * 4)
        return dict(made, config=config, settings=settings)

    sweep.run_all(_args(tmp_path, seeds=[0]), work)
    sweep.run_all(_args(tmp_path), work)
    assert sorted(called) == [(label, seed) for label in ('AT(Dense)', 'advmoe_resnet18_digits') for seed in (0, 1)]
    sweep.run_all(_args(tmp_path, retry_failed=True), work)
    assert called[4:] == [('advmoe_resnet18_digits', 1)]
    sweep.run_all(_args(tmp_path, DENSE, set=['model.head.topk=1']), work)
    assert len(called) == 7
    results = tmp_path / 'results.jsonl'
    assert len(results.read_text().splitlines()) == 7 and len(sweep.read(results)) == 6
    with pytest.raises(ValueError, match='other --cfg-options: choose another --work-dir'):
        sweep.run_all(_args(tmp_path, cfg_options=['train_cfg.max_epochs=1']), work)


@pytest.mark.parametrize('name', ['digits', 'vit_digits'])
def test_the_sweeps_of_the_docs_name_configs_that_exist(sweep: ModuleType, name: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', ['sweep.py', f'@docs/results/{name}_sweep.txt'])
        configs = sweep.parse_args().configs
    runs = sweep.read(ROOT / 'docs' / 'results' / f'{name}_table.jsonl')
    assert {sweep.split(config) for config in configs} == {(run['method'], run['config']) for run in runs}


def _start_in_fork(popen: type, command: list, **settings: object) -> object:
    """Python scripts in forks, which have imported everything already; what is no script as it is."""
    if command[0] != sys.executable:
        return popen(command, **settings)
    return start_script_in_fork(command[1:], stdout=settings['stdout'], env=settings['env'])


def test_a_run_is_trained_tested_and_written_down(
    sweep: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The smallest real run, and one whose config is refused."""
    monkeypatch.setattr(subprocess, 'Popen', partial(_start_in_fork, subprocess.Popen))
    options = [
        'train_cfg.max_epochs=1',
        'train_cfg.val_interval=1',
        'train_dataloader.dataset.indices=128',
        'val_dataloader.dataset.indices=8',
        'test_dataloader.dataset.indices=8',
        'test_cfg.attacks.autoattack.type=FGSM',
    ]
    settings = ['model.data_preprocessor.attack.eps=0.2,20']
    sweep.run_all(_args(tmp_path, MOE, seeds=[3], jobs=1, set=settings, cfg_options=options))
    good, bad = map(json.loads, (tmp_path / 'results.jsonl').read_text().splitlines())
    assert good['status'] == 'done', good
    assert good['metrics']['worst/accuracy/top1'] <= good['metrics']['ra/accuracy/top1']
    assert good['checkpoint'] == 'best_worst_accuracy_top1_epoch_1.pth'
    assert 0 < good['train_processor_seconds'] < 600
    assert good['cost']['params_active'] < good['cost']['params_total']
    assert 'seed=3' in next(tmp_path.glob('*eps=0.2/seed_3/advmoe_resnet18_digits.py')).read_text()
    assert next(tmp_path.glob('*eps=0.2/seed_3/outcomes/best_worst_accuracy_top1_epoch_1/outcomes.jsonl')).is_file()
    assert bad['status'] == 'failed'
    assert 'eps=20' in bad['error'] and bad['error'] in capsys.readouterr().out


def test_a_run_that_was_begun_otherwise_is_set_aside(sweep: ModuleType, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sweep, 'call', lambda *_: 0.0)
    args = _args(tmp_path, MOE)
    begun = tmp_path / sweep.folder_of(MOE, []) / 'seed_0'
    for threads, folders in ((1, 1), (1, 1), (2, 2)):
        args.threads = threads
        record = sweep.run(MOE, [], 0, args)
        assert record['status'] == 'failed' and 'training left no best_worst' in record['error']
        (begun / 'epoch_7.pth').touch()
        assert len(list(begun.parent.iterdir())) == folders
    assert len(list(begun.parent.glob('seed_0_until_*/epoch_7.pth'))) == 1
    assert not list(begun.parent.rglob(LOCK)), 'a lock is left'


def test_what_would_mix_runs_is_refused(sweep: ModuleType, tmp_path: Path) -> None:
    for name in 'ab':
        (tmp_path / name).mkdir()
        (tmp_path / name / 'net.py').write_text(f'name = {name!r}')
    configs = [f'{name}:{tmp_path}/{name}/net.py' for name in 'ab']
    with pytest.raises(ValueError, match='would write into one folder: rename one'):
        sweep.run_all(_args(tmp_path / 'out', *configs), None)

    def work(labelled: str, settings: list, seed: int, args: argparse.Namespace) -> dict:
        path = sweep.split(labelled)[1]
        record = dict(_record('a', seed, (1,) * 4), config=path, settings=settings)
        return dict(record, config_sha256=sweep.digest_of(path))

    sweep.run_all(_args(tmp_path / 'out', configs[0]), work)
    # Other configs may join.
    (tmp_path / 'other.py').write_text('name = "other"')
    sweep.run_all(_args(tmp_path / 'out', f'other:{tmp_path}/other.py'), work)
    assert len(sweep.read(tmp_path / 'out' / 'results.jsonl')) == 4
    (tmp_path / 'a' / 'net.py').write_text('name = "changed"')
    with pytest.raises(ValueError, match=r'net.py as it was before: choose another --work-dir'):
        sweep.run_all(_args(tmp_path / 'out', configs[0]), work)
    with (tmp_path / 'out' / 'results.jsonl').open('a') as file:
        file.write('{"method": ')
    with pytest.raises(ValueError, match='results.jsonl, line 5 is damaged: remove it'):
        sweep.read(tmp_path / 'out' / 'results.jsonl')


def test_runs_are_counted_once_and_rows_not_mixed(compare: ModuleType) -> None:
    one, other = _record('A', 0, (90, 50, 45, 40)), _record('A', 1, (90, 50, 45, 50))
    assert compare.rows_of([one, other, one]) == dict(A=[one, other])
    with pytest.raises(ValueError, match="'A' has two runs with seed 0 that differ"):
        compare.rows_of([one, dict(other, seed=0)])
    with pytest.raises(ValueError, match=r"'A' names runs of .* and of .*eps=0.3.*: compare them apart"):
        compare.rows_of([one, dict(other, cfg_options=['eps=0.3'])])
    rows = dict(A=[one, dict(other, metrics={'clean/accuracy/top1': 90.0})])
    assert '40.0, 1 of 2 runs' in compare.table(rows, compare.columns_of(rows))
    with pytest.raises(ValueError, match="--columns='wrost' is unknown .did you mean 'worst'"):
        compare.columns_of(rows, ['wrost'])


def test_a_folder_that_another_process_writes_to_is_left_alone(
    sweep: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    begun = tmp_path / sweep.folder_of(MOE, []) / 'seed_0'
    begun.mkdir(parents=True)
    fork = get_context('fork')
    ready, ended = fork.Event(), fork.Event()

    def training() -> None:
        lock = FolderLock(begun, '')
        lock.acquire()
        ready.set()
        ended.wait(60)

    process = fork.Process(target=training)
    process.start()
    try:
        assert ready.wait(60)
        with pytest.raises(FolderInUseError, match='Wait until that training ends'):
            sweep.run(MOE, [], 0, _args(tmp_path, MOE))
        # A sweep goes on to other runs, and does this one when it is started again.
        sweep.run_all(_args(tmp_path, MOE, seeds=[0]))
        assert 'Wait until that training ends' in capsys.readouterr().out
        assert not (tmp_path / 'results.jsonl').is_file()
        assert begun.is_dir() and len(list(begun.parent.iterdir())) == 1
    finally:
        ended.set()
        process.join()


def test_a_run_that_is_stopped_from_outside_is_not_recorded(sweep: ModuleType, tmp_path: Path, capsys) -> None:
    stop = tmp_path / 'stop.py'
    for name, is_error in (('SIGINT', False), ('SIGTERM', False), ('SIGKILL', True)):
        stop.write_text(
            f'import os, signal\nsignal.signal({signal.SIGINT}, signal.SIG_DFL)\nos.kill(os.getpid(), signal.{name})'
        )
        with pytest.raises(sweep.RunError if is_error else sweep.Interrupted, match=f'killed by {name}'):
            sweep.call([stop], tmp_path / 'out', 1)

    def work(*_: object) -> dict:
        raise sweep.Interrupted('killed by SIGINT')

    sweep.run_all(_args(tmp_path / 'runs', MOE, seeds=[0]), work)
    assert 'killed by SIGINT' in capsys.readouterr().out
    assert not (tmp_path / 'runs' / 'results.jsonl').exists()


def test_a_config_whose_cost_cannot_be_counted_fails_before_it_trains(sweep: ModuleType, tmp_path: Path) -> None:
    record = sweep.run(MOE, ['model.backbone.backbone.widths=3'], 0, _args(tmp_path, MOE))
    assert record['status'] == 'failed' and 'widths' in record['error']


def test_rows_without_the_metric_are_left_out(compare: ModuleType) -> None:
    held = {'held/accuracy/top1': 30.0}
    mixture = [dict(r, metrics={**r['metrics'], **held}) for r in (_record('M', s, (90, 50, 45, 40)) for s in (0, 1))]
    rows = dict(A=[_record('A', 0, (90, 50, 45, 40))], M=mixture)
    with pytest.raises(ValueError, match="--baseline: 'A' has no 'held'"):
        compare.differences(rows, 'A', 'held/accuracy/top1')
    assert 'A' not in compare.differences(rows, 'M', 'held/accuracy/top1').splitlines()[-1]
    old, new = (dict(mixture[seed], config_sha256=sha) for seed, sha in enumerate(('old', 'new')))
    with pytest.raises(ValueError, match="'M' names runs of .* as it was and as it is"):
        compare.rows_of([old, new])


def test_what_is_at_work_ends_with_a_sweep_that_is_killed(tmp_path):
    work = f"""
import signal, sys, time
from pathlib import Path

def end(*_):
    Path({str(tmp_path / 'ended')!r}).touch()
    sys.exit()

signal.signal(signal.SIGTERM, end)
Path({str(tmp_path / 'begun')!r}).touch()
time.sleep(60)
"""
    (tmp_path / 'work.py').write_text(work)
    sweeping = f"""
import signal, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT / 'tools')!r})
import sweep
signal.signal(signal.SIGTERM, sweep.end)
sweep.call([{str(tmp_path / 'work.py')!r}], Path({str(tmp_path / 'out')!r}), 1)
"""
    process = subprocess.Popen([sys.executable, '-c', sweeping])
    for name in ('begun', 'ended'):
        deadline = time.monotonic() + 60
        while not (tmp_path / name).is_file():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
