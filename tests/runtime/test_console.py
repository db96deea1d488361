"""The console shows what a reader watches; the log file holds everything."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import pytest
from mmengine.logging import MMLogger
from mmengine.runner import FlexibleRunner, Runner
from tiny_runs import run_cfg

from mmadvmoe.attacks.autoattack import PassProgress
from mmadvmoe.runtime.console import ConsoleFilter, shorten
from mmadvmoe.runtime.launch import build_runner


@pytest.mark.parametrize(
    ('message', 'expected'),
    [
        (
            'Epoch(val) [10][2/2]    clean/accuracy/top1: 85.0000  pgd10/accuracy/top1: 21.6667  '
            'worst/accuracy/top1: 19.4444  clean/expert_share/0: 0.3389  clean/expert_share/1: 0.6611  '
            'pgd10/expert_share/0: 0.3667  pgd10/route_changed: 0.2222  data_time: 0.0909  time: 4.5314',
            'Epoch(val) [10]  SA 85.0  pgd10 21.7  worst 19.4  load 34/66',
        ),
        ('Epoch(test) [3/3]    clean/accuracy/top1: 85.0000  time: 4.5', 'Epoch(test)   SA 85.0'),
        ('Epoch(val) [10][2/2]    accuracy/top1: 85.0000', None),
        ('Epoch(train)  [1][19/19]  lr: 9.9938e-02  loss: 2.3809', None),
    ],
    ids=['mixture', 'dense', 'not_robust', 'training'],
)
def test_a_robust_evaluation_is_one_short_line(message: str, expected: str | None) -> None:
    assert shorten(message) == expected


@pytest.mark.parametrize(
    ('message', 'shown'),
    [
        ('Robust evaluation: 180 of 360 images, robust accuracy so far 40.00, 0:01:00 left', True),
        ('Robust evaluation: 360 of 360 images, robust accuracy so far 45.00', False),
    ],
    ids=['under_way', 'results_follow'],
)
def test_an_evaluation_ends_in_its_results(message: str, shown: bool) -> None:
    record = logging.LogRecord('mmengine', logging.INFO, '', 0, message, (), None)
    assert ConsoleFilter().filter(record) == shown


@pytest.mark.parametrize('verbose', [False, True])
def test_the_first_training_line_comes_within_twenty(
    verbose: bool, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    cfg = run_cfg(tmp_path, experiment_name=f'console_{verbose}', log_level='INFO')
    runner = build_runner(cfg, verbose)
    assert (type(runner) is Runner) == verbose
    schedule = dict(type='CosineAnnealingLR', T_max=8, by_epoch=False)
    runner.param_schedulers = dict(experts=[schedule], router=[schedule])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        runner.train()
    # The router's schedule goes on in the experts' turn, before its optimizer has stepped.
    assert any('scheduler.step()' in str(warning.message) for warning in caught) == verbose
    lines = capsys.readouterr().out.splitlines()
    first = next(number for number, line in enumerate(lines) if 'Epoch(train)' in line)
    assert (first < 20) != verbose
    assert any('System environment' in line for line in lines) == verbose
    assert any('will be deprecated' in line for line in lines) == verbose
    log = next(tmp_path.rglob('*.log')).read_text()
    for text in ('System environment:', 'Config:\n', 'Hooks will be executed', 'Exp name: ', 'Saving checkpoint at'):
        assert text in log
    for handler in runner.logger.handlers:
        assert handler.level == logging.INFO


def test_further_runners_are_as_quiet(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for number, name in enumerate(('further', 'furthest')):
        build_runner(run_cfg(tmp_path / str(number), experiment_name=name, log_level='INFO'))
        log = next((tmp_path / str(number)).rglob('*.log')).read_text()
        assert 'System environment:' in log and 'Config:\n' in log
    shown = capsys.readouterr().out
    assert 'System environment:' not in shown and 'Config:' not in shown


def test_a_named_runner_stays(tmp_path: Path) -> None:
    cfg = run_cfg(tmp_path, experiment_name='console_named', runner_type='Runner')
    assert type(build_runner(cfg)) is Runner
    for kind in ('FlexibleRunner', FlexibleRunner):
        cfg.runner_type = kind
        with pytest.raises(ValueError, match="runner_type='FlexibleRunner' is not allowed: it must be 'Runner'"):
            build_runner(cfg)


def test_a_long_attack_tells_how_far_it_is(capsys: pytest.CaptureFixture) -> None:
    # The current one, which writes where capsys reads.
    MMLogger.get_instance('progress')
    progress = PassProgress(lambda x: x + 1, dict(a=10, b=20), 8, 'AutoAttack', terminal=False, interval=0.0)
    progress.begin('a', 8)
    assert [progress(n) for n in range(5)] == [1, 2, 3, 4, 5]
    progress.begin('b', 3)
    for number in range(20):
        progress(number)
    progress.close()
    first, *_, last = [line for line in capsys.readouterr().out.splitlines() if 'still robust' in line]
    assert 'AutoAttack: a, 8 of 8 images still robust' in first
    # What the first part left out is not waited for.
    assert 'AutoAttack: b, 3 of 8 images still robust: 100%' in last and '25/25' in last
    quiet = PassProgress(lambda x: x, dict(a=3), 2, 'AutoAttack', terminal=False)
    quiet.begin('a', 2)
    quiet(0)
    quiet.close()
    assert capsys.readouterr().out == ''
    bar = PassProgress(lambda x: x, dict(a=3), 2, 'AutoAttack', terminal=True)
    bar.begin('a', 2)
    bar(0)
    bar.close()
