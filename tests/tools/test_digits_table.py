import argparse
import json
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / 'tools' / 'analysis_tools' / 'digits_table.py'
NAMES = ('clean', 'pgd50', 'routepgd50', 'ra', 'worst')


@pytest.fixture(scope='module')
def script() -> dict:
    return runpy.run_path(str(SCRIPT))


def _record(method: str, seed: int, values: tuple, shares: tuple = ()) -> dict:
    metrics = {f'{name}/accuracy/top1': value for name, value in zip(NAMES, values)}
    metrics.update({f'clean/expert_share/{n}': share for n, share in enumerate(shares)})
    cost = dict(pathway_gflops=0.0034, router_gflops=0.001 * bool(shares), params_total=1234, params_active=789)
    return dict(
        method=method,
        seed=seed,
        status='done',
        metrics=metrics,
        cost=cost,
        cfg_options=[],
        train_seconds=1,
        test_seconds=2,
    )


def _failed(method: str, seed: int) -> dict:
    return dict(method=method, seed=seed, status='failed', error='NonFiniteError: loss at iteration 3', cfg_options=[])


def _args(directory: Path, **others) -> argparse.Namespace:
    values = dict(seeds=[0, 1], methods=['AT(Dense)', 'AT(MoE)'], jobs=2, threads=1, cfg_options=[], retry_failed=False)
    return argparse.Namespace(work_dir=directory, **{**values, **others})


def test_table_shows_spread_load_and_failures(script: dict) -> None:
    records = [
        _record('AT(MoE)', 0, (90, 60, 40, 38, 30), shares=(0.25, 0.75)),
        _record('AT(MoE)', 1, (94, 60, 40, 40, 20), shares=(1.0, 0.0)),
        _failed('AT(MoE)', 2),
        _record('AT(Dense)', 0, (96, 50, 50, 50, 45.04)),
    ]
    lines = script['table'](records).splitlines()
    assert lines[0].startswith('| method | SA | PGD-50 | RoutePGD | RA | RA-AA | busiest expert |')
    assert lines[1].count('|') == lines[0].count('|')
    dense = [cell.strip() for cell in lines[2].strip('|').split('|')]
    assert dense == ['AT(Dense)', '96.0', '50.0', '50.0', '50.0', '45.0', '', '0.0034', '', '1,234', '789', '1']
    moe = [cell.strip() for cell in lines[3].strip('|').split('|')]
    assert moe[1] == '92.0 ± 2.8 (90.0 to 94.0)'
    assert moe[5:7] == ['25.0 ± 7.1 (20.0 to 30.0)', '87.5 ± 17.7 (75.0 to 100.0)']
    assert moe[-1] == '2 of 3'
    assert lines[-1] == '* AT(MoE), seed 2: NonFiniteError: loss at iteration 3'


def test_finished_runs_are_not_run_again(script: dict, tmp_path: Path) -> None:
    results = tmp_path / 'results.jsonl'
    called = []

    def work(label: str, seed: int, args: argparse.Namespace) -> dict:
        called.append((label, seed))
        return _failed(label, seed) if (label, seed) == ('AT(MoE)', 1) else _record(label, seed, (1, 1, 1, 1, 1))

    script['run_all'](_args(tmp_path, seeds=[0]), results, work)
    script['run_all'](_args(tmp_path), results, work)
    assert sorted(called) == [('AT(Dense)', 0), ('AT(Dense)', 1), ('AT(MoE)', 0), ('AT(MoE)', 1)]
    script['run_all'](_args(tmp_path, retry_failed=True), results, work)
    assert called[4:] == [('AT(MoE)', 1)]
    assert len(results.read_text().splitlines()) == 5
    assert len(script['read'](results)) == 4
    with pytest.raises(ValueError, match='other --cfg-options: choose another --work-dir'):
        script['run_all'](_args(tmp_path, cfg_options=['train_cfg.max_epochs=1']), results, work)


def test_rows_are_configs_that_exist(script: dict) -> None:
    assert all((ROOT / config).is_file() for config in script['METHODS'].values())
    assert len(script['METHODS']) == sum(len(rows) for rows in script['FAMILIES'].values())


def test_a_family_has_its_own_methods(script: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, count in (([], 6), (['--family', 'vit'], 3), (['--family', 'vit', '--methods', 'AT(Dense)'], 1)):
        monkeypatch.setattr('sys.argv', ['digits_table.py', *arguments])
        methods = script['parse_args']().methods
        assert len(methods) == count
        assert all('vit' in script['METHODS'][label] for label in methods) == (count == 3)


def test_a_run_is_trained_tested_and_written_down(
    script: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The smallest real run, and one whose config is refused."""
    monkeypatch.setenv('PYTHONPATH', str(ROOT))
    options = [
        'train_cfg.max_epochs=1',
        'train_cfg.val_interval=1',
        'train_dataloader.dataset.indices=128',
        'val_dataloader.dataset.indices=8',
        'test_dataloader.dataset.indices=8',
        'test_cfg.attacks.autoattack.type=FGSM',
    ]

    def run(directory: Path, *more: str) -> tuple[str, dict]:
        directory.mkdir()
        args = _args(directory, methods=['AdvMoE'], seeds=[3], cfg_options=[*options, *more])
        script['run_all'](args, directory / 'results.jsonl')
        return capsys.readouterr().out, json.loads((directory / 'results.jsonl').read_text())

    _, record = run(tmp_path / 'good')
    assert record['status'] == 'done', record
    assert record['metrics']['worst/accuracy/top1'] <= record['metrics']['ra/accuracy/top1']
    assert record['checkpoint'] == 'best_worst_accuracy_top1_epoch_1.pth'
    assert record['cost']['params_active'] < record['cost']['params_total']
    log = (tmp_path / 'good' / 'advmoe_resnet18_digits' / 'seed_3' / 'train.out').read_text()
    assert 'seed: 3' in log
    printed, record = run(tmp_path / 'bad', 'model.data_preprocessor.attack.eps=20')
    assert record['status'] == 'failed'
    assert 'eps=20' in record['error'] and record['error'] in printed
